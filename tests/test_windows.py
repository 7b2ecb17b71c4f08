"""Every target of a stream is scored exactly once, whatever the window, the stride and the number of ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from golf.score.windows import WindowError, plan_windows, rank_share

WORLD_SIZES = (1, 2, 3, 8)


@st.composite
def window_shapes(draw):
    """(targets, length, stride) with every kind of tail, short streams, stride 1 and stride = length."""
    length = draw(st.integers(1, 60))
    return draw(st.integers(1, 400)), length, draw(st.integers(1, length))


def coverage(plan, targets: int, begin: int, end: int) -> np.ndarray:
    """How often windows begin .. end - 1 score each target."""
    counts_N = np.zeros(targets, dtype=int)
    for k in range(begin, end):
        counts_N[plan.first_scored_W[k] : plan.ends_W[k]] += 1
    return counts_N


@given(window_shapes())
def test_each_target_is_scored_exactly_once_over_all_ranks(shape):
    plan = plan_windows(*shape)
    for world_size in WORLD_SIZES:
        shares = [rank_share(len(plan), rank, world_size) for rank in range(world_size)]
        counts_N = sum(coverage(plan, shape[0], *share) for share in shares)
        assert (counts_N == 1).all()
        assert max(end - begin for begin, end in shares) - min(end - begin for begin, end in shares) <= 1
        assert all(shares[rank][1] == shares[rank + 1][0] for rank in range(world_size - 1))


@given(window_shapes())
def test_windows_have_one_length_and_score_the_end_of_their_context(shape):
    targets, length, stride = shape
    plan = plan_windows(*shape)
    assert plan.length == min(length, targets)
    assert (plan.ends_W - plan.starts_W == plan.length).all()
    assert plan.starts_W[0] == 0 and plan.ends_W[-1] == targets
    scored_W = plan.ends_W - plan.first_scored_W
    assert scored_W[0] == plan.length
    assert (scored_W[1:-1] == stride).all() and (scored_W[1:] <= stride).all() and (scored_W >= 1).all()


@given(window_shapes())
def test_context_of_later_targets_is_a_window_less_a_stride_at_least(shape):
    plan = plan_windows(*shape)
    assert (plan.first_scored_W[1:] - plan.starts_W[1:] >= plan.length - plan.stride).all()


@pytest.mark.parametrize(
    ("length", "stride", "windows"), [(2048, 512, 121_133), (4096, 64, 969_025), (2048, 64, 969_057)]
)
def test_published_validation_set_has_the_known_number_of_windows(length, stride, windows):
    assert len(plan_windows(62_021_632, length, stride)) == windows


def test_tail_that_the_stride_does_not_divide():
    plan = plan_windows(targets=11, length=4, stride=3)
    assert plan.starts_W.tolist() == [0, 3, 6, 7]
    assert plan.ends_W.tolist() == [4, 7, 10, 11]
    assert plan.first_scored_W.tolist() == [0, 4, 7, 10]


@pytest.mark.parametrize(("targets", "length", "stride"), [(0, 4, 2), (8, 4, 0), (8, 4, 5), (8, 0, 0)])
def test_impossible_sizes_are_refused(targets, length, stride):
    with pytest.raises(WindowError, match="stream|stride"):
        plan_windows(targets, length, stride)
