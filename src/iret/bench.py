"""Time and energy of models against their budget on this machine: interleaved, raw samples kept.

A row is one model at one budget and batch size. Its work is a replay of what held-out images did at the operating point next
to that budget (`Iret.replay`), so a batch holds as many different token counts as real images have. Of these images so many
are taken as the rounds need, spread evenly from the cheapest to the dearest, and dealt at random. A model without operating
points drops the same share of patches at every transition in every image, as many as the budget asks.
"""

import csv
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, cycle
from pathlib import Path

import numpy as np
import torch

from iret import doctor
from iret.clock import NetJoules, Say, announce, estimate_image, estimate_meter, measure_joules, synchronizer
from iret.measure.energy import EnergyMeter
from iret.measure.latency import Latency, measure_latency
from iret.model import Iret
from iret.runtime.cost import full_macs, plan_macs
from iret.runtime.points import Plan, Point, check_budget
from iret.weights import write_atomically

ROWS_NAME, SAMPLES_NAME = "bench.json", "samples.csv"
LEAD = 1  # untimed calls before each timed one, of the same batch of plans

Key = tuple[str, int, float]  # model, batch size, budget


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate. `share` is how many times faster it is over how many times fewer MACs it spends."""

    model: str
    batch: int
    budget: float  # asked for
    macs_share: float  # of the full model's, mean over the images timed
    ms_p50: float  # of the whole batch
    ms_p95: float
    images_per_s: float  # in the mean of all rounds, each of other images
    speedup: float  # the full run's time to this one's, likewise
    share: float
    joules: float  # an image, net of `idle_watts`
    idle_watts: float  # of the machine at rest, taken off the joules; 0 where they are estimated
    energy_source: str
    energy_scope: str
    energy_kind: str  # "measured" or "estimated", the same in all rows
    is_faint: bool  # the work adds so little to `idle_watts` that these may be mostly noise


def make_point(model: Iret, budget: float) -> Point:
    """The operating point next to `budget`, or one made up for a model without any.

    Raises:
        ValueError: outside (0, 1], or below what the model can do.
    """
    check_budget(budget)
    if model.points is not None:
        if budget < model.points.cheapest_budget:
            model.setting(budget)  # refuses in its own words
        with_plans = [point for point in model.points.points if point.plans]
        if not with_plans:
            raise ValueError(
                "the operating points hold no plans to replay; run `iret calibrate MODEL --data DATA` once."
            )
        return min(with_plans, key=lambda point: abs(point.macs_mean / model.points.full_macs - budget))
    shape, full = model.shape, full_macs(model.shape)
    low, high = shape.min_keep / shape.num_patches, 1.0
    least = _uniform(model, low).macs_mean
    if least > 1.02 * budget * full:
        raise ValueError(f"budget={budget:g} is below what this model can do, {least / full:.3f} of its MACs.")
    for _ in range(30):  # the share kept at each transition, by bisection: MACs rise with it
        middle = (low + high) / 2
        low, high = (middle, high) if _uniform(model, middle).macs_mean < budget * full else (low, middle)
    both = (_uniform(model, share if budget < 1 else 1.0) for share in (low, high))
    return min(both, key=lambda point: abs(point.macs_mean / full - budget))


def _uniform(model: Iret, share: float) -> Point:
    """Every transition keeps the same share of what reached it."""
    shape = model.shape
    kept = tuple(max(shape.min_keep, round(shape.num_patches * share**stage)) for stage in range(len(shape.depths)))
    threshold = 0.0 if share == 1 else 1.0
    macs = float(plan_macs(shape, kept, kept, scored=share < 1))
    return Point(
        thresholds=((threshold, threshold),) * len(model.transitions),
        accuracy=float("nan"),
        macs_mean=macs,
        macs_p95=macs,
        kept_mean=tuple(map(float, kept)),
        plans=(Plan(kept, (0, *kept[1:])),),
    )


@dataclass(frozen=True)
class _Candidate:
    """One model at one budget and batch size; every round replays a batch of plans of its own, `macs_share` is of those timed."""

    model: Iret
    images: torch.Tensor
    point: Point
    batches: Iterator[list[Plan]]
    macs_share: float
    estimate_j: float  # an image

    @classmethod
    def draw(
        cls, model: Iret, images: torch.Tensor, budget: float, warm_up: int, rounds: int, generator: random.Random
    ) -> "_Candidate":
        point = _uniform(model, 1.0) if budget == 1 else make_point(model, budget)
        scored, size = bool(np.any(point.thresholds)), len(images)

        def macs_of(plan: Plan) -> float:
            return float(plan_macs(model.shape, plan.kept, plan.refined, scored=scored))

        ranked, wanted = sorted(point.plans, key=macs_of), rounds * size
        plans = [ranked[int((place + 0.5) * len(ranked) / wanted)] for place in range(wanted)]
        generator.shuffle(plans)
        share = 1.0 if budget == 1 else float(np.mean([macs_of(plan) for plan in plans])) / full_macs(model.shape)
        joules = np.mean([estimate_image(model, point, plan) for plan in plans])
        dealt = [plans[start : start + size] for start in range(0, wanted, size)]
        first = [dealt[round_ % rounds] for round_ in range(warm_up)]
        calls = chain.from_iterable([batch] * (LEAD + 1) for batch in chain(first, cycle(dealt)))
        return cls(model, images, point, calls, share, float(joules))

    def __call__(self) -> object:
        if not np.any(self.point.thresholds):
            return self.model(self.images)
        return self.model.replay(self.images, next(self.batches), self.point)


@torch.inference_mode()
def bench(
    models: dict[str, Iret],
    budgets: Sequence[float],
    batches: Sequence[int],
    *,
    rounds: int,
    warm_up: int = 3,
    seed: int = 0,
    meter: EnergyMeter | None = None,
    say: Say = lambda line: None,
) -> tuple[list[Row], dict[Key, Latency]]:
    """Rows and raw samples of every model, batch size and budget; the full run is timed in the same rounds.

    Joules are net of the idle machine's power, which is measured once. `meter` None, or one that fails in any row: all are
    estimated, of arithmetic and memory alone.

    Raises:
        ValueError: a budget that a model cannot serve.
    """
    generator = random.Random(seed)
    work: dict[Key, _Candidate] = {}
    for name, model in models.items():
        model.eval()
        for batch in batches:
            images = torch.randn(batch, model.shape.in_chans, *model.shape.img_size, device=model.pos_embed.device)
            for budget in dict.fromkeys((1.0, *budgets)):
                work[name, batch, budget] = _Candidate.draw(model, images, budget, warm_up, rounds, generator)
    say(f"{len(work)} candidates, {warm_up} + {rounds} rounds, each timed call after an untimed one")
    if meter is not None:
        announce(meter, len(work), say)
    wait = synchronizer(next(iter(models.values())).pos_embed.device)
    samples = measure_latency(work, rounds=rounds, warm_up=warm_up, lead=LEAD, seed=seed, synchronize=wait)
    calls = [([call], batch) for (_, batch, _), call in work.items()]
    measured = None if meter is None else measure_joules(calls, meter, wait, say)
    read = measured or NetJoules([call.estimate_j for call in work.values()], 0.0, [False] * len(work))
    rows = []
    for (key, latency), energy_j, is_faint in zip(samples.items(), read.joules, read.is_faint, strict=True):
        name, batch, budget = key
        speedup = float(samples[name, batch, 1.0].samples_s.mean() / latency.samples_s.mean())
        source = meter if meter is not None and measured else estimate_meter(models[name])
        rows.append(
            Row(
                model=name,
                batch=batch,
                budget=budget,
                macs_share=work[key].macs_share,
                ms_p50=latency.p50_ms,
                ms_p95=latency.p95_ms,
                images_per_s=float(batch / latency.samples_s.mean()),
                speedup=speedup,
                share=speedup * work[key].macs_share,
                joules=energy_j,
                idle_watts=read.idle_w,
                energy_source=source.source,
                energy_scope=source.scope,
                energy_kind=source.kind,
                is_faint=is_faint,
            )
        )
    return rows, samples


def save(folder: Path, command: str, rows: Sequence[Row], samples: dict[Key, Latency]) -> None:
    """`bench.json` (rows, command, environment) and `samples.csv` (seconds of every timed call)."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"command": command, "rows": [asdict(row) for row in rows], "env": doctor.report()}
    write_atomically(folder / ROWS_NAME, (json.dumps(found, indent=1) + "\n").encode())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("model", "batch", "budget", "round", "seconds"))
    for (name, batch, budget), latency in samples.items():
        writer.writerows((name, batch, budget, index, f"{s:.9f}") for index, s in enumerate(latency.samples_s))
    write_atomically(folder / SAMPLES_NAME, text.getvalue().encode())
