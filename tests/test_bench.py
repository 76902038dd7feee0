"""Benchmarks: the work is that of the budget asked for, and every candidate is timed in the same rounds."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import iret
from iret.bench import bench, make_point, save
from iret.measure.energy import EnergyError, EnergyMeter
from iret.runtime.cost import full_macs, plan_macs
from iret.runtime.points import OperatingPoints, Plan, Point


def make_model(**options) -> iret.Iret:
    torch.manual_seed(0)
    return iret.create_model("iret_pico", num_classes=2, **options).eval()


class FakeMeter(EnergyMeter):
    """Windows of 1 s: the first, of the idle machine, reads 1 J, the others 3 J; window number `fails_at` vanishes."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__("fake:0", "a fake board", resolution_s=0.001)
        self.fails_at, self.num_windows = fails_at, 0

    def _begin(self) -> None:
        self.num_windows += 1

    def _end(self) -> tuple[float, float]:
        if self.num_windows == self.fails_at:
            raise EnergyError("fake:0 vanished.")
        return 1.0 if self.num_windows == 1 else 3.0, 1.0


def with_two_plans(model: iret.Iret) -> iret.Iret:
    """With a point at about half of the MACs whose images did one of two things."""
    full, kinds = full_macs(model.shape), dict(accuracy=0.5, kept_mean=(64.0, 32.0, 32.0))
    plans = tuple(Plan((64, kept, kept), (0, kept, kept)) for kept in (56, 8))
    points = (
        Point(thresholds=((0.0, 0.0),) * 2, macs_mean=float(full), macs_p95=float(full), **kinds),
        Point(thresholds=((1.0, 1.0),) * 2, macs_mean=full / 2, macs_p95=full / 2, plans=plans, **kinds),
    )
    model.points = OperatingPoints(data="", num_images=1, full_macs=full, points=points)
    return model


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_a_model_without_points_gets_counts_that_cost_the_budget(budget):
    model = make_model()
    point = make_point(model, budget)
    (plan,) = point.plans
    spent = plan_macs(model.shape, plan.kept, plan.refined, scored=True)
    assert spent == point.macs_mean
    assert spent / full_macs(model.shape) == pytest.approx(budget, abs=0.02)  # one patch is 1 % of the MACs


def test_a_model_with_points_takes_the_one_next_to_the_budget():
    model = iret.load("iret_nano-cluttered-digits")
    point = make_point(model, 0.5)
    distances = [abs(each.macs_mean / model.points.full_macs - 0.5) for each in model.points.points]
    assert point == model.points.points[int(np.argmin(distances))]


@pytest.mark.parametrize(
    ("budget", "sentence"), [(0.0, r"outside \(0, 1\]"), (0.05, "below what this model can do, 0.1")]
)
def test_a_budget_that_cannot_be_served_is_refused(budget, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_point(make_model(), budget)


def test_a_table_without_plans_says_what_to_run():
    model = iret.load("iret_nano-cluttered-digits")
    model.points = replace(model.points, points=tuple(replace(each, plans=()) for each in model.points.points))
    with pytest.raises(ValueError, match="hold no plans to replay; run `iret calibrate MODEL --data DATA` once"):
        make_point(model, 0.5)


def test_every_row_is_held_against_the_full_run_of_its_batch(tmp_path):
    model = make_model()
    rows, samples = bench({"pico": model}, [0.5], [1, 2], rounds=5, warm_up=1)
    assert [(row.batch, row.budget) for row in rows] == [(1, 1.0), (1, 0.5), (2, 1.0), (2, 0.5)]
    for row in rows:
        own, full = samples["pico", row.batch, row.budget], samples["pico", row.batch, 1.0]
        assert len(own.samples_s) == 5
        assert row.speedup == pytest.approx(full.samples_s.mean() / own.samples_s.mean())
        assert row.share == pytest.approx(row.speedup * row.macs_share)
        assert row.images_per_s == pytest.approx(row.batch / own.samples_s.mean())
        assert row.energy_kind == "estimated"
    assert [row.macs_share for row in rows[::2]] == [1.0, 1.0]
    assert rows[1].joules < rows[0].joules
    save(tmp_path, "iret bench", rows, samples)
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 4
    assert len((tmp_path / "samples.csv").read_text().splitlines()) == 1 + 4 * 5


def test_a_meter_gives_the_joules_of_an_image_over_the_idle_power(monkeypatch):
    model, meter, calls = make_model(), FakeMeter(), []
    monkeypatch.setattr(model, "forward", lambda images: calls.append(meter.num_windows))
    rows, _ = bench({"pico": model}, [], [4], rounds=5, warm_up=0, meter=meter)
    assert meter.num_windows == 2
    assert (rows[0].energy_kind, rows[0].energy_source, rows[0].energy_scope) == ("measured", "fake:0", "a fake board")
    assert (rows[0].idle_watts, rows[0].is_faint) == (1.0, False)
    assert rows[0].joules == pytest.approx((3.0 - 1.0) / (4 * calls.count(2)))


def test_a_row_that_adds_little_to_the_idle_power_is_faint(monkeypatch):
    model, meter = make_model(), FakeMeter()
    monkeypatch.setattr("iret.clock.FAINT", 3.0)  # the meter's windows add twice the idle power
    rows, _ = bench({"pico": model}, [], [1], rounds=5, warm_up=0, meter=meter)
    assert rows[0].is_faint and rows[0].energy_scope == "a fake board"


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_meter_that_vanishes_in_one_row_leaves_estimates_in_all(fails_at):
    model, said = make_model(), []
    rows, _ = bench({"pico": model}, [0.5], [1], rounds=5, warm_up=0, meter=FakeMeter(fails_at), say=said.append)
    wanted, _ = bench({"pico": model}, [0.5], [1], rounds=5, warm_up=0)
    assert "energy is estimated: fake:0 vanished." in said
    for row, estimate in zip(rows, wanted, strict=True):
        assert row.joules == estimate.joules
        assert (row.energy_kind, row.energy_source, row.idle_watts) == ("estimated", "estimate:fp32", 0.0)
        assert "45 nm" in row.energy_scope


def test_the_replayed_batch_runs_at_its_plans(monkeypatch):
    model = make_model()
    point = make_point(model, 0.4)
    calls = []
    monkeypatch.setattr(model, "replay", lambda images, plans, at: calls.append((len(images), len(plans), at.plans)))
    bench({"pico": model}, [0.4], [3], rounds=5, warm_up=0)
    assert set(calls) == {(3, 3, point.plans)}
    assert len(calls) == 2 * 5  # an untimed call before each timed one


@pytest.mark.parametrize("rounds", [5, 20])
def test_the_macs_of_a_row_are_those_of_the_batches_that_were_timed(monkeypatch, rounds):
    model, calls = with_two_plans(make_model()), []
    monkeypatch.setattr(model, "replay", lambda images, plans, at: calls.append(plans))
    rows, _ = bench({"pico": model}, [0.5], [3], rounds=rounds, warm_up=2)
    leads, timed = calls[0::2][2:], calls[1::2][2:]  # after two rounds of warming up
    assert leads == timed
    assert len(timed) == rounds
    plans = [plan for batch in timed for plan in batch]
    assert len(set(plans)) == 2
    macs = np.mean([plan_macs(model.shape, plan.kept, plan.refined, scored=True) for plan in plans])
    assert rows[1].macs_share == pytest.approx(macs / full_macs(model.shape))


@pytest.mark.parametrize("rounds", [7, 20, 150])
def test_a_row_costs_what_its_budget_says_and_cheaper_budgets_cost_less(monkeypatch, rounds):
    """Images leave early or run to the end, so a few drawn at random would say anything."""
    model, calls = iret.load("iret_pico-cifar10"), []
    monkeypatch.setattr(model, "replay", lambda images, plans, at: calls.append((at.macs_mean, *plans)))
    budgets = [0.75, 0.5, 0.35, 0.25]
    rows, _ = bench({"pico": model}, budgets, [1], rounds=rounds, warm_up=3)
    shares = [row.macs_share for row in rows[1:]]
    full = model.points.full_macs
    assert shares == pytest.approx([make_point(model, budget).macs_mean / full for budget in budgets], rel=0.1)
    assert shares == sorted(shares, reverse=True)
    assert [row.joules for row in rows] == sorted((row.joules for row in rows), reverse=True)
    if rounds == 20:
        assert len(set(calls)) > 4 * 8, "rounds replay images of their own"
