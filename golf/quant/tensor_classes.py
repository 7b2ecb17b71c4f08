"""Decides how many bits a tensor gets by its class, and its class by its name."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from torch import Tensor

from golf.config.knobs import UserError
from golf.config.quantization import QuantConfig
from golf.config.site_quantizers import SiteQuantizer, weight_sites

FP16_BITS = 16
SMALL_ELEMENTS = 256
"""Fewest elements of a quantized matrix: smaller ones are fp16, since scales and rounding would cost more than they
save."""
SITE_PATHS = {
    "attn.c_q": "q", "attn.c_k": "k", "attn.c_v": "v", "attn.proj": "o", "mlp.fc": "up", "mlp.proj": "down",
    "tok_emb": "embed", "head": "head",
}  # fmt: skip
"""Site of a weight by the end of its module's path."""


class QuantError(UserError):
    """Reports a tensor that can't be put on a grid."""


def tensor_class(name: str, shape: Sequence[int]) -> str:
    """Returns embed, bigram, attn or mlp for weight matrices, small for all else: a stack of vectors is no `.weight`.

    Raises QuantError for a matrix of unknown name.
    """
    if len(shape) < 2 or not name.endswith(".weight") or prod(shape) < SMALL_ELEMENTS:
        return "small"
    parts = name.split(".")
    if parts[0] in ("tok_emb", "head"):
        return "embed"
    for part in ("bigram", "attn", "mlp"):
        if part in parts and len(shape) == 2:
            return part
    raise QuantError(f"no quantization rule for tensor {name!r} of shape {tuple(shape)}")


def weight_site(name: str, quant: QuantConfig) -> SiteQuantizer | None:
    """Returns the quantizer that the configuration names for this weight's site, if any."""
    path = name.removesuffix(".weight")
    site = SITE_PATHS.get(path if "." not in path else ".".join(path.split(".")[-2:]))
    return weight_sites(quant).get(site or "")


def bits_of(name: str, shape: Sequence[int], quant: QuantConfig) -> int:
    """Returns the bits per weight of a tensor's codes; 16 means fp16 without a grid."""
    if site := weight_site(name, quant):
        return site.bits
    return {
        "embed": quant.embed_bits,
        "bigram": quant.bigram_bits,
        "attn": quant.attn_bits,
        "mlp": quant.mlp_bits,
        "small": FP16_BITS,
    }[tensor_class(name, shape)]


def shared_weights(name: str, site: SiteQuantizer, weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yields the matrices of the attention of `name` where they share a step."""
    if site.granularity == "qkvo":
        path = name.rsplit(".", 2)[0]
        for part in ("c_q", "c_k", "c_v", "proj"):
            yield weights[f"{path}.{part}.weight"]
