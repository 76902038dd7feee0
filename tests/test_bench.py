"""Benchmarks: the work is that of the budget asked for, and every candidate is timed in the same rounds."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import iret
from iret.bench import bench, make_point, save
from iret.measure.energy import EnergyMeter
from iret.runtime.cost import full_macs, plan_macs


def make_model(**options) -> iret.Iret:
    torch.manual_seed(0)
    return iret.create_model("iret_pico", num_classes=2, **options).eval()


class FakeMeter(EnergyMeter):
    def __init__(self) -> None:
        super().__init__("fake:0", "a fake board", resolution_s=0.001)

    def _begin(self) -> None: ...

    def _end(self) -> tuple[float, float]:
        return 3.0, 1.0


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
        assert row.speedup == pytest.approx(float(np.median(full.samples_s / own.samples_s)))
        assert row.share == pytest.approx(row.speedup * row.macs_share)
        assert row.images_per_s == pytest.approx(1e3 * row.batch / row.ms_p50)
        assert row.energy_kind == "estimated"
    assert [row.macs_share for row in rows[::2]] == [1.0, 1.0]
    assert rows[1].joules < rows[0].joules
    save(tmp_path, "iret bench", rows, samples)
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 4
    assert len((tmp_path / "samples.csv").read_text().splitlines()) == 1 + 4 * 5


def test_a_meter_gives_the_joules_of_an_image():
    rows, _ = bench({"pico": make_model()}, [], [4], rounds=5, warm_up=0, meter=FakeMeter())
    assert rows[0].energy_kind == "measured"
    assert 0 < rows[0].joules <= 3.0 / 4


def test_the_replayed_batch_runs_at_its_plans(monkeypatch):
    model = make_model()
    point = make_point(model, 0.4)
    calls = []
    monkeypatch.setattr(model, "replay", lambda images, plans, at: calls.append((len(images), len(plans), at.plans)))
    bench({"pico": model}, [0.4], [3], rounds=5, warm_up=0)
    assert set(calls) == {(3, 3, point.plans)}
    assert len(calls) == 2 * 5  # an untimed call before each timed one
