"""The clock columns of a table: what is replayed, how often, and whose joules they are."""

import math

import numpy as np
import pytest
import torch

import iret
from iret.clock import MIN_ROUNDS, estimate_image, measure_device, measure_joules
from iret.doctor import describe_device
from iret.measure.energy import EnergyError, EnergyMeter
from iret.measure.estimate import HOROWITZ
from iret.runtime.cost import full_macs, numbers_moved, plan_macs
from iret.runtime.points import OperatingPoints, Plan, Point


def make_model() -> iret.Iret:
    """With two points: everything, and little."""
    torch.manual_seed(0)
    model = iret.create_model("iret_pico", num_classes=2, embed_dims=(32, 64, 64), depths=(1, 2, 2)).eval()
    full = float(full_macs(model.shape))
    kinds = dict(accuracy=0.5, kept_mean=(64.0, 64.0, 64.0))
    everything, little = Plan((64, 64, 64), (0, 64, 64)), Plan((64, 8, 4), (0, 8, 4))
    points = (
        Point(thresholds=((0.0, 0.0),) * 2, macs_mean=full, macs_p95=full, plans=(everything,), **kinds),
        Point(thresholds=((2.0, 2.0),) * 2, macs_mean=full / 9, macs_p95=full, plans=(little, little), **kinds),
    )
    model.points = OperatingPoints(data="", num_images=1, full_macs=int(full), points=points)
    return model


class FakeMeter(EnergyMeter):
    """Tells 2 J a window; `fails`: vanishes."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__("fake:0", "a fake board", resolution_s=0.01)
        self.fails = fails

    def _begin(self) -> None: ...

    def _end(self) -> tuple[float, float]:
        if self.fails:
            raise EnergyError("fake:0 vanished.")
        return 2.0, 1.0


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


def test_points_without_plans_say_what_to_run():
    model = make_model()
    bare = Point(thresholds=((0.0, 0.0),) * 2, accuracy=0.5, macs_mean=1.0, macs_p95=1.0, kept_mean=())
    table = OperatingPoints(data="", num_images=1, full_macs=1, points=(bare,))
    with pytest.raises(ValueError, match="hold no plans to replay; run `iret calibrate MODEL --data DATA`"):
        measure_device(model, table)


def test_a_meter_is_asked_for_every_point():
    model = make_model()
    table, _ = measure_device(model, model.points, FakeMeter())
    assert (table.energy_kind, table.energy_source, table.energy_scope) == ("measured", "fake:0", "a fake board")
    assert all(joules > 0 for joules in table.joules)


def test_a_meter_that_vanishes_leaves_the_estimate_and_says_so():
    model, said = make_model(), []
    table, _ = measure_device(model, model.points, FakeMeter(fails=True), said.append)
    assert table.energy_kind == "estimated"
    assert table.joules == measure_device(model, model.points)[0].joules
    assert "energy is estimated: fake:0 vanished." in said


def test_a_meter_that_vanishes_halfway_leaves_estimates_alone(monkeypatch):
    model, meter = make_model(), FakeMeter()
    ends = iter([(2.0, 1.0), (0.0, 1.0)])  # the second: a sensor that is stuck
    monkeypatch.setattr(meter, "_end", lambda: next(ends))
    table, _ = measure_device(model, model.points, meter)
    assert table.energy_kind == "estimated"
    assert table.joules == measure_device(model, model.points)[0].joules


def test_measured_joules_are_shared_by_the_images_of_the_window():
    calls = []
    joules, kind = measure_joules([lambda: calls.append(1), lambda: calls.append(2)], 8, FakeMeter(), None, 9.0, print)
    assert kind == "measured"
    assert joules == pytest.approx(2.0 / (8 * len(calls)))
    assert len(calls) % 2 == 0


def test_the_estimate_is_arithmetic_and_memory():
    model = make_model()
    for point in model.points.points:
        plan, scored = point.plans[0], bool(np.any(point.thresholds))
        macs = plan_macs(model.shape, plan.kept, plan.refined, scored=scored)
        wanted = macs * HOROWITZ["fp32"].mac_j + 4 * numbers_moved(model.shape, plan.kept) * HOROWITZ["fp32"].byte_j
        assert math.isclose(estimate_image(model, point, plan), wanted)


def test_numbers_moved_by_hand():
    shape = make_model().shape
    weights = 12 * (1 * 32**2 + 2 * 64**2 + 2 * 64**2)
    tokens = 16 * (65 * 1 * 32 + 9 * 2 * 64 + 5 * 2 * 64)
    between = 32 * 64 + 9 * (32 + 64) + 64 * 64 + 5 * (64 + 64)
    assert numbers_moved(shape, (64, 8, 4)) == weights + tokens + between + 64 * (3 * 4**2 + 32)
    assert numbers_moved(shape, (64,)) == 12 * 32**2 + 16 * 65 * 32 + 64 * (3 * 4**2 + 32)
