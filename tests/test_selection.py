"""Choosing on tensors: the same patches as the NumPy reference, and a cut that keeps order, class tokens and owners."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from iret.runtime import keep as reference
from iret.selection import (
    MOMENTUM,
    accumulate,
    choose,
    keep,
    replace_importance,
    select,
    take_images,
    to_importance,
)
from iret.tokens import Tokens, pack

DEAD = -torch.inf


@st.composite
def batches(draw) -> tuple[torch.Tensor, list[float]]:
    """Importance [B, N] of few distinct values, so that ties are common, with dead patches; and a strength an image."""
    images, cells = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    row = st.lists(st.integers(-2, 4), min_size=cells, max_size=cells).filter(lambda values: max(values) > 0)
    values = torch.tensor(draw(st.lists(row, min_size=images, max_size=images)), dtype=torch.float32)
    live = values >= 0
    mean = values.clamp(min=0).sum(1, keepdim=True) / live.sum(1, keepdim=True)
    strengths = draw(st.lists(st.integers(0, 15), min_size=images, max_size=images))
    return torch.where(live, values / mean, DEAD), [strength / 16 for strength in strengths]


def by_reference(importance: torch.Tensor, strength: torch.Tensor, rule: str, min_keep: int) -> list:
    return reference.keep(importance.double().numpy(), strength.double().numpy(), rule, min_keep).tolist()


# ---- rules on tensors


@pytest.mark.parametrize("rule", reference.RULES)
@given(batch=batches(), min_keep=st.integers(0, 12))
def test_tensors_keep_what_the_reference_keeps(rule, batch, min_keep):
    importance, strengths = batch
    strength = torch.tensor(strengths) * (3 if rule == "threshold" else 1)
    got = keep(importance, strength, rule, min_keep)
    assert got.tolist() == by_reference(importance, strength, rule, min_keep)


@pytest.mark.parametrize("rule", reference.RULES)
def test_random_importance_keeps_what_the_reference_keeps(rule):
    torch.manual_seed(0)
    importance = torch.rand(64, 196)
    importance[torch.rand(64, 196) < 0.2] = DEAD
    importance = importance * (importance > DEAD).sum(1, keepdim=True) / importance.clamp(min=0).sum(1, keepdim=True)
    strength = torch.linspace(0, 0.98 if rule != "threshold" else 2.0, 64)
    assert keep(importance, strength, rule, 8).tolist() == by_reference(importance, strength, rule, 8)


@pytest.mark.parametrize("count", [49, 64, 100, 196, 1000])
@pytest.mark.parametrize("strength", [0.1, 0.3, 0.7, 0.9])
def test_topk_on_tensors_is_not_misled_by_decimal_shares(count, strength):
    got = keep(torch.ones(1, count), torch.tensor([strength]), "topk", 0)
    assert got.sum().item() == -(-count * (10 - round(10 * strength)) // 10)  # in whole tenths, so exactly


@pytest.mark.parametrize(
    ("rule", "strength", "expected"),
    [
        ("threshold", 1.0, [True, False, True, False]),
        ("threshold", 0.5, [True, True, True, True]),
        ("mass", 0.125, [True, True, True, False]),
        ("topk", 0.25, [True, True, True, False]),
        ("topk", 0.75, [True, False, False, False]),
    ],
)
def test_four_patches_by_hand(rule, strength, expected):
    importance = torch.tensor([[2.0, 0.5, 1.0, 0.5]])
    assert keep(importance, torch.tensor([strength]), rule, 0).tolist() == [expected]


def test_the_floor_takes_the_lower_cell_of_a_tie():
    importance = torch.tensor([[0.5, 1.5, 0.5, 1.5]])
    assert keep(importance, torch.tensor([9.0]), "threshold", 3).tolist() == [[True, True, False, True]]


def test_a_floor_that_one_image_needs_changes_nothing_for_the_others():
    importance = torch.tensor([[2.5, 0.5, 0.5, 0.5], [1.5, 1.5, 0.5, 0.5]])
    got = keep(importance, torch.tensor([1.0, 1.0]), "threshold", 2)
    assert got.tolist() == [[True, True, False, False], [True, True, False, False]]


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule='best' is unknown"):
        keep(torch.ones(1, 4), torch.zeros(1), "best")


# ---- keep and refine


@pytest.mark.parametrize("rule", reference.RULES)
@given(batch=batches(), min_keep=st.integers(0, 12))
def test_what_is_refined_is_kept(rule, batch, min_keep):
    importance, strengths = batch
    keep_at = torch.tensor(strengths)
    choice = choose(importance, torch.stack([keep_at, (keep_at + 1) / 2], 1), rule, min_keep)
    assert not (choice.refined & ~choice.kept).any()
    assert torch.equal(choice.kept, keep(importance, keep_at, rule, min_keep))
    assert torch.equal(choice.refined, keep(importance, (keep_at + 1) / 2, rule, min_keep=0))


def test_equal_strengths_refine_all_that_is_kept():
    choice = choose(torch.tensor([[2.0, 0.5, 1.0, 0.5]]), torch.tensor([[1.0, 1.0]]), min_keep=0)
    assert choice.kept.tolist() == choice.refined.tolist() == [[True, False, True, False]]


def test_one_image_may_refine_less_than_it_keeps_and_another_all():
    importance = torch.tensor([[2.0, 0.5, 1.0, 0.5]] * 2)
    choice = choose(importance, torch.tensor([[1.0, 1.0], [1.0, 1.5]]), min_keep=0)
    assert choice.kept.tolist() == [[True, False, True, False]] * 2
    assert choice.refined.tolist() == [[True, False, True, False], [True, False, False, False]]


# ---- importance on the grid


def test_importance_is_attention_in_units_of_the_mean():
    tokens = pack(torch.zeros(1, 5, 1))
    importance = to_importance(torch.tensor([0.0, 0.5, 0.125, 0.25, 0.125]), tokens, 4)
    assert importance.tolist() == [[2.0, 0.5, 1.0, 0.5]]


def test_importance_of_a_ragged_batch_lies_in_its_cells():
    tokens = Tokens(
        torch.zeros(6, 1), torch.tensor([-1, 0, 3, -1, 1, 2]), torch.tensor([0, 3, 6]), True
    )  # even, but dropped
    importance = to_importance(torch.tensor([0.0, 0.75, 0.25, 0.0, 0.5, 0.5]), tokens, 4)
    assert importance.tolist() == [[1.5, DEAD, DEAD, 0.5], [DEAD, 1.0, 1.0, DEAD]]


def test_masked_patches_are_as_good_as_dropped():
    whole = pack(torch.zeros(1, 5, 1))
    masked = replace(whole, size_T=torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]))
    importance = to_importance(torch.tensor([0.0, 0.75, 0.0, 0.25, 0.0]), masked, 4)
    assert importance.tolist() == [[1.5, DEAD, 0.5, DEAD]]


def test_a_live_patch_without_attention_is_not_dead():
    tokens = pack(torch.zeros(1, 3, 1))
    for form in (tokens, replace(tokens, is_even=False)):
        importance = to_importance(torch.tensor([0.0, 1.0, 0.0]), form, 2)
        assert importance.tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize("form", ["dense", "ragged", "masked"])
def test_a_threshold_of_one_keeps_all_of_exactly_uniform_attention(form):
    # A mean that is off by one rounding would keep the floor alone; it depends on the count whether it is.
    cut = []
    for count in range(1, 260):
        tokens = pack(torch.zeros(2, 1 + count, 1))
        if form == "ragged":
            tokens = replace(tokens, is_even=False)
        if form == "masked":
            tokens = replace(tokens, size_T=torch.ones(2 + 2 * count))
        importance = to_importance(torch.full((2 + 2 * count,), 1 / count), tokens, count)
        if not keep(importance, torch.ones(2), "threshold", 1).all():
            cut.append(count)
    assert cut == []


def test_accumulation_weighs_the_latest_block_most():
    first = accumulate(None, torch.tensor([0.0, 1.0]))
    assert first.tolist() == [0.0, 1.0]
    assert MOMENTUM == 0.5
    second = accumulate(first, torch.tensor([1.0, 0.0]))
    third = accumulate(second, torch.tensor([1.0, 0.0]))
    assert third.tolist() == [0.75, 0.25]
    assert accumulate(first, torch.tensor([1.0, 0.0]), momentum=0.75).tolist() == [0.25, 0.75]


# ---- the cut


def test_kept_tokens_stay_in_image_order():
    tokens = pack(torch.arange(10.0).view(2, 5, 1))
    cut = select(tokens, torch.tensor([[True, False, False, True], [False, True, True, True]]))
    assert cut.x_TD.flatten().tolist() == [0, 1, 4, 5, 7, 8, 9]
    assert cut.cell_T.tolist() == [-1, 0, 3, -1, 1, 2, 3]
    assert cut.starts.tolist() == [0, 3, 7]
    assert not cut.is_even
    assert cut.size_T is None


def test_equal_counts_are_noticed():
    tokens = pack(torch.zeros(2, 5, 1))
    assert select(tokens, torch.tensor([[True, False, False, True], [False, True, True, False]])).is_even
    assert select(pack(torch.zeros(1, 5, 1)), torch.tensor([[True, False, False, True]])).is_even


def test_the_class_token_always_stays():
    cut = select(pack(torch.zeros(3, 5, 1)), torch.zeros(3, 4, dtype=torch.bool))
    assert cut.cell_T.tolist() == [-1, -1, -1]
    assert cut.starts.tolist() == [0, 1, 2, 3]


def test_a_second_cut_finds_cells_not_places():
    tokens = select(pack(torch.arange(5.0).view(1, 5, 1)), torch.tensor([[False, True, False, True]]))
    again = select(tokens, torch.tensor([[False, False, False, True]]))
    assert again.cell_T.tolist() == [-1, 3]
    assert again.x_TD.flatten().tolist() == [0, 4]


def test_sizes_travel_with_their_tokens():
    tokens = replace(pack(torch.zeros(1, 4, 1)), size_T=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert select(tokens, torch.tensor([[True, False, True]])).size_T.tolist() == [1, 2, 4]


def test_masking_sets_sizes_to_zero_and_moves_nothing():
    tokens = pack(torch.arange(10.0).view(2, 5, 1))
    cut = select(tokens, torch.tensor([[True, False, False, True], [False, True, True, True]]), masked=True)
    assert torch.equal(cut.x_TD, tokens.x_TD)
    assert cut.size_T.tolist() == [1, 1, 0, 0, 1, 1, 0, 1, 1, 1]
    again = select(cut, torch.tensor([[False, False, False, True], [False, False, False, True]]), masked=True)
    assert again.size_T.tolist() == [1, 0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert again.is_even


def test_masking_leaves_the_sizes_of_those_that_stay():
    tokens = replace(pack(torch.zeros(1, 4, 1)), size_T=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert select(tokens, torch.tensor([[True, False, True]]), masked=True).size_T.tolist() == [1, 2, 0, 4]


def test_taking_images_leaves_the_tokens_of_the_others_behind():
    tokens = Tokens(
        torch.arange(6.0)[:, None],
        torch.tensor([-1, 1, -1, 0, 2, -1]),
        torch.tensor([0, 2, 5, 6]),
        is_even=False,
        size_T=torch.tensor([1.0, 2.0, 1.0, 3.0, 4.0, 1.0]),
    )
    taken = take_images(tokens, torch.tensor([True, False, True]))
    assert taken.x_TD.flatten().tolist() == [0, 1, 5]
    assert taken.cell_T.tolist() == [-1, 1, -1]
    assert taken.starts.tolist() == [0, 2, 3]
    assert taken.size_T.tolist() == [1, 2, 1]


# ---- choices without attention, for comparison


def test_inverse_importance_turns_the_order_around():
    other = replace_importance(torch.tensor([[2.0, DEAD, 1.0, 0.0]]), "inverse")
    assert other.argsort(descending=True).tolist() == [[3, 2, 0, 1]]
    assert other[0, 1] == DEAD
    assert (other[0, [0, 2, 3]] > 0).all()  # shares of the rule `mass`


def test_random_importance_lives_where_attention_does_and_forgets_it():
    torch.manual_seed(0)
    importance = torch.arange(1000.0).expand(4, -1).clone()
    importance[:, ::4] = DEAD
    other = replace_importance(importance, "random")
    assert torch.equal(other > DEAD, importance > DEAD)
    live = torch.stack([importance[importance > DEAD], other[importance > DEAD]])
    assert torch.corrcoef(live)[0, 1].abs() < 0.07  # 3000 pairs: four standard errors
    assert not torch.equal(other[0], other[1])


def test_attention_itself_is_left_alone():
    importance = torch.tensor([[2.0, DEAD]])
    assert torch.equal(replace_importance(importance, "attention"), importance)


def test_an_unknown_control_is_refused():
    with pytest.raises(ValueError, match="control='best' is unknown; choose from attention, random, inverse"):
        replace_importance(torch.ones(1, 2), "best")
