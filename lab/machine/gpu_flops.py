"""Counts the operations of products and of attention in a captured graph."""

import math
import re
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

MEDIAN_DOCUMENT, MEAN_DOCUMENT, DOCUMENTS = 575, 957, 100_000
"""Tokens of FineWeb's validation documents in CaseOps pieces, and how many are drawn from the log-normal with these."""


@cache
def document_share(row_tokens: int) -> float:
    """Returns which share of a row's causal pairs lie within one document, in rows that are cut from a stream."""
    spread = math.sqrt(2 * math.log(MEAN_DOCUMENT / MEDIAN_DOCUMENT))
    lengths = np.random.default_rng(0).lognormal(math.log(MEDIAN_DOCUMENT), spread, DOCUMENTS)
    ends = np.cumsum(np.maximum(1, lengths.astype(np.int64)))
    pieces = np.diff(np.union1d(ends, np.arange(0, ends[-1], row_tokens))).astype(float)
    return float((pieces**2).sum() / pieces.sum() / row_tokens)


def product_flops(graph: torch.fx.GraphModule, documents: bool = False) -> tuple[float, float]:
    """Returns the operations of a graph's matrix products, and of its attention: half of all pairs of a row, and where
    rows are cut into `documents` those within one."""
    products = attended = 0.0
    for node in graph.graph.nodes:
        name = str(node.target)
        shapes = [part.meta["val"].shape for part in node.all_input_nodes if isinstance(part.meta.get("val"), Tensor)]
        if re.match(r"aten\.(mm|bmm|addmm|baddbmm)\.", name):
            products += 2.0 * node.meta["val"].numel() * shapes[-1][-2]
        elif name.startswith("golf_forecast.attention"):
            rows, heads, time, width = shapes["backward" in name]
            attended += (5 if "backward" in name else 2) * rows * heads * time * time * width
        elif name.startswith("golf.segment_attention"):
            positions, heads, width = shapes["backward" in name]
            _, keys, window = node.args[-3:]
            seen = (window or keys) * (2 - (window or keys) / keys)  # twice the keys that a query sees on average
            if documents and not window:
                seen = keys * document_share(int(keys))
            attended += (5 if "backward" in name else 2) * positions * heads * seen * width
    return products, attended


def own_flops(node: Any) -> float:
    """Returns the operations of the product in a kernel of ours, 0 where it has none."""
    shapes = [tuple(map(int, given.get_size())) for given in node.inputs[:2]]
    return 2.0 * math.prod(shapes[0]) * max(shapes[1]) if "mlp_hidden" in str(node.op_overload) else 0.0
