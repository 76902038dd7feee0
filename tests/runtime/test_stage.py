"""Which images of a ragged batch share a call, and the patches they are fed. What else a stage is fed: test_session."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from iret.runtime.cost import Shape
from iret.runtime.stage import Batch, group_by_count


def cost_of(groups, cost, call) -> float:
    return sum(call + len(group) * cost[group].max() for group in groups)


def partitions(items: list[int]):
    """All ways to put items into groups."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for others in partitions(rest):
        yield [[first], *others]
        for place in range(len(others)):
            yield [*others[:place], [first, *others[place]], *others[place + 1 :]]


@given(
    counts=st.lists(st.integers(2, 20), min_size=1, max_size=6),
    call=st.floats(0, 500),
    limit=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_no_other_groups_cost_less(counts, call, limit):
    counts = np.array(counts)
    cost = counts**2 + 7.0 * counts
    groups = group_by_count(counts, cost, call, limit)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(counts)))
    assert max(map(len, groups)) <= limit
    fair = (
        [np.array(group) for group in each]
        for each in partitions(list(range(len(counts))))
        if max(map(len, each)) <= limit
    )
    assert cost_of(groups, cost, call) <= min(cost_of(each, cost, call) for each in fair) + 1e-9


@pytest.mark.parametrize("images", [1, 3])
def test_patches_are_cut_out_of_their_own_image_between_rows_of_zeros(images):
    shape = Shape(
        img_size=(8, 12), patch_size=4, in_chans=2, num_classes=2, embed_dims=(8, 8), depths=(1, 1), head_dim=8
    )
    pixels = np.random.default_rng(0).normal(size=(images, 2, 8, 12)).astype(np.float32)
    every = pixels.reshape(images, 2, 2, 4, 3, 4).transpose(0, 2, 4, 1, 3, 5).reshape(images * 6, 2, 4, 4)
    batch, some = Batch(pixels, shape), np.arange(1, images * 6, 4)
    found = batch.read(some, len(some) + 3)
    assert (found[1 : len(some) + 1] == every[some]).all()
    assert not found[0].any()
    assert not found[len(some) + 1 :].any()
    whole = batch.read(np.arange(images * 6), images * 6 + 1)
    assert (whole[1:] == every).all()
