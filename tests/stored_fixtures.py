"""Stored tensors of every form, from integers alone, so that no library's random numbers have a part in them."""

from dataclasses import replace

import torch

from golf.artifact.description import expected_shapes
from golf.config.model import ModelConfig
from golf.quant.grid import QuantizedState, QuantizedTensor
from golf.quant.tensor_classes import tensor_class

TINY = ModelConfig(
    vocab_size=32,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    mlp_mult=2.0,
    bigram_vocab_size=40,
    bigram_dim=8,
    train_seq_len=16,
)
TOKENIZER = "c0ffee00" * 8


def integers(shape: tuple[int, ...], salt: int, low: int, high: int) -> torch.Tensor:
    """Whole numbers of low..high that look like noise."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 2654435761 + salt * 40503) % 65_521 % (high - low + 1) + low).view(shape)


def integer_weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    return {
        name: integers(shape, salt, -128, 128).float() / 512
        for salt, (name, shape) in enumerate(expected_shapes(model).items())
    }


def stored_tensor(
    shape: tuple[int, int], bits: int, salt: int = 0, *, shared: bool = False, groups: int = 1, columns: bool = False,
    zeros: bool = False, trellis: bool = False, rank: int = 0,
) -> QuantizedTensor:  # fmt: skip
    """A stored matrix of the form that the arguments tell."""
    low, high = (0, 2**bits - 1) if zeros else (-max(2 ** (bits - 1) - 1, 1), max(2 ** (bits - 1) - 1, 1))
    codes_RC = integers(shape, salt, low, high) if bits > 1 or zeros else integers(shape, salt, 0, 1) * 2 - 1
    scale_shape = (1 if shared else shape[0], groups)
    factors = None
    if rank:
        factors = stored_tensor((shape[0], rank), 2, salt + 1), stored_tensor((rank, shape[1]), 4, salt + 2, groups=2)
    return QuantizedTensor(
        codes_RC.to(torch.int8),
        (2.0 ** integers(scale_shape, salt + 3, -9, -5).float()).half(),
        bits,
        (integers((shape[1],), salt + 4, 900, 1100).float() / 1000).half() if columns else None,
        integers(scale_shape, salt + 5, low, high).to(torch.int8) if zeros else None,
        factors,
        trellis,
    )


EXCEPTIONS = {
    "tok_emb.weight": {"bits": 7, "shared": True, "columns": True},
    "blocks.0.attn.c_q.weight": {"bits": 1},
    "blocks.0.attn.proj.weight": {"bits": 2},
    "blocks.1.attn.c_q.weight": {"bits": 4, "zeros": True, "groups": 3},
    "blocks.1.attn.proj.weight": {"bits": 6, "trellis": True, "shared": True},
    "blocks.0.mlp.fc.weight": {"bits": 5, "rank": 3},
    "blocks.1.mlp.fc.weight": {"bits": 5, "groups": 4, "columns": True},
    "blocks.1.mlp.proj.weight": {"bits": 8, "zeros": True},
}


def stored_of_every_form() -> QuantizedState:
    """A model of TINY's shape whose tensors are of many forms."""
    stored: QuantizedState = {}
    for salt, (name, tensor) in enumerate(integer_weights(TINY).items()):
        if tensor_class(name, tensor.shape) == "small":
            stored[name] = tensor.half()
        else:
            stored[name] = stored_tensor(tuple(tensor.shape), salt=10 * salt, **{"bits": 5} | EXCEPTIONS.get(name, {}))
    zeros = stored["blocks.1.mlp.proj.weight"]
    assert isinstance(zeros, QuantizedTensor) and zeros.zero_SG is not None
    moved = (zeros.codes_RC.int() - 128).to(torch.int8), (zeros.zero_SG.int() - 128).to(torch.int8)
    stored["blocks.1.mlp.proj.weight"] = replace(zeros, codes_RC=moved[0], zero_SG=moved[1])
    return stored
