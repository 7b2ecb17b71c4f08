"""Hidden units of an MLP in an order that suits the coder: the function stays, for units have no order of their own.

Rows of blocks.N.mlp.fc.weight and columns of blocks.N.mlp.proj.weight move together. What was measured of the inputs
and outputs of the two before is in the old order. H hidden units, D model width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from golf.quant.calibration import LayerStatistics
from golf.quant.tensor_classes import QuantError

UP_SUFFIX, DOWN_SUFFIX = ".mlp.fc.weight", ".mlp.proj.weight"


def hidden_order(up_HD: Tensor, down_DH: Tensor) -> Tensor:
    """order_H: units by falling product of the L2 norms of their two vectors; ties by their old place."""
    strength_H = up_HD.double().norm(dim=1) * down_DH.double().norm(dim=0)
    return strength_H.argsort(descending=True, stable=True)


def mlp_blocks(state: Mapping[str, Tensor]) -> list[str]:
    """Prefixes of the MLPs in `state`. Raises QuantError where one lacks a matrix, or theirs do not fit."""
    prefixes = [name.removesuffix(UP_SUFFIX) for name in state if name.endswith(UP_SUFFIX)]
    for prefix in prefixes:
        up, down = state[prefix + UP_SUFFIX], state.get(prefix + DOWN_SUFFIX)
        if down is None or up.dim() != 2 or down.shape != (up.size(1), up.size(0)):
            raise QuantError(f"{prefix}{UP_SUFFIX} has no {DOWN_SUFFIX} that fits it")
    return prefixes


def hidden_orders(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """hidden_order of every MLP by its prefix. Raises QuantError."""
    return {block: hidden_order(state[block + UP_SUFFIX], state[block + DOWN_SUFFIX]) for block in mlp_blocks(state)}


def permute_statistics(
    statistics: Mapping[str, LayerStatistics], orders: Mapping[str, Tensor]
) -> dict[str, LayerStatistics]:
    """What calibration says of the weights once their hidden units are in `orders` (by prefix)."""
    permuted = dict(statistics)
    for prefix, order_H in orders.items():
        up, down = statistics[prefix + UP_SUFFIX], statistics[prefix + DOWN_SUFFIX]
        permuted[prefix + UP_SUFFIX] = LayerStatistics(up.hessian_CC, up.row_weight_R[order_H])
        permuted[prefix + DOWN_SUFFIX] = LayerStatistics(down.hessian_CC[order_H][:, order_H], down.row_weight_R)
    return permuted


def permute_hidden_units(state: Mapping[str, Tensor], orders: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A state of the same function with each MLP's units in `orders` (by prefix, "blocks.0"), or by hidden_order."""
    permuted = dict(state)
    orders = hidden_orders(state) if orders is None else orders
    for prefix in mlp_blocks(state):
        up_HD, down_DH, order_H = state[prefix + UP_SUFFIX], state[prefix + DOWN_SUFFIX], orders[prefix]
        if not torch.equal(order_H.sort().values.cpu(), torch.arange(len(up_HD))):
            raise QuantError(f"the order of {prefix}'s units is no permutation of {len(up_HD)}")
        permuted[prefix + UP_SUFFIX] = up_HD[order_H].contiguous()
        permuted[prefix + DOWN_SUFFIX] = down_DH[:, order_H].contiguous()
    return permuted
