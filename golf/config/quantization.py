"""Defines the knobs of quantization and packing."""

from dataclasses import dataclass
from typing import Any, Literal

from golf.config.knobs import ConfigError, Rule
from golf.config.site_quantizers import SiteError, site_rules

CODECS = Literal["rans", "brotli", "lzma", "zstd", "zlib", "none"]


@dataclass(frozen=True)
class QuantConfig:
    """Sets how weights become codes, and codes bytes."""

    qat_enabled: bool = True
    """Weights pass through the export grid in the forward pass of training."""
    qat_start: float = 0.0
    """Share of the budget after which training uses the export grid."""
    mlp_bits: int = 5
    """Bits of the MLP's matrices, 2 to 8; 16: stored as fp16."""
    attn_bits: int = 6
    """Bits of the attention's matrices, 2 to 8; 16: stored as fp16."""
    bigram_bits: int = 6
    """Bits of the bigram table and its projection, 2 to 8; 16: stored as fp16."""
    embed_bits: int = 16
    """Bits of the token embedding, 2 to 8; 16: stored as fp16."""
    prune_frac: float = 0.05
    """Share of smallest weights set to zero per tensor, where that can change a code."""
    codec: CODECS = "lzma"
    """Coder of the artifact's streams; rans is the project's own."""
    quantizer: Literal["rtn", "waterfill"] = "rtn"
    """rtn: rounded to nearest on the bits above; waterfill: GPTQ after calibration, steps chosen to fill the limit."""
    calibration_tokens: int = 131_072
    """Tokens on which quantizer=waterfill measures the weights' sensitivity."""
    calibration_text: Literal["train", "generated"] = "train"
    """Text to calibrate on: training text, or text that the model generates."""
    calibration_reserve: float = 8.0
    """Seconds of max_wallclock_seconds that training leaves to the calibration of quantizer=waterfill."""
    weight_q: str = ""
    """Quantizer (golf/config/site_quantizers.py) that the query matrix trains through and is exported on."""
    weight_k: str = ""
    """Quantizer of the key matrix."""
    weight_v: str = ""
    """Quantizer of the value matrix."""
    weight_o: str = ""
    """Quantizer of the attention's output matrix."""
    weight_up: str = ""
    """Quantizer of the MLP's input matrix."""
    weight_down: str = ""
    """Quantizer of the MLP's output matrix."""
    weight_embed: str = ""
    """Quantizer of the token embedding."""
    weight_head: str = ""
    """Quantizer of a head of its own (tie_embeddings=0)."""
    rd_lambda: float = 0.15
    """Weight of a code's bits against its error in quantizer=waterfill; 1: full price; 0: the error alone decides."""


GRID_KNOBS = {"mlp_bits", "attn_bits", "bigram_bits", "embed_bits", "qat_start"}
"""Knobs of the grid that weights train through and are rounded to; quantizer=waterfill does not use them."""


def quant_rules(config: Any) -> list[Rule]:
    """Returns the rules between the knobs of a Config that concern quantization. Raises ConfigError."""
    model, train, quant = config.model, config.train, config.quant
    rounds = quant.quantizer == "rtn"
    try:
        rules = site_rules(model, quant)
    except SiteError as error:
        raise ConfigError(str(error)) from None
    return [
        *rules,
        (0 <= quant.qat_start < 1, "qat_start is a share, 0 to below 1"),
        (0 <= quant.prune_frac < 1, "prune_frac is a share, 0 to below 1"),
        (
            {quant.mlp_bits, quant.attn_bits, quant.bigram_bits, quant.embed_bits} <= {*range(2, 9), 16},
            "mlp_bits, attn_bits, bigram_bits and embed_bits must be 2 to 8, or 16",
        ),
        (
            rounds or not (quant.qat_enabled or quant.prune_frac),
            "quantizer=waterfill chooses its own grid: set qat_enabled=0 and prune_frac=0, or quantizer=rtn",
        ),
        (
            rounds or quant.calibration_tokens >= model.train_seq_len,
            "calibration_tokens must be at least a row of train_seq_len",
        ),
        (
            rounds or quant.calibration_reserve < train.max_wallclock_seconds or not train.max_wallclock_seconds,
            "calibration_reserve leaves no time to train: raise max_wallclock_seconds",
        ),
    ]
