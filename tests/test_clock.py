"""The clock columns of a table: what is replayed, how often, and whose joules they are."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import iret
from iret import clock
from iret.clock import estimate_image, interpolate_joules, measure_device, measure_joules, rows_to_measure
from iret.doctor import describe_device
from iret.measure.energy import EnergyError, EnergyMeter
from iret.measure.estimate import HOROWITZ, EstimateMeter
from iret.precision import to_int8
from iret.runtime.cost import block_linears, full_macs, numbers_moved, plan_macs
from iret.runtime.points import OperatingPoints, Plan, Point
from iret.runtime.timing import MIN_ROUNDS


def make_model() -> iret.Iret:
    """With two points: everything, and little."""
    torch.manual_seed(0)
    model = iret.create_model("iret_pico", num_classes=2, embed_dims=(32, 64, 64), depths=(1, 2, 2)).eval()
    full = float(full_macs(model.shape))
    kinds = dict(kept_mean=(64.0, 64.0, 64.0))
    everything, little = Plan((64, 64, 64), (0, 64, 64)), Plan((64, 8, 4), (0, 8, 4))
    points = (
        Point(thresholds=((0.0, 0.0),) * 2, accuracy=0.6, macs_mean=full, macs_p95=full, plans=(everything,), **kinds),
        Point(
            thresholds=((2.0,) * 2,) * 2, accuracy=0.5, macs_mean=full / 9, macs_p95=full, plans=(little,) * 2, **kinds
        ),
    )
    model.points = OperatingPoints(data="", num_images=1, full_macs=int(full), points=points)
    return model


class FakeMeter(EnergyMeter):
    """Windows of 1 s at 0.5 W and what is added to `spent_j` meanwhile; window number `fails_at` vanishes."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__("fake:0", "a fake board", resolution_s=0.01)
        self.fails_at, self.num_windows, self.spent_j = fails_at, 0, 0.0

    def _begin(self) -> None:
        self.num_windows, self.spent_j = self.num_windows + 1, 0.0

    def _end(self) -> tuple[float, float]:
        if self.num_windows == self.fails_at:
            raise EnergyError("fake:0 vanished.")
        return 0.5 + self.spent_j, 1.0


def spend(meter: FakeMeter, joules: float) -> None:
    meter.spent_j += joules


def test_the_columns_are_of_this_device_and_come_with_their_samples():
    model = make_model()
    table, samples = measure_device(model, model.points)
    assert table.device == describe_device(torch.device("cpu"), "float32")
    assert set(samples) == {(0, 0), (1, 0), (1, 1)}
    assert all(len(latency.samples_s) == table.rounds >= MIN_ROUNDS for latency in samples.values())
    assert table.ms_mean[0] == pytest.approx(samples[0, 0].p50_ms)
    assert table.ms_mean[1] == pytest.approx((samples[1, 0].p50_ms + samples[1, 1].p50_ms) / 2)
    assert all(p50 <= p95 for p50, p95 in zip(table.ms_p50, table.ms_p95, strict=True))
    assert (table.energy_kind, table.energy_source) == ("estimated", "estimate:fp32")
    model.points = model.points.with_device(table)
    assert model.budget_for(ms=1e6) == 1.0


def test_means_are_of_all_images_and_not_of_the_plans_that_ran(monkeypatch):
    model = make_model()
    monkeypatch.setattr("iret.runtime.timing.mean_of_all", lambda *_: 7.0)
    table, _ = measure_device(model, model.points)
    assert (table.ms_mean, table.joules) == ((7.0, 7.0), (7.0, 7.0))


def test_points_without_plans_say_what_to_run():
    model = make_model()
    bare = Point(thresholds=((0.0, 0.0),) * 2, accuracy=0.5, macs_mean=1.0, macs_p95=1.0, kept_mean=())
    table = OperatingPoints(data="", num_images=1, full_macs=1, points=(bare,))
    with pytest.raises(ValueError, match="hold no plans to replay; run `iret calibrate MODEL --data DATA`"):
        measure_device(model, table)


def test_a_plan_that_refines_nothing_is_replayed_with_and_without_exits():
    model = make_model()
    plan = Plan((64, 8, 4), (0, 0, 4))
    for leaves in (None, 0.9):
        point = replace(model.points.points[1], exit_confidence=leaves)
        with torch.no_grad():
            assert model.replay(torch.zeros(1, 3, *model.shape.img_size), [plan], point).shape == (1, 2)


def test_a_model_too_slow_for_every_plan_still_has_all_its_columns(monkeypatch):
    model = make_model()
    monkeypatch.setattr(clock, "TIME_LIMIT_S", 0.0)
    table, samples = measure_device(model, model.points)
    assert set(samples) == {(0, 0), (1, 1)}
    assert table.rounds == MIN_ROUNDS
    assert len(table.ms_mean) == len(table.joules) == 2


# ---- joules


def test_a_meter_is_asked_for_every_point_and_once_for_the_idle_machine(monkeypatch):
    """An image costs a millijoule a patch over three stages: 192 and 76."""
    model, meter, said = make_model(), FakeMeter(), []
    monkeypatch.setattr(model, "replay", lambda images, plans, point: spend(meter, 1e-3 * sum(plans[0].kept)))
    table, _ = measure_device(model, model.points, meter, said.append)
    assert (table.energy_kind, table.energy_source, table.energy_scope) == ("measured", "fake:0", "a fake board")
    assert meter.num_windows == 1 + 2
    assert table.idle_watts == 0.5
    assert table.joules == pytest.approx((0.192, 0.076))
    assert said[1:] == ["then joules from fake:0: 2 windows of 0.012 s and one of the idle machine, 0 s or more"]


def test_a_table_of_joules_that_are_faint_says_so(monkeypatch):
    model, meter, windows = make_model(), FakeMeter(), []

    def work(images, plans, point):  # once a window, which the meter takes to be a second
        if meter.num_windows and meter.num_windows not in windows:
            windows.append(meter.num_windows)
            spend(meter, 1.0 if len(windows) == 1 else 0.02)

    monkeypatch.setattr(model, "replay", work)
    table, _ = measure_device(model, model.points, meter)
    assert table.energy_scope == "a fake board, faint"


def test_a_slow_meter_is_asked_for_some_points_and_power_is_interpolated_between(monkeypatch):
    assert rows_to_measure(31, 6.0) == [0, 1, 30]
    assert rows_to_measure(31, 1.2) == [0, *np.linspace(1, 30, 15).round()]
    assert rows_to_measure(31, 0.12) == list(range(31)) == rows_to_measure(31, 0.0)
    assert rows_to_measure(2, 360.0) == [0, 1]
    # 1, 2 and 4 W where they were asked; between the last two 3 W, at half their MACs
    ms, macs = np.array([10.0, 8.0, 7.0, 3.0]), np.array([100.0, 90.0, 60.0, 30.0])
    assert interpolate_joules([0, 1, 3], [10.0, 16.0, 12.0], ms, macs) == pytest.approx([10.0, 16.0, 21.0, 12.0])
    assert interpolate_joules([0, 1, 2, 3], [1.0, 9.0, 2.0, 8.0], ms, np.array([9.0, 9.0, 9.0, 3.0])) == [
        1.0,
        9.0,
        2.0,
        8.0,
    ]

    model, meter, said = make_model(), FakeMeter(), []
    first, last = model.points.points
    middle = replace(last, macs_mean=(first.macs_mean + last.macs_mean) / 2)
    points = replace(model.points, points=(first, middle, middle, last))
    monkeypatch.setattr(clock, "ENERGY_LIMIT_S", 0.0)
    monkeypatch.setattr(model, "replay", lambda images, plans, point: spend(meter, 0.1))
    table, _ = measure_device(model, points, meter, said.append)
    assert meter.num_windows == 1 + 3 and len(table.joules) == 4
    assert [table.joules[row] for row in (0, 1, 3)] == pytest.approx([0.1, 0.1, 0.1])
    assert table.energy_scope == "a fake board, at 3 points"
    assert "3 windows" in said[1]


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_meter_that_vanishes_at_any_window_leaves_estimates_alone_and_says_so(monkeypatch, fails_at):
    model, meter, said = make_model(), FakeMeter(fails_at), []
    wanted = measure_device(model, model.points)[0]
    monkeypatch.setattr(model, "replay", lambda images, plans, point: spend(meter, 0.1))
    table, _ = measure_device(model, model.points, meter, said.append)
    assert (table.energy_kind, table.energy_source, table.idle_watts) == ("estimated", "estimate:fp32", 0.0)
    assert table.joules == wanted.joules
    assert "energy is estimated: fake:0 vanished." in said


def test_work_that_adds_nothing_to_the_idle_power_is_estimated(monkeypatch):
    model, said = make_model(), []
    monkeypatch.setattr(model, "replay", lambda images, plans, point: None)
    table, _ = measure_device(model, model.points, FakeMeter(), said.append)
    assert table.energy_kind == "estimated"
    assert "measure the idle baseline again" in said[-1]


@pytest.mark.parametrize(("added_w", "is_faint"), [(0.02, True), (0.03, False)])
def test_work_that_adds_little_to_the_idle_power_is_measured_and_said_to_be_noise(added_w, is_faint):
    meter, said, windows = FakeMeter(), [], []

    def call() -> None:  # once a window, which the meter takes to be a second
        if meter.num_windows not in windows:
            windows.append(meter.num_windows)
            spend(meter, added_w if len(windows) == 2 else 1.0)

    measured = measure_joules([([call], 1)] * 3, meter, None, said.append)
    assert measured is not None and measured.idle_w == 0.5
    assert measured.is_faint == [False, is_faint, False]
    assert [line.startswith(f"some work adds only {added_w} W to the idle machine's 0.5 W") for line in said] == [
        True
    ] * is_faint


def test_measured_joules_are_shared_by_the_images_of_the_window():
    calls, meter = [], FakeMeter()

    def call(number: int) -> None:
        calls.append(number)
        spend(meter, 8 * 0.25)

    measured = measure_joules([([lambda: call(1), lambda: call(2)], 8)], meter, None, print)
    assert measured is not None and (measured.joules, measured.idle_w) == (pytest.approx([0.25]), 0.5)
    assert calls == [1, 2] * (len(calls) // 2)


def test_an_estimate_is_no_meter_to_ask():
    assert measure_joules([([pytest.fail], 1)], EstimateMeter(), None, print) is None


def test_the_estimate_is_arithmetic_and_memory():
    model = make_model()
    for point in model.points.points:
        plan, scored = point.plans[0], bool(np.any(point.thresholds))
        macs = plan_macs(model.shape, plan.kept, plan.refined, scored=scored)
        moved = numbers_moved(model.shape, plan.kept, plan.refined, scored=scored)
        wanted = macs * HOROWITZ["fp32"].mac_j + 4 * moved * HOROWITZ["fp32"].byte_j
        assert math.isclose(estimate_image(model, point, plan), wanted)


def test_the_estimate_in_int8_spares_the_products_and_weights_of_blocks_alone():
    model = make_model()
    point = model.points.points[1]
    (plan, _), fp32, int8 = point.plans, HOROWITZ["fp32"], HOROWITZ["int8"]
    weights, products = block_linears(model.shape, plan.kept, scored=bool(np.any(point.thresholds)))
    spared = products * (fp32.mac_j - int8.mac_j) + weights * (4 - 1) * fp32.byte_j
    assert math.isclose(estimate_image(to_int8(model), point, plan), estimate_image(model, point, plan) - spared)
