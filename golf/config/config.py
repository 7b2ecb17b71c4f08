"""Every knob of the pipeline: frozen dataclasses, presets, and the one reader of the environment.

A knob has one lower-case name, unique over the whole tree, and answers to it in upper case as an
environment variable (``train_seq_len`` is ``TRAIN_SEQ_LEN``). Precedence: preset, then environment,
then ``key=value`` on the command line. Horizons are fractions of the binding budget (steps or seconds,
whichever is nearer its end), so that they act on a machine of any speed.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin

from golf.config.presets import PRESETS, RETIRED_KNOBS
from golf.config.site_quantizers import SiteError, site_rules

CODECS = Literal["rans", "brotli", "lzma", "zstd", "zlib", "none"]


EXIT_FINDINGS, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_MACHINE = 1, 2, 4, 5
"""Exit statuses of all programs; 3 is run.sh's, where the set-up failed."""


class UserError(ValueError):
    """What a person can mend: one clear line that says what is wrong and what to do. Every room has its own kind."""


class ConfigError(UserError):
    """A knob that does not exist, a value that does not parse, or values that do not fit together."""


@dataclass(frozen=True)
class RunConfig:
    preset: str = "leaderboard"
    run_id: str = ""
    """Name of the folder under `runs_root`; empty: preset, time and seed."""
    seed: int = 42
    runs_root: str = "runs"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    compile: Literal["auto", "on", "off"] = "on"
    """torch.compile the training step and the scorer; auto: where there is CUDA or a C++ compiler."""
    threads: int = 0
    """CPU threads of torch; 0: torch's own choice."""
    limit_bytes: int = 16_000_000
    """Most bytes that packed code and artifact may have together."""
    reserve_bytes: int = 10_000
    """Bytes to stay below the limit when weights had to be coarsened to fit."""
    checkpoint_seconds: float = 60.0
    """Seconds of training between checkpoints; 0: only at the end and on SIGTERM or SIGINT."""
    rehearse: bool = True
    """Quantize, pack, reload and score the untrained model before the first step, so that what is missing shows."""


@dataclass(frozen=True)
class DataConfig:
    data_path: str = "data/datasets/fineweb10B_sp1024"
    """Folder of *_train_*.bin and *_val_*.bin shards; empty: prepared from `corpus` at first use."""
    tokenizer_path: str = "data/tokenizers/fineweb_1024_bpe.model"
    """SentencePiece model; empty: the one prepared with `corpus`."""
    corpus: str = ""
    """`embedded` (texts of Python's standard library) or a path: .txt, .jsonl, .jsonl.xz, a folder of them."""
    row_order: Literal["sequential", "spread", "shuffled", "documents"] = "sequential"
    """sequential: as in the shards (the competition's); spread: each batch from all over the text, each row once;
    shuffled: documents in an order drawn from the seed; documents: shuffled, and rows begin where a document does."""


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 1024
    """0: the tokenizer's; text is then prepared in characters."""
    num_layers: int = 10
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: float = 3.0
    """MLP hidden width as a multiple of `model_dim`."""
    bigram_vocab_size: int = 10_240
    """Rows of the hashed bigram table, the last one reserved for "no previous token"; 0: no table."""
    bigram_dim: int = 128
    smear_gate: bool = True
    resid_mix_init: Literal["phase", "stream"] = "phase"
    """phase: early blocks lean on the embedding, late ones on the stream; stream: all of the stream."""
    matrix_init: Literal["orthogonal", "uniform"] = "orthogonal"
    """orthogonal: output projections scaled by 1/sqrt(2 layers); uniform: torch's default, outputs zero."""
    qk_gain_init: float = 1.5
    rope_base: float = 10_000.0
    logit_softcap: float = 30.0
    tied_embed_init_std: float = 0.005
    train_seq_len: int = 2048
    """Tokens in a training row; the length at which RoPE is unscaled."""
    bos_id: int = 1
    """Token that starts a document."""
    document_attention: bool = False
    """Attention stays within a document; off: it sees all of the row before."""
    attention_window: int = 0
    """Positions that a query sees, its own the last of them; 0: all before it."""
    tie_embeddings: bool = True
    """One table for the embedding and the head; off: the head has its own."""
    mlp_activation: Literal["relu2", "tanh", "sigmoid", "identity"] = "relu2"
    knowledge_tokens: int = 0
    """Learned vectors that every query sees beside the text, never a target (External Knowledge Tokens)."""
    knowledge_at: Literal["input", "layers"] = "input"
    """input: before the first block, which then treats them as positions; layers: anew before every block."""
    act_attn_in: str = ""
    """Quantizer (config/site_quantizers.py) of the attention's input; so for the other act_*: part of the model."""
    act_q: str = ""
    act_k: str = ""
    act_v: str = ""
    act_attn_out: str = ""
    act_mlp_in: str = ""
    act_hidden: str = ""
    """Of the MLP's hidden values, after its non-linearity."""


@dataclass(frozen=True)
class TrainConfig:
    iterations: int = 20_000
    """Most optimizer steps; 0: no limit."""
    max_wallclock_seconds: float = 600.0
    """Most seconds of training; 0: no limit (then equal seeds give equal bytes)."""
    knowledge_frozen: bool = False
    """Knowledge tokens stay the random vectors that they begin as: a control."""
    train_batch_tokens: int = 786_432
    """Tokens of a step over all ranks and micro-steps."""
    micro_batch_tokens: int = 98_304
    """Most tokens of one forward pass on one rank."""
    short_seq_len: int = 0
    """Rows are cut into rows of this length in the first part of the budget; 0: never."""
    short_seq_fraction: float = 0.0
    """Share of the budget that is trained on the short rows."""
    warmup_steps: int = 20
    """Untimed steps that compile and warm the caches; their effect is undone."""
    warmdown_fraction: float = 0.45
    """Share of the budget over which the learning rate falls to zero (272 of 600 s in the recipe's log)."""
    warmdown_shape: Literal["cosine", "linear"] = "cosine"
    holdout_every: int = 500
    """Steps between looks at the weights in training, on training text that is held out for it; 0: no look."""
    train_log_every: int = 100
    holdout_tokens: int = 524_288
    """Training tokens held out for `holdout_every`."""
    eval_batch_tokens: int = 524_288
    """Tokens of a batch that is scored in plain rows, over all ranks."""


@dataclass(frozen=True)
class OptimConfig:
    matrix_lr: float = 0.02
    embed_lr: float = 0.03
    scalar_lr: float = 0.02
    muon_momentum: float = 0.99
    muon_momentum_start: float = 0.92
    muon_momentum_warmup_fraction: float = 0.23
    """Share of the budget over which momentum rises (1,500 of 6,606 steps in the recipe's log)."""
    muon_ns_steps: int = 5
    muon_weight_decay: float = 0.04
    embed_weight_decay: float = 0.04
    scalar_weight_decay: float = 0.04
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip_norm: float = 0.3
    """Largest norm of all gradients together; 0: no clipping."""


@dataclass(frozen=True)
class AverageConfig:
    swa_enabled: bool = True
    swa_start: float = 0.82
    """Share of the budget after which weights are averaged (step 5,425 of 6,606 in the recipe's log)."""
    swa_snapshots: int = 48
    """Snapshots in the average, evenly spaced (fewer when fewer steps are left)."""


@dataclass(frozen=True)
class QuantConfig:
    qat_enabled: bool = True
    qat_start: float = 0.0
    """Share of the budget after which weights pass through the export grid in the forward pass."""
    mlp_bits: int = 5
    attn_bits: int = 6
    bigram_bits: int = 6
    embed_bits: int = 16
    """Bits of the token embedding; 16: stored as fp16."""
    prune_frac: float = 0.05
    """Share of smallest weights set to zero per tensor, where that can change a code."""
    codec: CODECS = "lzma"
    quantizer: Literal["rtn", "waterfill"] = "rtn"
    """grid: rounded to nearest on the bits above; fit: GPTQ after calibration, steps chosen to fill the byte limit."""
    calibration_tokens: int = 131_072
    """Tokens that quantizer=waterfill measures the weights on."""
    calibration_text: Literal["train", "generated"] = "train"
    """Training text, or text that the model makes up itself."""
    calibration_reserve: float = 8.0
    """Seconds of max_wallclock_seconds that training leaves to the calibration of quantizer=waterfill."""
    weight_q: str = ""
    """Quantizer (config/site_quantizers.py) that the matrix trains through and is exported on, for its class's bits."""
    weight_k: str = ""
    weight_v: str = ""
    weight_o: str = ""
    weight_up: str = ""
    weight_down: str = ""
    weight_embed: str = ""
    weight_head: str = ""
    rd_lambda: float = 0.15
    """Price of a code's bits beside its error in quantizer=waterfill; 1: in full; 0: the error decides alone."""


@dataclass(frozen=True)
class ScoreConfig:
    eval_seq_len: int = 4096
    """Tokens in a scoring window."""
    eval_stride: int = 64
    """Targets scored by a window (the first window scores all of its own)."""
    eval_batch_seqs: int = 32
    """Windows in one forward pass on one rank."""
    eval_rope: Literal["ntk", "none"] = "ntk"
    """RoPE beyond the training length: NTK-aware base, or the training base as it is."""
    max_eval_seconds: float = 600.0
    """Most seconds of scoring: a stride that would take longer is raised before anything is scored; 0: no limit."""


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)


def iter_knobs(config: Config) -> Iterator[tuple[str, str, type, Any]]:
    """Yield (section, knob, type, value) for every scalar of the tree."""
    for section in fields(config):
        part = getattr(config, section.name)
        for knob in fields(part):
            yield section.name, knob.name, knob.type, getattr(part, knob.name)


KNOBS: dict[str, tuple[str, Any]] = {knob: (section, kind) for section, knob, kind, _ in iter_knobs(Config())}


def parse_value(knob: str, kind: Any, text: str) -> Any:
    """The value of `knob` that `text` spells; booleans are 0, 1, true or false."""
    try:
        if get_origin(kind) is Literal:
            return {choice: choice for choice in get_args(kind)}[text]
        if kind is bool:
            return {"0": False, "1": True, "false": False, "true": True}[text.lower()]
        value = int(text.replace("_", "")) if kind is int else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        wanted = " or ".join(get_args(kind)) if get_origin(kind) is Literal else kind.__name__
        raise ConfigError(f"{knob}={text!r} is not a valid value: it must be {wanted}") from None


def with_knobs(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with some knobs set; values that are text are parsed."""
    changes: dict[str, dict[str, Any]] = {}
    for knob, value in values.items():
        if knob.upper() in RETIRED_KNOBS:
            raise ConfigError(f"{knob} is not a knob here: set {RETIRED_KNOBS[knob.upper()]}")
        if knob not in KNOBS:
            raise ConfigError(f"unknown knob {knob!r}: `python train_gpt.py --help` lists the {len(KNOBS)} that exist")
        section, kind = KNOBS[knob]
        changes.setdefault(section, {})[knob] = parse_value(knob, kind, value) if isinstance(value, str) else value
    sections = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
    return replace(config, **sections)


def knobs_of_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Knobs that environment variables set, retired ones included (so that they are refused by name)."""
    names = {knob.upper(): knob for knob in KNOBS} | {name: name for name in RETIRED_KNOBS}
    return {names[name]: text for name, text in environ.items() if name in names}


def build_config(preset: str, environ: Mapping[str, str], overrides: Mapping[str, str]) -> Config:
    """The resolved configuration: preset, then environment, then overrides. Raises ConfigError."""
    chosen = knobs_of_environment(environ) | dict(overrides)
    preset = chosen.pop("preset", preset)
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    if chosen.get("corpus") and chosen.get("data_path"):
        raise ConfigError("corpus and data_path are both set: give the text, or the shards that were made of it")
    if chosen.get("corpus"):  # text of the user's own replaces the preset's shards
        chosen = {"data_path": "", "tokenizer_path": ""} | chosen
    config = with_knobs(with_knobs(Config(), PRESETS[preset] | {"preset": preset}), chosen)
    unheard = sorted(chosen.keys() & GRID_KNOBS)
    if unheard and config.quant.quantizer == "waterfill":
        raise ConfigError(
            f"{unheard[0]} does nothing with quantizer=waterfill, which chooses all steps: set quantizer=rtn"
        )
    check_config(config)
    return config


GRID_KNOBS = {"mlp_bits", "attn_bits", "bigram_bits", "embed_bits", "qat_start"}
"""Of the grid that weights train through and are rounded to; a fit has no use for them."""
POSITIVE_KNOBS = (
    "num_heads", "num_kv_heads", "model_dim", "mlp_mult", "train_seq_len", "rope_base", "logit_softcap",
    "train_batch_tokens", "micro_batch_tokens", "train_log_every", "holdout_tokens", "eval_batch_tokens",
    "limit_bytes", "eval_batch_seqs",
)  # fmt: skip


def low_bit_rules(config: Config) -> list[tuple[bool, str]]:
    try:
        return site_rules(config.model, config.quant, config.train.knowledge_frozen)
    except SiteError as error:
        raise ConfigError(str(error)) from None


def check_config(config: Config) -> None:
    """Raise ConfigError where values do not fit together, before anything has cost time."""
    for _, knob, _, value in iter_knobs(config):
        if isinstance(value, (int, float)) and (value < 0 or (knob in POSITIVE_KNOBS and value == 0)):
            raise ConfigError(f"{knob}={value} must be {'positive' if knob in POSITIVE_KNOBS else 'at least 0'}")
    model, train, quant, score, average = config.model, config.train, config.quant, config.score, config.average
    short = train.short_seq_len
    rules = [
        *low_bit_rules(config),
        (model.model_dim % model.num_heads == 0, "model_dim must be a multiple of num_heads"),
        (model.num_heads % model.num_kv_heads == 0, "num_heads must be a multiple of num_kv_heads"),
        (model.model_dim // model.num_heads % 2 == 0, "the head width model_dim / num_heads must be even"),
        (model.num_layers >= 2, "num_layers must be at least 2 (U-Net skips need an encoder and a decoder)"),
        (model.vocab_size <= 65_536, "vocab_size must fit in 16 bits (65,536)"),
        (model.bigram_vocab_size != 1, "bigram_vocab_size must be 0 (off) or at least 2"),
        (model.bigram_vocab_size == 0 or model.bigram_dim > 0, "bigram_dim must be positive"),
        (train.iterations > 0 or train.max_wallclock_seconds > 0, "set iterations or max_wallclock_seconds"),
        (train.train_batch_tokens % model.train_seq_len == 0, "train_batch_tokens must be rows of train_seq_len"),
        (train.micro_batch_tokens >= model.train_seq_len, "micro_batch_tokens must hold one row of train_seq_len"),
        (
            0 < short < model.train_seq_len and model.train_seq_len % short == 0 < train.short_seq_fraction < 1
            if short
            else not train.short_seq_fraction,
            "short_seq_len must be a part of train_seq_len, with a short_seq_fraction between 0 and 1; or both be 0",
        ),
        (0 <= train.warmdown_fraction <= 1, "warmdown_fraction is a share, 0 to 1"),
        (0 <= quant.qat_start < 1, "qat_start is a share, 0 to below 1"),
        (0 <= quant.prune_frac < 1, "prune_frac is a share, 0 to below 1"),
        (
            {quant.mlp_bits, quant.attn_bits, quant.bigram_bits, quant.embed_bits} <= {*range(2, 9), 16},
            "mlp_bits, attn_bits, bigram_bits and embed_bits must be 2 to 8, or 16",
        ),
        (
            quant.quantizer == "rtn" or not (quant.qat_enabled or quant.prune_frac),
            "quantizer=waterfill chooses its own grid: set qat_enabled=0 and prune_frac=0, or quantizer=rtn",
        ),
        (
            quant.quantizer == "rtn" or quant.calibration_tokens >= model.train_seq_len,
            "calibration_tokens must be at least a row of train_seq_len",
        ),
        (
            quant.quantizer == "rtn"
            or quant.calibration_reserve < train.max_wallclock_seconds
            or not train.max_wallclock_seconds,
            "calibration_reserve leaves no time to train: raise max_wallclock_seconds",
        ),
        (0 <= average.swa_start < 1, "swa_start is a share, 0 to below 1"),
        (average.swa_snapshots >= 2 or not average.swa_enabled, "swa_snapshots must be at least 2"),
        (1 <= score.eval_stride <= score.eval_seq_len, "eval_stride must be 1 to eval_seq_len (equal: plain rows)"),
        (
            score.eval_rope == "none" or score.eval_seq_len > model.train_seq_len,
            "eval_rope=ntk acts only where eval_seq_len is beyond train_seq_len: set eval_rope=none",
        ),
        (bool(config.data.data_path) or bool(config.data.corpus), "set data_path, or corpus to prepare data from"),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)


def changed_knobs(config: Config) -> dict[str, Any]:
    """Knobs that differ from the preset's, but for where the data is."""
    preset = with_knobs(Config(), PRESETS[config.run.preset] | {"preset": config.run.preset})
    pairs = zip(iter_knobs(preset), iter_knobs(config), strict=True)
    changed = {knob: value for (_, _, _, before), (_, knob, _, value) in pairs if value != before}
    return {knob: value for knob, value in changed.items() if knob not in ("data_path", "tokenizer_path")}


def config_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested dictionary, for JSON."""
    return asdict(config)


RENAMED_KNOBS = {
    "tied_embed_lr": ("embed_lr",), "val_loss_every": ("holdout_every",), "rate_weight": ("rd_lambda",),
    "val_batch_size": ("holdout_tokens", "eval_batch_tokens"),
}  # fmt: skip
"""Names that knobs had in the configurations of older runs, and what they are called now."""
RENAMED_VALUES = {("quantizer", "grid"): "rtn", ("quantizer", "fit"): "waterfill"}


def current_knobs(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of an older run by their names and values of today."""
    renamed = {new: value for knob, value in knobs.items() for new in RENAMED_KNOBS.get(knob, (knob,))}
    return {
        knob: RENAMED_VALUES.get((knob, value), value) if isinstance(value, str) else value
        for knob, value in renamed.items()
    }


def config_from_dict(sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """Inverse of config_dict; reads the configurations of older runs too."""
    return with_knobs(
        Config(), current_knobs({knob: value for part in sections.values() for knob, value in part.items()})
    )


def config_hash(config: Config) -> str:
    """SHA-256 (16 hex digits) of all knobs that shape the result: equal for the seeds of one experiment."""
    sections = config_dict(config)
    for knob in ("run_id", "seed", "runs_root", "threads", "checkpoint_seconds", "rehearse"):
        del sections["run"][knob]
    for knob in ("data_path", "tokenizer_path"):  # data has its own identity, whatever folder it is in
        del sections["data"][knob]
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:16]
