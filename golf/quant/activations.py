"""From a configuration to a model whose activations pass through the quantizers that it names."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from golf.config.config import ModelConfig
from golf.config.site_quantizers import parse_site
from golf.model.gpt import GPT
from golf.model.layers import ActivationSite
from golf.quant.site_grid import quantize_activation


def quantized_gpt(config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> GPT:
    """A GPT without weights yet, with its activation quantizers."""
    return install_activation_quantizers(GPT(config, compute_dtype))


def install_activation_quantizers(model: GPT) -> GPT:
    """`model`, every activation site that its configuration names with its quantizer."""
    for module in model.modules():
        if isinstance(module, ActivationSite) and (site := parse_site(module.quantizer, activation=True)):
            module.quantize = partial(quantize_activation, site=site)
    return model


def count_activation_quantizers(model: GPT) -> int:
    """How many there are in a forward pass."""
    return sum(isinstance(module, ActivationSite) and module.quantize is not None for module in model.modules())


@contextmanager
def without_activation_quantizers(model: GPT) -> Iterator[None]:
    """Within it, activations are used as they are: to measure what their quantizers change."""
    modules = [module for module in model.modules() if isinstance(module, ActivationSite) and module.quantize]
    held = [(module, module.quantizer, module.quantize) for module in modules]
    for module in modules:
        module.quantizer, module.quantize = "", None
    try:
        yield
    finally:
        for module, quantizer, quantize in held:
            module.quantizer, module.quantize = quantizer, quantize
