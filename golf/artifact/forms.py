"""Which parts a stored tensor has: what an artifact must say of it beside its shape, and what takes its parts together.

R rows, C columns, S rows of scales, G groups of columns, K rank of the correction.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from golf.artifact.codecs import ArtifactError
from golf.quant.grid import grid_clip
from golf.quant.stored import QuantizedState, QuantizedTensor
from golf.quant.tensor_classes import FP16_BITS

STORABLE_BITS = (*range(1, 9), FP16_BITS)
FACTOR_NAMES = ("left", "right")


@dataclass(frozen=True)
class Form:
    """One tensor, or one factor of a correction (by the name `tensor:left` or `tensor:right`)."""

    shape: tuple[int, ...]
    bits: int
    row_scales: bool = True
    """A row of scales for each row; else one for all."""
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
    """The form of a stored tensor, and of its factors. Raises ArtifactError where its parts don't fit together."""
    if isinstance(entry, Tensor):
        return {name: Form(tuple(entry.shape), FP16_BITS)}
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
    """Tensors and the factors of their corrections, by the names of `Forms`."""
    entries: QuantizedState = {}
    for name, entry in stored.items():
        entries[name] = entry
        if isinstance(entry, QuantizedTensor):
            entries |= {f"{name}:{side}": f for side, f in zip(FACTOR_NAMES, entry.low_rank or (), strict=False)}
    return entries


def form_to_json(name: str, forms: Forms) -> list:
    """[row_scales, groups, column_scales, zeros, trellis]; with a correction also its rank, and both factors' bits and
    forms."""
    form = forms[name]
    values: list = [int(form.row_scales), form.groups, int(form.column_scales), int(form.zeros), int(form.trellis)]
    if form.rank:
        values.append(form.rank)
        for side in FACTOR_NAMES:
            factor = f"{name}:{side}"
            values += [forms[factor].bits, form_to_json(factor, forms)]
    return values


def forms_from_json(name: str, shape: tuple[int, ...], bits: object, values: object, factor: bool = False) -> Forms:
    """Inverse of `form_to_json`, from untrusted values. Raises ArtifactError."""
    if type(bits) is not int or bits not in STORABLE_BITS or (bits != FP16_BITS and len(shape) != 2):
        raise ArtifactError(f"the artifact gives tensor {name!r} an impossible number of bits")
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
    """Raise ArtifactError for codes outside their grid."""
    low, high = form.code_range
    binary_zero = form.bits == 1 and not form.zeros and bool((codes_RC == 0).any())
    if codes_RC.numel() and (codes_RC.min() < low or codes_RC.max() > high or binary_zero):
        raise ArtifactError(f"tensor {name!r} has codes outside its {form.bits}-bit grid")


def join_entry(name: str, forms: Forms, parts: Mapping[str, Mapping[str, Tensor]]) -> QuantizedTensor | Tensor:
    """A stored tensor from the parts of all streams (role -> name -> tensor)."""
    form = forms[name]
    if form.bits == FP16_BITS:
        return parts["fp16"][name]
    check_codes(name, parts["codes"][name], form)
    factors = tuple(join_entry(f"{name}:{side}", forms, parts) for side in FACTOR_NAMES) if form.rank else None
    return QuantizedTensor(
        parts["codes"][name].to(torch.int8), parts["scales"][name], form.bits, parts["columns"].get(name),
        parts["zeros"].get(name), factors, form.trellis,
    )  # fmt: skip
