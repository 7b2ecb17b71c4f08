"""Muon: momentum, then the nearest (semi-)orthogonal matrix (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

M matrices of a shape, R rows, C columns. Matrices of one shape are handled as one stack, so that the
Newton-Schulz iteration is a few large batched products; under torchrun each rank iterates on its share.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(update_MRC: Tensor, steps: int) -> Tensor:
    """Drive all singular values of every matrix towards 1 (into about 0.7 to 1.2) with a quintic iteration.

    Computed in the dtype of `update_MRC`: bf16 on CUDA, where it is fastest, fp32 on CPU, where bf16 is slower.
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
    """W <- (1 - lr wd) W - lr sqrt(max(1, R/C)) NewtonSchulz(Nesterov momentum of the gradient).

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

    def own_updates(self, group: dict) -> Tensor:
        """Orthogonalised updates_MRC of this rank's matrices: every world_size-th, from `rank` on."""
        own, first = group["params"][self.rank :: self.world_size], group["params"][0]
        dtype = torch.bfloat16 if first.is_cuda else torch.float32  # of every rank's message, empty ones too
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
        """The updates of all `count` matrices, in their order, as fp32."""
        if self.world_size == 1:
            return list(own_MRC.float())
        share = -(-count // self.world_size)
        padded_MRC = own_MRC.new_zeros(share, *own_MRC.shape[1:])
        padded_MRC[: own_MRC.size(0)] = own_MRC
        everyone_MRC = own_MRC.new_empty(self.world_size * share, *own_MRC.shape[1:])
        dist.all_gather_single(everyone_MRC, padded_MRC)
        return [everyone_MRC[i % self.world_size * share + i // self.world_size].float() for i in range(count)]
