"""The controller at work: what the sensors say reaches it, and what it decides is a budget the model can serve."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from iret.measure.battery import Battery
from iret.measure.energy import EnergyError, EnergyMeter
from iret.pilot import WINDOW_S, WORK_SHARE, Pilot, _LiveMeter
from iret.runtime.controller import Decision, Goal, Menu

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


class World:
    """A device that draws `idle_w`, give or take `wobble` of it from second to second, and takes `times` what the menu says."""

    def __init__(self, *, idle_w: float = 1.0, wobble: float = 0.0, times: float = 1.0) -> None:
        self.time_s, self.joules, self.idle_w, self.wobble, self.times = 0.0, 0.0, idle_w, wobble, times
        self.draw = random.Random(0)

    def wait(self, time_s: float, work_joules: float = 0.0) -> None:
        self.time_s += time_s
        self.joules += self.idle_w * (1 + self.wobble * self.draw.uniform(-1, 1)) * time_s + self.times * work_joules


class WorldMeter(EnergyMeter):
    """Sees that part of what the device takes; `trouble`: raised in place of the next start, reading or end."""

    def __init__(self, world: World, resolution_s: float = 0.1, part: float = 1.0) -> None:
        super().__init__("made up", "device", resolution_s=resolution_s)
        self.world, self.part, self.windows, self.is_cancelled = world, part, [], False
        self.trouble: dict[str, Exception] = {}

    def _begin(self) -> None:
        if "start" in self.trouble:
            raise self.trouble.pop("start")
        self._from = (self.world.joules, self.world.time_s)

    def _end(self) -> tuple[float, float]:
        if "stop" in self.trouble:
            raise self.trouble.pop("stop")
        joules, time_s = self.world.joules - self._from[0], self.world.time_s - self._from[1]
        self.windows.append(time_s)
        return self.part * joules, time_s

    def _abandon(self) -> None:
        self.is_cancelled = True
        if "cancel" in self.trouble:
            raise self.trouble.pop("cancel")


def fly(
    world: World,
    meter: WorldMeter | None,
    *,
    images: int,
    every_s: float,
    battery_joules: float,
    gauge: Callable[[], Battery | None] = lambda: None,
) -> list[Decision]:
    """So many images, evenly in time; without a gauge unless one is given."""
    goal = Goal(hours=images * every_s / 3600, images_per_second=1 / every_s, burst=1.0, battery_joules=battery_joules)
    menu = replace(MENU, idle_watts=world.idle_w)
    idle_watts = world.idle_w * (1.0 if meter is None else meter.part)
    pilot = Pilot(menu, goal, battery=gauge, clock=lambda: world.time_s, meter=meter, idle_watts=idle_watts)
    decisions = []
    for _ in range(images):
        decisions.append(pilot.next())
        world.wait(every_s, menu.read("joules", decisions[-1].budget))
        pilot.note(0.01)
    pilot.close()
    return decisions


def test_a_device_dearer_than_its_table_is_read_off_the_meter_and_the_battery_lasts_without_a_gauge():
    enough = dict(images=2000, every_s=0.1, battery_joules=2000 * (0.1 + 0.08))
    without, world = World(times=2.0), World(times=2.0)
    fly(without, None, **enough)
    assert without.joules > 1.05 * enough["battery_joules"]  # nobody noticed
    meter = WorldMeter(world)
    decisions = fly(world, meter, **enough)
    assert world.joules < 1.005 * enough["battery_joules"]  # the first windows' images were reckoned by the table
    assert decisions[0].budget > 0.7
    assert decisions[1000].budget == pytest.approx(0.4, abs=0.04)  # 0.04 J, which are 0.08 here
    assert len(meter.windows) > 100
    assert meter.is_cancelled


@pytest.mark.parametrize("percent", [False, True])
def test_a_gauge_has_the_last_word_beside_a_meter_that_sees_a_part(percent):
    """The device takes twice its table, and the meter sees half of it: alone it would say that all is well."""
    world, full = World(times=2.0), 2000 * (0.1 + 0.08)

    def gauge() -> Battery:
        left = max(full - world.joules, 0.0)
        return battery(None, 100 * left / full) if percent else battery(left)

    fly(world, WorldMeter(world, part=0.5), images=2000, every_s=0.1, battery_joules=full, gauge=gauge)
    assert world.joules <= full


def test_images_answered_beside_a_gauge_are_in_no_window():
    """A gauge that comes and goes: what was seen while it was there is not charged to the images after."""
    world, full = World(), 4000 * 0.2
    meter = WorldMeter(world, resolution_s=0.35)

    def gauge() -> Battery | None:
        return battery(full - world.joules) if world.time_s % 1.0 < 0.5 else None

    decisions = fly(world, meter, images=2000, every_s=0.1, battery_joules=full, gauge=gauge)
    assert meter.windows
    assert all(decision.budget == 1.0 for decision in decisions)
    assert max(meter.windows) < 0.5


@pytest.mark.parametrize("wobble", [0.0, 0.02])
def test_a_wobble_of_the_idle_power_does_not_make_images_dear(wobble):
    """5 W idle, and windows whose net is over as often as under what the work took."""
    world = World(idle_w=5.0, wobble=wobble)
    live = _LiveMeter(WorldMeter(world, resolution_s=0.01), 5.0, lambda: world.time_s)
    live.read(0.0, [])
    ratios = []
    for number in range(6000):
        predicted = 0.1 if number % 2 else 0.02  # two in 0.1 s: 0.12 J beside 0.5, which is over a fifth
        world.wait(0.05, predicted)
        joules = live.read(predicted, [])
        ratios += [] if joules is None else [joules / predicted]
    assert len(ratios) > 2000
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=1e-6 + wobble / 4)
    assert max(ratios) <= 1 + wobble / WORK_SHARE + 1e-6


def test_images_too_rare_to_stand_out_are_never_read_off_the_meter():
    world = World(idle_w=5.0, wobble=0.01)
    meter = WorldMeter(world)
    decisions = fly(world, meter, images=500, every_s=1.0, battery_joules=500 * (5 + 0.06))
    assert meter.windows == []
    assert decisions == fly(World(idle_w=5.0), None, images=500, every_s=1.0, battery_joules=500 * (5 + 0.06))


def test_work_is_what_the_menu_puts_at_the_budgets_served():
    """0.02 J in 0.2 s beside 1 W are a tenth, and 0.1 J a half."""
    for joules, is_read in ((0.0201, False), (0.2, True)):
        meter = WorldMeter(World())
        fly(meter.world, meter, images=100, every_s=0.2, battery_joules=100 * (0.2 + joules))
        assert bool(meter.windows) == is_read


def test_a_window_is_not_read_before_the_meter_can_be_trusted():
    world = World(idle_w=0.0)
    meter = WorldMeter(world, resolution_s=1.0)
    fly(world, meter, images=100, every_s=0.1, battery_joules=10.0)
    assert 5 <= len(meter.windows) <= 9
    assert min(meter.windows) > 1.0


@pytest.mark.parametrize("pause_s", [30.0, 10_000.0])
def test_after_a_pause_the_meter_is_soon_read_again(pause_s):
    world = World(idle_w=5.0)
    meter = WorldMeter(world)
    live = _LiveMeter(meter, 5.0, lambda: world.time_s)
    live.read(0.0, [])
    world.wait(pause_s)
    known = []
    while not known and world.time_s < pause_s + 1000:
        world.wait(0.05, 0.1)
        known += [joules for joules in [live.read(0.1, [])] if joules is not None]
    assert known == [pytest.approx(0.1)]
    assert world.time_s < pause_s + WINDOW_S + 1
    assert max(meter.windows) < WINDOW_S + 1


def test_a_meter_that_fails_is_named_and_the_next_window_is_read_all_the_same():
    world = World(idle_w=0.5)
    meter, failed = WorldMeter(world), []
    live = _LiveMeter(meter, 0.5, lambda: world.time_s)
    meter.trouble["start"] = EnergyError("the meter is gone.")
    assert live.read(0.0, failed) is None
    assert failed == ["the meter is gone."]
    for trouble in (None, EnergyError("the counter was reset."), OSError("unplugged")):
        if trouble:
            meter.trouble["stop"] = trouble
        known = []
        for _ in range(6):
            world.wait(0.06, 0.1)
            known.append(live.read(0.1, failed))
        read = [joules for joules in known if joules is not None]
        assert len(read) >= 2
        assert read == [pytest.approx(0.1)] * len(read)
    assert failed == ["the meter is gone.", "the counter was reset.", "unplugged"]
    meter.trouble["cancel"] = EnergyError("Zeus failed.")
    live.close()  # nobody needs it any more
    assert meter.is_cancelled


def test_without_hours_to_last_no_meter_is_read():
    meter = WorldMeter(World())
    meter.trouble["start"] = AssertionError("the meter was started")
    pilot = Pilot(MENU, Goal(deadline_ms=20.0), meter=meter, clock=lambda: 0.0)
    pilot.next()
    pilot.close()
