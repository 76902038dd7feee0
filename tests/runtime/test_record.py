"""What the host notes of a run: masks, exits one after another, and MACs that add up. With answers: tests/test_output.py."""

import numpy as np
import pytest

from iret.runtime.choice import Layout
from iret.runtime.cost import Shape, plan_macs
from iret.runtime.record import Output, Record, SingleRecord, Trace

# Three stages on a grid of 2 x 3 patches of 4 px.
SHAPE = Shape(
    img_size=(8, 12), patch_size=4, in_chans=1, num_classes=2, embed_dims=(8, 8, 16), depths=(1, 1, 1), head_dim=8
)


def layout(images: list[int], *cells: list[int], live: list[bool] | None = None) -> Layout:
    rows = [[-1, *each] for each in cells]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return Layout(np.concatenate(rows), starts, np.array(images), None if live is None else np.array(live))


def test_every_image_costs_what_its_own_way_costs():
    """One leaves after each stage; the last refines a part of what it keeps."""
    record = Record(SHAPE, 3)
    record.add(0, Layout.whole(3, 6), None)
    record.add(1, layout([0, 2], [0, 1, 2, 5], [3, 4]), np.array([False, True, False, False, True, False, True, True]))
    record.add(2, layout([2], [4]), None)
    assert record.exits.tolist() == [1, 0, 2]
    ways = (((6, 4), (0, 2)), ((6,), (0,)), ((6, 2, 1), (0, 2, 1)))
    assert record.macs(scored=True).tolist() == [plan_macs(SHAPE, *way, scored=True) for way in ways]
    kept, refined = record.grids
    assert kept.shape == refined.shape == (3, 3, 2, 3)
    assert kept[1, 0].tolist() == [[True, True, True], [False, False, True]]
    assert refined[1, 0].tolist() == [[True, False, False], [False, False, True]]
    assert not kept[1:, 1].any()


def test_images_that_leave_late_are_answered_by_the_last_stage_they_passed():
    record = Record(SHAPE, 3)
    record.add(0, Layout.whole(3, 6), None)
    record.add(1, Layout.whole(3, 6), None)
    record.add(2, layout([1], [0, 3]), None)
    assert record.exits.tolist() == [1, 2, 1]


def test_masked_patches_were_not_looked_at():
    record = Record(SHAPE, 1)
    record.add(0, Layout.whole(1, 6), None)
    record.add(1, layout([0], range(6), live=[True, True, False, True, False, False, True]), None)
    kept, refined = record.grids
    assert kept[1, 0].tolist() == refined[1, 0].tolist() == [[True, False, True], [False, False, True]]
    assert record.macs(scored=True).tolist() == [plan_macs(SHAPE, (6, 3), (0, 3), scored=True)]


def test_details_never_enter_in_the_first_stage_and_later_at_every_patch_unless_said():
    record = Record(SHAPE, 2)
    record.add(0, Layout.whole(2, 6), None)
    record.add(1, Layout.whole(2, 6), None)
    _, refined = record.grids
    assert not refined[0].any()
    assert refined[1].all()
    assert record.exits.tolist() == [1, 1]  # nobody went on: a deadline


def test_images_that_were_not_choosing_are_counted_without_it():
    record = Record(SHAPE, 2)
    for stage in range(3):
        record.add(stage, Layout.whole(2, 6), None)
    everything = ((6, 6, 6), (0, 6, 6))
    counted = record.macs(scored=np.array([True, False])).tolist()
    assert counted == [plan_macs(SHAPE, *everything, scored=scored) for scored in (True, False)]
    assert counted[0] > counted[1]


@pytest.mark.parametrize("refined", [None, [False, True, False, False, True]])
def test_an_image_alone_is_recorded_as_beside_another(refined):
    cells, two = [1, 2, 4, 5], Layout.whole(2, 6)
    alone, beside = Record(SHAPE, 1), Record(SHAPE, 2)
    alone.add(0, Layout.whole(1, 6), None)
    beside.add(0, two, None)
    refined_T = None if refined is None else np.array(refined)
    alone.add(1, Layout(np.array([-1, *cells]), np.array([0, 5]), np.array([0])), refined_T)
    both = Layout(np.array([-1, *cells, *two.cell_T[7:]]), np.array([0, 5, 12]), np.array([0, 1]))
    beside.add(1, both, None if refined_T is None else np.append(refined_T, np.ones(7, dtype=bool)))
    for scored in (True, False):
        assert alone.macs(scored)[0] == beside.macs(scored)[0]
    for one, of_two in zip(alone.grids, beside.grids, strict=True):
        assert (one[:, 0] == of_two[:, 0]).all()
        assert one[1].any()


def test_importance_stands_where_something_was_to_be_chosen():
    record = Record(SHAPE, 2)
    for stage in range(2):
        record.add(stage, Layout.whole(2, 6), None)
    some = layout([0, 1], [0, 5], [2])
    record.see(1, some, np.array([9.0, 0.5, 1.5, 9.0, 1.0]), np.ones((2, 2, 2)))
    seen = record.importance()
    assert seen.shape == (2, 2, 2, 3)
    assert np.isnan(seen[0]).all()
    assert seen[1, 0, 0, 0] == 0.5
    assert seen[1, 0, 1, 2] == 1.5
    assert seen[1, 1, 0, 2] == 1.0
    assert np.isfinite(seen).sum() == 3


def test_macs_and_a_trace_are_made_when_somebody_asks_for_them_and_once():
    record, made = Record(SHAPE, 1), []
    record.add(0, Layout.whole(1, 6), None)

    def count() -> np.ndarray:
        made.append(record.macs(scored=False))
        return made[-1]

    def look() -> Trace:
        made.append(Trace.of(record, np.zeros((3, 1, 2), np.float32)))
        return made[-1]

    out = Output(np.zeros((1, 2), np.float32), count, look, 0.0, 0.0)
    assert not made
    assert out.trace is out.trace is made[0]
    assert out.macs is out.macs is made[1]
    assert out.trace.kept.sum() == 6
    assert out.macs.tolist() == record.macs(scored=False).tolist()


@pytest.mark.parametrize("drops", [True, False])
def test_grids_of_a_graph_say_what_notes_of_the_same_run_say(drops):
    """Two images: one keeps three patches and then one, refining one and none; the other keeps all and refines all."""
    everything, first = np.arange(7), np.array([np.inf, *range(6)], np.float32)
    found = [
        [(np.array([0, 1, 3, 6]), np.array([0, 3]), first)],
        [(everything, everything, first + 12), (everything, everything, first + 18)],
    ]
    found[0].append((np.array([0, 3]), np.array([0]), np.array([np.inf, 6, 8, 11], np.float32)))
    grids = SingleRecord(SHAPE, found, np.full((2, 2, 2), float(drops)))

    record = Record(SHAPE, 2)
    record.add(0, Layout.whole(2, 6), None)
    middle = layout([0, 1], [0, 2, 5], range(6))
    record.add(1, middle, np.array([False, False, True, False, False, *[True] * 6]))
    last = layout([0, 1], [2], range(6))
    record.add(2, last, np.array([False, False, False, *[True] * 6]))
    if drops:
        record.see(0, Layout.whole(2, 6), np.array([0, *range(6), 0, *range(12, 18)], float), np.ones((2, 2, 2)))
        record.see(1, middle, np.array([0, 6, 8, 11, 0, *range(18, 24)], float), np.ones((2, 2, 2)))

    assert grids.exits.tolist() == record.exits.tolist()
    assert grids.macs(np.array([True, False])).tolist() == [
        record.macs(True)[0], plan_macs(SHAPE, (6, 6, 6), (0, 6, 6), scored=False)
    ]  # fmt: skip
    for ours, theirs in zip((*grids.grids, grids.importance()), (*record.grids, record.importance()), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
