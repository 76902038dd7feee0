"""What operating points cost in a session: on its engine, with its threads, on this device. Neither torch nor data needed.

A point remembers what a sample of held-out images did there (`Plan`: patches kept in each stage, where they left). Noise that is
made to do the same takes the time that the images took. `iret.clock` does this for a model on torch; their clocks differ, so
each engine has its own.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from iret.measure.estimate import HOROWITZ, EstimateMeter, estimate_joules
from iret.measure.latency import Latency, measure_latency
from iret.runtime.cost import Shape, block_linears, numbers_moved, plan_macs
from iret.runtime.points import DeviceTable, OperatingPoints, Plan, Point, check_number

if TYPE_CHECKING:
    from iret.runtime.session import Session

MIN_ROUNDS, MAX_ROUNDS, WARM_UP = 3, 15, 1
FORMATS = {
    "float32": ("fp32", 4),
    "float32-onednn": ("fp32", 4),
    "bfloat16": ("fp16", 2),
    "float16": ("fp16", 2),
    "int8": ("int8", 4),
}  # constants of the estimate, and bytes a number
SAME = 1e-2  # columns that differ by less, of their own spread, have one slope
NEARLY_NOTHING = 1e-9  # a strength that drops no patch, but has it chosen

Calls = dict[tuple[int, int], Callable[[], Any]]  # by point and image


def measure_session(
    session: "Session", points: OperatingPoints, images: np.ndarray | None, seconds: float
) -> DeviceTable:
    """The columns of `session.device`: every point on `images`, float32 [B, C, Y, X], one at a time, or on its plans.

    Of what takes longer than about `seconds`, fewer images or plans are timed, evenly over those of each point, but never fewer
    than one, in never fewer than three rounds. Means are of the images that were timed, or, from plans, of all that a point
    was found on.
    """
    check_number("seconds", seconds)
    if not (np.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds={seconds:g} must be above 0.")
    shape, precision = session.shape, session.bundle.precision
    if images is None:
        if session.bundle.is_single or not all(point.plans for point in points.points):
            what = (
                "one graph cannot replay plans" if session.bundle.is_single else "these points hold no plans to replay"
            )
            raise ValueError(f"{what}; give session.measure some images, a dozen or more.")
        noise = np.random.default_rng(0).standard_normal((1, shape.in_chans, *shape.img_size), dtype=np.float32)
    calls: Calls = {}
    for row, point in enumerate(points.points):
        for column, plan in enumerate(point.plans if images is None else ()):
            calls[row, column] = partial(session, noise, **replay(shape, point, plan))
        for column, image in enumerate(() if images is None else images):
            calls[row, column] = partial(
                session, image[None], thresholds=point.thresholds, exit_confidence=point.exit_confidence
            )
    chosen, rounds, _ = fit(calls, len(points.points), seconds)
    samples = measure_latency(chosen, rounds=rounds, warm_up=WARM_UP, lead=1)
    if images is None:
        ms_mean, ms_p50, ms_p95 = clock_columns(samples, points.points, shape)
        joules = [estimate_point(shape, precision, point) for point in points.points]
    else:
        ms_mean, ms_p50, ms_p95 = clock_columns(samples, points.points)
        joules = []
        for row, point in enumerate(points.points):
            plans = [plan_of(call().trace) for (at, _), call in chosen.items() if at == row]
            joules.append(statistics.mean(estimate_image(shape, precision, point, plan) for plan in plans))
    meter = EstimateMeter(HOROWITZ[FORMATS[precision][0]])
    return DeviceTable(
        device=session.device,
        ms_mean=ms_mean,
        ms_p50=ms_p50,
        ms_p95=ms_p95,
        joules=tuple(joules),
        energy_source=meter.source,
        energy_scope=meter.scope,
        energy_kind=meter.kind,
        rounds=rounds,
    )


def replay(shape: Shape, point: Point, plan: Plan) -> dict[str, Any]:
    """What to give a session with one image, whatever it shows, to have it do what `plan` says another did at `point`."""
    strengths, exits = strengths_of([plan], len(shape.depths) - 1, point)
    confidence = None if point.exit_confidence is None else exits
    return {"thresholds": strengths, "exit_confidence": confidence, "rule": "topk"}


def strengths_of(plans: Sequence[Plan], transitions: int, point: Point) -> tuple[np.ndarray, np.ndarray]:
    """What has images do what `plans` say, one each, by the rule "topk": strengths [B, transitions, 2], exits [B, transitions].

    Where `point` drops nothing the strengths are 0; where it does, every transition chooses, even if nothing is dropped there.
    """
    least = NEARLY_NOTHING if np.any(point.thresholds) else 0.0
    strengths, exits = np.full((len(plans), transitions, 2), least), np.full((len(plans), transitions), np.inf)
    for row, plan in enumerate(plans):
        live, counts = np.array(plan.kept[:-1], dtype=np.float64), np.array([plan.kept[1:], plan.refined[1:]]).T
        strengths[row, : len(live)] = np.clip(1 - counts / live[:, None], least, 1 - NEARLY_NOTHING)
        exits[row, len(live) :] = 0.0  # it left there
    return strengths, exits


def plan_of(trace: Any) -> Plan:
    """What the only image of a run did."""
    ran = int(trace.exit_stage[0]) + 1
    kept, refined = (grid[:ran, 0].sum((1, 2)).tolist() for grid in (trace.kept, trace.refined))
    return Plan(tuple(kept), tuple(refined))


def fit(
    calls: Calls, num_points: int, seconds: float, wait: Callable[[], object] | None = None
) -> tuple[Calls, int, float]:
    """What of `calls` fits so many seconds, in how many rounds, and the seconds of a round; tried on a middle call a point.

    `wait`: what waits for a device's queue, where calls return before they are done.
    """
    counts = [sum(at == row for at, _ in calls) for row in range(num_points)]
    middles, ends_s = [calls[row, count // 2] for row, count in enumerate(counts)], []
    for call in (middles[0], *middles):  # the first call is slow, and not counted
        call()
        if wait:
            wait()
        ends_s.append(time.perf_counter())
    call_s = 2 * max(ends_s[-1] - ends_s[0], 1e-9) / num_points  # with the untimed call before the timed one
    share = seconds / ((WARM_UP + MIN_ROUNDS) * call_s * len(calls))
    chosen = {
        (row, column)
        for row, count in enumerate(counts)
        for column in spread(count, max(1, int(min(share, 1) * count)))
    }
    round_s = call_s * len(chosen)
    rounds = int(np.clip(seconds / round_s - WARM_UP, MIN_ROUNDS, MAX_ROUNDS))
    return {key: call for key, call in calls.items() if key in chosen}, rounds, round_s


def clock_columns(
    samples: Mapping[tuple[int, int], Latency], points: Sequence[Point], shape: Shape | None = None
) -> tuple[tuple[float, ...], ...]:
    """`ms_mean`, `ms_p50` and `ms_p95` of a table, from what was timed of each point.

    With `shape`, (point, plan) were timed, and the mean is that of all images that the point was found on (`mean_of_all`).
    """
    rows = []
    for row, point in enumerate(points):
        own = {column: latency for (at, column), latency in samples.items() if at == row}
        every = np.concatenate([latency.samples_s for latency in own.values()]) * 1e3
        each = [latency.p50_ms for latency in own.values()]  # of an image; a median over rounds
        if shape is None:
            mean = statistics.mean(each)
        else:
            mean = mean_of_all(shape, point, [point.plans[column] for column in own], each)
        rows.append((mean, *map(float, np.percentile(every, (50, 95)))))
    return tuple(zip(*rows, strict=True))


def mean_of_all(shape: Shape, point: Point, plans: Sequence[Plan], costs: Sequence[float]) -> float:
    """The mean cost of all images that `point` was found on, from the costs of `plans`, a few of them.

    A dozen plans are seldom as dear in the mean as all images: where one image in five reaches the last stage, they hold two or
    three of it. Costs go with MACs and with the patches of later stages, whose means are known, so their slopes say what the
    difference is worth (the regression estimator of survey sampling); never further than to the cheapest or dearest of the few.
    """
    later = range(1, len(point.kept_mean))
    x = [
        [macs_of(shape, point, plan), *(plan.kept[stage] if stage < plan.stages_run else 0 for stage in later)]
        for plan in plans
    ]
    known = np.array(x, dtype=np.float64)
    means = np.array([point.macs_mean, *point.kept_mean[1:]])
    if len(plans) < 3 * len(means):  # too few for as many slopes
        known, means = known[:, :1], means[:1]
    away, y = known - known.mean(0), np.asarray(costs, dtype=np.float64)
    scale = np.where(away.any(0), away.std(0), 1.0)
    slopes = np.linalg.lstsq(away / scale, y - y.mean(), rcond=SAME)[0]
    return float(np.clip(y.mean() + (means - known.mean(0)) / scale @ slopes, y.min(), y.max()))


def spread(total: int, count: int) -> list[int]:
    """`count` of the places 0 to `total` - 1, the middles of equal shares."""
    return [(2 * place + 1) * total // (2 * count) for place in range(count)]


def macs_of(shape: Shape, point: Point, plan: Plan) -> float:
    """MACs of one image that did `plan` at `point`."""
    return float(plan_macs(shape, plan.kept, plan.refined, scored=bool(np.any(point.thresholds))))


def estimate_point(shape: Shape, precision: str, point: Point) -> float:
    """Joules an image at `point`, in the mean of all that it was found on, estimated from its plans."""
    costs = [estimate_image(shape, precision, point, plan) for plan in point.plans]
    return mean_of_all(shape, point, point.plans, costs)


def estimate_image(shape: Shape, precision: str, point: Point, plan: Plan) -> float:
    """Joules of one image that did `plan` at `point`, estimated."""
    return estimate_work(
        shape,
        precision,
        macs_of(shape, point, plan),
        plan.kept,
        plan.refined,
        scored=bool(np.any(point.thresholds)),
    )


def estimate_work(
    shape: Shape,
    precision: str,
    work: int | float,
    kept: Sequence[int],
    refined: Sequence[int] | None,
    *,
    scored: bool,
) -> float:
    """Joules of `work` MACs on so many patches a stage, by published constants: arithmetic and memory alone, without idle power.

    In int8, the linear layers of the blocks multiply in 8 bits and read weights of 8 bits, as in `iret.precision`; all else stays
    in float32. Other engines round every product with a weight, so theirs is too dear by embeddings and heads.
    """
    moved = numbers_moved(shape, kept, refined, scored=scored)
    constants, size = FORMATS[precision]
    if precision != "int8":
        return estimate_joules(work, size * moved, constants=HOROWITZ[constants])
    weights, rounded = block_linears(shape, kept, scored=scored)
    in_float = estimate_joules(max(work - rounded, 0), size * (moved - weights))
    return in_float + estimate_joules(rounded, weights, constants=HOROWITZ["int8"])
