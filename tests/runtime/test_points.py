"""The table of operating points: what a budget buys, what it refuses, and its file."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from iret.runtime import points
from iret.runtime.controller import Controller, Goal, Reading
from iret.runtime.points import (
    FILE_NAME,
    DeviceTable,
    OperatingPoints,
    Plan,
    Point,
    Setting,
    check_budget,
    frontier,
)


def point(macs: float, accuracy: float, *thresholds: tuple[float, float]) -> Point:
    return Point(thresholds=thresholds, accuracy=accuracy, macs_mean=macs, macs_p95=macs + 5, kept_mean=(64.0, 30.5))


def table() -> OperatingPoints:
    """Of a model of 1000 MACs with one transition: all of it, a half at threshold 1, a quarter at 2 (refine at 3)."""
    points = (point(1000.0, 0.9, (0.0, 0.0)), point(500.0, 0.8, (1.0, 1.0)), point(250.0, 0.6, (2.0, 3.0)))
    return OperatingPoints(data="made up", num_images=8, full_macs=1000, points=points)


# ---- what a budget buys


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1.0, (0.0, 0.0)),
        (0.75, (0.5, 0.5)),
        (0.5, (1.0, 1.0)),
        (0.375, (1.5, 2.0)),
        (0.25, (2.0, 3.0)),
    ],
)
def test_thresholds_lie_between_those_of_the_neighbouring_points(budget, expected):
    assert table().setting(budget) == Setting(thresholds=(expected,))


def test_every_transition_has_its_own_thresholds():
    points = (point(800.0, 0.9, (0.0, 0.0), (0.5, 0.5)), point(400.0, 0.7, (1.0, 1.0), (1.5, 2.5)))
    found = OperatingPoints(data="made up", num_images=8, full_macs=1000, points=points).setting(0.6).thresholds
    assert found == (pytest.approx((0.5, 0.5)), pytest.approx((1.0, 1.5)))


def test_a_setting_is_looked_up_once_and_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(points, "MAX_SETTINGS", 3)
    known = table()
    first = known.setting(0.5)
    assert known.setting(np.float64(0.5)) is first
    for budget in np.linspace(0.3, 0.9, 20):
        known.setting(budget)
        assert len(known._settings) <= 3
    assert known.setting(0.5) == first
    assert known == table()


def test_a_budget_above_the_dearest_point_takes_that_point():
    points = (point(800.0, 0.9, (0.5, 0.75)), point(400.0, 0.7, (1.0, 1.0)))
    assert OperatingPoints(data="", num_images=1, full_macs=1000, points=points).setting(0.9).thresholds == (
        (0.5, 0.75),
    )


def test_the_full_budget_keeps_everything_even_if_no_point_does():
    points = (point(800.0, 0.9, (0.5, 0.75), (1.0, 1.0)),)
    found = OperatingPoints(data="", num_images=1, full_macs=1000, points=points).setting(1.0).thresholds
    assert found == ((0.0, 0.0), (0.0, 0.0))


def exits(*confidences: float | None) -> OperatingPoints:
    """At shares 1, 0.5 and 0.25."""
    points = tuple(
        replace(point(macs, 0.5, (0.0, 0.0)), exit_confidence=confidence)
        for macs, confidence in zip((1000.0, 500.0, 250.0), confidences, strict=True)
    )
    return OperatingPoints(data="", num_images=1, full_macs=1000, points=points)


def test_the_exit_confidence_lies_between_those_of_the_neighbours_and_none_counts_as_one():
    table = exits(None, 0.8, 0.6)
    assert table.setting(1.0).exit_confidence is None
    assert table.setting(0.75).exit_confidence == pytest.approx(0.9)
    assert table.setting(0.375).exit_confidence == pytest.approx(0.7)
    assert exits(None, None, 0.6).setting(0.6).exit_confidence is None


def test_a_budget_below_the_cheapest_point_names_it():
    assert table().cheapest_budget == 0.25
    with pytest.raises(
        ValueError, match=r"budget=0.2 is below the cheapest .* 0.250 of its MACs; ask for that or more\."
    ):
        table().setting(0.2)


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_a_budget_outside_zero_to_one_is_refused(budget):
    with pytest.raises(ValueError, match=r"is outside \(0, 1\]; it is a share of the full model's MACs"):
        check_budget(budget)
    with pytest.raises(ValueError, match=r"is outside \(0, 1\]"):
        table().setting(budget)


# ---- what milliseconds and joules buy


def timed(ms: tuple[float, ...] = (10.0, 6.0, 2.0), device: str = "chip, 1 thread, float32") -> DeviceTable:
    return DeviceTable(
        device=device,
        ms_mean=ms,
        ms_p50=ms,
        ms_p95=ms,
        joules=tuple(each / 100 for each in ms),
        energy_source="made up",
        energy_scope="all",
        energy_kind="estimated",
        rounds=3,
    )


@pytest.mark.parametrize(
    ("ms", "budget"), [(2.0, 0.25), (4.0, 0.375), (6.0, 0.5), (8.0, 0.75), (10.0, 1.0), (99.0, 1.0)]
)
def test_milliseconds_and_joules_are_a_budget_on_the_chord_between_points(ms, budget):
    found = table().with_device(timed())
    assert found.budget_for(timed().device, ms=ms) == pytest.approx(budget)
    assert found.budget_for(timed().device, joules=ms / 100) == pytest.approx(budget)


def test_a_dearer_point_that_is_faster_is_taken():
    found = table().with_device(timed((5.0, 6.0, 2.0)))  # everything kept is faster than choosing
    assert found.budget_for(timed().device, ms=5.5) == 1.0
    assert found.budget_for(timed().device, ms=4.0) == pytest.approx(0.375)


@pytest.mark.parametrize(
    ("accuracies", "ms", "budget"),  # from the dearest budget: 1, 0.5, 0.25
    [
        ((0.7, 0.8, 0.6), (10.0, 6.0, 2.0), 0.5),  # all of it is slower and worse
        ((0.8, 0.8, 0.6), (10.0, 6.0, 2.0), 0.5),  # ... or slower and no better
        ((0.9, 0.8, 0.6), (6.0, 10.0, 2.0), 1.0),
        ((0.7, 0.6, 0.8), (12.0, 6.0, 8.0), 0.25),
        ((0.9, 0.8, 0.6), (12.0, 9.0, 2.0), 0.5 + 0.5 / 3 * 2),  # where the chord reaches 11 ms
    ],
)
def test_of_what_fits_the_most_accurate_is_served_and_of_equals_the_cheapest(accuracies, ms, budget):
    points = tuple(replace(each, accuracy=a) for each, a in zip(table().points, accuracies, strict=True))
    found = replace(table(), points=points).with_device(timed(ms))
    assert found.budget_for(timed().device, ms=11.0) == pytest.approx(budget)
    assert found.budget_for(timed().device, joules=0.11) == pytest.approx(budget)


def test_no_position_that_another_beats_in_accuracy_at_no_more_milliseconds_or_joules_is_ever_served():
    random, device = np.random.default_rng(0), timed().device
    for _ in range(30):
        rungs = np.sort(random.uniform(0, 3, 6))  # some so close that they are cliffs
        shares, accuracies, ms = (
            np.sort(random.uniform(0.1, 1, 6))[::-1],
            random.uniform(0, 1, 6),
            random.uniform(1, 9, 6),
        )
        points = tuple(point(1e3 * s, a, (t, t)) for s, a, t in zip(shares, accuracies, rungs, strict=True))
        found = OperatingPoints(data="", num_images=1, full_macs=1000, points=points).with_device(timed(tuple(ms)))
        menu, unit = found.menu(device), str(random.choice(["ms", "joules"]))
        asked = float(random.uniform(min(getattr(menu, unit)), max(getattr(menu, unit))))
        served = found.budget_for(device, **{unit: asked})
        cost, accuracy = menu.read(unit, served), menu.read("accuracy", served)
        assert cost <= asked * (1 + 1e-9)
        for other in np.union1d(menu.budget, np.linspace(menu.budget[0], menu.budget[-1], 100)):
            other_cost, other_accuracy = menu.read(unit, other), menu.read("accuracy", other)
            assert not (other_cost <= cost and other_accuracy > accuracy + 1e-9)
            assert not (other_cost < cost * (1 - 1e-9) and other_accuracy >= accuracy)


def test_within_a_cliff_milliseconds_buy_its_foot():
    points = (point(1000.0, 0.9, (0.69, 0.69)), point(200.0, 0.5, (0.7, 0.7)))
    found = OperatingPoints(data="", num_images=1, full_macs=1000, points=points).with_device(timed((10.0, 2.0)))
    assert found.budget_for(timed().device, ms=9.0) == 0.2


def test_the_share_that_a_refusal_names_can_be_asked_for():
    found = OperatingPoints(data="", num_images=1, full_macs=1000, points=(point(95.1, 0.5, (1.0, 1.0)),))
    for refused in (
        lambda: found.setting(0.09),
        lambda: found.with_device(timed((2.0,))).budget_for(timed().device, ms=1.0),
    ):
        with pytest.raises(ValueError, match=r"0\.096 of"):
            refused()
    assert found.setting(0.096).thresholds == ((1.0, 1.0),)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            {"ms": 1.9},
            r"ms=1.9 is below the cheapest operating point on this device, 2 ms at 0\.250 of the MACs; ask for that or more, "
            r"or for a budget of 0\.250\. .* measure again with `iret calibrate MODEL --device-only`",
        ),
        ({"joules": 0.01}, "joules=0.01 is below the cheapest operating point on this device, 0.02 joules at 0.250"),
        ({"ms": 0.0}, "must be above 0"),
        ({"ms": float("nan")}, "must be above 0"),
        ({}, "give one of ms and joules"),
        ({"ms": 3.0, "joules": 1.0}, "give one of ms and joules"),
    ],
)
def test_what_milliseconds_cannot_buy_is_refused(asked, sentence):
    with pytest.raises(ValueError, match=sentence):
        table().with_device(timed()).budget_for(timed().device, **asked)


@pytest.mark.parametrize("least", [1.15049, 0.00020001, 2.0, 12345.6, 0.1 + 0.2])
def test_the_milliseconds_that_a_refusal_names_can_be_asked_for(least):
    found = OperatingPoints(data="", num_images=1, full_macs=1000, points=(point(95.1, 0.5, (1.0, 1.0)),))
    found = found.with_device(timed((least,)))
    with pytest.raises(ValueError, match="is below the cheapest") as refusal:
        found.budget_for(timed().device, ms=least / 2)
    named = float(re.search(r"this device, (\S+) ms", str(refusal.value))[1])
    assert least <= named < 1.001 * least
    assert found.budget_for(timed().device, ms=named) == pytest.approx(0.0951)


def test_an_accuracy_lies_on_the_chord_of_two_points():
    points = (point(1000.0, 0.9, (0.0, 0.0)), point(200.0, 0.5, (0.7, 0.7)))
    found = OperatingPoints(data="", num_images=1, full_macs=1000, points=points)
    assert [found.accuracy_at(budget) for budget in (1.0, 0.6, 0.2)] == pytest.approx([0.9, 0.7, 0.5])


def test_another_device_is_refused_and_the_known_ones_are_named():
    found = table().with_device(timed()).with_device(timed(device="other"))
    with pytest.raises(
        ValueError, match=r"no clock .* \(mine\); known: chip, 1 thread, float32; other\. .*--device-only"
    ):
        found.budget_for("mine", ms=3.0)


def test_a_device_measured_again_replaces_its_columns():
    found = table().with_device(timed()).with_device(timed(device="other")).with_device(timed((9.0, 5.0, 1.0)))
    assert [each.device for each in found.devices] == ["other", timed().device]
    assert found.table_of(timed().device).ms_mean == (9.0, 5.0, 1.0)


def test_columns_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"columns of device .* do not have 3 entries"):
        table().with_device(timed((1.0, 2.0)))


# ---- what a controller chooses from


def test_the_menu_is_the_table_from_the_cheapest():
    menu = table().with_device(timed()).menu(timed().device, idle_watts=0.5)
    assert menu.budget == (0.25, 0.5, 1.0)
    assert menu.accuracy == (0.6, 0.8, 0.9)
    assert menu.ms == menu.ms_p95 == (2.0, 6.0, 10.0)
    assert menu.joules == pytest.approx((0.02, 0.06, 0.1))
    assert menu.idle_watts == 0.5 and menu.is_estimated
    with pytest.raises(ValueError, match="no clock"):
        table().menu("other")


def test_a_cliff_is_a_step_of_the_menu_as_it_is_of_the_settings():
    points = (point(100.0, 0.9, (0.0, 0.0)), point(90.0, 0.8, (0.69, 0.69)), point(20.0, 0.5, (0.7, 0.7)))
    found = OperatingPoints(data="", num_images=1, full_macs=100, points=points).with_device(timed())
    menu = found.menu(timed().device)
    assert menu.budget == pytest.approx((0.2, 0.9 - 1e-6, 0.9, 1.0), abs=1e-9)
    assert menu.accuracy == (0.5, 0.5, 0.8, 0.9)
    assert menu.ms == (2.0, 2.0, 6.0, 10.0)
    assert menu.is_foot == (False, True, False, False)


def test_the_accuracy_that_the_controller_reckons_with_is_that_of_the_setting_served_cliffs_included():
    macs, thresholds, accuracies = (100.0, 90.0, 20.0, 10.0), (0.0, 0.69, 0.7, 2.0), (0.9, 0.8, 0.5, 0.4)
    points = tuple(point(m, a, (t, t)) for m, a, t in zip(macs, accuracies, thresholds, strict=True))
    found = OperatingPoints(data="", num_images=1, full_macs=100, points=points)
    found = found.with_device(timed((10.0, 6.0, 2.0, 1.0)))
    menu = found.menu(timed().device)
    controller, budgets = Controller(menu, Goal(hours=1.0, images_per_second=1.0)), set()
    for millijoules in range(110, 5, -1):
        reading = Reading(time_s=0.0, images=0, battery_joules=3.6 * millijoules)
        decision = controller.decide(reading)
        ((keep, _),) = found.setting(decision.budget).thresholds
        assert decision.accuracy == pytest.approx(np.interp(keep, thresholds, accuracies))
        assert decision.accuracy == pytest.approx(menu.read("accuracy", decision.budget))
        budgets.add(decision.budget)
    assert len(budgets) > 20
    assert menu.read("accuracy", 0.9 - 5e-7) == 0.5 and menu.read("joules", 0.9) == 0.06


def test_what_the_device_draws_always_is_that_of_its_table_unless_it_is_given():
    measured = replace(timed(), idle_watts=2.5, energy_kind="measured")
    found = table().with_device(measured)
    assert found.menu(measured.device).idle_watts == 2.5
    assert not found.menu(measured.device).is_estimated
    assert found.menu(measured.device, idle_watts=0.0).idle_watts == 0.0


# ---- the table


def test_the_frontier_is_what_nobody_cheaper_beats_beyond_noise_and_the_dearest():
    cheap, good, worse = (point(macs, accuracy, (1.0, 1.0)) for macs, accuracy in ((1.0, 0.5), (3.0, 0.8), (4.0, 0.7)))
    whole = point(5.0, 0.79, (0.0, 0.0))
    assert frontier([worse, whole, cheap, good], 1000) == (whole, good, cheap)
    assert frontier([worse, whole, cheap, good], 100) == (whole, worse, good, cheap)  # 10 points apart, interval 12
    assert frontier([worse, cheap, good], 1000) == (worse, good, cheap)
    assert frontier([cheap], 1000) == (cheap,)


def test_of_points_that_cost_the_same_the_most_accurate_is_served():
    worse, good = point(3.0, 0.7, (2.0, 2.0)), point(3.0, 0.8, (1.0, 2.0))
    assert frontier([worse, good, point(9.0, 0.9)], 100) == (point(9.0, 0.9), good)


def idle_thresholds() -> tuple[Point, ...]:
    """Two points whose thresholds drop nothing, so that scoring makes them dearer than the one that keeps everything."""
    idle = (point(1000.5, 0.91, (0.2, 0.2)), point(1000.4, 0.9, (0.1, 0.1)))
    return (*idle, point(1000.1, 0.9, (0.0, 0.0)), *table().points[1:])


def test_thresholds_that_drop_nothing_are_not_served():
    served = frontier(idle_thresholds(), 100)
    assert served == idle_thresholds()[2:]
    assert served[0].keeps_all and not any(point.keeps_all for point in served[1:])
    assert not replace(served[0], exit_confidence=0.9).keeps_all
    points = OperatingPoints(data="", num_images=1, full_macs=1000, points=served).with_device(timed())
    assert points.menu(timed().device).budget == (0.25, 0.5, 1.0)


def test_a_table_that_holds_them_all_the_same_still_has_a_menu():
    found = OperatingPoints(data="", num_images=1, full_macs=1000, points=idle_thresholds())
    menu = found.with_device(timed((12.0, 11.0, 10.0, 6.0, 2.0))).menu(timed().device)
    assert menu.budget == (0.25, 0.5, 1.0)
    assert menu.ms == (2.0, 6.0, 12.0)


def test_points_out_of_order_are_refused():
    with pytest.raises(ValueError, match="ordered from the dearest to the cheapest"):
        OperatingPoints(
            data="", num_images=1, full_macs=10, points=(point(1.0, 0.1, (1.0, 1.0)), point(2.0, 0.2, (0.0, 0.0)))
        )


def test_an_empty_table_is_refused():
    with pytest.raises(ValueError, match="needs at least one point"):
        OperatingPoints(data="", num_images=1, full_macs=10, points=())


def test_at_a_cliff_between_points_the_cheaper_one_is_taken():
    ladder = ((100.0, 0.0), (95.0, 0.69), (20.0, 0.7), (10.0, 2.0))
    points = tuple(point(macs, 0.5, (rung, rung)) for macs, rung in ladder)
    table = OperatingPoints(data="made up", num_images=1, full_macs=100, points=points)
    assert table.setting(0.5).thresholds == points[2].thresholds
    assert table.setting(0.95).thresholds == points[1].thresholds
    assert table.setting(0.15).thresholds[0][0] == pytest.approx(1.35)


# ---- the file


def test_a_table_survives_its_file(tmp_path):
    plan = Plan((64, 30), (0, 12))
    points = tuple(replace(each, plans=(plan,), exit_confidence=0.5) for each in table().points)
    whole = replace(table(), points=points).with_device(timed())
    (tmp_path / FILE_NAME).write_text(whole.to_json())
    assert OperatingPoints.read(tmp_path) == whole
    assert len(whole.to_json().splitlines()) < 20  # one point a line


def test_a_table_written_before_idle_power_was_measured_has_none():
    raw = json.loads(table().with_device(timed()).to_json())
    assert raw["devices"][0].pop("idle_watts") == 0.0
    assert OperatingPoints.from_json(json.dumps(raw)) == table().with_device(timed())


def test_a_plan_says_how_many_stages_ran():
    assert Plan((64, 30), (0, 12)).stages_run == 2


def test_no_file_is_no_table(tmp_path):
    assert OperatingPoints.read(tmp_path) is None


def change(**fields) -> str:
    return json.dumps({**json.loads(table().to_json()), **fields})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        table().to_json()[:-20],
        change(format=1),
        change(points=[]),
        change(points=[{}]),
        change(points=3),
        change(unknown=1),
        change(points=[{**json.loads(table().to_json())["points"][0], "thresholds": [[1.0]]}]),
        table().to_json().replace('"num_images"', '"images"'),
    ],
)
def test_a_damaged_file_is_named_with_the_command_that_makes_a_new_one(tmp_path, text):
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(
        ValueError,
        match=f"{FILE_NAME} is not a table of operating points .* run `iret calibrate` again, in a folder without it",
    ):
        OperatingPoints.read(tmp_path)


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=f"{FILE_NAME} is not a table of operating points"):
        OperatingPoints.read(tmp_path)
