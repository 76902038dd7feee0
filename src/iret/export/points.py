"""The operating points that a bundle gets.

A bundle of stages serves the model's own. A single graph runs from end to end, so a point whose images leave early is none for
it: its thresholds alone cost more and answer better. What they do without the exits is measured anew on held-out images,
and of that the frontier is kept, as `iret calibrate` does.

Read first: `iret.runtime.points`.
"""

from collections.abc import Callable
from dataclasses import replace

from iret.evaluate import evaluate
from iret.export.accuracy import HeldOut
from iret.model import Iret
from iret.runtime.points import OperatingPoints, Point, Setting, frontier


def points_of(
    model: Iret, is_single: bool, held_out: HeldOut | None, say: Callable[[str], None]
) -> OperatingPoints | None:
    """The table of the model's bundle; None: thresholds only, which is said where the model has a table.

    Raises:
        ValueError: no image of `held_out` can be read.
    """
    points = model.points
    if points is None or not is_single or all(point.exit_confidence is None for point in points.points):
        return points
    if held_out is not None and held_out.fits(model):
        return without_exits(model, points, held_out, say)
    stay = tuple(point for point in points.points if point.exit_confidence is None)
    if len(stay) < 2:
        say(
            "its operating points leave early, which one graph cannot: this bundle has none, and takes thresholds; with --data "
            "of its classes their thresholds are measured without exits"
        )
        return None
    say(
        f"{len(points.points) - len(stay)} operating points leave early, which one graph cannot; it has the other {len(stay)}"
    )
    return replace(points, points=stay, devices=())


def without_exits(
    model: Iret, points: OperatingPoints, held_out: HeldOut, say: Callable[[str], None]
) -> OperatingPoints:
    """The thresholds of `points`, nobody leaving early, as measured on `held_out`; no clocks."""
    say(f"its operating points leave early, which one graph cannot: measuring {len(points.points)} without exits")
    settings = [Setting(thresholds=each) for each in dict.fromkeys(point.thresholds for point in points.points)]
    scores = evaluate(model, held_out.data, settings)
    measured = [
        Point(
            thresholds=setting.thresholds,  # type: ignore[arg-type]
            accuracy=score.accuracy,
            macs_mean=score.macs_mean,
            macs_p95=score.macs_p95,
            kept_mean=score.kept_mean,
        )
        for setting, score in zip(settings, scores, strict=True)
    ]
    return OperatingPoints(
        data=held_out.name,
        num_images=scores[0].num_images,
        full_macs=points.full_macs,
        points=frontier(measured, scores[0].num_images),
    )
