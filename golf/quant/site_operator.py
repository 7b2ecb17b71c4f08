"""Makes a site's quantizer an operator with a gradient, and uses it on activations and weights.

R rows, C columns.
"""

from typing import Any

import torch
from torch import Tensor

from golf.config.site_quantizers import SiteQuantizer, parse_site
from golf.quant.site_grid import gradient_through_step, in_one_kernel, site_grid, site_rows, step_basis, surrogate_slope

SITE_CALLS = {False: 0, True: 0}
"""Calls of the operator in this process, for weights (False) and activations (True)."""


def weight_calls() -> int:
    """Returns the calls for weights so far."""
    return SITE_CALLS[False]


def activation_calls() -> int:
    """Returns the calls for activations so far; a compiled graph calls the operator too, so they show what it really
    does."""
    return SITE_CALLS[True]


# Custom operators, which torch.compile calls but does not rewrite: inductor keeps the fp16 rounding of a scale in fp32
# and approximates the division, and then nearly every value differs from the exported one.
@torch.library.custom_op("golf::site_value", mutates_args=())
def site_value(x_RC: Tensor, text: str, activation: bool, gamma: Tensor | None) -> Tensor:
    """Returns values on the grid in the dtype of x_RC, with the gradient that `text` names."""
    SITE_CALLS[activation] += 1
    site = parse_site(text, activation)
    if in_one_kernel(x_RC, site, backward=False):
        basis = None if site.granularity == "row" else step_basis(x_RC, site, gamma)
        return site_rows(x_RC, site, activation, basis)
    grid = site_grid(x_RC.float(), site, activation, gamma)
    return (grid.codes_RC * grid.spread(grid.scale)).to(x_RC.dtype)


@site_value.register_fake
def site_value_shape(x_RC: Tensor, text: str, activation: bool, gamma: Tensor | None) -> Tensor:
    return torch.empty_like(x_RC, memory_format=torch.contiguous_format)


@torch.library.custom_op("golf::site_gradient", mutates_args=())
def site_gradient(
    g_RC: Tensor, x_RC: Tensor, text: str, activation: bool, gamma: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of `site_value` by x_RC and by gamma (0 where the operator has no gamma)."""
    site, dtype = parse_site(text, activation), x_RC.dtype
    dgamma = x_RC.new_zeros((), dtype=torch.float32)
    if in_one_kernel(x_RC, site, backward=True):
        return site_rows(x_RC, site, activation, None, g_RC), dgamma
    x_RC, g_RC = x_RC.float(), g_RC.float()
    grid = site_grid(x_RC, site, activation, gamma)
    step, scale = grid.spread(grid.step), grid.spread(grid.scale)
    u = x_RC / step
    by_codes_RC = g_RC * scale * surrogate_slope(u, site)
    dx_RC = by_codes_RC / step
    if site.attached:
        through, dgamma = gradient_through_step(g_RC * grid.codes_RC, -by_codes_RC * u / step, x_RC, grid, site, gamma)
        dx_RC = dx_RC + through
    return dx_RC.to(dtype), dgamma


@site_gradient.register_fake
def site_gradient_shape(
    g_RC: Tensor, x_RC: Tensor, text: str, activation: bool, gamma: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_RC, memory_format=torch.contiguous_format), x_RC.new_empty((), dtype=torch.float32)


def keep_site_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x_RC, ctx.text, ctx.activation, gamma = inputs
    ctx.save_for_backward(x_RC, gamma)


def site_backward(ctx: Any, g_RC: Tensor) -> tuple[Tensor | None, ...]:
    x_RC, gamma = ctx.saved_tensors
    if is_plain(parse_site(ctx.text, ctx.activation)):
        return g_RC.to(x_RC.dtype), None, None, None
    dx_RC, dgamma = site_gradient(g_RC.contiguous(), x_RC, ctx.text, ctx.activation, gamma)
    return dx_RC, None, None, None if gamma is None else dgamma.view_as(gamma)


def is_plain(site: SiteQuantizer) -> bool:
    """Returns whether the gradient is the identity: straight through, with step and scale equal, and detached."""
    return site.gradient == "ste" and not site.attached and site.scale != "leastsq" and site.threshold == 0.5


site_value.register_autograd(site_backward, setup_context=keep_site_inputs)


def quantize_activation(x: Tensor, site: SiteQuantizer) -> Tensor:
    """Returns `x` on the grid of each token (or a token's head: the last axis), in its own dtype."""
    squashed = torch.tanh(x) if site.squash == "tanh" else torch.sigmoid(x) if site.squash == "sigmoid" else x
    return site_value(squashed.reshape(-1, x.size(-1)), site.text, True, None).view(x.shape)


def quantize_weight(weight_RC: Tensor, site: SiteQuantizer, shared: tuple[Tensor, ...] = ()) -> Tensor:
    """Returns fp32 weights on the grid that export keeps; `shared` holds all the matrices that share a step."""
    return site_value(weight_RC, site.text, False, shared_gamma(shared) if shared else None)


def shared_gamma(weights: tuple[Tensor, ...]) -> Tensor:
    """Returns the mean magnitude over several matrices, in fp16, as unquantized matrices are exported."""
    return sum(weight.half().float().abs().sum() for weight in weights) / sum(weight.numel() for weight in weights)
