"""What stages took, and what is expected of them."""

import pytest

from iret.runtime.pace import Paces


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


def test_what_calls_took_is_forgotten_and_doubted():
    forgets, doubts = Paces(1), Paces(1)
    for paces in (forgets, doubts):
        paces.learn(0, 100.0, 50.0)
    for _ in range(40):
        forgets.learn(0, 100.0, 5.0)
    assert forgets.predict(0, 100.0) == pytest.approx(5.0, rel=0.02)
    for _ in range(115):  # ten times too slow: as the module says
        doubts.doubt(0)
    assert doubts.predict(0, 100.0) < 5.0


def test_doubt_takes_the_same_share_off_calls_of_every_size():
    paces = Paces(1)
    for macs in (100.0, 300.0):
        paces.learn(0, macs, 2.0 + 0.01 * macs)
    before = [paces.predict(0, macs) for macs in (50.0, 400.0)]
    paces.doubt(0)
    assert [paces.predict(0, macs) for macs in (50.0, 400.0)] == pytest.approx([0.98 * each for each in before])
