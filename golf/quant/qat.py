"""Installs and removes the grids of quantization-aware training on weights and activations."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from golf.config.features import Feature, Verdict, register_feature
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.config.site_quantizers import activation_sites, parse_site
from golf.model.gpt import GPT
from golf.model.layers import ActivationSite, Linear, acts_always
from golf.quant.grid import RowGrids, through_grid
from golf.quant.site_operator import activation_calls, quantize_activation, quantize_weight, weight_calls
from golf.quant.tensor_classes import FP16_BITS, bits_of, shared_weights, weight_site
from golf.runtime import Runtime


def quantized_gpt(config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> GPT:
    """Returns a GPT with its activation quantizers, before its weights are loaded."""
    return install_activation_quantizers(GPT(config, compute_dtype))


def load_gpt(config: ModelConfig, state: Mapping[str, Tensor], runtime: Runtime) -> GPT:
    """Returns a GPT with these weights and its activation quantizers, on the runtime's device in its dtype."""
    model = quantized_gpt(config, runtime.compute_dtype)
    model.load_state_dict(state)
    return model.to(runtime.device)


def install_activation_quantizers(model: GPT) -> GPT:
    """Installs a quantizer in every activation site that the model's configuration names; returns the model."""
    if activation_sites(model.config):
        for module in model.modules():
            if isinstance(module, ActivationSite) and (site := parse_site(module.quantizer, activation=True)):
                module.quantize = partial(quantize_activation, site=site)
    return model


def count_activation_quantizers(model: GPT) -> int:
    """Counts the activation quantizers of a forward pass."""
    return sum(isinstance(module, ActivationSite) and module.quantize is not None for module in model.modules())


def verify_activation_quantizers(forward: Callable, model: GPT, batch: tuple) -> Verdict:
    """Verifies that the compiled step calls each activation quantizer once and that they change the loss.

    Any change is enough: 8 bits change less than what bf16 rounds.
    """
    before, sites = activation_calls(), count_activation_quantizers(model)
    forward(*batch).item()
    calls = activation_calls() - before
    with torch.no_grad():
        on = model(*batch).item()
        with without_activation_quantizers(model):
            off = model(*batch).item()
    effect = f"{calls} calls of {sites} quantizers in a compiled step, loss with them {on:.6f}, without {off:.6f}"
    return calls == sites and on != off, effect


@contextmanager
def without_activation_quantizers(model: GPT) -> Iterator[None]:
    """Uses activations unquantized within the context, to measure what their quantizers change."""
    modules = [module for module in model.modules() if isinstance(module, ActivationSite) and module.quantize]
    held = [(module, module.quantizer, module.quantize) for module in modules]
    for module in modules:
        module.quantizer, module.quantize = "", None
    try:
        yield
    finally:
        for module, quantizer, quantize in held:
            module.quantizer, module.quantize = quantizer, quantize


class FakeQuantizable(Protocol):
    """Uses `weight` through `fake_quantize` when that is set."""

    weight: nn.Parameter
    fake_quantize: Callable[[Tensor], Tensor] | None


def fake_quantizable_modules(model: nn.Module) -> Iterator[tuple[str, FakeQuantizable]]:
    for path, module in model.named_modules():
        if hasattr(module, "fake_quantize"):
            yield path, cast(FakeQuantizable, module)


def install_fake_quantization(
    model: GPT, quant: QuantConfig, tensor_bits: Mapping[str, int] | None = None
) -> tuple[list[str], RowGrids]:
    """Makes training use the grid of export; returns the names of the weights that it acts on, and the grids that have
    to be renewed before a compiled step.

    Weights that are exported as fp16 are left alone; those in `tensor_bits` get those bits, except weights for which
    the configuration names a quantizer.
    """
    names, modules, grids = [], dict(fake_quantizable_modules(model)), RowGrids()
    for path, module in modules.items():
        name = f"{path}.weight"
        bits = (tensor_bits or {}).get(name) or bits_of(name, module.weight.shape, quant)
        if site := weight_site(name, quant):
            weights = {f"{other}.weight": part.weight for other, part in modules.items()}
            shared = tuple(shared_weights(name, site, weights))
            module.fake_quantize = partial(quantize_weight, site=site, shared=shared)
        elif bits < FP16_BITS:
            dtype = model.compute_dtype if isinstance(module, Linear) else torch.float32  # a table's gradient is a sum
            values_RC = grids.add(module.weight, bits, dtype)
            module.fake_quantize = partial(through_grid, values_RC=values_RC, grids=grids)
        if module.fake_quantize:
            names.append(name)
    return names, grids


def remove_fake_quantization(model: nn.Module) -> None:
    """Removes fake quantization: weights are used as they are."""
    for _, module in fake_quantizable_modules(model):
        module.fake_quantize = None


@contextmanager
def spoilt(weights: list[Tensor]) -> Iterator[None]:
    """Makes weights NaN within the context, by a tensor beside each, so that grids don't take them for changed."""
    held = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.data.fill_(torch.nan)
    try:
        yield
    finally:
        for weight, before in zip(weights, held, strict=True):
            weight.data.copy_(before)


def verify_fake_quantization(forward: Callable, model: GPT, batch: tuple) -> Verdict:
    """Verifies that the compiled step takes every matrix that is to train on a grid from there, and that the grid moves
    weights.

    Losses of an untrained model can't show it: in bf16 they change by as much as rounding does (docs/LOG.md). With the
    weights themselves spoilt the loss is finite only if none of them is read; a site's operator counts its calls.
    """
    modules = [module for _, module in fake_quantizable_modules(model) if module.fake_quantize]
    on_rows = [module.weight for module in modules if module.fake_quantize.func is through_grid]
    with torch.no_grad():
        moved = sum(int((module.effective_weight() != module.weight).sum()) for module in modules)
    before = weight_calls()
    with spoilt(on_rows):
        loss = forward(*batch).item()
    grids = len(on_rows) + weight_calls() - before
    effect = f"loss {loss:.4f} from {grids} of {len(modules)} grids, which move {moved:,} weights"
    return math.isfinite(loss) and moved > 0 and grids == len(modules) > 0, effect


register_feature(
    Feature(
        "qat", lambda config: config.quant.qat_enabled, "train longer, or lower qat_start",
        lambda config, facts: (facts.fake_quantized, ""), verify_step=verify_fake_quantization, verified_at_start=True,
    )
)  # fmt: skip
register_feature(
    Feature(
        "activation_quantizers", lambda config: bool(activation_sites(config.model)), "leave act_* out",
        acts_always, verify_step=verify_activation_quantizers,
    )
)  # fmt: skip
