"""Runs the Triton kernel of golf/quant/site_grid.py on the CPU, in Triton's interpreter, and compares it with the
plain form, bit for bit. A program of its own: the interpreter is chosen before triton is imported
(TRITON_INTERPRET=1)."""

import torch

from golf.config.site_quantizers import parse_site
from golf.quant.site_grid import site_rows, step_basis
from golf.quant.site_operator import is_plain, site_gradient, site_value

KINDS = [
    "int8", "int4", "int2", "ternary", "ternary-t0.7", "ternary-leastsq", "binary", "binary-leastsq", "ternary-absmax",
    "binary-absmax", "unsigned8", "twosided8", "tanh-ternary", "sigmoid-binary", "unit-int8",
]  # fmt: skip
GRADIENTS = ("ste", "clipped", "fork", "dge5", "dge3c1.5")
WEIGHTS = (
    "ternary", "binary", "int3-tensor", "ternary-t0.7", "ternary-row", "binary-row", "int8", "ternary-row-leastsq",
)  # fmt: skip


def texts() -> list[str]:
    """Quantizers of activations, with every gradient that each may have."""
    return [
        f"{kind}-{gradient}{attached}"
        for kind in KINDS
        for gradient in GRADIENTS
        for attached in ("", "-attached")
        if not (gradient == "fork" and kind.startswith("binary"))
        if not (attached and kind.split("-")[0] in ("tanh", "sigmoid", "unit"))
    ]


def activations(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    sizes = 10 ** torch.randn(rows, 1, generator=generator)
    x_RC = torch.randn(rows, columns, generator=generator) * sizes
    x_RC[0] = 0.0
    x_RC[1] = (x_RC[1] * 4).round() / 2  # many values half way between two codes, and several largest ones
    x_RC[2] = x_RC[2].abs() + 1  # no negative one
    return x_RC.to(dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    integers = torch.int32 if one.dtype == torch.float32 else torch.int16
    return torch.equal(one.view(integers), other.view(integers))


def cut(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The interpreter cuts to bf16 where a device rounds."""
    return values if dtype == torch.float32 else (values.view(torch.int32) >> 16).to(torch.int16).view(dtype)


def compare_activations(text: str, x_RC: torch.Tensor) -> int:
    site = parse_site(text, True)
    plain_RC = site_value(x_RC.float(), text, True, None)
    assert same(site_rows(x_RC, site, True), cut(plain_RC, x_RC.dtype)), (text, x_RC.shape)
    if is_plain(site):
        return 1
    g_RC = torch.randn(x_RC.shape, generator=torch.Generator().manual_seed(1)).to(x_RC.dtype)
    expected_RC, _ = site_gradient(g_RC.float(), x_RC.float(), text, True, None)
    found_RC = site_rows(x_RC, site, True, None, g_RC)
    if site.gradient in ("fork", "dge"):  # powers are approximations
        tolerance = 3e-6 if x_RC.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found_RC.float(), expected_RC, rtol=tolerance, atol=tolerance * 30)
    else:
        assert same(found_RC + 0.0, cut(expected_RC, x_RC.dtype) + 0.0), (text, x_RC.shape)  # -0 is 0
    return 2


def compare_weights(text: str) -> int:
    site, weight_RC = parse_site(text, False), activations(7, 100, torch.float32)
    basis = None if site.granularity == "row" else step_basis(weight_RC, site, None)
    assert same(site_rows(weight_RC, site, False, basis), site_value(weight_RC, text, False, None)), text
    return 1


def compare_nan() -> int:
    """A row with NaN, or with an infinite value, does not become numbers."""
    for text in ("int8", "ternary", "binary", "unit-int8", "ternary-leastsq", "twosided8"):
        x_RC = activations(4, 8, torch.float32)
        x_RC[3, 5] = torch.nan
        assert site_rows(x_RC, parse_site(text, True), True)[3].isnan().any(), text
    return 6


def main() -> None:
    equal = sum(compare_weights(text) for text in WEIGHTS) + compare_nan()
    for rows, columns, dtype in ((5, 64, torch.float32), (40, 100, torch.bfloat16), (3, 7, torch.float32)):
        x_RC = activations(rows, columns, dtype)
        equal += sum(compare_activations(text, x_RC) for text in texts())
    print(f"{equal} equal")


if __name__ == "__main__":
    main()
