"""Fills the table of operating points: runs thresholds on held-out images until the MACs of neighbouring ones lie close.

The thresholds of one table rise together by a fixed ratio from the first transition to the last; which ratio is found first,
on fewer images. `iret train` calls this at its end, `iret calibrate` on a model and data of yours.
"""

from itertools import pairwise

import numpy as np

from iret.evaluate import Score, Setting, evaluate
from iret.model import Iret
from iret.runtime.cost import full_macs
from iret.runtime.points import OperatingPoints, Point
from iret.train.data import ImageData

# Times uniform attention, at the last transition: from "everything" to "little more than the floor".
FIRST_RUNGS = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0)
RATIOS = (1.0, 0.6, 0.35, 0.2)  # first threshold : last
RATIO_IMAGES = 1000  # that the ratio is found on
RATIO_BUDGETS = (0.75, 0.6, 0.5, 0.4, 0.3)  # where ratios are compared
LARGEST_GAP = 0.05  # of the full MACs, between neighbouring points
SMALLEST_STEP = 0.01  # between thresholds


def calibrate(
    model: Iret, data: ImageData, *, data_name: str, max_images: int | None = None, workers: int = 0
) -> OperatingPoints:
    """Measure a ladder of thresholds on `data` (held-out, never the test images).

    Where two neighbours differ by more than `LARGEST_GAP`, one between them is measured too. The point that keeps
    everything always stays, so that every budget up to 1 can be served.

    Source: rising thresholds are those of Kim et al. 2022, "Learned Token Pruning for Transformers", which start proportional
    to depth; the search is ours.
    """
    few = min(RATIO_IMAGES, max_images or RATIO_IMAGES)
    ratio = max(RATIOS, key=lambda each: _worth(model, data, each, few)) if len(model.transitions) > 1 else 1.0
    full = full_macs(model.shape)
    measured: dict[float, Score] = {}
    rungs: list[float] = list(FIRST_RUNGS)
    while rungs:
        measured = dict(sorted({**measured, **_measure(model, data, ratio, rungs, max_images, workers)}.items()))
        rungs = [
            (low + high) / 2
            for low, high in pairwise(measured)
            if high - low > SMALLEST_STEP and measured[low].macs_mean - measured[high].macs_mean > LARGEST_GAP * full
        ]
    points: list[Point] = []
    for rung, score in measured.items():
        if points and score.macs_mean >= points[-1].macs_mean:  # nothing more was dropped
            continue
        points.append(
            Point(
                thresholds=_spread(model, rung, ratio),
                accuracy=score.accuracy,
                macs_mean=score.macs_mean,
                macs_p95=score.macs_p95,
                kept_mean=score.kept_mean,
            )
        )
    num_images = measured[0.0].num_images
    return OperatingPoints(data=data_name, num_images=num_images, full_macs=full, points=tuple(points))


def _measure(
    model: Iret, data: ImageData, ratio: float, rungs: list[float], max_images: int | None, workers: int = 0
) -> dict[float, Score]:
    settings = [Setting(thresholds=_spread(model, rung, ratio)) for rung in rungs]
    scores = evaluate(model, data, settings, max_images=max_images, workers=workers)
    return dict(zip(rungs, scores, strict=True))


def _worth(model: Iret, data: ImageData, ratio: float, num_images: int) -> float:
    """Accuracy at this ratio, mean over `RATIO_BUDGETS`, interpolated between the first rungs."""
    ladder = list(_measure(model, data, ratio, list(FIRST_RUNGS), num_images).values())[::-1]
    shares = np.array([score.macs_mean for score in ladder]) / full_macs(model.shape)
    return float(np.interp(RATIO_BUDGETS, shares, [score.accuracy for score in ladder]).mean())


def _spread(model: Iret, rung: float, ratio: float) -> tuple[tuple[float, float], ...]:
    """Thresholds that rise geometrically from `ratio` times `rung` to `rung`."""
    each = rung * np.geomspace(ratio, 1.0, len(model.transitions))
    return tuple((float(threshold), float(threshold)) for threshold in each)
