"""Keeps keys and values as the codes that the model's own quantizers (act_k, act_v) make of them.

Per token and head: the codes' bits in whole bytes, and the scale (of `twosided8` one for each sign; of the unit
quantizers none, theirs is fixed). What comes out is what the quantizer gives, exactly where scales are kept in fp32; in
fp16 every value is off by at most 2^-11 of itself. A site without a quantizer keeps its values as they are.

Written to be checked, not fast: everything that is kept is unpacked for every new token.

B batch, G key/value heads, T new positions, U positions that are kept, K head width, N bytes, S scales.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from golf.config.model import ModelConfig
from golf.config.site_quantizers import SiteQuantizer, parse_site
from golf.model.cache import KeyValueCache, QuantizerSite, keep_window
from golf.quant.grid import FP16_MAX
from golf.quant.site_grid import site_grid
from golf.quant.tensor_classes import QuantError

SQUASHES = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "unit": lambda x: x, "": lambda x: x}


def packed_width(values: int, bits: int) -> int:
    """Returns the bytes of so many codes."""
    return -(-values * bits // 8)


def pack_codes(codes_BGTK: Tensor, site: SiteQuantizer) -> Tensor:
    """Returns uint8_BGTN: the codes of each head as numbers of `site.bits` bits from 0, the lowest bit first."""
    numbers = ((codes_BGTK - site.low) / site.step_of_levels).to(torch.uint8)
    places = torch.arange(site.bits, dtype=torch.uint8, device=numbers.device)
    bits = ((numbers.unsqueeze(-1) >> places) & 1).flatten(-2)
    bits = F.pad(bits, (0, -bits.size(-1) % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def unpack_codes(packed_BGTN: Tensor, values: int, site: SiteQuantizer) -> Tensor:
    """Returns fp32 codes_BGTK, K = `values`: inverse of pack_codes."""
    places = torch.arange(8, dtype=torch.uint8, device=packed_BGTN.device)
    bits = ((packed_BGTN.unsqueeze(-1) >> places) & 1).flatten(-2)[..., : values * site.bits]
    bits = bits.unflatten(-1, (values, site.bits)) << places[: site.bits]
    return bits.sum(-1, dtype=torch.uint8).float() * site.step_of_levels + site.low


def scale_count(site: SiteQuantizer) -> int:
    """Returns how many scales are kept for a token's head."""
    return {"unit": 0, "twosided": 2}.get(site.scale, 1)


class PackedPart:
    """The keys or the values of a layer; `text` is their quantizer, empty for none."""

    def __init__(self, text: str, pinned: int, window: int, scale_dtype: torch.dtype):
        self.site, self.pinned, self.window = parse_site(text, activation=True), pinned, window
        self.scale_dtype = scale_dtype
        self.kept: tuple[Tensor, ...] | None = None
        """(packed_BGUN, scale_BGUS), or (values_BGUK,) without a quantizer."""

    def extend(self, x_BGTK: Tensor) -> Tensor:
        """Keeps new values, not yet quantized; returns all that are kept, quantized, the new ones last."""
        new = (x_BGTK,) if self.site is None else self.encode(x_BGTK)
        if self.kept is not None:
            new = tuple(torch.cat(pair, 2) for pair in zip(self.kept, new, strict=True))
        self.kept = tuple(keep_window(part, self.pinned, self.window) for part in new)
        return new[0] if self.site is None else self.decode(*new, x_BGTK.size(-1)).to(x_BGTK.dtype)

    def encode(self, x_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Returns packed_BGTN and scale_BGTS."""
        x_RK = SQUASHES[self.site.squash](x_BGTK).reshape(-1, x_BGTK.size(-1)).float()
        grid = site_grid(x_RK, self.site, activation=True)
        if self.site.scale == "unit":
            scale_RS = grid.scale.new_empty(len(x_RK), 0)
        elif self.site.scale == "twosided":  # of a sign that no value has it is 0, and never used
            signs = x_RK > 0, x_RK <= 0
            scale_RS = torch.stack([(grid.scale * sign).amax(1) for sign in signs], 1)
        else:
            scale_RS = grid.scale
        if self.scale_dtype == torch.float16:
            scale_RS = scale_RS.clamp_max(FP16_MAX)
        packed = pack_codes(grid.codes_RC.view(x_BGTK.shape), self.site)
        return packed, scale_RS.to(self.scale_dtype).view(*x_BGTK.shape[:-1], scale_RS.size(1))

    def decode(self, packed_BGUN: Tensor, scale_BGUS: Tensor, values: int) -> Tensor:
        """Returns fp32 values_BGUK."""
        codes_BGUK, scale_BGUS = unpack_codes(packed_BGUN, values, self.site), scale_BGUS.float()
        if self.site.scale == "unit":
            return codes_BGUK * torch.full_like(codes_BGUK, 1 / self.site.high)
        if self.site.scale == "twosided":
            up_BGU1, down_BGU1 = scale_BGUS.split(1, dim=-1)
            return codes_BGUK * torch.where(codes_BGUK > 0, up_BGU1, down_BGU1)
        return codes_BGUK * scale_BGUS

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.kept or ())


class PackedLayer:
    """Keys and values of one layer, each packed where it has a quantizer."""

    def __init__(self, pinned: int, window: int, config: ModelConfig, scale_dtype: torch.dtype):
        self.last_key: Tensor | None = None
        self.k = PackedPart(config.act_k, pinned, window, scale_dtype)
        self.v = PackedPart(config.act_v, pinned, window, scale_dtype)

    def extend(
        self, k_BGTK: Tensor, v_BGTK: Tensor, act_k: QuantizerSite, act_v: QuantizerSite
    ) -> tuple[Tensor, Tensor]:
        """Does what PlainLayer's does; the quantizers are known from the configuration."""
        return self.k.extend(k_BGTK), self.v.extend(v_BGTK)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


def packed_cache(config: ModelConfig, scale_dtype: torch.dtype = torch.float32) -> KeyValueCache:
    """Returns an empty cache that keeps codes. Raises QuantError for a model that has no quantizer there."""
    if not (config.act_k or config.act_v):
        raise QuantError("a packed cache needs a model with act_k or act_v: this one's keys and values have no codes")
    assert scale_dtype in (torch.float32, torch.float16)
    return KeyValueCache(config, partial(PackedLayer, config=config, scale_dtype=scale_dtype))
