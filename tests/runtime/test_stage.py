"""Which images of a ragged batch share a call. What a stage is fed: test_session."""

import numpy as np
from hypothesis import given, settings, strategies as st

from iret.runtime.stage import group_by_count


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
