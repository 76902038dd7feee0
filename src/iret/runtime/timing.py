"""What operating points cost in a session: on its engine, with its threads, on this device. Neither torch nor data needed.

A point remembers what a sample of held-out images did there (`Plan`: patches kept in each stage, where they left). Noise that is
made to do the same takes the time that the images took. `iret.clock` does this for a model on torch; their clocks differ, so
each engine has its own.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from iret.measure.estimate import HOROWITZ, EstimateMeter, estimate_joules
from iret.measure.latency import measure_latency
from iret.runtime.cost import Shape, block_linears, numbers_moved, plan_macs
from iret.runtime.points import DeviceTable, OperatingPoints, Plan, Point

if TYPE_CHECKING:
    from iret.runtime.session import Session

MIN_ROUNDS, MAX_ROUNDS, WARM_UP = 3, 15, 1
FORMATS = {
    "float32": ("fp32", 4),
    "bfloat16": ("fp16", 2),
    "float16": ("fp16", 2),
    "int8": ("int8", 4),
}  # constants of the estimate, and bytes a number
NEARLY_NOTHING = 1e-9  # a strength that drops no patch, but has it chosen

Calls = dict[tuple[int, int], Callable[[], Any]]  # by point and image


def measure_session(
    session: "Session", points: OperatingPoints, images: np.ndarray | None, seconds: float
) -> DeviceTable:
    """The columns of `session.device`: every point on `images`, float32 [B, C, Y, X], one at a time, or on its plans.

    Of a slow model fewer plans are timed, evenly over each point, so that it takes about `seconds`, but never fewer than one, in
    never fewer than three rounds.
    """
    if not (np.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds={seconds:g} must be above 0.")
    shape, precision = session.shape, session.bundle.precision
    calls: Calls = {}
    plans: dict[tuple[int, int], Plan] = {}
    if images is None:
        if session.bundle.is_single or not all(point.plans for point in points.points):
            what = (
                "one graph cannot replay plans" if session.bundle.is_single else "these points hold no plans to replay"
            )
            raise ValueError(f"{what}; give session.measure some images, a dozen or more.")
        noise = np.random.default_rng(0).standard_normal((1, shape.in_chans, *shape.img_size), dtype=np.float32)
    for row, point in enumerate(points.points):
        for column, plan in enumerate(point.plans if images is None else ()):
            calls[row, column] = partial(session, noise, **replay(shape, point, plan))
            plans[row, column] = plan
        for column, image in enumerate(() if images is None else images):
            calls[row, column] = partial(
                session, image[None], thresholds=point.thresholds, exit_confidence=point.exit_confidence
            )
            plans[row, column] = plan_of(calls[row, column]().trace)
    chosen, rounds = fit(calls, len(points.points), seconds)
    samples = measure_latency(chosen, rounds=rounds, warm_up=WARM_UP, lead=1)
    columns = []
    for row, point in enumerate(points.points):
        of_point = [latency for (at, _), latency in samples.items() if at == row]
        every = np.concatenate([latency.samples_s for latency in of_point]) * 1e3
        mean = statistics.mean(latency.p50_ms for latency in of_point)  # of images; a median over rounds for each
        estimates = [estimate_image(shape, precision, point, plan) for (at, _), plan in plans.items() if at == row]
        columns.append((mean, *map(float, np.percentile(every, (50, 95))), statistics.mean(estimates)))
    ms_mean, ms_p50, ms_p95, joules = zip(*columns, strict=True)
    meter = EstimateMeter(HOROWITZ[FORMATS[precision][0]])
    return DeviceTable(
        device=session.device,
        ms_mean=ms_mean,
        ms_p50=ms_p50,
        ms_p95=ms_p95,
        joules=joules,
        energy_source=meter.source,
        energy_scope=meter.scope,
        energy_kind=meter.kind,
        rounds=rounds,
    )


def replay(shape: Shape, point: Point, plan: Plan) -> dict[str, Any]:
    """What to give a session with one image, whatever it shows, to have it do what `plan` says another did at `point`."""
    transitions, live = len(shape.depths) - 1, np.array(plan.kept[:-1], dtype=np.float64)
    strengths = np.full((1, transitions, 2), NEARLY_NOTHING if np.any(point.thresholds) else 0.0)
    passed = strengths[0, : len(live)]
    passed[:] = np.maximum(1 - np.array([plan.kept[1:], plan.refined[1:]]).T / live[:, None], passed)
    exits = np.full((1, transitions), np.inf)
    exits[0, len(live) :] = 0.0  # it left there
    confidence = None if point.exit_confidence is None else exits
    return {"thresholds": strengths, "exit_confidence": confidence, "rule": "topk"}


def plan_of(trace: Any) -> Plan:
    """What the only image of a run did."""
    ran = int(trace.exit_stage[0]) + 1
    kept, refined = (grid[:ran, 0].sum((1, 2)).tolist() for grid in (trace.kept, trace.refined))
    return Plan(tuple(kept), tuple(refined))


def fit(calls: Calls, num_points: int, seconds: float) -> tuple[Calls, int]:
    """What of `calls` fits so many seconds, and in how many rounds; tried on the middle call of each point."""
    counts = [sum(at == row for at, _ in calls) for row in range(num_points)]
    middles = [calls[row, count // 2] for row, count in enumerate(counts)]
    middles[0]()  # the first call is slow, and not counted
    began = time.perf_counter()
    for call in middles:
        call()
    call_s = 2 * max(time.perf_counter() - began, 1e-9) / num_points  # with the untimed call before the timed one
    share = seconds / ((WARM_UP + MIN_ROUNDS) * call_s * len(calls))
    chosen = {
        (row, column)
        for row, count in enumerate(counts)
        for column in spread(count, max(1, int(min(share, 1) * count)))
    }
    rounds = int(np.clip(seconds / (call_s * len(chosen)) - WARM_UP, MIN_ROUNDS, MAX_ROUNDS))
    return {key: call for key, call in calls.items() if key in chosen}, rounds


def spread(total: int, count: int) -> list[int]:
    """`count` of the places 0 to `total` - 1, the middles of equal shares."""
    return [(2 * place + 1) * total // (2 * count) for place in range(count)]


def estimate_image(shape: Shape, precision: str, point: Point, plan: Plan) -> float:
    """Joules of one image that did `plan` at `point`, estimated."""
    work = plan_macs(shape, plan.kept, plan.refined, scored=bool(np.any(point.thresholds)))
    return estimate_work(shape, precision, work, plan.kept, plan.refined)


def estimate_work(
    shape: Shape, precision: str, work: int | float, kept: Sequence[int], refined: Sequence[int] | None
) -> float:
    """Joules of `work` MACs on so many patches a stage, by published constants: arithmetic and memory alone, without idle power.

    In int8, the linear layers of the blocks multiply in 8 bits and read weights of 8 bits; everything else stays in float32.
    """
    moved = numbers_moved(shape, kept, refined)
    constants, size = FORMATS[precision]
    if precision != "int8":
        return estimate_joules(work, size * moved, constants=HOROWITZ[constants])
    weights, rounded = block_linears(shape, kept)
    in_float = estimate_joules(max(work - rounded, 0), size * (moved - weights))
    return in_float + estimate_joules(rounded, weights, constants=HOROWITZ["int8"])
