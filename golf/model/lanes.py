"""Gives attention and MLP of the last blocks a residual stream each (parameter-golf pull requests 1204, 1529).

B batch, T time, S last positions of T, D model width.
"""

from torch import Tensor

from golf.config.features import Feature, register_feature
from golf.model.block import Block, Positions
from golf.model.cache import LayerCache
from golf.model.layers import acts_always, changed_model


def run_lanes(
    block: Block, x_BTD: Tensor, lane_BTD: Tensor, x0_BTD: Tensor, positions: Positions, last: int,
    cache: LayerCache | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns both streams of the `last` positions after a block: attention reads the first, mixed with the embedding,
    the MLP the second, and the result of each is added to both."""
    dtype = x_BTD.dtype
    attended_BSD = block.attn(block.norm(block.mixed(x_BTD, x0_BTD)), positions, last, cache)
    a_BSD = block.attn_scale.to(dtype) * attended_BSD
    f_BSD = block.mlp_scale.to(dtype) * block.mlp(block.norm(lane_BTD[:, -last:]))
    decay_2, inputs_22 = block.lane_decay.to(dtype), block.lane_inputs.to(dtype)
    return tuple(
        decay_2[i] * stream_BTD[:, -last:] + inputs_22[i, 0] * a_BSD + inputs_22[i, 1] * f_BSD
        for i, stream_BTD in enumerate((x_BTD, lane_BTD))
    )


register_feature(
    Feature(
        "lanes", lambda config: config.model.lanes_from > 0, "set lanes_from=0",
        acts_always, without=lambda model: changed_model(model, lanes_from=0),
    )
)  # fmt: skip
