"""What operating points cost on this machine: milliseconds and joules an image at batch 1, without any data.

A point remembers what a sample of held-out images did there (`Plan`: patches kept in each stage, where they left). Replaying
these on noise takes the time that the images took, so the clock columns of a table can be measured again on a device that has
neither data nor labels (`iret calibrate MODEL --device-only`).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from iret.doctor import describe_device
from iret.measure.energy import EnergyError, EnergyMeter
from iret.measure.estimate import HOROWITZ, EstimateMeter, estimate_joules
from iret.measure.latency import Latency, measure_latency
from iret.model import Iret
from iret.runtime.cost import numbers_moved, plan_macs
from iret.runtime.points import DeviceTable, OperatingPoints, Plan, Point

TIME_LIMIT_S = 30.0  # for the milliseconds; a round is never cut short
MIN_ROUNDS, MAX_ROUNDS = 3, 15
ENERGY_MARGIN = 1.2  # windows of this many times the meter's resolution
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}

Say = Callable[[str], None]


def synchronizer(device: torch.device) -> Callable[[], object] | None:
    """What waits for the device's queue; None where calls return when they are done."""
    return {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type)


@torch.inference_mode()
def measure_device(
    model: Iret, points: OperatingPoints, meter: EnergyMeter | None = None, say: Say = lambda line: None
) -> tuple[DeviceTable, dict[tuple[int, int], Latency]]:
    """The columns of this device for `points`, and the raw samples by (point, plan). Takes about a minute.

    `meter` None: joules are estimated. A meter that fails is named, and the estimate stands in.

    Raises:
        ValueError: points without plans.
    """
    if not all(point.plans for point in points.points):
        raise ValueError("these operating points hold no plans to replay; run `iret calibrate MODEL --data DATA` once.")
    image = torch.randn(1, model.shape.in_chans, *model.shape.img_size, device=model.pos_embed.device)
    plans = [
        (row, column, point, plan) for row, point in enumerate(points.points) for column, plan in enumerate(point.plans)
    ]
    work = {(row, column): partial(model.replay, image, [plan], point) for row, column, point, plan in plans}
    wait = synchronizer(image.device)
    started = time.monotonic()
    for call in work.values():
        call()
    round_s = 2 * (time.monotonic() - started)
    rounds = int(np.clip(TIME_LIMIT_S / round_s, MIN_ROUNDS, MAX_ROUNDS))
    say(f"{len(points.points)} points, {len(work)} plans, {rounds} rounds of {round_s:.1f} s")
    samples = measure_latency(work, rounds=rounds, warm_up=1, lead=1, synchronize=wait)
    columns = []
    for row in range(len(points.points)):
        of_point = [latency for (at, _), latency in samples.items() if at == row]
        every = np.concatenate([latency.samples_s for latency in of_point]) * 1e3
        mean = statistics.mean(latency.p50_ms for latency in of_point)  # of images; a median over rounds for each
        columns.append((mean, float(np.percentile(every, 50)), float(np.percentile(every, 95))))
    ms_mean, ms_p50, ms_p95 = zip(*columns, strict=True)
    estimates = tuple(statistics.mean(estimate_image(model, p, plan) for plan in p.plans) for p in points.points)
    calls = [[call for (at, _), call in work.items() if at == row] for row in range(len(estimates))]
    read = [measure_joules(each, 1, meter, wait, one, say) for each, one in zip(calls, estimates, strict=True)]
    kinds = {kind for _, kind in read}
    is_measured = meter is not None and kinds == {"measured"}
    source = meter if meter is not None and is_measured else estimate_meter(model)
    table = DeviceTable(
        device=describe_device(image.device, model.precision),
        ms_mean=ms_mean,
        ms_p50=ms_p50,
        ms_p95=ms_p95,
        joules=tuple(each for each, _ in read) if is_measured else estimates,  # never some of both
        energy_source=source.source,
        energy_scope=source.scope,
        energy_kind=source.kind,
        rounds=rounds,
    )
    return table, samples


def measure_joules(
    calls: Sequence[Callable[[], object]],
    images: int,
    meter: EnergyMeter | None,
    wait: Callable[[], object] | None,
    estimate_j: float,
    say: Say,
) -> tuple[float, str]:
    """Joules an image of `calls`, each on so many images, and whether they were "measured" or are the estimate."""
    if meter is None or meter.kind == "estimated":
        return estimate_j, "estimated"
    num_images, started = 0, time.monotonic()
    try:
        with meter.window() as window:
            while time.monotonic() - started < ENERGY_MARGIN * meter.resolution_s:
                for call in calls:
                    call()
                if wait:
                    wait()
                num_images += images * len(calls)
        return window.reading.joules / num_images, "measured"
    except EnergyError as error:
        say(f"energy is estimated: {error}")
        return estimate_j, "estimated"


def estimate_meter(model: Iret) -> EstimateMeter:
    """The estimate for the model's number format."""
    return EstimateMeter(HOROWITZ[{4: "fp32", 2: "fp16", 1: "int8"}[BYTES[model.precision]]])


def estimate_image(model: Iret, point: Point, plan: Plan) -> float:
    """Joules of one image by published constants: arithmetic and memory alone."""
    macs = plan_macs(model.shape, plan.kept, plan.refined, scored=bool(np.any(point.thresholds)))
    moved = numbers_moved(model.shape, plan.kept) * BYTES[model.precision]
    return estimate_joules(macs, moved, constants=estimate_meter(model).constants)
