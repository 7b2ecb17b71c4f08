"""Assigns each parameter its optimizer: matrices train by Muon, tables and vectors by AdamW.

PARAMETER_GROUPS defines the groups as data: a module names its weight's group, and a group defines how its optimizer is
built and which of its settings change during training. Muon takes momentum, then the nearest (semi-)orthogonal matrix
(Jordan et al. 2024, kellerjordan.github.io/posts/muon); it stacks matrices of one shape, so that the Newton-Schulz
iteration is a few large batched products; under torchrun each rank iterates on its share.

M matrices of a shape, R rows, C columns.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from golf.config.features import Feature, StepFacts, register_feature
from golf.config.training import OptimConfig
from golf.model.gpt import GPT
from golf.runtime import Runtime

gather_stacks = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Has a new name since torch 2.13, which warns of the old one."""
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(update_MRC: Tensor, steps: int) -> Tensor:
    """Drives all singular values of every matrix towards 1 (into about 0.7 to 1.2) with a quintic iteration.

    Computes in the dtype of `update_MRC`: bf16 on CUDA, where it is fastest, fp32 on CPU, where bf16 is slower.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    tall = update_MRC.size(-2) > update_MRC.size(-1)
    x_MRC = update_MRC.mT if tall else update_MRC
    x_MRC = x_MRC / (x_MRC.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram_MRR = x_MRC @ x_MRC.mT
        polynomial_MRR = b * gram_MRR + c * (gram_MRR @ gram_MRR)
        x_MRC = a * x_MRC + polynomial_MRR @ x_MRC
    return x_MRC.mT if tall else x_MRC


class Muon(torch.optim.Optimizer):
    """Updates W <- (1 - lr wd) W - lr sqrt(max(1, R/C)) NewtonSchulz(Nesterov momentum of the gradient).

    Gradients must be averaged over ranks already. `momentum` may be changed between steps.
    """

    def __init__(
        self,
        matrices: list[Tensor],
        lr: float,
        momentum: float,
        weight_decay: float,
        ns_steps: int,
        rank: int = 0,
        world_size: int = 1,
        orthogonalize: Callable[[Tensor, int], Tensor] = newton_schulz,
    ):
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps)
        super().__init__([{"params": stack} for stack in by_shape.values()], defaults)
        self.rank, self.world_size, self.orthogonalize = rank, world_size, orthogonalize

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            updates = self.gather_updates(self.own_updates(group), len(group["params"]))
            rows, columns = group["params"][0].shape
            scale = max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(group["params"], updates, alpha=-group["lr"] * scale)

    def held_parameters(self) -> list[Tensor]:
        """Returns the matrices whose momentum this rank keeps: every world_size-th of each shape, from `rank` on."""
        return [matrix for group in self.param_groups for matrix in group["params"][self.rank :: self.world_size]]

    def own_updates(self, group: dict) -> Tensor:
        """Returns orthogonalised updates_MRC of this rank's matrices: every world_size-th, from `rank` on."""
        own, first = group["params"][self.rank :: self.world_size], group["params"][0]
        dtype = torch.bfloat16 if first.is_cuda else torch.float32  # equal on every rank, empty messages included
        if not own:
            return first.new_empty(0, *first.shape, dtype=dtype)
        gradients = [matrix.grad for matrix in own]
        for matrix in own:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        buffers = [self.state[matrix]["momentum"] for matrix in own]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        nesterov_MRC = torch.stack(torch._foreach_add(gradients, buffers, alpha=group["momentum"]))
        return self.orthogonalize(nesterov_MRC.to(dtype), group["ns_steps"])

    def gather_updates(self, own_MRC: Tensor, count: int) -> list[Tensor]:
        """Returns the updates of all `count` matrices, in their order, as fp32."""
        if self.world_size == 1:
            return list(own_MRC.float())
        share = -(-count // self.world_size)
        padded_MRC = F.pad(own_MRC, (0, 0, 0, 0, 0, share - own_MRC.size(0)))
        everyone_MRC = own_MRC.new_empty(self.world_size * share, *own_MRC.shape[1:])
        gather_stacks(everyone_MRC, padded_MRC)
        updates = everyone_MRC.float().unbind()
        return [updates[i % self.world_size * share + i // self.world_size] for i in range(count)]


def muon_momentum(progress: float, config: OptimConfig) -> float:
    """Returns Muon's momentum: linear from its initial to its final value over a share of the budget."""
    warmup = config.muon_momentum_warmup_fraction
    share = min(progress / warmup, 1.0) if warmup > 0 else 1.0
    return (1 - share) * config.muon_momentum_start + share * config.muon_momentum


def build_muon(matrices: list[Tensor], config: OptimConfig, runtime: Runtime) -> Muon:
    """Returns the matrices' optimizer; compiles its iteration on CUDA only (five shapes take a minute on a CPU)."""
    compiled = runtime.compiles and runtime.device.type == "cuda"
    return Muon(
        matrices, config.matrix_lr, config.muon_momentum_start, config.muon_weight_decay, config.muon_ns_steps,
        runtime.rank, runtime.world_size,
        torch.compile(newton_schulz, dynamic=False, fullgraph=True) if compiled else newton_schulz,
    )  # fmt: skip


def build_adamw(parameters: list[Tensor], lr: float, weight_decay: float, config: OptimConfig) -> torch.optim.AdamW:
    """Returns AdamW with the betas and epsilon that all its groups share."""
    betas = config.beta1, config.beta2
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=betas, eps=config.adam_eps, fused=True)


@dataclass(frozen=True)
class ParameterGroup:
    """Describes parameters that learn by one rule."""

    trains_as: str
    """Group name that a module gives its weight; parameters of modules that give none are in "vector"."""
    build: Callable[[list[Tensor], OptimConfig, Runtime], torch.optim.Optimizer]
    settings: Callable[[float, OptimConfig], dict[str, float]] = lambda progress, config: {}
    """Returns settings of the optimizer, beside the learning rate, at a share of the budget."""


PARAMETER_GROUPS = (
    ParameterGroup("table", lambda own, c, runtime: build_adamw(own, c.embed_lr, c.embed_weight_decay, c)),
    ParameterGroup("matrix", build_muon, lambda progress, config: {"momentum": muon_momentum(progress, config)}),
    ParameterGroup("vector", lambda own, c, runtime: build_adamw(own, c.scalar_lr, c.scalar_weight_decay, c)),
)
"""Groups in the order in which gradients are clipped and parameters updated."""


def parameters_of_group(model: GPT, trains_as: str) -> list[Tensor]:
    """Returns a group's parameters in the order of the model; frozen ones are in no group."""
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in model.named_parameters()}
    named = [(getattr(owners[name], "trains_as", "vector"), part) for name, part in model.named_parameters()]
    return [parameter for group, parameter in named if group == trains_as and parameter.requires_grad]


class Optimizers:
    """Runs a model's optimizers under one learning-rate scale and one gradient clip."""

    def __init__(self, model: GPT, config: OptimConfig, runtime: Runtime):
        self.config, self.parameters = config, []
        self.all: list[tuple[ParameterGroup, torch.optim.Optimizer]] = []
        for group in PARAMETER_GROUPS:
            own = parameters_of_group(model, group.trains_as)
            self.parameters += own
            self.all.append((group, group.build(own, config, runtime)))
        self.base_lr = [[part["lr"] for part in optimizer.param_groups] for _, optimizer in self.all]

    def step(self, progress: float, lr_scale: float) -> Tensor | None:
        """Clips gradients, updates every parameter and clears the gradients; returns their norm where it is clipped."""
        for (group, optimizer), base in zip(self.all, self.base_lr, strict=True):
            for part, lr in zip(optimizer.param_groups, base, strict=True):
                part |= {"lr": lr * lr_scale} | group.settings(progress, self.config)
        clip = self.config.grad_clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip, foreach=True) if clip > 0 else None
        for _, optimizer in self.all:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def state_tensors(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """Returns all state as optimizer.<parameter>.<entry>; of Muon's, only what this rank holds."""
        states = [state for _, optimizer in self.all for state in optimizer.state.items()]
        return {f"optimizer.{names[p]}.{entry}": value for p, values in states for entry, value in values.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor], names: dict[Tensor, str]) -> None:
        """Restores state from state_tensors' output, which may include entries of every rank."""
        for _, optimizer in self.all:
            if isinstance(optimizer, Muon):  # another rank's momentum would become stale here and be saved again
                held = optimizer.held_parameters()
            else:
                held = [parameter for part in optimizer.param_groups for parameter in part["params"]]
            for parameter in held:
                start = f"optimizer.{names[parameter]}."
                own = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
                optimizer.state[parameter].update({key: value.to(parameter.device) for key, value in own.items()})


def average_gradients(parameters: list[Tensor], world_size: int) -> None:
    """Replaces every gradient by its mean over ranks, in one fp32 message."""
    if world_size == 1:
        return
    gradients = [parameter.grad for parameter in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(world_size)
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])


def momentum_acts(config: Any, facts: StepFacts) -> tuple[bool, str]:
    """Returns whether the momentum was still below its final value in a step, and the effect."""
    momentum = muon_momentum(facts.progress, config.optim)
    rises = momentum != config.optim.muon_momentum
    return rises, f"momentum from {config.optim.muon_momentum_start} to {momentum:.4f}" if rises else ""


def clip_acts(config: Any, facts: StepFacts) -> tuple[bool, str]:
    """Returns whether a step's gradients were clipped, and the effect."""
    norm, most = facts.gradient_norm, config.optim.grad_clip_norm
    cut = norm is not None and norm > most
    return cut, f"norm {norm:.3f} cut to {most}" if cut else ""


register_feature(
    Feature(
        "muon_momentum_warmup",
        lambda config: (
            config.optim.muon_momentum_warmup_fraction > 0
            and config.optim.muon_momentum_start != config.optim.muon_momentum
        ),
        "set muon_momentum_warmup_fraction=0",
        momentum_acts,
    )
)
register_feature(
    Feature(
        "grad_clip", lambda config: config.optim.grad_clip_norm > 0, "lower grad_clip_norm, or set it to 0", clip_acts
    )
)
