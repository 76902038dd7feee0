"""A bundle at work, without torch: the engine computes a stage, the host chooses, the engine computes the next.

    session = Session("bundle/")
    out = session("photo.jpg", budget=0.4)        # or ms=, joules=, thresholds=, exit_confidence=, deadline_ms=
    out.logits, out.macs, out.trace.kept          # as of `Iret.run`, as NumPy arrays

The choice between two stages is the model's own code (`choice`), so the same patches are kept but for ties by rounding.

Read first: `bundle`, `choice`, `stage`, `record`, `pace`. The graphs: `iret.export.graphs`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, runtime_checkable

import numpy as np

from iret.runtime.bundle import ENGINES, Bundle
from iret.runtime.choice import Layout, choose, cut, to_importance
from iret.runtime.controller import Decision
from iret.runtime.cost import Shape, stage_macs
from iret.runtime.engines import JOINERS, Graph, check_threads, load_graph, loading
from iret.runtime.keep import check_dials, read_exits, read_strengths
from iret.runtime.pace import Paces
from iret.runtime.points import (
    DeviceTable,
    OperatingPoints,
    Point,
    Setting,
    budget_of,
    check_number,
    require,
    setting_of,
)
from iret.runtime.preprocess import Source
from iret.runtime.record import Output, Record, SingleRecord, Trace
from iret.runtime.single import run_single
from iret.runtime.stage import Batch, Stage
from iret.runtime.whole import Whole

LACKING = "this bundle has none; run `iret calibrate MODEL` and export the model again"
LACKING_SINGLE = "this single graph has none; export it with --data of the model's classes, or without --single-graph"
MEASURE_SESSION = "session.measure() and session.save()"


@runtime_checkable
class Controls(Protocol):
    """What turns the dial from call to call, such as `iret.pilot.Pilot`: a controller with sensors."""

    def next(self, images: int) -> Decision:
        """The budget of the next `images` images, asked before they are run."""

    def note(self, time_s: float, images: int) -> None:
        """They were answered, in `time_s` all together, reading photos excepted."""


class Session:
    """A bundle on one engine of this device.

    Threads may share one: nothing of a run is kept here but what is learned of the pace. ONNX Runtime computes their calls side
    by side, other engines in turn, and calls that ask a `controller` take turns as a whole. A deadline is best kept, and a clock
    best measured, with one caller at a time.
    """

    def __init__(
        self,
        bundle: str | Path,
        engine: str | None = None,
        *,
        threads: int | None = None,
        controller: Controls | None = None,
        clock: Callable[[], float] = time.perf_counter,
        load: Callable[[str, Path, int | None], Graph] = load_graph,
    ) -> None:
        """`engine` None: the first that runs this kind of bundle. `threads` None: as many as the engine likes.

        ExecuTorch has one pool of threads a process, so there the latest number that any session gave holds for all.
        `controller` is asked for the budget of every call that says nothing itself, and told what it took; calls with a
        setting of their own go past it. `clock` (seconds) and `load`, which makes a graph of a file, can be replaced: tests do.

        Raises:
            ValueError: a folder that is no bundle, a damaged file, an engine that does not run its kind, threads below 1.
            ImportError: the engine is not installed.
        """
        check_threads(threads)
        self._folder = folder = Path(bundle)
        self.bundle = Bundle.read(folder)
        self.bundle.verify(folder)
        able = ENGINES[self.bundle.kind]
        self.engine = engine or able[0]
        if self.engine not in able:
            raise ValueError(
                f"engine={engine!r} does not run a bundle of kind {self.bundle.kind!r}; choose from {', '.join(able)}, "
                "or export the model in another format."
            )
        self.threads, self._controller, self._clock = threads, controller, clock
        with loading(self.engine):
            loaded = [
                [(graph, load(self.engine, folder / graph.file, threads)) for graph in graphs]
                for graphs in self.bundle.stages
            ]
        self._stages = [Stage(self.bundle, index, graphs) for index, graphs in enumerate(loaded)]
        self._paces, self._in_turn = Paces(len(self.shape.depths)), Lock()
        takes_any = not self.bundle.is_single and all(graphs[0].tokens is None for graphs in self.bundle.stages)
        can_join = takes_any and self.engine in JOINERS and load is load_graph
        self._whole = Whole(JOINERS[self.engine], folder, self.bundle, threads) if can_join else None

    def __repr__(self) -> str:
        return f"Session({str(self._folder)!r}, {self.engine!r}, threads={self.threads})"

    @property
    def shape(self) -> Shape:
        return self.bundle.shape

    @property
    def labels(self) -> tuple[str, ...] | None:
        return self.bundle.labels

    @property
    def points(self) -> OperatingPoints | None:
        return self.bundle.points

    @property
    def lacking(self) -> str:
        """What to say where operating points are needed and there are none."""
        return LACKING_SINGLE if self.bundle.is_single else LACKING

    @cached_property
    def device(self) -> str:
        """What a clock of this session holds for: processor, engine, threads and number format."""
        from iret.doctor import processor_name  # slow to import

        threads = "any threads" if self.threads is None else f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{processor_name()}, {self.engine}, {threads}, {self.bundle.precision}"

    def __call__(
        self,
        images: Source | Sequence[Source] | np.ndarray,
        budget: float | np.ndarray | None = None,
        *,
        ms: float | None = None,
        joules: float | None = None,
        thresholds: object = None,
        exit_confidence: object = None,
        deadline_ms: float | None = None,
        rule: str = "threshold",
    ) -> Output:
        """Look, choose, look again; each image on its own, whatever else is in the batch.

        `images`: a photo (path, bytes, PIL image), a list of photos, uint8 [Y, X, 3] or [B, Y, X, 3], which are preprocessed;
        or float32 [B, C, Y, X], which are taken as they are.

        How much to look, at most one of: `budget` in (0, 1], the share of the full MACs to spend in the mean, one for all or
        [B], one an image; `ms` or `joules` an image, in the mean at batch 1 on this engine here (`measure`); `thresholds`, as of
        `Iret.run`, like `exit_confidence` and `rule`. Without any, the controller says, else the deadline, else everything.

        `deadline_ms`, for the whole batch, from this call on and with reading photos: the most accurate point that should
        fit is taken where none is given, and no stage is begun that should end too late, so the last head that could be afforded
        answers. The first stage always runs, and one that was refused for long is tried now and then, for it may have become
        faster. A stage can take longer than it should, so the answer comes after the deadline at most by what the last stage
        took (by less, if that was expected of it); or by reading and the first stage, where reading alone takes too long.

        Raises:
            ValueError: images that do not fit or hold NaN, settings that do not fit, a bundle that cannot do what is asked.
        """
        check_dials(rule, budget=budget, ms=ms, joules=joules, thresholds=thresholds)
        check_number("deadline_ms", deadline_ms)
        if deadline_ms is not None and not deadline_ms > 0:
            raise ValueError(f"deadline_ms={deadline_ms} must be above 0.")
        if self.bundle.is_single and (deadline_ms is not None or exit_confidence is not None or rule != "threshold"):
            raise ValueError(
                "a single graph takes no deadline_ms, exit_confidence or other rule; export without --single-graph for them."
            )
        until = np.inf if deadline_ms is None else self._clock() + deadline_ms / 1e3
        x = self._read(images)
        if ms is not None or joules is not None:
            budget = self.budget_for(ms=ms, joules=joules)
        if budget is not None or thresholds is not None or self._controller is None:
            return self._answer(x, budget, thresholds, exit_confidence, until, rule)
        with self._in_turn:  # it is asked for so many images, and told of them, before it is asked again
            decision = self._controller.next(len(x))
            out = self._answer(x, decision.budget, None, exit_confidence, until, rule)
            self._controller.note(out.time_s, len(x))
        return replace(out, decision=decision)

    def _answer(
        self, x: np.ndarray, budget: Any, thresholds: object, exit_confidence: object, until: float, rule: str
    ) -> Output:
        started = self._clock()
        batch = Batch(x, self.shape)
        if budget is None and thresholds is None:
            budget = 1.0 if until == np.inf else self._affordable(len(x), until - started)
        budgets, strengths, exits = self._settings(len(x), budget, thresholds, exit_confidence, rule)
        whole = self._whole if self._may_run_whole(batch, strengths, exits, until) else None
        if whole and not whole.is_made:
            whole = self._whole = whole if whole.make() else None
            started = self._clock()  # once in a session: no part of what a run takes
        record: Record | SingleRecord
        if self.bundle.is_single:
            record, stage_logits = run_single(self._stages[0], batch, self.shape, strengths)
        elif whole:
            record, stage_logits = whole.run(batch)
        else:
            record, stage_logits = self._run_staged(batch, strengths, exits, until, rule)
        logits = record.answer(stage_logits)
        count = partial(_count, record, strengths)
        look = partial(Trace.of, record, stage_logits)
        return Output(logits, count, look, self._clock() - started, batch.engine_s, budgets)

    # ---- settings

    def setting(self, budget: float) -> Setting:
        """Thresholds and exit confidence for a budget, from the bundle's operating points."""
        return setting_of(self.points, budget, len(self.shape.depths) - 1, self.lacking)

    def budget_for(self, *, ms: float | None = None, joules: float | None = None) -> float:
        """The budget that costs so many milliseconds or joules an image, in the mean at batch 1 on this engine here.

        Raises:
            ValueError: as `OperatingPoints.budget_for`; a session that was not measured.
        """
        return budget_of(self.points, self.device, ms=ms, joules=joules, lacking=self.lacking, remedy=MEASURE_SESSION)

    def measure(
        self, images: Source | Sequence[Source] | np.ndarray | None = None, *, seconds: float = 20.0
    ) -> DeviceTable:
        """Time every operating point on this engine here, for some `seconds`; `ms` and `joules` are looked up there from now on.

        On `images`, as `__call__` takes them, or as many of them, spread evenly, as that time allows (one at least); None: on
        noise, which is made to do what held-out images did at every point.
        Joules are estimated (`iret.measure.estimate`). Meanwhile nobody else should call.

        Raises:
            ValueError: no operating points, none that can be replayed, images that do not fit.
        """
        from iret.runtime.timing import measure_session  # seldom needed, and not to slow down loading

        points = require(self.points, "a clock", self.lacking)
        table = measure_session(self, points, None if images is None else self._read(images), seconds)
        self.bundle = replace(self.bundle, points=points.with_device(table))
        return table

    def save(self) -> None:
        """Add what was measured to `bundle.json`, whose other clocks stay; a device needs to be measured once only.

        Raises:
            ValueError: nothing was measured here, or the folder's bundle is not the one of this session any more.
            OSError: it cannot be written; the old one stays.
        """
        points = require(self.points, "a clock", self.lacking)
        table = points.table_of(self.device, MEASURE_SESSION)
        there = Bundle.read(self._folder)
        if there.points is None or there.checksums != self.bundle.checksums or not there.points.has_those_of(points):
            raise ValueError(
                f"{self._folder} was exported again since this session was made; open it anew, and measure there."
            )
        replace(there, points=there.points.with_device(table)).write(self._folder)

    def _settings(
        self, batch: int, budget: Any, thresholds: object, exit_confidence: object, rule: str
    ) -> tuple[np.ndarray | None, np.ndarray, np.ndarray | None]:
        """Budgets [B] or None, strengths [B, transitions, 2] and exits [B, transitions] or None."""
        transitions = len(self.shape.depths) - 1
        own = budgets = None
        if thresholds is not None:
            strengths = read_strengths(thresholds, batch, transitions, rule)
        else:
            try:
                asked = np.asarray(budget, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(f"budget={budget!r} must be one number, or one an image.") from error
            if asked.shape not in ((), (batch,)):
                raise ValueError(f"budget of shape {asked.shape} does not fit {batch} images; give one each.")
            settings = [self.setting(float(each)) for each in asked.ravel()]
            if asked.ndim:
                strengths = np.concatenate([read_strengths(each.thresholds, 1, transitions) for each in settings])
            else:
                strengths = read_strengths(settings[0].thresholds, batch, transitions)
            budgets = np.broadcast_to(asked, batch)
            leaves = [each.exit_confidence for each in settings]
            if any(each is not None for each in leaves):
                own = np.array([np.inf if each is None else each for each in leaves])
                own = np.broadcast_to(own[:, None], (batch, transitions))
        exits = own if exit_confidence is None else read_exits(exit_confidence, batch, transitions)
        return budgets, strengths, exits

    def _affordable(self, batch: int, seconds: float) -> float:
        """The budget of the most accurate point that should take at most `seconds` for a batch; the cheapest if none does."""
        if self.points is None or not self._paces.are_known:
            return 1.0
        shares = self.points.shares  # cheapest first, points dearest first
        rows = zip(shares[::-1].tolist(), self.points.points, strict=True)
        fit = [(point.accuracy, -share) for share, point in rows if self._predict(point, batch) <= seconds]
        return -max(fit)[1] if fit else float(shares[0])  # of equally accurate ones the cheapest

    def _predict(self, point: Point, batch: int) -> float:
        """Seconds of so many mean images at `point`, by what calls have taken so far.

        Of a mean image, those that leave early included; one that stays takes longer, and may find no time for its last stage.
        """
        kept = (self.shape.num_patches, *point.kept_mean[1:])
        return self._paces.speed * sum(
            self._paces.predict(stage, batch * float(stage_macs(self.shape, stage, count, count, scored=True)))
            for stage, count in enumerate(kept)
        )

    # ---- running

    def _may_run_whole(self, batch: Batch, strengths: np.ndarray, exits: np.ndarray | None, until: float) -> bool:
        """Not before the stages ran a few times, which teaches their pace to later calls with a deadline."""
        if self._whole is None or len(batch.images) > 1 or exits is not None or until < np.inf:
            return False
        return not strengths.any() and self._paces.are_settled

    def _run_staged(
        self, images: Batch, strengths: np.ndarray, exits: np.ndarray | None, until: float, rule: str
    ) -> tuple[Record, np.ndarray]:
        """The record and logits [S, B, classes]."""
        shape, batch = self.shape, len(images.images)
        num_stages, drops = len(shape.depths), bool(strengths.any())
        layout = Layout.whole(batch, shape.num_patches)
        record, paces, speed = Record(shape, batch), self._paces, self._paces.speed
        stage_logits = np.full((num_stages, batch, shape.num_classes), np.nan, np.float32)
        refined_T: np.ndarray | None = None
        x_TD = np.empty(0, np.float32)
        for index, stage in enumerate(self._stages):
            macs = stage.macs(layout)
            began = self._clock()
            if index and until < np.inf and began + speed * paces.predict(index, macs) > until:
                paces.refuse(index)
                break
            x_TD, received_T, logits = stage.run(images, x_TD, layout, refined_T)
            took = self._clock() - began
            if index == 0:
                speed = paces.speed = took / macs or speed  # a clock too coarse to see it
            paces.learn(index, macs, took / speed)
            record.add(index, layout, refined_T)
            stage_logits[index, slice(None) if len(layout.images) == batch else layout.images] = logits
            if index == num_stages - 1:
                break
            if exits is not None:
                goes_on = _confidence(logits) < exits[:, index].astype(np.float32)
                if not goes_on.any():
                    break
                if not goes_on.all():
                    strengths, exits = strengths[goes_on], exits[goes_on]
                    layout, rows = layout.take(goes_on)
                    x_TD, received_T = x_TD[rows], received_T[rows]
            if drops:
                importance_T = to_importance(received_T, layout)
                record.see(index, layout, importance_T, strengths)
                choice = choose(importance_T, layout, strengths[:, index], rule, shape.min_keep)
                x_TD, layout, refined_T = cut(x_TD, layout, choice)
        return record, stage_logits

    def _read(self, images: Source | Sequence[Source] | np.ndarray) -> np.ndarray:
        if not isinstance(images, np.ndarray) or images.dtype == np.uint8:
            return self.bundle.preprocess(images)
        wanted = (self.shape.in_chans, *self.shape.img_size)
        if images.dtype != np.float32 or images.ndim != 4 or not len(images) or images.shape[1:] != wanted:
            raise ValueError(
                f"images are {images.dtype} {images.shape}; this bundle takes float32 [B, {', '.join(map(str, wanted))}], B 1 "
                "or more, or photos, of which an array is uint8 [Y, X, C] or [B, Y, X, C]."
            )
        if not np.isfinite(images.sum()):
            raise ValueError("images hold NaN or infinite values; check how they were read and normalised.")
        return np.ascontiguousarray(images)


def _count(record: Record | SingleRecord, strengths: np.ndarray) -> np.ndarray:
    """MACs of each image, once somebody asks."""
    return record.macs(scored=np.asarray(strengths.any((1, 2))))


def _confidence(logits: np.ndarray) -> np.ndarray:
    """Largest softmax probability a row."""
    return 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)
