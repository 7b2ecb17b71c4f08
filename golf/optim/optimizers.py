"""Assigns each parameter its optimizer: matrices train by Muon, tables and vectors by AdamW.

PARAMETER_GROUPS defines the groups as data: a module names its weight's group, a group how its optimizer is built. The
gradients of all lie in one tensor, so that reducing and clipping them are a few kernels each. Muon takes momentum, then
the nearest (semi-)orthogonal matrix (Jordan et al. 2024, kellerjordan.github.io/posts/muon); it stacks matrices, so
that the Newton-Schulz iteration is a few large batched products; under torchrun each rank iterates on its share.

M matrices of a stack, R rows, C columns, N numbers of several tensors, K rows of them.
"""

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from golf.config.features import Feature, StepFacts, register_feature
from golf.config.training import OptimConfig
from golf.model.gpt import GPT
from golf.runtime import Runtime

gather_updates = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Has a new name since torch 2.13, which warns of the old one."""


BY_MUON_ITERATION: dict[str, tuple[tuple[float, float, float], ...]] = {
    "quintic": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        (8.15655, -22.48329, 15.87877), (4.04293, -2.80892, 0.50002), (3.89167, -2.77248, 0.50606),
        (3.28575, -2.36813, 0.46449), (2.34655, -1.70978, 0.42324),
    ),
}  # fmt: skip
"""Coefficients a, b, c of each iteration a X + b (X X^T) X + c (X X^T)^2 X; the last ones go on. quintic: Jordan et al.
2024; polar_express: Amsel et al. 2025 (arXiv 2505.16932), by parameter-golf pull request 1787."""


def newton_schulz(x_MRC: Tensor, steps: int, iteration: str = "quintic") -> Tensor:
    """Drives all singular values of every matrix towards 1 with quintic iterations.

    Costs least where R <= C. Zeros around a matrix stay zeros.
    """
    x_MRC = x_MRC / (x_MRC.norm(dim=2).norm(dim=1)[:, None, None] + 1e-7)
    coefficients = BY_MUON_ITERATION[iteration]
    for step in range(steps):
        a, b, c = coefficients[min(step, len(coefficients) - 1)]
        gram_MRR = x_MRC @ x_MRC.mT
        diagonal_RR = x_MRC.new_full((x_MRC.size(1),), a).diag()
        x_MRC = (diagonal_RR + b * gram_MRR + c * (gram_MRR @ gram_MRR)) @ x_MRC
    return x_MRC


def equal_rows(x_MRC: Tensor, turned_M11: Tensor) -> Tensor:
    """Returns a stack whose matrices have rows of norm 1, as they stand in the model: those that are transposed in the
    stack have columns of norm 1 (MuonEq-R, parameter-golf pull request 1260)."""
    norms_MRC = torch.where(turned_M11, x_MRC.norm(dim=1, keepdim=True), x_MRC.norm(dim=2, keepdim=True))
    return x_MRC / (norms_MRC + 1e-7)


def turned(like: Tensor, x_RC: Tensor) -> Tensor:
    """Returns `x_RC`, transposed where `like` has more rows than columns."""
    return x_RC.mT if like.size(0) > like.size(1) else x_RC


def place_of(like: Tensor, x_RC: Tensor) -> Tensor:
    """Returns the view of a matrix of a stack, which may be larger, that holds a matrix in the shape of `like`."""
    rows, columns = sorted(like.shape)
    return turned(like, x_RC.narrow(0, 0, rows).narrow(1, 0, columns))


def orthogonal_updates(
    stacks: list[tuple[list[Tensor], Tensor, Tensor]], momentum: Tensor, optim: OptimConfig, padding_N: Tensor
) -> Tensor:
    """Adds each stack of gradients to its momentum_MRC; returns the orthogonalised updates one after the other, and
    `padding_N`, in whose dtype they are computed."""
    parts = []
    for own, momentum_MRC, turned_M11 in stacks:
        _, rows, columns = momentum_MRC.shape
        nesterov_MRC = torch.stack(
            [F.pad(turned(x, x), (0, columns - max(x.shape), 0, rows - min(x.shape))) for x in own]
        )
        momentum_MRC.mul_(momentum).add_(nesterov_MRC)
        nesterov_MRC.addcmul_(momentum_MRC, momentum)
        if optim.muon_row_norm:
            nesterov_MRC = equal_rows(nesterov_MRC, turned_M11)
        update_MRC = newton_schulz(nesterov_MRC.to(padding_N.dtype), optim.muon_ns_steps, optim.muon_iteration)
        parts += [(max(x.shape) / x.size(1)) ** 0.5 * x.flatten() for x in map(place_of, own, update_MRC)]
    return torch.cat([*parts, padding_N])


def compiled_on_gpu(function: Callable, runtime: Runtime) -> Callable:
    """Returns a function compiled, but for a CPU, where it takes a minute and saves nothing, as it is."""
    return torch.compile(function, dynamic=False, fullgraph=True) if runtime.compiles_scoring else function


class Muon(torch.optim.SGD):
    """Updates W <- (1 - lr wd) W - lr sqrt(max(1, R/C)) NewtonSchulz(Nesterov momentum of the gradient).

    Gradients must be averaged over ranks already. Iterates in bf16 on CUDA, where it is fastest and one stack for all
    shapes the fewest kernels; in fp32 and by shapes on CPU. SGD does the last part of the rule, but not fused:
    that would hide from grids that a weight has changed. A step needs the group's "muon_momentum".
    """

    def __init__(self, matrices: list[Tensor], config: OptimConfig, runtime: Runtime):
        matrices = sorted(matrices, key=lambda matrix: sorted(matrix.shape), reverse=True)
        self.config, self.ranks = config, runtime.world_size
        self.update = compiled_on_gpu(orthogonal_updates, runtime)
        shares = [matrices[rank :: self.ranks] for rank in range(self.ranks)]
        sizes = [sum(map(Tensor.numel, share)) for share in shares]
        for share, size in zip(shares, sizes, strict=True):  # all ranks send equally much
            share.append(torch.zeros(max(sizes) - size, device=runtime.device))
        *own, padding_N = shares[runtime.rank]
        self.order, self.padding_N = sum(shares, []), padding_N.to(runtime.compute_dtype)
        super().__init__(self.order, config.matrix_lr, weight_decay=config.muon_weight_decay, foreach=True)
        self.stacks = []
        for _, group in groupby(own, lambda matrix: matrix.is_cuda or sorted(matrix.shape)):
            stack = list(group)
            rows, columns = min(stack[0].shape), max(max(matrix.shape) for matrix in stack)
            momentum_MRC = torch.zeros(len(stack), rows, columns, device=runtime.device)
            turned_M11 = torch.stack([torch.full((1, 1), len(x) > x.size(1), device=runtime.device) for x in stack])
            self.stacks.append((stack, momentum_MRC, turned_M11))
            for matrix, x_RC in zip(stack, momentum_MRC, strict=True):
                self.state[matrix]["momentum"] = place_of(matrix, x_RC)

    @torch.no_grad()
    def step(self):
        gradients = [([matrix.grad for matrix in stack], *rest) for stack, *rest in self.stacks]
        momentum = torch.tensor(self.param_groups[0]["muon_momentum"])
        updates_N = own_N = self.update(gradients, momentum, self.config, self.padding_N)
        if self.ranks > 1:
            updates_N = own_N.new_empty(self.ranks * len(own_N))
            gather_updates(updates_N, own_N)
        set_gradients(self.order, updates_N.float())
        super().step()


def set_gradients(parameters: list[Tensor], flat_N: Tensor) -> None:
    """Makes parts of a flat tensor, one after the other, the gradients of parameters."""
    parts = flat_N.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def muon_momentum(progress: float, config: OptimConfig) -> float:
    """Returns Muon's momentum: linear from its initial to its final value over a share of the budget."""
    warmup = config.muon_momentum_warmup_fraction
    share = min(progress / warmup, 1.0) if warmup > 0 else 1.0
    return (1 - share) * config.muon_momentum_start + share * config.muon_momentum


def build_adamw(parameters: list[Tensor], lr: float, weight_decay: float, config: OptimConfig) -> torch.optim.AdamW:
    """Returns AdamW with the betas and epsilon that all its groups share."""
    betas, eps = (config.beta1, config.beta2), config.adam_eps
    return torch.optim.AdamW(parameters, lr, betas, eps, weight_decay, fused=True)


PARAMETER_GROUPS = {
    "table": lambda own, c, runtime: build_adamw(own, c.embed_lr, c.embed_weight_decay, c),
    "matrix": Muon,
    "vector": lambda own, c, runtime: build_adamw(own, c.scalar_lr, c.scalar_weight_decay, c),
}
"""Makes the optimizer of each group that a module may name for its weight; parameters of modules that name none are in
"vector". The order is that of gradients in their message, and of updates."""


def parameters_of_group(model: GPT, trains_as: str) -> list[Tensor]:
    """Returns a group's parameters in the order of the model; frozen ones are in no group."""
    modules = [module for module in model.modules() if getattr(module, "trains_as", "vector") == trains_as]
    return [part for module in modules for part in module.parameters(recurse=False) if part.requires_grad]


class Optimizers:
    """Runs a model's optimizers under one learning-rate scale and one gradient clip."""

    def __init__(self, model: GPT, config: OptimConfig, runtime: Runtime):
        self.config, self.runtime, self.parameters = config, runtime, []
        self.all: list[torch.optim.Optimizer] = []
        for name, build in PARAMETER_GROUPS.items():
            own = parameters_of_group(model, name)
            self.parameters += own
            self.all.append(build(own, config, runtime))
        total = sum(map(Tensor.numel, self.parameters))
        self.gradients_KN = torch.zeros(total // 4096 + 1, 4096, device=runtime.device)
        self.message_N = self.gradients_KN.flatten().narrow(0, 0, total)

    def sum_gradients(self) -> None:
        """Sums the gradients over ranks in one fp32 message, and leaves views of it in their place."""
        torch.cat([parameter.grad.flatten() for parameter in self.parameters], out=self.message_N)
        self.runtime.sum_over_ranks(self.message_N)
        set_gradients(self.parameters, self.message_N)

    def step(self, progress: float, lr_scale: float) -> Tensor | None:
        """Sums gradients over ranks, clips them, updates every parameter and clears the gradients; returns their norm
        where it is clipped."""
        momentum = muon_momentum(progress, self.config)
        for optimizer in self.all:  # AdamW does not look at momentum
            optimizer.param_groups[0] |= {"lr": optimizer.defaults["lr"] * lr_scale, "muon_momentum": momentum}
        self.sum_gradients()
        clip = self.config.grad_clip_norm
        norm = compiled_on_gpu(clip_gradients, self.runtime)(self.gradients_KN, clip) if clip > 0 else None
        for optimizer in self.all:
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def state_tensors(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """Returns all state as optimizer.<parameter>.<entry>; of Muon's, only what this rank holds."""
        return {
            f"optimizer.{names[parameter]}.{entry}": value.contiguous()
            for optimizer in self.all
            for parameter, state in optimizer.state.items()
            for entry, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor], names: dict[Tensor, str]) -> None:
        """Restores state from state_tensors' output, which may include entries of every rank."""
        for optimizer in self.all:
            # Another rank's momentum would become stale here and be saved again.
            held = optimizer.state if isinstance(optimizer, Muon) else optimizer.param_groups[0]["params"]
            for parameter in held:
                start = f"optimizer.{names[parameter]}."
                for key, value in tensors.items():
                    if key.startswith(start):
                        optimizer.state[parameter].setdefault(
                            key.removeprefix(start), value.to(parameter.device)
                        ).copy_(value)


def clip_gradients(gradients_KN: Tensor, most: float) -> Tensor:
    """Scales gradients to a norm of at most `most`; returns the norm that they had."""
    norm = gradients_KN.norm(dim=1).norm()  # in one go, an fp32 sum of a million squares is off by 1e-5
    gradients_KN.mul_((most / (norm + 1e-6)).clamp(max=1.0))
    return norm


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
