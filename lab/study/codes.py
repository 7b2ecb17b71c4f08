"""What is on a grid in a model: codes of its matrices over the steps of a training, sites with their bits, coverage.

R rows, C columns.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.config.site_quantizers import ACTIVATION_SITES, WEIGHT_SITES, parse_site
from golf.quant.export import quantize_state
from golf.quant.grid import QuantizedState, QuantizedTensor
from golf.quant.tensor_classes import FP16_BITS, SITE_PATHS, bits_of
from lab.cost.energy import measured_zero_shares, zero_codes

MOST_SHOWN_CODES = 16
"""Finer grids have no histogram, only their share of zeros."""


def grid_codes(state: Mapping[str, Tensor], quant: QuantConfig) -> dict[str, Tensor]:
    """codes_RC (int8) of every matrix that is exported on a grid, as it would be exported now."""
    coded = {name: tensor for name, tensor in state.items() if bits_of(name, tensor.shape, quant) < FP16_BITS}
    attention = {name: tensor for name, tensor in state.items() if ".attn." in name and tensor.dim() == 2}
    stored = quantize_state(coded | attention, quant) if coded else {}  # those that share a step ask for all of them
    return {name: entry.codes_RC for name in coded if isinstance(entry := stored[name], QuantizedTensor)}


def code_shares(codes_RC: Tensor) -> dict[str, float]:
    """Share of each code, by its number; of a fine grid the zeros' alone."""
    values, counts = np.unique(codes_RC.numpy(), return_counts=True)
    if int(values.max()) - int(values.min()) >= MOST_SHOWN_CODES:
        return {"0": float(counts[values == 0].sum() / counts.sum())}
    return {str(int(value)): float(count / counts.sum()) for value, count in zip(values, counts, strict=True)}


class CodeWatch:
    """Histograms of codes at every look, and the share of codes that changed since the look before."""

    def __init__(self, quant: QuantConfig):
        self.quant = quant
        self.before: dict[str, Tensor] = {}

    def look(self, state: Mapping[str, Tensor], step: int) -> list[dict[str, Any]]:
        """A row for each matrix on a grid."""
        codes = grid_codes(state, self.quant)
        rows = []
        for name, codes_RC in codes.items():
            row: dict[str, Any] = {"step": step, "matrix": name, "shares": code_shares(codes_RC)}
            if name in self.before:
                row["flips"] = float((codes_RC != self.before[name]).double().mean())
            rows.append(row)
        self.before = codes
        return rows


def site_of_weight(name: str) -> str | None:
    """q, k, v, o, up, down, embed or head; None for a tensor that is at none of these sites."""
    path = name.removesuffix(".weight").split(".")
    return SITE_PATHS.get(path[0] if len(path) == 1 else ".".join(path[-2:]))


def grid_bits(entry: QuantizedTensor | Tensor) -> float:
    """Bits that a code can tell: log2 of the codes for 1 and 2 bits around 0, else the grid's bits; fp16 has 16."""
    if not isinstance(entry, QuantizedTensor):
        return float(FP16_BITS)
    return round(math.log2(3), 2) if entry.bits == 2 and entry.zero_SG is None else float(entry.bits)


def weight_site_bits(stored: QuantizedState) -> dict[str, float]:
    """Bits of each site's weights, the mean over its matrices."""
    found: dict[str, list[float]] = {}
    for name, entry in stored.items():
        site = site_of_weight(name)
        if site:
            found.setdefault(site, []).append(grid_bits(entry))
    return {site: sum(found[site]) / len(found[site]) for site in WEIGHT_SITES if site in found}


def activation_site_bits(model: ModelConfig) -> dict[str, float]:
    """Bits of each activation site that has a quantizer."""
    sites = {site: parse_site(getattr(model, f"act_{site}"), activation=True) for site in ACTIVATION_SITES}
    return {
        site: round(math.log2(quantizer.high - quantizer.low + 1), 2) if quantizer.bits == 2 else float(quantizer.bits)
        for site, quantizer in sites.items()
        if quantizer
    }


def bits_text(weights: Mapping[str, float], activations: Mapping[str, float]) -> str:
    """W: q1.58 k1.58 ... | A: q8 hidden8; sites of equal bits together."""

    def side(sites: Mapping[str, float]) -> str:
        by_bits: dict[float, list[str]] = {}
        for site, bits in sites.items():
            by_bits.setdefault(bits, []).append(site)
        return " ".join(f"{','.join(names)}:{bits:g}" for bits, names in sorted(by_bits.items()))

    return f"W {side(weights)}" + (f" A {side(activations)}" if activations else "")


def coverage(stored: QuantizedState) -> dict[str, Any]:
    """Parameters, the share of them that is on a grid, and the share of zeros among those, by site too."""
    parameters = quantized = zeros = 0
    for entry in stored.values():
        if not isinstance(entry, QuantizedTensor):
            parameters += entry.numel()
            continue
        elements = entry.codes_RC.numel()
        parameters, quantized, zeros = parameters + elements, quantized + elements, zeros + zero_codes(entry)
    return {
        "params": parameters,
        "covered": quantized / parameters,
        "zero_fraction": zeros / quantized if quantized else None,
        "zero_shares": measured_zero_shares(stored),
    }


def current_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights as they are, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
