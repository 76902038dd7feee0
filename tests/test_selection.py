"""Choosing: importance on the grid, what is refined is kept, and a cut that keeps order, class tokens and owners."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from iret.runtime.choice import Choice, Layout, choose, to_importance
from iret.runtime.keep import RULES, keep
from iret.selection import replace_importance, select, take_images
from iret.tokens import Tokens, pack

DEAD = -np.inf


def layout(*rows: str, live: tuple[str, ...] = ()) -> Layout:
    """`"x..x"` is an image that has tokens of cells 0 and 3 of four; `live`: those that are not masked."""
    cells = [[-1, *(place for place, mark in enumerate(row) if mark == "x")] for row in rows]
    starts = np.concatenate([[0], np.cumsum([len(each) for each in cells])])
    masks = [[True, *(mark == "x" for mark in row)] for row in live]
    return Layout(
        cell_T=np.concatenate(cells),
        starts=starts,
        images=np.arange(len(rows)),
        live_T=np.concatenate(masks) if masks else None,
    )


def chosen(*rows: str) -> Choice:
    """Of whole images: the marked cells are kept and refined."""
    return Choice(np.concatenate([[True, *(mark == "x" for mark in row)] for row in rows]), None)


@st.composite
def batches(draw) -> tuple[np.ndarray, np.ndarray]:
    """Importance [B, N] of few distinct values, so that ties are common; and a strength an image."""
    images, cells = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    row = st.lists(st.integers(0, 4), min_size=cells, max_size=cells).filter(lambda values: max(values) > 0)
    values = np.array(draw(st.lists(row, min_size=images, max_size=images)), dtype=float)
    strengths = draw(st.lists(st.integers(0, 15), min_size=images, max_size=images))
    return values / values.mean(1, keepdims=True), np.array(strengths) / 16


# ---- what is kept, what is refined


def on_grid(mask_T: np.ndarray, images: int) -> np.ndarray:
    return mask_T.reshape(images, -1)[:, 1:]


@pytest.mark.parametrize("rule", RULES)
@given(batch=batches(), min_keep=st.integers(0, 12), refines_less=st.booleans())
def test_packed_images_keep_what_the_rule_keeps_of_each(rule, batch, min_keep, refines_less):
    importance, keep_at = batch
    keep_at = keep_at * (3 if rule == "threshold" else 1)
    refine_at = keep_at + refines_less * (1 if rule == "threshold" else (1 - keep_at) / 2)
    packed = np.insert(importance, 0, 7.0, axis=1).ravel()  # of class tokens: without meaning
    here = Layout.whole(*importance.shape)
    choice = choose(packed, here, np.stack([keep_at, refine_at], 1), rule, min_keep)
    assert np.array_equal(on_grid(choice.kept_T, len(importance)), keep(importance, keep_at, rule, min_keep))
    assert choice.kept_T[here.starts[:-1]].all()
    if choice.refined_T is None:
        assert (refine_at == keep_at).all()
    else:
        same = (refine_at == keep_at)[:, None]  # what is kept is refined, the floor too
        refined = np.where(same, on_grid(choice.kept_T, len(importance)), keep(importance, refine_at, rule, 0))
        assert np.array_equal(on_grid(choice.refined_T, len(importance)), refined)
        assert not choice.refined_T[here.starts[:-1]].any()


@pytest.mark.parametrize("rule", RULES)
def test_an_image_is_cut_as_it_is_alone(rule):
    draw = np.random.default_rng(0)
    here = layout("xx.x.xxx", "..xxx...", "xxxxxxxx")
    importance = to_importance(draw.uniform(0.1, 2, len(here.cell_T)), here)
    strengths = np.full((3, 2), 0.9 if rule == "threshold" else 0.5)
    together = choose(importance, here, strengths, rule, 2).kept_T
    for image in range(3):
        alone, rows = here.take(np.arange(3) == image)
        assert choose(importance[rows], alone, strengths[:1], rule, 2).kept_T.tolist() == together[rows].tolist()


def test_equal_strengths_refine_all_that_is_kept():
    choice = choose(np.array([0.0, 2.0, 0.5, 1.0, 0.5]), layout("xxxx"), np.array([[1.0, 1.0]]), min_keep=0)
    assert choice.kept_T.tolist() == [True, True, False, True, False]
    assert choice.refined_T is None


@pytest.mark.parametrize("reach", [1, 2, 3])
@pytest.mark.parametrize("refine_at", [1.0, 1.6])
def test_the_floor_holds_from_one_patch_less_than_it_asks_for(reach, refine_at):
    """An image alone, of which `reach` patches reach the threshold; two are the floor."""
    importance = np.array([9.0, 1.5, 1.7, 1.2, 0.4, 0.3])
    importance[1 + reach : 4] = 0.5
    choice = choose(importance, layout("xxxxx"), np.array([[1.0, refine_at]]), min_keep=2)
    assert np.count_nonzero(choice.kept_T[1:]) == max(reach, 2)
    assert choice.kept_T[1 : 1 + reach].all()
    refined = choice.kept_T[1:] if choice.refined_T is None else choice.refined_T[1:]
    wanted = choice.kept_T[1:] if refine_at == 1.0 else importance[1:] >= refine_at
    assert refined.tolist() == wanted.tolist()


def test_one_image_may_refine_less_than_it_keeps_and_another_all():
    importance = np.array([0.0, 2.0, 0.5, 1.0, 0.5] * 2)
    choice = choose(importance, layout("xxxx", "xxxx"), np.array([[1.0, 1.0], [1.0, 1.5]]), min_keep=3)
    assert choice.kept_T.tolist() == [True, True, True, True, False] * 2  # the floor takes the lower cell of a tie
    assert choice.refined_T.tolist() == [False, True, True, True, False, False, True, False, False, False]


def test_a_floor_that_one_image_needs_changes_nothing_for_the_others():
    importance = np.array([9.0, 2.5, 0.5, 0.5, 0.5, 9.0, 1.5, 1.5, 0.5, 0.5])
    choice = choose(importance, layout("xxxx", "xxxx"), np.ones((2, 2)), min_keep=2)
    assert choice.kept_T.tolist() == [True, True, True, False, False] * 2


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule='best' is unknown"):
        choose(np.ones(5), layout("xxxx"), np.zeros((1, 2)), "best")


# ---- importance


def test_importance_is_attention_in_units_of_the_mean():
    importance = to_importance(np.array([0.0, 0.5, 0.125, 0.25, 0.125], dtype=np.float32), layout("xxxx"))
    assert importance[1:].tolist() == [2.0, 0.5, 1.0, 0.5]


def test_importance_of_a_ragged_batch_counts_the_patches_of_each_image():
    received = np.array([0.0, 0.75, 0.25, 0.0, 0.25, 0.5, 0.25], dtype=np.float32)
    importance = to_importance(received, layout("x..x", ".xxx"))
    assert importance[1:3].tolist() == [1.5, 0.5]
    assert importance[4:].tolist() == [0.75, 1.5, 0.75]


def test_masked_patches_are_as_good_as_dropped():
    importance = to_importance(np.array([0.0, 0.75, 0.0, 0.25, 0.0]), layout("xxxx", live=("x.x.",)))
    assert importance[1:].tolist() == [1.5, DEAD, 0.5, DEAD]


def test_a_live_patch_without_attention_is_not_dead():
    assert to_importance(np.array([0.0, 1.0, 0.0]), layout("xx"))[1:].tolist() == [2.0, 0.0]


@pytest.mark.parametrize("form", ["one", "many", "masked"])
def test_a_threshold_of_one_keeps_all_of_exactly_uniform_attention(form):
    # A mean that is off by one rounding would keep the floor alone; it depends on the count whether it is.
    cut = []
    for count in range(1, 260):
        rows = ["x" * count] * (1 if form == "one" else 2)
        here = layout(*rows, live=tuple(rows) if form == "masked" else ())
        received = np.full(len(here.cell_T), 1 / count, dtype=np.float32)
        choice = choose(to_importance(received, here), here, np.ones((len(rows), 2)), "threshold", 1)
        if not choice.kept_T.all():
            cut.append(count)
    assert cut == []


# ---- the cut


def test_kept_tokens_stay_in_image_order():
    cut, left, _ = select(pack(torch.arange(10.0).view(2, 5, 1)), layout("xxxx", "xxxx"), chosen("x..x", ".xxx"))
    assert cut.x_TD.flatten().tolist() == [0, 1, 4, 5, 7, 8, 9]
    assert cut.cell_T.tolist() == left.cell_T.tolist() == [-1, 0, 3, -1, 1, 2, 3]
    assert cut.starts.tolist() == left.starts.tolist() == [0, 3, 7]
    assert left.image_T().tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert not cut.is_even
    assert (cut.most, cut.width) == (4, 4)
    assert cut.size_T is None


def test_equal_counts_are_noticed():
    tokens = pack(torch.zeros(2, 5, 1))
    assert select(tokens, layout("xxxx", "xxxx"), chosen("x..x", ".xx."))[0].is_even
    assert select(pack(torch.zeros(1, 5, 1)), layout("xxxx"), chosen("x..x"))[0].is_even


def test_the_class_token_always_stays():
    cut, *_ = select(pack(torch.zeros(3, 5, 1)), layout(*["xxxx"] * 3), chosen(*["...."] * 3))
    assert cut.cell_T.tolist() == [-1, -1, -1]
    assert cut.starts.tolist() == [0, 1, 2, 3]


def test_a_second_cut_finds_cells_not_places():
    tokens, left, _ = select(pack(torch.arange(5.0).view(1, 5, 1)), layout("xxxx"), chosen(".x.x"))
    again, *_ = select(tokens, left, Choice(np.array([True, False, True]), None))
    assert again.cell_T.tolist() == [-1, 3]
    assert again.x_TD.flatten().tolist() == [0, 4]


def test_sizes_travel_with_their_tokens():
    tokens = replace(pack(torch.zeros(1, 4, 1)), size_T=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert select(tokens, layout("xxx"), chosen("x.x"))[0].size_T.tolist() == [1, 2, 4]


def test_masking_sets_sizes_to_zero_and_moves_nothing():
    tokens = pack(torch.arange(10.0).view(2, 5, 1))
    cut, left, _ = select(tokens, layout("xxxx", "xxxx"), chosen("x..x", ".xxx"), masked=True)
    assert torch.equal(cut.x_TD, tokens.x_TD)
    assert cut.size_T.tolist() == left.live_T.astype(float).tolist() == [1, 1, 0, 0, 1, 1, 0, 1, 1, 1]
    again, left, _ = select(cut, left, chosen("...x", "x..x"), masked=True)
    assert again.size_T.tolist() == left.live_T.astype(float).tolist() == [1, 0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert again.is_even


def test_masking_leaves_the_sizes_of_those_that_stay():
    tokens = replace(pack(torch.zeros(1, 4, 1)), size_T=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert select(tokens, layout("xxx"), chosen("x.x"), masked=True)[0].size_T.tolist() == [1, 2, 0, 4]


def test_taking_images_leaves_the_tokens_of_the_others_behind():
    tokens = Tokens(
        torch.arange(6.0)[:, None],
        torch.tensor([-1, 1, -1, 0, 2, -1]),
        torch.tensor([0, 2, 5, 6]),
        is_even=False,
        size_T=torch.tensor([1.0, 2.0, 1.0, 3.0, 4.0, 1.0]),
    )
    taken, left, rows = take_images(tokens, layout(".x.", "x.x", "..."), np.array([True, False, True]))
    assert taken.x_TD.flatten().tolist() == rows.tolist() == [0, 1, 5]
    assert taken.cell_T.tolist() == left.cell_T.tolist() == [-1, 1, -1]
    assert taken.starts.tolist() == left.starts.tolist() == [0, 2, 3]
    assert taken.size_T.tolist() == [1, 2, 1]
    assert (taken.is_even, taken.most) == (False, 2)
    assert left.images.tolist() == [0, 2]
    assert left.image_T().tolist() == [0, 0, 2]


# ---- choices without attention, for comparison


def test_inverse_importance_turns_the_order_around():
    other = replace_importance(np.array([2.0, DEAD, 1.0, 0.0]), "inverse")
    assert (-other).argsort().tolist() == [3, 2, 0, 1]
    assert other[1] == DEAD
    assert (other[[0, 2, 3]] > 0).all()  # shares of the rule `mass`


def test_random_importance_lives_where_attention_does_and_forgets_it():
    torch.manual_seed(0)
    importance = np.arange(4000.0)
    importance[::4] = DEAD
    other = replace_importance(importance, "random")
    live = importance > DEAD
    assert np.array_equal(other > DEAD, live)
    assert abs(np.corrcoef(importance[live], other[live])[0, 1]) < 0.07  # 3000 pairs: four standard errors
    assert len(set(other[live])) > 0.99 * live.sum()


def test_attention_itself_is_left_alone():
    importance = np.array([2.0, DEAD])
    assert replace_importance(importance, "attention") is importance


def test_an_unknown_control_is_refused():
    with pytest.raises(ValueError, match="control='best' is unknown; choose from attention, random, inverse"):
        replace_importance(np.ones(2), "best")
