"""True-sequential quantization: each matrix is rounded for the inputs that the rounded matrices before it give it.

Frantar et al. 2022 (arXiv 2210.17323), section 4: within a block the groups query-key-value, attention output, MLP
input, MLP output come one after the other. The tied table comes last, as the head that it is. N rows of T tokens.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from golf.model.gpt import GPT
from golf.quant.calibration import collect_hessians
from golf.quant.stored import QuantizedTensor, dequantize_tensor

BLOCK_GROUPS = (("attn.c_q", "attn.c_k", "attn.c_v"), ("attn.proj",), ("mlp.fc",), ("mlp.proj",))


def matrix_groups(model: GPT) -> Iterator[list[str]]:
    """Names of the matrices that are rounded together, in the order of the forward pass."""
    if model.bigram is not None:
        yield ["bigram.embed.weight"]
        yield ["bigram.proj.weight"]
    for layer in range(len(model.blocks)):
        for group in BLOCK_GROUPS:
            yield [f"blocks.{layer}.{name}.weight" for name in group]
    yield ["tok_emb.weight"]


@torch.no_grad()
def quantize_in_sequence(
    model: GPT, rows_NT: Tensor, encode: Callable[[str, Tensor | None], QuantizedTensor], batch_rows: int = 8
) -> dict[str, QuantizedTensor]:
    """Every matrix by `encode(name, hessian_CC)`, the Hessian measured behind those that came before it (None where
    a matrix is looked up and multiplies nothing). `model` is left with the rounded weights."""
    stored = {}
    for names in matrix_groups(model):
        hessians = collect_hessians(model, rows_NT, batch_rows)
        for name in names:
            stored[name] = encode(name, hessians.get(name))
            model.get_parameter(name).copy_(dequantize_tensor(stored[name]))
    return stored
