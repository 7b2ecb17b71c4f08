"""Reads and writes an artifact's description: the model's configuration, and the parts of each stored tensor.

The file is untrusted, so the type, bounds and meaning of each value are checked. R rows, C columns, S rows of scales, G
groups of columns, K rank of the correction.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from golf.artifact.codecs import ArtifactError
from golf.config.config import FROZEN, Config, check_config, current_knobs, preset_config, stores_plain_rows
from golf.config.knobs import ConfigError
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.config.scoring import ScoreConfig
from golf.config.training import TrainConfig
from golf.model.gpt import GPT
from golf.quant.grid import QuantizedState, QuantizedTensor, grid_clip
from golf.quant.tensor_classes import FP16_BITS

STORED_FIRST = (
    "tok_emb", "bigram.embed", "bigram.proj", "bigram.scale", "head", "knowledge", "smear", "skip_weights",
)  # fmt: skip
"""Parts of a model that files store first, in this order since version 1; other parts follow in the model's order."""


def stored_rank(name: str) -> int:
    """Returns the rank of a tensor's part in STORED_FIRST, or the one after the last."""
    ranks = (rank for rank, part in enumerate(STORED_FIRST) if name == part or name.startswith(f"{part}."))
    return next(ranks, len(STORED_FIRST))


@lru_cache(maxsize=64)
def expected_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a GPT of this configuration, in stored order.

    The model itself gives the shapes, on a device without memory.
    """
    with torch.device("meta"):
        state = GPT(model).state_dict()
    return {name: tuple(state[name].shape) for name in sorted(state, key=stored_rank)}


LARGEST_NUMBER = 2**24
MOST_LAYERS = 1024
MAY_BE_ZERO = (
    "bigram_vocab_size", "bigram_dim", "bos_id", "attention_window", "knowledge_tokens", "smear_gate_dims", "rope_dims",
    "attention_gate_dims", "loop_first", "loop_last", "loop_repeats", "lanes_from", "late_mix_hidden",
)  # fmt: skip
"""Whole numbers that may be 0; all others are at least 1."""
VERSION_1_FIELDS = {
    "vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "bigram_vocab_size", "bigram_dim",
    "smear_gate", "resid_mix_init", "matrix_init", "qk_gain_init", "rope_base", "logit_softcap", "tied_embed_init_std",
    "train_seq_len", "bos_id",
    "qat_enabled", "qat_start", "mlp_bits", "attn_bits", "bigram_bits", "embed_bits", "prune_frac", "codec",
}  # fmt: skip
"""Knobs that every file has. A model's later knobs are written only where they differ from their default, which a file
without them means."""


def model_to_json(model: ModelConfig) -> dict[str, Any]:
    """Returns the values that `model_from_json` reads."""
    return {k: v for k, v in asdict(model).items() if k in VERSION_1_FIELDS or v != getattr(ModelConfig, k)}


def model_from_json(values: object) -> ModelConfig:
    """Returns the model configuration that parsed JSON spells. Raises ArtifactError."""
    if FROZEN:
        return frozen_model(values)
    model = ModelConfig(**checked_values(ModelConfig, values))
    check_together(config_of(model, QuantConfig()))
    if model.num_layers > MOST_LAYERS:
        raise ArtifactError(f"num_layers is {model.num_layers}; at most {MOST_LAYERS} can be stored")
    if not 1 <= model.mlp_mult * model.model_dim <= LARGEST_NUMBER or model.rope_base <= 0:
        raise ArtifactError("mlp_mult or rope_base is out of bounds")
    return model


def frozen_model(values: object) -> ModelConfig:
    """Returns the model that this script was made for, with the stored vocabulary where it leaves that open.

    Raises ArtifactError where `values` spell another model.
    """
    model = preset_config("").model
    if isinstance(values, Mapping) and not model.vocab_size:
        model = replace(model, vocab_size=int(values.get("vocab_size", 0)))
    if values not in (model_to_json(model), asdict(model)):
        raise ArtifactError("the file's model is not the one that this script was made for")
    return model


def quant_from_json(values: object, model: ModelConfig) -> QuantConfig:
    """Returns the quantization of `model` that parsed JSON spells. Raises ArtifactError."""
    if FROZEN:
        return preset_config("").quant
    known = current_knobs(values) if isinstance(values, Mapping) else values
    quant = QuantConfig(**checked_values(QuantConfig, known))
    check_together(config_of(model, replace(quant, quantizer="rtn")))  # what else a fit wants, its run has checked
    return quant


def config_of(model: ModelConfig, quant: QuantConfig) -> Config:
    """Returns a configuration of these two whose other sections fit the model."""
    row = TrainConfig(train_batch_tokens=model.train_seq_len, micro_batch_tokens=model.train_seq_len)
    return Config(model=model, quant=quant, train=row, score=ScoreConfig(eval_rope="none"))


def checked_values(settings: type, values: object) -> dict[str, Any]:
    """Checks a knob section's values: all fields of version 1, no unknown ones, each of its type. Raises
    ArtifactError."""
    names = {field.name for field in fields(settings)}
    if not isinstance(values, Mapping) or not names & VERSION_1_FIELDS <= set(values) <= names:
        raise ArtifactError(
            f"the entries of {settings.__name__} are not those of this version: {', '.join(sorted(names))}"
        )
    kinds = {field.name: field.type for field in fields(settings)}
    return {name: checked_value(name, kinds[name], value) for name, value in values.items()}


def checked_value(name: str, kind: Any, value: object) -> Any:
    """Returns `value` if it has the knob's type and is within bounds. Raises ArtifactError."""
    if get_origin(kind) is Literal:
        valid = isinstance(value, str) and value in get_args(kind)
    elif kind is int:
        valid = type(value) is int and (0 if name in MAY_BE_ZERO else 1) <= value <= LARGEST_NUMBER
    elif kind is float:
        valid = type(value) in (int, float) and abs(value) < 1e9 and math.isfinite(value)
    else:
        valid = type(value) is kind
    if not valid:
        raise ArtifactError(f"{name} is missing or out of bounds in the stored configuration")
    return float(value) if kind is float else value


def check_together(config: Config) -> None:
    try:
        check_config(config)
    except ConfigError as error:
        raise ArtifactError(f"the stored configuration is impossible: {error}") from None


STORABLE_BITS = (*range(1, 9), FP16_BITS)
FACTOR_NAMES = ("left", "right")


@dataclass(frozen=True)
class Form:
    """Describes one tensor, or one factor of a correction (named `tensor:left` or `tensor:right`)."""

    shape: tuple[int, ...]
    bits: int
    row_scales: bool = True
    """Whether each row has its own row of scales; else one serves all."""
    groups: int = 1
    column_scales: bool = False
    zeros: bool = False
    trellis: bool = False
    rank: int = 0

    @property
    def scale_shape(self) -> tuple[int, int]:
        return (self.shape[0] if self.row_scales else 1), self.groups

    @property
    def code_range(self) -> tuple[int, int]:
        if not self.zeros:
            return -grid_clip(self.bits), grid_clip(self.bits)
        return (-128, 127) if self.bits == 8 else (0, 2**self.bits - 1)


Forms = dict[str, Form]


def forms_of_entry(name: str, entry: QuantizedTensor | Tensor) -> Forms:
    """Returns the forms of a stored tensor and of its factors. Raises ArtifactError where its parts don't fit
    together."""
    if isinstance(entry, Tensor):
        return {name: Form(tuple(entry.shape), FP16_BITS)}
    if stores_plain_rows():
        return {name: Form(tuple(entry.codes_RC.shape), entry.bits)}
    shape, (scale_rows, groups) = tuple(entry.codes_RC.shape), entry.scale_SG.shape
    rank = entry.low_rank[0].codes_RC.size(1) if entry.low_rank else 0
    form = Form(
        shape, entry.bits, scale_rows == shape[0], groups, entry.column_scale_C is not None, entry.zero_SG is not None,
        entry.trellis, rank,
    )  # fmt: skip
    sound = entry.bits in STORABLE_BITS[:-1] and 0 < groups <= shape[1] and scale_rows == form.scale_shape[0]
    if entry.column_scale_C is not None:
        sound &= tuple(entry.column_scale_C.shape) == shape[1:]
    if entry.zero_SG is not None:
        sound &= entry.zero_SG.shape == entry.scale_SG.shape
    forms = {name: form}
    for side, factor in zip(FACTOR_NAMES, entry.low_rank or (), strict=False):
        expected = (shape[0], rank) if side == "left" else (rank, shape[1])
        sound &= rank > 0 and factor.low_rank is None and tuple(factor.codes_RC.shape) == expected
        forms |= forms_of_entry(f"{name}:{side}", factor)
    if not sound:
        raise ArtifactError(f"the parts of tensor {name!r} do not fit together")
    return forms


def forms_of_state(stored: QuantizedState) -> Forms:
    forms: Forms = {}
    for name, entry in stored.items():
        forms |= forms_of_entry(name, entry)
    return forms


def is_factor(name: str) -> bool:
    return ":" in name


def all_entries(stored: QuantizedState) -> QuantizedState:
    """Returns tensors and the factors of their corrections, by the names of `Forms`."""
    if stores_plain_rows():
        return dict(stored)
    entries: QuantizedState = {}
    for name, entry in stored.items():
        entries[name] = entry
        if isinstance(entry, QuantizedTensor):
            entries |= {f"{name}:{side}": f for side, f in zip(FACTOR_NAMES, entry.low_rank or (), strict=False)}
    return entries


def form_to_json(name: str, forms: Forms) -> list:
    """Returns [row_scales, groups, column_scales, zeros, trellis]; with a correction also its rank, and both factors'
    bits and forms."""
    form = forms[name]
    values: list = [int(form.row_scales), form.groups, int(form.column_scales), int(form.zeros), int(form.trellis)]
    if form.rank:
        values.append(form.rank)
        for side in FACTOR_NAMES:
            factor = f"{name}:{side}"
            values += [forms[factor].bits, form_to_json(factor, forms)]
    return values


def forms_from_json(name: str, shape: tuple[int, ...], bits: object, values: object, factor: bool = False) -> Forms:
    """Inverts `form_to_json`, from untrusted values. Raises ArtifactError."""
    if type(bits) is not int or bits not in STORABLE_BITS or (bits != FP16_BITS and len(shape) != 2):
        raise ArtifactError(f"the artifact gives tensor {name!r} an impossible number of bits")
    if stores_plain_rows():
        return {name: Form(shape, bits)}
    fits = isinstance(values, list) and len(values) in ((5,) if factor else (5, 10)) and len(shape) == 2
    if (
        not fits
        or bits == FP16_BITS
        or any(type(values[i]) is not int or values[i] not in (0, 1) for i in (0, 2, 3, 4))
    ):
        raise ArtifactError(f"the artifact gives tensor {name!r} an impossible form")
    rows, columns = shape
    rank = values[5] if len(values) == 10 else 0
    if type(values[1]) is not int or not 1 <= values[1] <= columns:
        raise ArtifactError(f"the artifact gives tensor {name!r} an impossible number of groups")
    if type(rank) is not int or not (len(values) == 10) <= rank <= min(rows, columns):
        raise ArtifactError(f"the artifact gives tensor {name!r} an impossible rank")
    forms = {
        name: Form(shape, bits, bool(values[0]), values[1], bool(values[2]), bool(values[3]), bool(values[4]), rank)
    }
    if rank:
        forms |= forms_from_json(f"{name}:left", (rows, rank), values[6], values[7], factor=True)
        forms |= forms_from_json(f"{name}:right", (rank, columns), values[8], values[9], factor=True)
    return forms


def check_codes(name: str, codes_RC: Tensor, form: Form) -> None:
    """Raises ArtifactError for codes outside their grid."""
    low, high = form.code_range
    binary_zero = form.bits == 1 and not form.zeros and bool((codes_RC == 0).any())
    if codes_RC.numel() and (codes_RC.min() < low or codes_RC.max() > high or binary_zero):
        raise ArtifactError(f"tensor {name!r} has codes outside its {form.bits}-bit grid")


def join_entry(name: str, forms: Forms, parts: Mapping[str, Mapping[str, Tensor]]) -> QuantizedTensor | Tensor:
    """Joins a stored tensor from the parts of all streams (role -> name -> tensor). Raises ArtifactError."""
    form = forms[name]
    if form.bits == FP16_BITS:
        return parts["fp16"][name]
    check_codes(name, parts["codes"][name], form)
    if stores_plain_rows():
        return QuantizedTensor(parts["codes"][name].to(torch.int8), parts["scales"][name], form.bits)
    factors = tuple(join_entry(f"{name}:{side}", forms, parts) for side in FACTOR_NAMES) if form.rank else None
    return QuantizedTensor(
        parts["codes"][name].to(torch.int8), parts["scales"][name], form.bits, parts["columns"].get(name),
        parts["zeros"].get(name), factors, form.trellis,
    )  # fmt: skip
