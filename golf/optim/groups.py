"""Which parameter learns by which rule: matrices by Muon, tables and vectors by AdamW."""

import torch
import torch.distributed as dist
from torch import Tensor

from golf.config.config import OptimConfig
from golf.model.gpt import GPT
from golf.optim.muon import Muon, newton_schulz
from golf.runtime import Runtime


def split_parameters(model: GPT) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(matrices of Linear layers, embedding tables, everything smaller), each in the order of the model; frozen
    parameters are in none."""
    matrices, tables, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in ("tok_emb.weight", "bigram.embed.weight", "head.weight"):
            tables.append(parameter)
        elif name.endswith(".weight"):
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    return matrices, tables, vectors


class Optimizers:
    """The optimizers of a model under one learning-rate scale and one gradient clip."""

    def __init__(self, model: GPT, config: OptimConfig, runtime: Runtime):
        matrices, tables, vectors = split_parameters(model)
        compile_muon = runtime.compiles and runtime.device.type == "cuda"  # five shapes take a minute on a CPU
        adam = dict(betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
        self.muon = Muon(
            matrices,
            config.matrix_lr,
            config.muon_momentum_start,
            config.muon_weight_decay,
            config.muon_ns_steps,
            runtime.rank,
            runtime.world_size,
            torch.compile(newton_schulz, dynamic=False, fullgraph=True) if compile_muon else newton_schulz,
        )
        self.all = [
            torch.optim.AdamW(tables, lr=config.embed_lr, weight_decay=config.embed_weight_decay, **adam),
            self.muon,
            torch.optim.AdamW(vectors, lr=config.scalar_lr, weight_decay=config.scalar_weight_decay, **adam),
        ]
        self.parameters = [*tables, *matrices, *vectors]
        self.base_lr = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.all]
        self.clip_norm = config.grad_clip_norm

    def step(self, lr_scale: float, muon_momentum: float) -> Tensor | None:
        """Clip, update every parameter, forget the gradients; returns their norm where it is clipped."""
        for optimizer, base in zip(self.all, self.base_lr, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * lr_scale
        for group in self.muon.param_groups:
            group["momentum"] = muon_momentum
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm) if self.clip_norm > 0 else None
        for optimizer in self.all:
            optimizer.step()
        self.zero_grad()
        return norm

    def state_tensors(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """All state by optimizer.<parameter>.<entry>; of Muon, what this rank holds."""
        states = [state for optimizer in self.all for state in optimizer.state.items()]
        return {f"optimizer.{names[p]}.{entry}": value for p, values in states for entry, value in values.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor], names: dict[Tensor, str]) -> None:
        """Inverse of state_tensors; entries of every rank may be among them."""
        for optimizer in self.all:
            groups = [group["params"] for group in optimizer.param_groups]
            if optimizer is self.muon:  # momentum of another rank's matrix would grow old here, and be saved again
                groups = [matrices[self.muon.rank :: self.muon.world_size] for matrices in groups]
            for parameter in (p for group in groups for p in group):
                start = f"optimizer.{names[parameter]}."
                own = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
                optimizer.state[parameter].update({key: value.to(parameter.device) for key, value in own.items()})

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)


def average_gradients(parameters: list[Tensor], world_size: int) -> None:
    """Replace every gradient by its mean over ranks, in one fp32 message."""
    if world_size == 1:
        return
    gradients = [parameter.grad for parameter in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(world_size)
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
