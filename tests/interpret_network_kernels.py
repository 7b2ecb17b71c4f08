"""Runs the Triton kernels of golf/model/kernels.py on the CPU, in Triton's interpreter, and compares results and
gradients with those of the plain forms in float64. A program of its own: the interpreter is chosen before triton is
imported (TRITON_INTERPRET=1). With the name of a kernel, an error is planted in its gradients."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import golf.model.kernels
from golf.config.model import ModelConfig
from golf.model.block import BY_MLP_ACTIVATION, gate_heads, without_own_value
from golf.model.fused import SLOPES, install_fused, verify_fused, without_fused
from golf.model.init import build_model
from golf.model.kernels import SquaredMlp, exclusive_heads
from golf.model.layers import changed_model

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}
"""Largest difference, as a share of the largest value: the interpreter cuts to bf16 where a device rounds (2^-7 =
0.8e-2 each time, and a gradient may be cut twice)."""
SMALL = ModelConfig(
    vocab_size=97, num_layers=3, model_dim=24, num_heads=4, num_kv_heads=2, mlp_mult=2.0, bigram_vocab_size=0,
    train_seq_len=32, mlp_activation="leaky_relu2", exclusive_attention=True, attention_gate_dims=8, loop_first=1,
    loop_last=1, loop_repeats=1, rope_dims=4, document_attention=True,
)  # fmt: skip


def plain_mlp(x_ND: Tensor, up_MD: Tensor, down_DM: Tensor, activation: str) -> Tensor:
    return BY_MLP_ACTIVATION[activation](x_ND @ up_MD.T) @ down_DM.T


def plain_heads(y_NHK: Tensor, v_NGK: Tensor, gate_NH: Tensor) -> Tensor:
    y_1HNK, v_1GNK = y_NHK.transpose(0, 1)[None], v_NGK.transpose(0, 1)[None]
    out_1HNK = without_own_value(y_1HNK, v_1GNK)
    # As inputs and gate of `gate_heads`: each position's own logits, and the unit matrix.
    return gate_heads(out_1HNK, gate_NH[None], torch.eye(gate_NH.size(1)))[0].transpose(0, 1)


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    one, other = one.detach().double(), other.detach()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-9))


def worst(kernel: Callable, plain: Callable, inputs: list[Tensor], dtype: torch.dtype) -> float:
    """Largest difference of results and gradients, from inputs that `dtype` holds exactly."""
    given = [part.detach().to(dtype).requires_grad_() for part in inputs]
    exact = [part.detach().double().requires_grad_() for part in given]
    found, wanted = kernel(*given), plain(*exact)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(7)).to(found.dtype)
    found.backward(weight), wanted.backward(weight.double())
    pairs = [(found, wanted), *((part.grad, other.grad) for part, other in zip(given, exact, strict=True))]
    return max(difference(*pair) for pair in pairs)


def cases() -> list[tuple[str, Callable, Callable, list[Tensor]]]:
    generator, found = torch.Generator().manual_seed(0), []

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    for rows, width, hidden in ((4, 64, 32), (130, 48, 260), (1, 100, 7)):
        for activation, slope in SLOPES.items():
            inputs = [normal(rows, width), normal(hidden, width, scale=0.2), normal(width, hidden, scale=0.2)]
            kernel = lambda x, up, down, slope=slope: SquaredMlp.apply(x, up, down, slope)  # noqa: E731
            found.append(("activated_product", kernel, partial(plain_mlp, activation=activation), inputs))
    for rows, heads, groups, width in ((40, 8, 4, 64), (3, 4, 2, 8), (33, 6, 2, 12), (1, 2, 2, 16)):
        inputs = [normal(rows, heads, width), normal(rows, groups, width), normal(rows, heads, scale=4.0)]
        found.append(("exclusive_heads", exclusive_heads, plain_heads, inputs))
    return found


def mend_products() -> None:
    """Lets the interpreter multiply bf16 as numbers; Triton 3.7 multiplies the integers that it keeps them in."""
    product = InterpreterBuilder.create_dot

    def whole(part: Any) -> Any:
        if part.dtype.scalar != tl.bfloat16:
            return part
        return TensorHandle((part.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *given: product(self, whole(a), whole(b), *given)


def plant(name: str) -> None:
    """Makes a kernel's gradients wrong by a twentieth in some places."""
    launch = golf.model.kernels.launch_kernel

    def wrong(function: Callable, *given: object, **options: object) -> None:
        launch(function, *given, **options)
        if function.__name__ == f"{name}_kernel" and options["BACKWARD"]:
            given[{"activated_product": 4, "exclusive_heads": 5}[name]].view(-1)[::3] *= 1.05

    golf.model.kernels.launch_kernel = wrong


def check_model() -> str:
    """Compares loss and gradients of a small network with fused forms to those with plain ones, and its proof."""
    model = build_model(SMALL, 0)
    for name, weight in model.named_parameters():  # no output is zero, and no gate
        weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    ids_BT = torch.randint(2, 97, (2, 33), generator=torch.Generator().manual_seed(1))
    batch, losses, gradients = (ids_BT[:, :-1], ids_BT[:, 1:]), [], []
    assert verify_fused(model, model, batch)[1].startswith("plain")
    install_fused(model)
    for context in (nullcontext(), without_fused(model)):
        with context:
            loss = model(*batch)
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
            losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-6 * losses[1], losses
    off = max(difference(one, other) for one, other in zip(*gradients, strict=True))
    assert off < 1e-4, f"model: {off:.2e}"
    holds, effect = verify_fused(model, model, batch)
    assert holds and effect.startswith("8 launches"), effect  # 3 blocks, one of them twice, with two kernels each
    assert not verify_fused(lambda *given: model(*given) * 1.01, model, batch)[0]
    with changed_model(model, exclusive_attention=False):
        assert abs(model(*batch).item() - losses[0]) > 1e-4
    return effect


def main() -> None:
    if sys.argv[1:]:
        plant(sys.argv[1])
    mend_products()
    count = 0
    for name, kernel, plain, inputs in cases():
        for dtype, most in TOLERANCES.items():
            off = worst(kernel, plain, inputs, dtype)
            print(f"{name} {[tuple(part.shape) for part in inputs]} {dtype}: {off:.2e}", file=sys.stderr)
            assert off <= most, f"{name}: {off:.2e} is more than {most:.2e}"
            count += 1
    print(f"{count} agree, a model too: {check_model()}", file=sys.stderr)
    print(f"{count} agree")


if __name__ == "__main__":
    main()
