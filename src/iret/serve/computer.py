"""One session answering a micro-batch: photos decoded within limits, every image at its own budget, in one ragged call.

Runs in a worker process or in a Ray replica; knows nothing of HTTP. A mistake of one image is that image's own: its mates
are answered.
"""

import io
import logging
import math
import secrets
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from iret.runtime.controller import Controller, Goal, Menu, Reading
from iret.runtime.cost import full_macs
from iret.runtime.points import DeviceTable, Point, round_up
from iret.runtime.preprocess import open_image
from iret.runtime.timing import estimate_point, estimate_work
from iret.serve.asks import Ask
from iret.serve.refusal import Refusal

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # of Pillow's fifty: the fewer decoders, the less to attack
HOURS = 24.0  # that a full battery lasts at the full budget, where nobody says how much it holds
SOURCES = {"float32": "estimate:fp32", "int8": "estimate:int8"}

log = logging.getLogger("iret.serve")


@dataclass(frozen=True)
class Job:
    """One image and what is asked of it."""

    image: bytes | np.ndarray  # a photo as it was sent, or float32 [C, Y, X] as the model takes it
    ask: Ask
    deadline_s: float | None = None  # of `time.monotonic`


@dataclass(frozen=True)
class Result:
    """Answer and cost of one image."""

    logits: np.ndarray  # float32 [classes]
    budget: float | None  # where the dial stood
    macs: int
    exit_stage: int
    tokens: tuple[int, ...]  # patches computed in each stage
    joules: float  # estimated
    engine_s: float  # of the whole batch, inside the engine
    busy_s: float  # of the whole batch, from decoding on
    batch: int  # images computed together
    stage_logits: np.ndarray | None = (
        None  # float32 [S, classes], NaN where not reached; these three with `trace` alone
    )
    kept: np.ndarray | None = None  # bool [S, rows, columns]
    refined: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Supply:
    """The battery that `battery_percent` is of. `battery_wh` None: it lasts 24 hours at the full budget."""

    battery_wh: float | None = None
    images_per_second: float = 1.0


AS_STATED = Supply()


class Computer:
    """`computer(jobs)` -> a `Result` or a `Refusal` for each; for one thread at a time."""

    def __init__(
        self,
        session: Any,
        *,
        max_pixels: int,
        supply: Supply = AS_STATED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`session`: an `iret.Session`, or what behaves like one."""
        self._session, self._max_pixels, self._supply, self._clock = session, max_pixels, supply, clock
        self._menu: Menu | None = None

    def __call__(self, jobs: Sequence[Job]) -> list[Result | Refusal]:
        """Jobs with a deadline go first and alone: mates would make them late."""
        began = self._clock()
        found: dict[int, Result | Refusal] = {}
        ready: dict[int, tuple[np.ndarray, float | None]] = {}
        for place in sorted(range(len(jobs)), key=lambda place: jobs[place].deadline_s or math.inf):
            try:
                budget = self._budget(jobs[place].ask)
                image = self._read(jobs[place].image)
            except ValueError as error:
                found[place] = as_refusal(error)
                continue
            if jobs[place].deadline_s is None:
                ready[place] = image, budget
            else:
                found |= self._run({place: (image, budget)}, jobs)
        if ready:
            found |= self._run(ready, jobs)
        busy_s = self._clock() - began
        return [
            replace(each, busy_s=busy_s) if isinstance(each, Result) else each
            for each in (found[place] for place in range(len(jobs)))
        ]

    def describe(self) -> dict[str, Any]:
        """The model and its trade-off, as `GET /v1/model` tells them."""
        session, shape = self._session, self._session.shape
        table = self._table()
        points = None
        if session.points is not None:
            rows = zip(session.points.points, session.points.shares[::-1], strict=True)
            points = [
                {
                    "share": float(share),
                    "accuracy": point.accuracy,
                    "macs": round(point.macs_mean),
                    "ms": None if table is None else table.ms_mean[place],
                    "joules": self._point_joules(point) if table is None else table.joules[place],
                }
                for place, (point, share) in enumerate(rows)
            ]
        return {
            "name": session.bundle.name,
            "labels": None if session.labels is None else list(session.labels),
            "grid": list(shape.grid),
            "img_size": list(shape.img_size),
            "channels": shape.in_chans,
            "classes": shape.num_classes,
            "stages": len(shape.depths),
            "full_macs": full_macs(shape),
            "points": points,
            "joules_source": SOURCES[session.bundle.precision] if table is None else table.energy_source,
            "engine": session.engine,
            "device": session.device,
            "threads": session.threads,
            "precision": session.bundle.precision,
            "preprocess": session.bundle.preprocess.to_dict(),
            "data": None
            if session.points is None
            else {"name": session.points.data, "images": session.points.num_images},
        }

    # ---- one image

    def _read(self, image: bytes | np.ndarray) -> np.ndarray:
        """float32 [C, Y, X]."""
        if isinstance(image, np.ndarray):
            return image
        return self._session.bundle.preprocess(read_photo(image, self._max_pixels))[0]

    def _budget(self, ask: Ask) -> float | None:
        """Where the dial goes; None: nobody said, so everything or what the deadline affords."""
        session = self._session
        if session.bundle.is_single and (ask.deadline_ms is not None or ask.exit_confidence is not None):
            raise Refusal(422, "this bundle is a single graph, which knows neither deadline_ms nor exit_confidence.")
        if ask.ms is not None or ask.joules is not None:
            return self._priced(ask)
        if ask.battery_percent is not None:
            return self._by_battery(ask.battery_percent, HOURS if ask.hours_left is None else ask.hours_left)
        if ask.budget is not None:
            if session.points is None and ask.budget < 1:
                raise Refusal(422, f"budget={ask.budget:g} needs operating points, and {session.lacking}; or give 1.")
            cheapest = 0.0 if session.points is None else session.points.cheapest_budget
            if ask.budget < cheapest:
                raise Refusal(
                    422, f"budget={ask.budget:g} is below what this model can do, {round_up(cheapest)}; ask for more."
                )
        return ask.budget

    def _priced(self, ask: Ask) -> float:
        name, value = ("ms", ask.ms) if ask.ms is not None else ("joules", ask.joules)
        if self._session.points is None or self._table() is None:
            raise Refusal(
                422,
                f"{name}={value:g}: the clock of this machine was not measured; start `iret serve` with --measure, or give "
                "a budget.",
            )
        try:
            return self._session.budget_for(**{name: value})
        except ValueError as error:
            least = min(getattr(self._session.points.menu(self._session.device), name))
            raise Refusal(
                422,
                f"{name}={value:g} is below the cheapest operating point on this machine, {least:.4g}; ask for more.",
            ) from error

    def _by_battery(self, percent: float, hours: float) -> float:
        """The controller's choice for so much battery and so long to go, at the stated rate."""
        if self._session.points is None:
            raise Refusal(422, f"battery_percent needs operating points, and {self._session.lacking}; or leave it out.")
        if self._menu is None:
            self._menu = self._make_menu()
        rate, watt_hours = self._supply.images_per_second, self._supply.battery_wh
        assert self._menu.joules is not None
        enough = HOURS * 3600 * rate * self._menu.joules[-1] * (1 + 1e-9)  # rounding would cost the top of the dial
        goal = Goal(
            hours=hours,
            images_per_second=rate,
            battery_joules=enough if watt_hours is None else 3600 * watt_hours,
        )
        return Controller(self._menu, goal).decide(Reading(time_s=0.0, battery_share=percent / 100)).budget

    # ---- a batch

    def _run(
        self, ready: dict[int, tuple[np.ndarray, float | None]], jobs: Sequence[Job]
    ) -> dict[int, Result | Refusal]:
        """By place among the jobs. If the session refuses a batch, each is tried alone, so that one mistake stays one."""
        try:
            return self._run_together(ready, jobs)
        except Exception as error:
            if len(ready) > 1:
                alone = [self._run({place: image}, jobs) for place, image in ready.items()]
                return {place: result for each in alone for place, result in each.items()}
            number = secrets.token_hex(4)  # settings and image were looked at before, so it is a bug, ValueError or not
            log.error("error %s", number, exc_info=error)
            sentence = f"the model failed on this image; the server's log says why under {number}."
            return dict.fromkeys(ready, Refusal(500, sentence))

    def _run_together(
        self, ready: dict[int, tuple[np.ndarray, float | None]], jobs: Sequence[Job]
    ) -> dict[int, Result | Refusal]:
        session, places = self._session, list(ready)
        first = jobs[places[0]]
        options: dict[str, Any] = {}
        if first.deadline_s is not None:  # it is alone
            options["deadline_ms"] = max(1e3 * (first.deadline_s - self._clock()), 1e-3)
            if ready[places[0]][1] is not None:
                options["budget"] = ready[places[0]][1]
        else:
            options["budget"] = np.array([1.0 if budget is None else budget for _, budget in ready.values()])
        exits = self._exits([jobs[place].ask.exit_confidence for place in places], [b for _, b in ready.values()])
        if exits is not None:
            options["exit_confidence"] = exits
        out = session(np.stack([image for image, _ in ready.values()]), **options)
        budgets = [None] * len(places) if out.budget is None else np.broadcast_to(out.budget, len(places))
        return {
            place: self._result(out, row, budgets[row], with_trace=jobs[place].ask.trace)
            for row, place in enumerate(places)
        }

    def _exits(self, asked: list[float | None], budgets: list[float | None]) -> np.ndarray | None:
        """[B]: what was asked for, else the table's, else never; None if nobody asked, and the table's hold."""
        if all(each is None for each in asked):
            return None
        own = [None if budget is None else self._session.setting(budget).exit_confidence for budget in budgets]
        chosen = [theirs if theirs is not None else ours for theirs, ours in zip(asked, own, strict=True)]
        return np.array([math.inf if each is None else each for each in chosen])

    def _result(self, out: Any, row: int, budget: float | None, *, with_trace: bool) -> Result | Refusal:
        if not np.isfinite(out.logits[row]).all():
            return Refusal(422, "the model's numbers overflow on this image; send normalised pixels, or a photo.")
        trace = out.trace
        kept, refined = trace.kept[:, row], trace.refined[:, row]
        stages_run = int(trace.exit_stage[row]) + 1
        tokens = tuple(int(count) for count in kept.sum((1, 2)))
        details = tuple(int(count) for count in refined.sum((1, 2)))
        scored = budget is not None and bool(np.any(self._session.setting(budget).thresholds))
        seen = dict(stage_logits=trace.stage_logits[:, row], kept=kept, refined=refined) if with_trace else {}
        return Result(
            logits=out.logits[row],
            budget=None if budget is None else float(budget),
            macs=int(out.macs[row]),
            exit_stage=stages_run - 1,
            tokens=tokens,
            joules=self._joules(float(out.macs[row]), tokens[:stages_run], details[:stages_run], scored=scored),
            engine_s=out.engine_s,
            busy_s=0.0,  # not over yet
            batch=len(out.logits),
            **seen,
        )

    # ---- joules

    def _joules(self, macs: float, kept: Sequence[int], refined: Sequence[int] | None, *, scored: bool) -> float:
        """Of one image, from the counted work; as `iret calibrate` estimates them."""
        session = self._session
        return estimate_work(session.shape, session.bundle.precision, macs, kept, refined, scored=scored)

    def _point_joules(self, point: Point) -> float:
        if not point.plans:
            kept, scored = [round(count) for count in point.kept_mean], bool(np.any(point.thresholds))
            return self._joules(point.macs_mean, kept, None, scored=scored)
        return estimate_point(self._session.shape, self._session.bundle.precision, point)

    def _table(self) -> DeviceTable | None:
        """What this machine's clock measured, if it did."""
        points = self._session.points
        if points is None:
            return None
        return next((table for table in points.devices if table.device == self._session.device), None)

    def _make_menu(self) -> Menu:
        """By this machine's clock or, without one, joules by the counted work."""
        points, device = self._session.points, self._session.device
        if self._table() is None:
            joules = tuple(self._point_joules(point) for point in points.points)
            estimated = DeviceTable(
                device=device,
                ms_mean=joules,  # no goal here asks for milliseconds; a table has to have some
                ms_p50=joules,
                ms_p95=joules,
                joules=joules,
                energy_source=SOURCES[self._session.bundle.precision],
                energy_scope="arithmetic and memory alone",
                energy_kind="estimated",
                rounds=0,
            )
            points = points.with_device(estimated)
        return points.menu(device)


def read_photo(content: bytes, max_pixels: int) -> Image.Image:
    """An RGB image, upright.

    Raises:
        Refusal: 413 for more pixels than that, seen in the header; 400 for what is no image, damaged, or of another format.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and broken EXIF; our own limit follows
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise Refusal(
                        413,
                        f"the image has {image.width} x {image.height} pixels, more than the limit of {max_pixels}; resize it "
                        "first.",
                    )
                return open_image(image)
    except Refusal:
        raise
    except MemoryError as error:
        raise Refusal(503, "there is no memory left to read this image; send a smaller one.", 1) from error
    except Image.DecompressionBombError as error:
        raise Refusal(413, f"the image has more pixels than the limit of {max_pixels}; resize it first.") from error
    except ValueError as error:  # it was opened, and is damaged
        raise Refusal(400, str(error)) from error
    except Exception as error:  # decoders fail in many ways on what was made to break them
        raise Refusal(400, f"the image cannot be read; send one of {', '.join(FORMATS)}.") from error


def as_refusal(error: ValueError) -> Refusal:
    """A user's mistake in its own sentence."""
    return error if isinstance(error, Refusal) else Refusal(422, str(error))
