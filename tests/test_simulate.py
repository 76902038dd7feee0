"""The simulated day: energy and heat add up, arrivals keep to what is stated, and the controller finishes it."""

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from iret.runtime.controller import Goal, Menu
from iret.simulate import PROFILES, Day, Thermal, draw, simulate

MENU = Menu(
    budget=(0.2, 0.4, 0.6, 0.8, 1.0),
    accuracy=(0.50, 0.60, 0.66, 0.69, 0.70),
    joules=(0.02, 0.04, 0.06, 0.08, 0.10),
)
# A full budget would take 324 J for the 3,240 images that come.
DAY = Day(hours=1.0, images_per_second=1.0, battery_joules=210.0, burst=20.0)


@pytest.mark.parametrize("arrivals", PROFILES)
def test_the_controller_finishes_the_day_where_full_budget_dies_and_is_right_at_least_as_often_as_any_that_does(
    arrivals,
):
    day = replace(DAY, arrivals=arrivals, burst=90.0 if arrivals == "bursts" else 20.0)
    controller, *fixed = simulate(MENU, day.goal(), day)
    assert (controller.policy, fixed[0].policy, fixed[-1].policy) == ("controller", "fixed 0.2", "fixed 1")
    assert controller.lasts and controller.hours == 1.0 and controller.answered == controller.images
    assert not fixed[-1].lasts and fixed[-1].hours < 0.95
    assert controller.correct >= max(outcome.correct for outcome in fixed)


def test_a_fixed_budget_takes_what_the_table_says():
    day = replace(DAY, spread=0.0, battery_joules=1000.0)
    for outcome, joules, accuracy in zip(simulate(MENU, day.goal(), day)[1:], MENU.joules, MENU.accuracy, strict=True):
        assert outcome.energy_j == pytest.approx(outcome.images * joules)
        assert outcome.correct == pytest.approx(outcome.images * accuracy)
        assert outcome.accuracy == pytest.approx(accuracy)


def test_an_empty_battery_answers_nothing_more():
    day = replace(DAY, spread=0.0, battery_joules=10.05)
    full = simulate(MENU, day.goal(), day)[-1]
    assert full.answered == 100
    assert full.hours == pytest.approx(day.times()[100] / 3600)
    assert full.energy_j == pytest.approx(10.05)
    dead = full.series["hour"] > full.hours + 0.01
    assert (full.series["battery"][dead] == 0).all() and (full.series["accuracy"][dead] == 0).all()
    assert np.isnan(full.series["budget"][dead]).all()


def test_an_idle_device_takes_energy_and_may_die_of_it():
    menu = replace(MENU, idle_watts=0.05)  # 180 J an hour
    day = replace(DAY, battery_joules=400.0)
    controller, cheapest, *_ = simulate(menu, day.goal(), day)
    assert controller.lasts and controller.hours == 1.0
    assert cheapest.energy_j == pytest.approx(180 + 0.02 * cheapest.images, rel=0.01)
    day = replace(DAY, battery_joules=90.0, images_per_second=0.001)
    assert simulate(menu, day.goal(), day)[1].hours == pytest.approx(0.5, abs=0.01)


def test_idle_hours_before_the_first_image_are_set_aside_once():
    menu = replace(MENU, joules=tuple(10 * joules for joules in MENU.joules), idle_watts=1.0)
    idle_j, needed_j = 5 * 3600.0, 1620 * 0.55
    day = Day(hours=5.0, images_per_second=0.1, battery_joules=idle_j + needed_j, arrivals="office")
    assert day.times()[0] > 0.1 * needed_j / menu.idle_watts
    controller, *fixed = simulate(menu, day.goal(), day)
    assert controller.lasts
    assert controller.correct >= max(outcome.correct for outcome in fixed if outcome.lasts)
    assert day.battery_joules - controller.energy_j < 0.03 * needed_j


def test_a_device_that_dies_idle_after_its_last_image_does_not_last(tmp_path, monkeypatch):
    menu = replace(MENU, idle_watts=0.05)
    day = replace(DAY, spread=0.0, busy=0.01, battery_joules=179.0 + 36 * 0.1)  # 20 s short of an hour at full budget
    full = simulate(menu, day.goal(), day)[-1]
    assert full.answered == full.images == 36
    assert not full.lasts and full.hours == pytest.approx(1 - 20 / 3600)
    labels, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *args, **kinds: labels.append(kinds["label"]) or plot(*args, **kinds))
    draw([full, full], tmp_path / "day.png", "a day")
    assert len(labels) == 6 and all(label.startswith("fixed 1: dies after 1.0 h") for label in labels)


def test_every_operating_point_is_played_once_and_the_foot_of_a_cliff_is_none():
    menu = Menu(
        budget=(0.2, 0.9 - 1e-6, 0.9, 0.9004, 1.0),
        accuracy=(0.5, 0.5, 0.6, 0.65, 0.7),
        joules=(0.02, 0.02, 0.08, 0.085, 0.1),
    )
    controller, *fixed = simulate(menu, DAY.goal(), DAY)
    assert [outcome.policy for outcome in fixed] == ["fixed 0.2", "fixed 0.9", "fixed 0.9004", "fixed 1"]
    assert controller.lasts and controller.correct > fixed[0].correct


def test_temperature_settles_where_the_power_says_and_the_controller_stays_under_the_cap():
    thermal = Thermal(ambient_celsius=25.0, kelvin_per_watt=300.0, joules_per_kelvin=2.0)  # settles in half an hour
    day = replace(DAY, thermal=thermal, spread=0.0, battery_joules=1000.0, busy=1.0)
    controller, *_, full = simulate(MENU, Goal(max_celsius=45.0), day)
    assert full.series["celsius"][-1] == pytest.approx(25 + 300 * 0.1, rel=0.02)
    assert full.hot > 2800 and full.peak_celsius > 54
    assert controller.hot == 0 and controller.peak_celsius > 41
    assert controller.accuracy > 0.6


@pytest.mark.parametrize("arrivals", PROFILES)
@pytest.mark.parametrize("burst", [1.0, 40.0])
def test_arrivals_keep_to_the_token_bucket_of_their_own_goal(arrivals, burst):
    day = replace(DAY, arrivals=arrivals, burst=burst, busy=1.0)
    goal, times = day.goal(), day.times()
    assert (np.diff(times) >= 0).all() and times[0] >= 0 and times[-1] <= 3600
    slices = np.array(goal.profile)
    stated = 3600 * np.interp(times / 3600, np.linspace(0, 1, len(slices) + 1), np.cumsum([0, *slices]) / slices.sum())
    excess = np.arange(len(times)) - stated  # images before one and itself, less what was stated until then
    assert (excess + 1 - np.minimum.accumulate(excess)).max() <= burst + 1e-6
    assert len(times) > (300 if burst == 1 else 1000)


def test_an_office_day_is_busy_at_ten_and_quiet_at_three():
    times = replace(DAY, hours=24.0, arrivals="office").times() / 3600
    count = np.histogram(times, np.arange(25))[0]
    assert count[10] > 20 * count[3] > 0


def test_a_seed_is_a_day():
    times = [replace(DAY, seed=seed).times() for seed in (0, 0, 1)]
    assert (times[0] == times[1]).all()
    assert times[0][0] != times[2][0]


def test_the_picture_has_a_panel_for_heat_only_if_there_is_a_cap(tmp_path):
    outcomes = simulate(MENU, DAY.goal(), DAY)
    draw(outcomes, tmp_path / "three.png", "a day")
    draw(outcomes, tmp_path / "four.png", "a day", max_celsius=30.0)
    (width, three), (other, four) = (Image.open(tmp_path / f"{name}.png").size for name in ("three", "four"))
    assert width == other == 1200
    assert four - three == 240


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(arrivals="never"), "arrivals='never' is unknown; choose from steady, office, bursts"),
        (dict(hours=0.0), "hours=0 is not a positive number"),
        (dict(battery_joules=math.nan), "battery_joules=nan is not a positive number"),
        (dict(busy=1.5), "busy=1.5 is outside \\(0, 1\\]"),
        (dict(spread=1.0), "spread=1 is outside \\[0, 1\\)"),
    ],
)
def test_a_wrong_day_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(DAY, **change)


def test_a_table_without_joules_and_a_board_without_mass_are_refused():
    with pytest.raises(ValueError, match="a day on battery needs the joules of every operating point"):
        simulate(Menu(budget=(0.5,), accuracy=(0.5,)), DAY.goal(), DAY)
    with pytest.raises(ValueError, match="kelvin_per_watt and joules_per_kelvin must be positive"):
        Thermal(joules_per_kelvin=0.0)


def test_more_images_than_memory_holds_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"7,200,000,000 images are more than .* lower --rate or --hours"):
        Day(hours=2.0, images_per_second=1e6, battery_joules=1.0).times()
