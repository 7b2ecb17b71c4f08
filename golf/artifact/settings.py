"""Configurations out of a file that nobody vouches for: kinds, bounds and sense of every value checked."""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, Literal, get_args, get_origin

from golf.artifact.codecs import ArtifactError
from golf.config.config import Config, ConfigError, ModelConfig, QuantConfig, ScoreConfig, TrainConfig, check_config
from golf.config.site_quantizers import ACTIVATION_SITES, WEIGHT_SITES

LARGEST_NUMBER = 2**24
MOST_LAYERS = 1024
MAY_BE_ZERO = ("bigram_vocab_size", "bigram_dim", "bos_id", "attention_window", "knowledge_tokens")
"""Whole numbers that may be 0; all others are at least 1."""
ADDED_FIELDS = {
    "document_attention", "quantizer", "calibration_tokens", "calibration_text", "calibration_reserve", "rate_weight",
    "attention_window", "tie_embeddings", "mlp_activation", "knowledge_tokens", "knowledge_at",
    *(f"act_{site}" for site in ACTIVATION_SITES), *(f"weight_{site}" for site in WEIGHT_SITES),
}  # fmt: skip
"""Since version 1: those of ModelConfig are written where they differ from their default, which older files mean."""


def model_to_json(model: ModelConfig) -> dict[str, Any]:
    """What `model_from_json` reads."""
    return {k: v for k, v in asdict(model).items() if k not in ADDED_FIELDS or v != getattr(ModelConfig, k)}


def model_from_json(values: object) -> ModelConfig:
    """The model configuration that parsed JSON spells. Raises ArtifactError."""
    model = ModelConfig(**checked_values(ModelConfig, values))
    check_together(config_of(model, QuantConfig()))
    if model.num_layers > MOST_LAYERS:
        raise ArtifactError(f"num_layers is {model.num_layers}; at most {MOST_LAYERS} can be stored")
    if not 1 <= model.mlp_mult * model.model_dim <= LARGEST_NUMBER or model.rope_base <= 0:
        raise ArtifactError("mlp_mult or rope_base is out of bounds")
    return model


def quant_from_json(values: object, model: ModelConfig) -> QuantConfig:
    """The quantization of `model` that parsed JSON spells. Raises ArtifactError."""
    quant = QuantConfig(**checked_values(QuantConfig, values))
    check_together(config_of(model, replace(quant, quantizer="grid")))  # what else a fit wants, its run has checked
    return quant


def config_of(model: ModelConfig, quant: QuantConfig) -> Config:
    """The rest such that it fits to the model."""
    row = TrainConfig(train_batch_tokens=model.train_seq_len, micro_batch_tokens=model.train_seq_len)
    return Config(model=model, quant=quant, train=row, score=ScoreConfig(eval_rope="none"))


def checked_values(settings: type, values: object) -> dict[str, Any]:
    """Values for the fields of a dataclass of knobs: all that version 1 has, no unknown ones, each of its kind."""
    names = {field.name for field in fields(settings)}
    if not isinstance(values, Mapping) or not names - ADDED_FIELDS <= set(values) <= names:
        raise ArtifactError(
            f"the entries of {settings.__name__} are not those of this version: {', '.join(sorted(names))}"
        )
    kinds = {field.name: field.type for field in fields(settings)}
    return {name: checked_value(name, kinds[name], value) for name, value in values.items()}


def checked_value(name: str, kind: Any, value: object) -> Any:
    """`value` if it is of the knob's kind and within bounds. Raises ArtifactError."""
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
