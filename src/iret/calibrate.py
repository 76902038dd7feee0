"""Fills the table of operating points: runs thresholds on held-out images until the MACs of neighbouring ones lie close.

`iret train` calls this at its end, `iret calibrate` on a model and data of yours.
"""

from itertools import pairwise

from iret.evaluate import Score, Setting, evaluate
from iret.model import Iret
from iret.runtime.cost import full_macs
from iret.runtime.points import OperatingPoints, Point
from iret.train.data import ImageData

# Times uniform attention, the same at every transition: from "everything" to "little more than the floor".
FIRST_RUNGS = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
LARGEST_GAP = 0.05  # of the full MACs, between neighbouring points
SMALLEST_STEP = 0.01  # between thresholds


def calibrate(
    model: Iret, data: ImageData, *, data_name: str, max_images: int | None = None, workers: int = 0
) -> OperatingPoints:
    """Measure a ladder of thresholds on `data` (held-out, never the test images).

    Where two neighbours differ by more than `LARGEST_GAP`, one between them is measured too. The point that keeps
    everything always stays, so that every budget up to 1 can be served.
    """
    full = full_macs(model.shape)
    measured: dict[float, Score] = {}
    rungs: list[float] = list(FIRST_RUNGS)
    while rungs:
        settings = [Setting(thresholds=_everywhere(model, rung)) for rung in rungs]
        scores = evaluate(model, data, settings, max_images=max_images, workers=workers)
        measured = dict(sorted({**measured, **dict(zip(rungs, scores, strict=True))}.items()))
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
                thresholds=_everywhere(model, rung),
                accuracy=score.accuracy,
                macs_mean=score.macs_mean,
                macs_p95=score.macs_p95,
                kept_mean=score.kept_mean,
            )
        )
    num_images = measured[0.0].num_images
    return OperatingPoints(data=data_name, num_images=num_images, full_macs=full, points=tuple(points))


def _everywhere(model: Iret, threshold: float) -> tuple[tuple[float, float], ...]:
    return ((threshold, threshold),) * len(model.transitions)
