"""The keep rules by hand, what holds for all of them, and every form in which thresholds may be written."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, strategies as st

from iret.runtime.keep import RULES, check_dials, check_rule, keep, keep_best, read_strengths

DEAD = -np.inf


def kept_cells(importance: list[float], strength: float, rule: str, min_keep: int = 0) -> list[int]:
    (kept,) = keep(np.array([importance]), np.array([strength]), rule, min_keep)
    return np.flatnonzero(kept).tolist()


@st.composite
def importances(draw) -> np.ndarray:
    """Importance [1, N] of few distinct values, so that ties are common, dead patches among them, mean 1 over the live."""
    live = draw(st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(any))
    row = np.array(live) / np.mean(live)
    dead = draw(st.lists(st.integers(0, len(live)), max_size=4))
    return np.insert(row, sorted(dead), DEAD)[None]


strengths_below_1 = st.integers(0, 19).map(lambda twentieth: twentieth / 20)


# ---- by hand


@pytest.mark.parametrize(
    ("strength", "expected"),
    [(0.0, [0, 1, 2, 3]), (0.5, [0, 1, 2, 3]), (1.0, [0, 2]), (1.5, [0]), (2.0, [0]), (2.1, [])],
)
def test_threshold_of_four_patches(strength, expected):
    assert kept_cells([2.0, 0.5, 1.0, 0.5], strength, "threshold") == expected


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        (0.0, [0, 1, 2, 3]),
        (0.1, [0, 1, 2, 3]),  # 0, 2 and one of the ties hold 0.875 < 0.9
        (0.125, [0, 1, 2]),  # of the tied 1 and 3 the lower cell stays
        (0.3, [0, 2]),
        (0.5, [0]),  # exactly half of the attention
        (0.9, [0]),
    ],
)
def test_mass_of_four_patches(strength, expected):
    assert kept_cells([2.0, 0.5, 1.0, 0.5], strength, "mass") == expected


@pytest.mark.parametrize(
    ("strength", "expected"),
    [(0.0, [0, 1, 2, 3]), (0.2, [0, 1, 2, 3]), (0.25, [0, 1, 2]), (0.5, [0, 2]), (0.7, [0, 2]), (0.9, [0])],
)
def test_topk_of_four_patches(strength, expected):
    assert kept_cells([2.0, 0.5, 1.0, 0.5], strength, "topk") == expected


def test_topk_counts_live_patches_only():
    assert kept_cells([DEAD, 1.5, DEAD, 0.5], 0.5, "topk") == [1]


def test_mass_shares_the_attention_of_live_patches_only():
    assert kept_cells([DEAD, 1.5, DEAD, 0.5], 0.25, "mass") == [1]


@pytest.mark.parametrize("count", [10, 49, 100, 196, 1000])
@pytest.mark.parametrize("strength", [0.1, 0.2, 0.3, 0.7, 0.9])
def test_topk_is_not_misled_by_decimal_shares(count, strength):
    # In whole tenths, so exactly: ceil(count * (10 - tenths) / 10).
    expected = -(-count * (10 - round(10 * strength)) // 10)
    assert len(kept_cells([1.0] * count, strength, "topk")) == expected
    assert len(kept_cells([1.0] * count, float(np.float32(strength)), "topk")) == expected


def test_each_image_has_its_own_strength():
    kept = keep(np.array([[2.0, 0.5, 1.0, 0.5]] * 3), np.array([0.0, 1.0, 2.0]), "threshold", 0)
    assert kept.tolist() == [[True] * 4, [True, False, True, False], [True, False, False, False]]


# ---- the floor


@pytest.mark.parametrize("rule", RULES)
def test_the_best_patches_stay_at_any_strength(rule):
    strength = 9.0 if rule == "threshold" else 0.99
    assert kept_cells([0.5, 1.0, 2.0, 0.5], strength, rule, min_keep=3) == [0, 1, 2]


@pytest.mark.parametrize("rule", RULES)
def test_a_floor_above_the_live_patches_keeps_exactly_these(rule):
    strength = 9.0 if rule == "threshold" else 0.99
    assert kept_cells([DEAD, 1.0, DEAD, 1.0], strength, rule, min_keep=8) == [1, 3]


def test_uniform_attention_above_one_keeps_the_floor():
    assert kept_cells([1.0] * 20, 1.01, "threshold", min_keep=8) == list(range(8))


def test_uniform_attention_up_to_one_keeps_all():
    assert kept_cells([1.0] * 20, 1.0, "threshold", min_keep=8) == list(range(20))


# ---- what holds for every rule


@pytest.mark.parametrize("rule", RULES)
@given(importance=importances())
def test_strength_zero_keeps_all_that_live(rule, importance):
    assert np.array_equal(keep(importance, np.zeros(1), rule, 0), np.isfinite(importance))


@pytest.mark.parametrize("rule", RULES)
@given(importance=importances(), pair=st.tuples(strengths_below_1, strengths_below_1), min_keep=st.integers(0, 5))
def test_more_strength_keeps_a_subset(rule, importance, pair, min_keep):
    scale = 3 if rule == "threshold" else 1
    weak, strong = (keep(importance, np.array([scale * s]), rule, min_keep) for s in sorted(pair))
    assert not (strong & ~weak).any()


@pytest.mark.parametrize("rule", RULES)
@given(importance=importances(), strength=strengths_below_1, min_keep=st.integers(0, 5))
def test_whatever_stays_matters_at_least_as_much_as_what_goes(rule, importance, strength, min_keep):
    kept = keep(importance, np.array([strength]), rule, min_keep)
    live = np.isfinite(importance)
    assert not (kept & ~live).any()
    assert kept.sum() >= min(min_keep, live.sum())
    if kept.any() and (live & ~kept).any():
        assert importance[kept].min() >= importance[live & ~kept].max()


@given(importance=importances(), strength=strengths_below_1)
def test_mass_keeps_the_fewest_that_hold_enough(importance, strength):
    kept = keep(importance, np.array([strength]), "mass", 0)
    share = np.where(np.isfinite(importance), importance, 0.0)
    share = share / share.sum()
    slack = 1e-6 + 1e-12  # the documented rounding, and float64 sums of 16
    assert share[kept].sum() >= 1 - strength - slack
    if strength > 0:  # without its smallest member it would not be enough
        assert share[kept].sum() - share[kept].min() < 1 - strength


def test_of_equal_patches_the_lower_cells_are_best_in_every_image():
    importance = np.array([[1.0, 2.0, 1.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0, -np.inf], [1.0, 2.0, 3.0, 4.0, 5.0]])
    best = keep_best(importance, np.array([3, 2, 0]))
    assert best.tolist() == [[True, True, False, True, False], [True, True, False, False, False], [False] * 5]


def test_at_strength_zero_mass_keeps_patches_without_any_attention():
    assert kept_cells([0.0] * 4, 0, "mass") == [0, 1, 2, 3]


def test_an_unknown_rule_lists_the_known_ones():
    with pytest.raises(ValueError, match="rule='best' is unknown; choose from threshold, mass, topk"):
        check_rule("best")
    with pytest.raises(ValueError, match="rule='best'"):
        keep(np.ones((1, 4)), np.zeros(1), "best")


NONE = {"budget": None, "ms": None, "joules": None, "thresholds": None}


@pytest.mark.parametrize("rule", ["mass", "topk"])
@pytest.mark.parametrize(
    ("asked", "ending"),
    [({}, "give them."), *(({name: 0.5}, f"give them in place of {name}.") for name in ("budget", "ms", "joules"))],
)
def test_other_rules_want_their_thresholds(rule, asked, ending):
    with pytest.raises(ValueError, match=f"rule='{rule}' reads thresholds as its own strengths; {re.escape(ending)}$"):
        check_dials(rule, **NONE | asked)
    check_dials(rule, **NONE | {"thresholds": 0.0})


@pytest.mark.parametrize("pair", list(itertools.combinations(NONE, 2)))
def test_one_dial_is_turned_at_a_time(pair):
    with pytest.raises(ValueError, match=f"thresholds, not {pair[0]} and {pair[1]}"):
        check_dials("threshold", **NONE | dict.fromkeys(pair, 0.5))
    for name in pair:
        check_dials("threshold", **NONE | {name: 0.5})
    check_dials("threshold", **NONE)


# ---- how thresholds may be written


@pytest.mark.parametrize(
    "value",
    [
        1.5,
        "1.5",  # as a command line hands it over
        np.array(1.5),
        [1.5, 1.5],
        (1.5, (1.5, 1.5)),
        [[1.5, 1.5], [1.5, 1.5]],
        np.full((3, 2), 1.5),
        np.full((3, 2, 2), 1.5, dtype=np.float32),
    ],
)
def test_one_threshold_in_every_form(value):
    strengths = read_strengths(value, batch=3, transitions=2)
    assert strengths.shape == (3, 2, 2)
    assert strengths.dtype == np.float64
    assert (strengths == 1.5).all()


def test_a_pair_is_keep_and_refine_and_entries_are_transitions():
    strengths = read_strengths((1.0, (1.25, 1.5)), batch=2, transitions=2)
    assert strengths.tolist() == [[[1.0, 1.0], [1.25, 1.5]]] * 2


def test_rows_of_an_array_are_images():
    strengths = read_strengths(np.array([[0.0, 1.0], [0.5, 2.0]]), batch=2, transitions=2)
    assert strengths.tolist() == [[[0.0, 0.0], [1.0, 1.0]], [[0.5, 0.5], [2.0, 2.0]]]


def test_an_integer_is_a_threshold():
    assert read_strengths(1, 1, 1).tolist() == [[[1.0, 1.0]]]


def test_thresholds_are_read_anew_where_they_may_have_changed():
    """Numbers and tuples of them are remembered, per batch and rule; what can be written into is not."""
    row, number = [0.5, 0.5], np.array(0.5)
    for value in (row, (row[0], number), number):
        assert read_strengths(value, 1, 2)[0, 1].tolist() == [0.5, 0.5]
    row[1], number[...] = 0.75, 0.75
    for value in (row, (row[0], number), number):
        assert read_strengths(value, 1, 2)[0, 1].tolist() == [0.75, 0.75]
    kept = read_strengths((0.5, 0.75), 2, 2)
    assert read_strengths((0.5, 0.75), 2, 2) is kept
    assert not kept.flags.writeable
    assert read_strengths((0.5, 0.75), 3, 2).shape == (3, 2, 2)
    assert read_strengths((2, 3), 1, 2).tolist() == [[[2.0, 2.0], [3.0, 3.0]]]
    with pytest.raises(ValueError, match="below 1"):
        read_strengths((2, 3), 1, 2, "topk")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "1 thresholds were given, but the model has 2 transitions"),
        ((1.0, 1.1, 1.2), "3 thresholds were given, but the model has 2 transitions"),
        ([], "0 thresholds were given"),
        (-0.5, "threshold -0.5 is not allowed"),
        ([0.5, (-1.0, 1.0)], "threshold -1 is not allowed"),
        (float("nan"), "threshold nan is not allowed"),
        (float("inf"), "threshold inf is not allowed"),
        ((1.0, (1.5, 1.2)), "refine threshold 1.2 is below keep threshold 1.5"),
        ((1.0, (1.0, 1.1, 1.2)), "an entry is a number or a pair"),
        (((1.0, 1.1, 1.2), (1.0, 1.1, 1.2)), "an entry is a number or a pair"),
        (((1.0,), (1.0,)), "an entry is a number or a pair"),
        ("much", "not a number or a pair"),
        (None, "not a number or a pair"),
        ({"keep": 1.0}, "not a number or a pair"),
        (np.ones(2), r"thresholds of shape \(2,\) do not fit; give \(3, 2\)"),
        (np.ones((2, 2)), r"shape \(2, 2\) do not fit"),
        (np.ones((3, 3)), r"shape \(3, 3\) do not fit"),
        (np.ones((3, 2, 3)), r"shape \(3, 2, 3\) do not fit"),
        (np.ones((3, 2, 2, 1)), "do not fit"),
    ],
)
def test_thresholds_that_do_not_fit_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        read_strengths(value, batch=3, transitions=2)


@pytest.mark.parametrize("rule", ["mass", "topk"])
def test_a_share_of_one_or_more_is_refused(rule):
    with pytest.raises(ValueError, match=f"strength 1 is not below 1; with rule='{rule}' it is the share"):
        read_strengths((0.5, 1.0), 1, 2, rule)
    assert read_strengths((0.5, 0.99), 1, 2, rule).shape == (1, 2, 2)


def test_strengths_of_an_unknown_rule_are_refused():
    with pytest.raises(ValueError, match="rule='best' is unknown"):
        read_strengths(1.0, 1, 1, "best")
