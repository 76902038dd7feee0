"""Fills the table of operating points: runs a ladder of thresholds on held-out images, keeps what nothing beats.

`iret train` calls this at its end, `iret calibrate` on a model and data of yours.
"""

from iret.evaluate import Setting, evaluate
from iret.model import Iret
from iret.runtime.cost import full_macs
from iret.runtime.points import OperatingPoints, Point, pareto
from iret.train.data import ImageData

# Times uniform attention, the same at every transition: from "everything" to "little more than the floor".
LADDER = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)


def calibrate(
    model: Iret, data: ImageData, *, data_name: str, max_images: int | None = None, workers: int = 0
) -> OperatingPoints:
    """Measure the ladder on `data` (held-out, never the test images) and return the Pareto frontier of accuracy and MACs.

    The point that keeps everything always stays, so that every budget up to 1 can be served.
    """
    rungs = [((rung, rung),) * len(model.transitions) for rung in LADDER]
    settings = [Setting(thresholds=thresholds) for thresholds in rungs]
    scores = evaluate(model, data, settings, max_images=max_images, workers=workers)
    points = [
        Point(
            thresholds=thresholds,
            accuracy=score.accuracy,
            macs_mean=score.macs_mean,
            macs_p95=score.macs_p95,
            kept_mean=score.kept_mean,
        )
        for thresholds, score in zip(rungs, scores, strict=True)
    ]
    full, *dropping = points
    best = [point for point in pareto(dropping) if point.macs_mean < full.macs_mean]
    return OperatingPoints(
        data=data_name,
        num_images=scores[0].num_images,
        full_macs=full_macs(model.shape),
        points=(full, *best),
    )
