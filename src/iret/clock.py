"""What operating points cost on this machine: milliseconds and joules an image at batch 1, without any data.

A point remembers what a sample of held-out images did there (`Plan`: patches kept in each stage, where they left). Replaying
these on noise takes the time that the images took, so the clock columns of a table can be measured again on a device that has
neither data nor labels (`iret calibrate MODEL --device-only`).

Joules are net: what an image adds to the power of the idle machine, which is measured once and kept beside them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from iret.doctor import describe_device
from iret.measure.energy import IDLE_MARGIN, EnergyError, EnergyMeter, measure_idle
from iret.measure.estimate import HOROWITZ, EstimateMeter
from iret.measure.latency import Latency, measure_latency
from iret.model import Iret
from iret.runtime import timing
from iret.runtime.points import DeviceTable, OperatingPoints, Plan, Point
from iret.runtime.timing import FORMATS, WARM_UP, Calls, clock_columns, estimate_point, fit

TIME_LIMIT_S = 30.0  # for the milliseconds
ENERGY_LIMIT_S = 20.0  # for the joules of all points, if three windows take no longer
ENERGY_MARGIN = 1.2  # windows of this many times the meter's resolution
FAINT = 0.05  # of the idle power, which wanders by about so much on a large GPU: work that adds less is hard to tell from it

Say = Callable[[str], None]
Work = tuple[Sequence[Callable[[], object]], int]  # calls, and how many images each of them looks at


@dataclass(frozen=True)
class NetJoules:
    """What `measure_joules` read, one entry for each piece of work."""

    joules: list[float]  # an image, net
    idle_w: float  # what was taken off
    is_faint: list[bool]  # the work adds less than `FAINT` of the idle power


def synchronizer(device: torch.device) -> Callable[[], object] | None:
    """What waits for the device's queue; None where calls return when they are done."""
    return {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type)


@torch.inference_mode()
def measure_device(
    model: Iret, points: OperatingPoints, meter: EnergyMeter | None = None, say: Say = lambda line: None
) -> tuple[DeviceTable, dict[tuple[int, int], Latency]]:
    """The columns of this device for `points`, and the raw samples by (point, plan).

    The milliseconds take `TIME_LIMIT_S`: where the least number of rounds would take longer, plans are left out evenly, down to
    the middle one of each point; their mean is that of all images (`mean_of_all`). The joules take a window of the meter a point
    and one of the idle machine, whose power is taken off them, and are of the plans that ran. Where windows of all points would
    take longer than `ENERGY_LIMIT_S`, some have one (`rows_to_measure`): a point between them draws a power between theirs, by
    its MACs, for the time that it takes. `meter` None: joules are estimated. A meter that fails is named, and the estimate stands
    in for all points.

    Raises:
        ValueError: points without plans.
    """
    if not all(point.plans for point in points.points):
        raise ValueError("these operating points hold no plans to replay; run `iret calibrate MODEL --data DATA` once.")
    image = torch.randn(1, model.shape.in_chans, *model.shape.img_size, device=model.pos_embed.device)
    wait = synchronizer(image.device)
    every_plan: Calls = {
        (row, column): partial(model.replay, image, [plan], point)
        for row, point in enumerate(points.points)
        for column, plan in enumerate(point.plans)
    }
    work, rounds, round_s = fit(every_plan, len(points.points), TIME_LIMIT_S, wait)
    say(f"{len(points.points)} points, {len(work)} plans, {WARM_UP} + {rounds} rounds of {round_s:.1f} s")
    meter = meter or estimate_meter(model)
    rows = rows_to_measure(len(points.points), ENERGY_MARGIN * meter.resolution_s)
    announce(meter, len(rows), say)
    samples = measure_latency(work, rounds=rounds, warm_up=WARM_UP, lead=1, synchronize=wait)
    ms_mean, ms_p50, ms_p95 = clock_columns(samples, points.points, model.shape)
    calls = [[call for (at, _), call in work.items() if at == row] for row in range(len(points.points))]
    measured = measure_joules([(calls[row], 1) for row in rows], meter, wait, say)
    if measured:
        source, idle_w = meter, measured.idle_w
        ms = [np.mean([samples[key].p50_ms for key in work if key[0] == row]) for row in range(len(calls))]
        joules = interpolate_joules(
            rows, measured.joules, np.array(ms), np.array([point.macs_mean for point in points.points])
        )
        scope = "" if len(rows) == len(calls) else f", at {len(rows)} points"
        scope += ", faint" if any(measured.is_faint) else ""
    else:
        source, idle_w, scope = estimate_meter(model), 0.0, ""
        joules = [estimate_point(model.shape, model.precision, point) for point in points.points]
    table = DeviceTable(
        device=describe_device(image.device, model.precision),
        ms_mean=ms_mean,
        ms_p50=ms_p50,
        ms_p95=ms_p95,
        joules=tuple(joules),
        idle_watts=idle_w,
        energy_source=source.source,
        energy_scope=source.scope + scope,
        energy_kind=source.kind,
        rounds=rounds,
    )
    return table, samples


def rows_to_measure(count: int, window_s: float) -> list[int]:
    """Of `count` points, dearest first, those that get a window: all if there is time, else the full run and an even spread."""
    if count <= 3 or count * window_s <= ENERGY_LIMIT_S:
        return list(range(count))
    # The full run neither scores nor gathers, so power may leap from it to the next point, and both are asked.
    spread = np.linspace(1, count - 1, max(2, int(ENERGY_LIMIT_S / window_s) - 1))
    return [0, *spread.round().astype(int).tolist()]


def interpolate_joules(rows: list[int], joules: list[float], ms: np.ndarray, macs: np.ndarray) -> list[float]:
    """Joules of all points, dearest first, from those of some `rows`: elsewhere power is a straight line in MACs between them."""
    watts = np.interp(macs, macs[rows][::-1], (np.array(joules) / ms[rows])[::-1])
    found = watts * ms
    found[rows] = joules
    return found.tolist()


def announce(meter: EnergyMeter, count: int, say: Say) -> None:
    """How long `measure_joules` of `count` pieces of work will take, where the meter measures."""
    if meter.kind == "measured":
        window_s, idle_s = ENERGY_MARGIN * meter.resolution_s, IDLE_MARGIN * meter.resolution_s
        say(
            f"then joules from {meter.source}: {count} windows of {window_s:.3g} s and one of the idle machine, "
            f"{count * window_s + idle_s:.0f} s or more"
        )


def measure_joules(
    work: Sequence[Work], meter: EnergyMeter, wait: Callable[[], object] | None, say: Say
) -> NetJoules | None:
    """Net joules an image of each piece of work, and the idle power in W that was taken off its gross reading.

    Work that adds little to the idle power is measured, noted and said. None where `meter` is an estimate, or any window of it
    fails, which is said: no table has estimates beside measurements.
    """
    if meter.kind == "estimated":
        return None
    joules, powers_w = [], []
    try:
        idle_w = measure_idle(meter)
        for calls, images in work:
            num_images, started = 0, time.monotonic()
            with meter.window() as window:
                while time.monotonic() - started < ENERGY_MARGIN * meter.resolution_s:
                    for call in calls:
                        call()
                    if wait:
                        wait()
                    num_images += images * len(calls)
            reading = window.reading.minus_idle(idle_w)
            joules.append(reading.joules / num_images)
            powers_w.append(reading.power_w)
    except EnergyError as error:
        say(f"energy is estimated: {error}")
        return None
    is_faint = [power_w < FAINT * idle_w for power_w in powers_w]
    if any(is_faint):
        say(
            f"some work adds only {min(powers_w):.2g} W to the idle machine's {idle_w:.3g} W; if these wander by as much, its "
            "joules are mostly noise"
        )
    return NetJoules(joules, idle_w, is_faint)


def estimate_meter(model: Iret) -> EstimateMeter:
    """The estimate for the model's number format."""
    return EstimateMeter(HOROWITZ[FORMATS[model.precision][0]])


def estimate_image(model: Iret, point: Point, plan: Plan) -> float:
    """Joules of one image by published constants: see `iret.runtime.timing`."""
    return timing.estimate_image(model.shape, model.precision, point, plan)
