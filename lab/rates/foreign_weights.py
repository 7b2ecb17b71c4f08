"""Opens weights that another script of the competition trained, by the names and shapes of their tensors.

The baseline's script and the recipe of 2026-03-20 name tensors as this project does, but for the table below. What
shapes don't say (the training length, RoPE's base) is taken from those scripts' defaults, and knobs can change it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from golf.artifact.codecs import ArtifactError
from golf.artifact.container import check_shapes
from golf.artifact.description import config_of, expected_shapes
from golf.artifact.weights import METADATA_ENTRIES, SavedWeights, load_weights
from golf.config.config import Config, check_config, with_knobs
from golf.config.knobs import ConfigError
from golf.config.model import ModelConfig
from golf.data.tokenizer import load_tokenizer

WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before a name."""
RENAMED = {"lm_head.weight": "head.weight"}
"""Names of the two scripts that are not this project's."""
SCRIPT_DEFAULTS: dict[str, dict[str, Any]] = {
    "baseline": {"train_seq_len": 1024, "resid_mix_init": "stream", "matrix_init": "uniform"},
    "recipe": {"train_seq_len": 2048},
}
"""What shapes don't say, where it is not the default of a knob: of the baseline's script, and of those with a bigram
table."""


def open_weights(path: Path, tokenizer: Path | None = None, knobs: str = "") -> tuple[SavedWeights, str]:
    """Returns the weights in a .safetensors file, and a line on how they were read (empty for this project's own).

    Raises ArtifactError, ConfigError.
    """
    if not is_foreign(path):
        if knobs:
            raise ConfigError(f"--knobs is for weights of another script: {path} says all about its model itself")
        return load_weights(path), ""
    if tokenizer is None:
        raise ConfigError(f"{path} was trained by another script: give its --tokenizer, which the artifact names")
    state = {own_name(name): part.float() for name, part in read_tensors(path).items()}
    script = "recipe" if "bigram.embed.weight" in state else "baseline"
    chosen = shape_knobs(path, state) | SCRIPT_DEFAULTS[script] | split_knobs(knobs)
    config = with_knobs(Config(), chosen)
    check_config(config_of(config.model, config.quant))
    shapes = expected_shapes(config.model)
    check_shapes({name: tuple(part.shape) for name, part in state.items()}, shapes)
    for name, part in state.items():
        if not torch.isfinite(part).all():
            raise ArtifactError(f"tensor {name!r} in {path} has NaN or infinite values")
    saved = SavedWeights(
        {name: state[name] for name in shapes}, config.model, config.quant, load_tokenizer(tokenizer).sha256
    )
    return saved, describe_reading(script, config.model)


def is_foreign(path: Path) -> bool:
    """Returns whether a .safetensors file lacks all metadata of this project. Raises ArtifactError."""
    try:
        with safe_open(path, framework="pt") as file:
            return not set(file.metadata() or {}) & set(METADATA_ENTRIES)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"cannot read weights from {path}: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file whose header has been read."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def own_name(name: str) -> str:
    """Returns this project's name of a tensor."""
    for wrapper in WRAPPERS * 2:
        name = name.removeprefix(wrapper)
    return RENAMED.get(name, name)


def shape_knobs(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the model's knobs that the shapes of its tensors say. Raises ArtifactError where one is missing."""
    needed = ("tok_emb.weight", "blocks.0.attn.q_gain", "blocks.0.attn.c_k.weight", "blocks.0.mlp.fc.weight")
    if missing := [name for name in needed if name not in state]:
        raise ArtifactError(
            f"{path} has no tensor {missing[0]!r}: its names are not those of the competition's baseline or recipe"
        )
    embedding, gain, keys, hidden = (state[name] for name in needed)
    (vocab_size, dim), heads = embedding.shape, len(gain)
    layers = {int(name.split(".")[1]) for name in state if name.startswith("blocks.") and name.split(".")[1].isdigit()}
    bigrams = state.get("bigram.embed.weight")
    return {
        "vocab_size": vocab_size, "model_dim": dim, "num_heads": heads, "num_layers": max(layers) + 1,
        "num_kv_heads": max(1, keys.size(0) * heads // dim), "mlp_mult": hidden.size(0) / dim,
        "bigram_vocab_size": 0 if bigrams is None else bigrams.size(0),
        "bigram_dim": 0 if bigrams is None else bigrams.size(1),
        "smear_gate": "smear.gate" in state, "tie_embeddings": "head.weight" not in state,
    }  # fmt: skip


def split_knobs(text: str) -> dict[str, str]:
    """Returns knobs of a line such as "train_seq_len=4096 rope_base=50000". Raises ConfigError."""
    pairs = [word.partition("=") for word in text.split()]
    if bad := [name for name, sign, _ in pairs if not sign or name not in ModelConfig.__dataclass_fields__]:
        raise ConfigError(f"--knobs: {bad[0]!r} is no knob=value of the model")
    return {name: value for name, _, value in pairs}


def describe_reading(script: str, model: ModelConfig) -> str:
    """Returns the line on what was taken from shapes, and what from the script's defaults."""
    shapes = f"{model.num_layers} layers of {model.model_dim}, {model.num_heads} heads, {model.num_kv_heads} for keys"
    assumed = ("train_seq_len", "rope_base", "logit_softcap", "bos_id", "mlp_activation")
    defaults = " ".join(f"{name}={getattr(model, name)}" for name in assumed)
    return f"pack: read as weights of the {script}'s script: {shapes}; not in the file: {defaults} (--knobs changes it)"
