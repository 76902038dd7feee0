"""What stages took, and what is expected of them."""

import pytest

from iret.runtime.pace import PATIENCE, Paces


def test_nothing_is_expected_of_a_stage_that_never_ran():
    paces = Paces(2)
    paces.learn(0, 100.0, 5.0)
    assert paces.predict(1, 100.0) == 0.0
    assert not paces.are_known
    paces.learn(1, 100.0, 5.0)
    assert paces.are_known


def test_calls_alike_are_taken_to_cost_in_proportion():
    paces = Paces(1)
    paces.learn(0, 100.0, 5.0)
    paces.learn(0, 100.0, 5.0)
    assert paces.predict(0, 50.0) == pytest.approx(2.5)


def test_a_line_with_an_offset_is_found():
    paces = Paces(1)
    for macs in (100.0, 300.0, 200.0):
        paces.learn(0, macs, 2.0 + 0.01 * macs)
    for macs in (50.0, 400.0):
        assert paces.predict(0, macs) == pytest.approx(2.0 + 0.01 * macs)


def test_small_calls_that_took_longer_never_make_large_ones_cheaper():
    paces = Paces(1)
    paces.learn(0, 100.0, 9.0)
    paces.learn(0, 300.0, 3.0)
    assert paces.predict(0, 1000.0) == paces.predict(0, 100.0) > 0


def test_large_calls_that_took_very_long_never_make_small_ones_free():
    paces = Paces(1)
    paces.learn(0, 100.0, 1.0)
    paces.learn(0, 200.0, 9.0)
    assert paces.predict(0, 1.0) > 0


def test_what_calls_took_is_forgotten():
    paces = Paces(1)
    paces.learn(0, 100.0, 50.0)
    for _ in range(40):
        paces.learn(0, 100.0, 5.0)
    assert paces.predict(0, 100.0) == pytest.approx(5.0, rel=0.02)


@pytest.mark.parametrize(("took", "expected"), [(20.0, 20.0), (49.0, 49.47), (50.0, 50.0)])
def test_a_stage_refused_for_long_is_tried_and_believed_where_it_is_much_faster(took, expected):
    paces = Paces(1)
    paces.learn(0, 100.0, 50.0)
    for _ in range(PATIENCE - 1):
        paces.refuse(0)
    assert paces.predict(0, 100.0) == 50.0
    paces.refuse(0)
    assert paces.predict(0, 100.0) == 0.0
    paces.learn(0, 100.0, took)
    assert paces.predict(0, 100.0) == pytest.approx(expected, abs=0.01)


def test_a_stage_that_ran_meanwhile_needs_no_try():
    paces = Paces(1)
    for _ in range(PATIENCE):
        paces.learn(0, 100.0, 50.0)
        paces.refuse(0)
    paces.learn(0, 100.0, 5.0)
    assert paces.predict(0, 100.0) > 40.0
