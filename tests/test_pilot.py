"""The controller at work: what the sensors say reaches it, and what it decides is a budget the model can serve."""

import pytest

from iret.measure.battery import Battery
from iret.measure.energy import EnergyError
from iret.pilot import Pilot
from iret.runtime.controller import Goal, Menu

MENU = Menu(
    budget=(0.2, 0.5, 1.0),
    accuracy=(0.5, 0.7, 0.8),
    ms=(2.0, 5.0, 10.0),
    ms_p95=(3.0, 6.0, 12.0),
    joules=(0.02, 0.05, 0.1),
)


def battery(joules: float | None, percent: float = 50.0) -> Battery:
    return Battery(percent=percent, joules=joules, is_plugged=False, source="made up")


def test_the_charge_of_the_battery_decides():
    goal = Goal(hours=1.0, images_per_second=1.0)
    rich = Pilot(MENU, goal, battery=lambda: battery(3600 * 0.2), clock=lambda: 0.0)
    poor = Pilot(MENU, goal, battery=lambda: battery(3600 * 0.04), clock=lambda: 0.0)
    assert rich.next().budget == 1.0
    assert poor.next().budget == pytest.approx(0.4, abs=0.03)  # 0.04 J lies two thirds of the way from 0.02 to 0.05


def test_a_gauge_of_percent_needs_the_capacity():
    goal = Goal(hours=1.0, images_per_second=1.0, battery_joules=2 * 3600 * 0.04)
    pilot = Pilot(MENU, goal, battery=lambda: battery(None), clock=lambda: 0.0)
    assert pilot.next().budget == pytest.approx(0.4, abs=0.03)


def test_no_battery_at_all_is_said():
    pilot = Pilot(MENU, Goal(hours=1.0, images_per_second=1.0), battery=lambda: None, clock=lambda: 0.0)
    decision = pilot.next()
    assert decision.budget == 0.2
    assert decision.broken == ("battery",)


def test_the_time_of_several_images_is_their_mean():
    pilot = Pilot(MENU, Goal(deadline_ms=16.0), clock=lambda: 0.0)
    assert pilot.next().budget == 1.0
    for _ in range(100):
        for time_s in (0.019, 0.001):  # 10 ms in the mean, as the table says
            pilot.note(time_s)
        assert pilot.next().budget == 1.0
    for _ in range(100):
        for time_s in (0.039, 0.001):
            pilot.note(time_s)
        last = pilot.next()
    assert last.budget < 1


def test_sensors_that_vanish_are_named_and_the_answers_go_on():
    def fail_from_the_second(value, error: Exception):
        asked = []

        def read():
            asked.append(None)
            if len(asked) > 1:
                raise error
            return value

        return read

    pilot = Pilot(
        MENU,
        Goal(hours=1.0, images_per_second=1.0, max_celsius=60.0),
        battery=fail_from_the_second(battery(3600 * 0.2), EnergyError("BAT0/energy_now is gone; it was taken out.")),
        thermometer=fail_from_the_second(30.0, OSError("the thermometer fell off")),
        clock=lambda: 0.0,
    )
    first = pilot.next()
    assert (first.budget, first.doubts) == (1.0, ())
    for _ in range(3):
        pilot.note(0.010)
        decision = pilot.next()
        assert decision.budget == 1.0
        assert decision.doubts[:2] == ("BAT0/energy_now is gone; it was taken out.", "the thermometer fell off")


def test_a_battery_that_never_answers_is_reckoned_from_the_full_one():
    def broken():
        raise EnergyError("the gauge is broken")

    goal = Goal(hours=1.0, images_per_second=1.0, battery_joules=3600 * 0.04)
    decision = Pilot(MENU, goal, battery=broken, clock=lambda: 0.0).next()
    assert decision.budget == pytest.approx(0.4, abs=0.03)
    assert decision.doubts == ("the gauge is broken",)


def test_a_machine_slower_than_its_table_is_learned_from_the_times_noted():
    pilot = Pilot(MENU, Goal(deadline_ms=16.0), clock=lambda: 0.0)
    assert pilot.next().budget == 1.0
    for _ in range(100):
        pilot.note(0.020)  # twice what the table says of the full budget
        last = pilot.next()
        if last.budget < 1:
            break
    assert last.budget < 1


def test_heat_is_read_only_where_there_is_a_cap():
    def never() -> float:
        raise AssertionError("the thermometer was read")

    Pilot(MENU, Goal(deadline_ms=20.0), thermometer=never, clock=lambda: 0.0).next()
    hot = Pilot(MENU, Goal(max_celsius=60.0), thermometer=lambda: 80.0, clock=lambda: 0.0)
    assert [hot.next() for _ in range(3)][-1].budget == 0.2
