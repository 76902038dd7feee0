"""A bundle at work, without torch: the engine computes a stage, the host chooses, the engine computes the next.

    session = Session("bundle/")
    out = session("photo.jpg", budget=0.4)        # or thresholds=, exit_confidence=, deadline_ms=
    out.logits, out.macs, out.trace.kept          # as of `Iret.run`, as NumPy arrays

The choice between two stages is the model's own code (`choice`), so the same patches are kept but for ties by rounding.

Read first: `bundle`, `choice`, `stage`. The graphs: `iret.export.graphs`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iret.runtime.bundle import ENGINES, Bundle
from iret.runtime.choice import Choice, Layout, choose, to_importance, to_starts
from iret.runtime.cost import Shape, stage_macs
from iret.runtime.engines import Graph, load_graph
from iret.runtime.keep import check_rule, read_exits, read_strengths
from iret.runtime.points import OperatingPoints, Point, Setting, check_budget, keep_all
from iret.runtime.preprocess import Source
from iret.runtime.record import Record
from iret.runtime.stage import Patches, Stage

FORGETTING = 0.9  # of what earlier calls took
DOUBT = 0.98  # a stage half as fast as it should be is tried again after 35 runs, one ten times too slow after 115


@dataclass(frozen=True)
class Trace:
    """What one run looked at; a stage that an image did not reach is False in `kept` and NaN elsewhere."""

    stage_logits: np.ndarray  # float32 [S, B, classes]
    exit_stage: np.ndarray  # int [B]: index of the stage whose head answered
    kept: np.ndarray  # bool [S, B, rows, columns]: patches computed in each stage
    refined: np.ndarray  # bool [S, B, rows, columns]: patches whose details were added on the way into each stage
    importance: (
        np.ndarray
    )  # float [S - 1, B, rows, columns]: what each choice was made on, "times uniform"; NaN elsewhere


@dataclass(frozen=True)
class Output:
    """Answer and cost of one run, as of `Iret.run`, and where the time went."""

    logits: np.ndarray  # float32 [B, classes]
    macs: np.ndarray  # int64 [B]: multiply-accumulates spent on each image
    trace: Trace
    time_s: float  # of all of it, preprocessing excepted
    engine_s: float  # of that, inside the engine


class Session:
    """A bundle on one engine of this device. For one thread at a time; give each its own."""

    def __init__(
        self,
        bundle: str | Path,
        engine: str | None = None,
        *,
        threads: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        load: Callable[[str, Path, int | None], Graph] = load_graph,
    ) -> None:
        """`engine` None: the first that runs this kind of bundle. `threads` None: as many as the engine likes.

        `clock` (seconds) and `load`, which makes a graph of a file, can be replaced: tests and calibration do.

        Raises:
            ValueError: a folder that is no bundle, a damaged file, an engine that does not run its kind.
            ImportError: the engine is not installed.
        """
        folder = Path(bundle)
        self.bundle = Bundle.read(folder)
        self.bundle.verify(folder)
        able = ENGINES[self.bundle.kind]
        self.engine = engine or able[0]
        if self.engine not in able:
            raise ValueError(
                f"engine={engine!r} does not run a bundle of kind {self.bundle.kind!r}; choose from {', '.join(able)}, "
                "or export the model in another format."
            )
        self._clock = clock
        self._stages = [
            Stage(self.bundle, index, [(graph, load(self.engine, folder / graph.file, threads)) for graph in graphs])
            for index, graphs in enumerate(self.bundle.stages)
        ]
        self._engine_s = 0.0
        self._paces = [_Pace() for _ in self.shape.depths]
        self._speed = 1.0  # seconds a MAC of the latest first stage; the paces are in units of it

    @property
    def shape(self) -> Shape:
        return self.bundle.shape

    @property
    def labels(self) -> tuple[str, ...] | None:
        return self.bundle.labels

    @property
    def points(self) -> OperatingPoints | None:
        return self.bundle.points

    def __call__(
        self,
        images: Source | Sequence[Source] | np.ndarray,
        budget: float | np.ndarray | None = None,
        *,
        thresholds: object = None,
        exit_confidence: object = None,
        deadline_ms: float | None = None,
        rule: str = "threshold",
    ) -> Output:
        """Look, choose, look again; each image on its own, whatever else is in the batch.

        `images`: a photo (path, bytes, PIL image), a list of photos, uint8 [Y, X, 3] or [B, Y, X, 3], which are preprocessed;
        or float32 [B, C, Y, X], which are taken as they are. `budget` in (0, 1], one for all or [B], needs operating points;
        `thresholds`, `exit_confidence` and `rule` are those of `Iret.run`.

        `deadline_ms`, for the whole batch, from this call on and with reading photos: the dearest point that should fit is
        taken where none is given, and no stage is begun that would end too late, so the last head that could be afforded
        answers. The first stage always runs.

        Raises:
            ValueError: images that do not fit or hold NaN, settings that do not fit, a bundle that cannot do what is asked.
        """
        check_rule(rule)
        if budget is not None and thresholds is not None:
            raise ValueError("give a budget or thresholds, not both.")
        if rule != "threshold" and thresholds is None:
            raise ValueError(f"rule={rule!r} reads thresholds as its own strengths; give them.")
        if deadline_ms is not None and not deadline_ms > 0:
            raise ValueError(f"deadline_ms={deadline_ms} must be above 0.")
        if self.bundle.is_single and (deadline_ms is not None or exit_confidence is not None or rule != "threshold"):
            raise ValueError(
                "a single graph runs from end to end and by the rule 'threshold' alone; export without --single-graph for "
                "deadlines, early exits and other rules."
            )
        until = np.inf if deadline_ms is None else self._clock() + deadline_ms / 1e3
        x = self._read(images)
        started = self._clock()
        strengths, exits = self._settings(len(x), budget, thresholds, exit_confidence, until - started, rule)
        self._engine_s = 0.0
        if self.bundle.is_single:
            record, stage_logits, importance = self._run_single(x, strengths)
        else:
            record, stage_logits, importance = self._run_staged(x, strengths, exits, until, rule)
        kept, refined = record.grids()
        trace = Trace(stage_logits, record.exits, kept, refined, importance)
        logits = stage_logits[record.exits, np.arange(len(x))]
        spent = record.macs(scored=np.asarray(strengths.any((1, 2))))
        return Output(logits, spent, trace, self._clock() - started, self._engine_s)

    # ---- settings

    def setting(self, budget: float) -> Setting:
        """Thresholds and exit confidence for a budget, from the bundle's operating points."""
        check_budget(budget)
        if budget == 1:
            return keep_all(len(self.shape.depths) - 1)
        if self.points is None:
            raise ValueError(
                f"budget={budget:g} needs operating points, and this bundle has none; run `iret calibrate MODEL` and export "
                "the model again, or give thresholds."
            )
        return self.points.setting(budget)

    def _settings(
        self, batch: int, budget: Any, thresholds: object, exit_confidence: object, seconds: float, rule: str
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Strengths [B, transitions, 2] and exits [B, transitions] or None."""
        transitions = len(self.shape.depths) - 1
        if thresholds is None and budget is None:
            budget = self._affordable(batch, seconds) if np.isfinite(seconds) else 1.0
        if thresholds is not None:
            strengths, own = read_strengths(thresholds, batch, transitions, rule), None
        else:
            budgets = np.asarray(budget, dtype=np.float64)
            if budgets.shape not in ((), (batch,)):
                raise ValueError(f"budget of shape {budgets.shape} does not fit {batch} images; give one each.")
            settings = [self.setting(float(each)) for each in budgets.ravel()]
            rows = np.concatenate([read_strengths(each.thresholds, 1, transitions) for each in settings])
            strengths = np.broadcast_to(rows, (batch, transitions, 2))
            leaves = [each.exit_confidence for each in settings]
            own = None
            if any(each is not None for each in leaves):
                own = np.array([np.inf if each is None else each for each in leaves])
                own = np.broadcast_to(own[:, None], (batch, transitions))
        return strengths, own if exit_confidence is None else read_exits(exit_confidence, batch, transitions)

    def _affordable(self, batch: int, seconds: float) -> float:
        """The largest budget whose points should take at most `seconds` for a batch; the cheapest if none does."""
        if self.points is None or not all(pace.is_known for pace in self._paces):
            return 1.0
        shares = self.points.shares  # cheapest first, points dearest first
        for share, point in zip(shares[::-1], self.points.points, strict=True):
            if self._predict(point, batch) <= seconds:
                return float(share)
        return float(shares[0])

    def _predict(self, point: Point, batch: int) -> float:
        """Seconds of so many mean images at `point`, by what calls have taken so far."""
        kept = (self.shape.num_patches, *point.kept_mean[1:])
        return self._speed * sum(
            pace.predict(batch * float(stage_macs(self.shape, stage, count, count, scored=True)))
            for stage, (pace, count) in enumerate(zip(self._paces, kept, strict=True))
        )

    # ---- running

    def _run_staged(
        self, images: np.ndarray, strengths: np.ndarray, exits: np.ndarray | None, until: float, rule: str
    ) -> tuple[Record, np.ndarray, np.ndarray]:
        """The record, logits [S, B, classes] and importance [S - 1, B, rows, columns]."""
        shape, batch = self.shape, len(images)
        num_stages, num_cells = len(shape.depths), shape.num_patches
        layout, drops = Layout.whole(batch, num_cells), bool(strengths.any())
        record, patches = Record(shape, batch), Patches(images, shape)
        stage_logits = np.full((num_stages, batch, shape.num_classes), np.nan, np.float32)
        importance = np.full((num_stages - 1, batch, num_cells), np.nan)
        refined_T: np.ndarray | None = None
        x_TD = np.empty(0, np.float32)
        for index, stage in enumerate(self._stages):
            macs = stage.macs(layout)
            began = self._clock()
            if index and began + self._speed * self._paces[index].predict(macs) > until:
                self._paces[index].doubt()
                break
            x_TD, received_T, logits = stage.run(patches, x_TD, layout, refined_T)
            took = self._clock() - began
            self._engine_s += stage.engine_s
            if index == 0:
                self._speed = took / macs or self._speed  # a clock too coarse to see it
            self._paces[index].learn(macs, took / self._speed)
            record.add(index, layout, refined_T)
            stage_logits[index, layout.images] = logits
            if index == num_stages - 1:
                break
            if exits is not None:
                goes_on = _confidence(logits) < exits[layout.images, index].astype(np.float32)
                if not goes_on.any():
                    break
                if not goes_on.all():
                    layout, rows = layout.take(goes_on)
                    x_TD, received_T = x_TD[rows], received_T[rows]
            if drops:
                importance_T = to_importance(received_T, layout)
                if layout.is_one:
                    importance[index, layout.images[0], layout.cell_T[1:]] = importance_T[1:]
                else:
                    is_patch = layout.cell_T >= 0
                    importance[index, layout.image_T()[is_patch], layout.cell_T[is_patch]] = importance_T[is_patch]
                choice = choose(importance_T, layout, strengths[layout.images, index], rule, shape.min_keep)
                x_TD, layout, refined_T = _cut(x_TD, layout, choice)
        return record, stage_logits, importance.reshape(num_stages - 1, batch, *shape.grid)

    def _run_single(self, images: np.ndarray, strengths: np.ndarray) -> tuple[Record, np.ndarray, np.ndarray]:
        shape, batch = self.shape, len(images)
        num_stages, record = len(shape.depths), Record(shape, batch)
        stage_logits = np.full((num_stages, batch, shape.num_classes), np.nan, np.float32)
        importance = np.full((num_stages - 1, batch, shape.num_patches), np.nan)
        self._stages[0].engine_s = 0.0
        for row in range(batch):
            logits, kept, refined, seen = self._stages[0].call([images[row, None], strengths[row].astype(np.float32)])
            stage_logits[-1, row] = logits[0]
            record.kept[:, row], record.refined[:, row] = kept > 0, refined > 0
            importance[:, row] = np.where(record.kept[:-1, row], seen, np.nan)
        record.stages_run = num_stages
        self._engine_s = self._stages[0].engine_s
        return record, stage_logits, importance.reshape(num_stages - 1, batch, *shape.grid)

    def _read(self, images: Source | Sequence[Source] | np.ndarray) -> np.ndarray:
        if not (isinstance(images, np.ndarray) and images.dtype == np.float32):
            return self.bundle.preprocess(images)
        wanted = (self.shape.in_chans, *self.shape.img_size)
        if images.ndim != 4 or not len(images) or images.shape[1:] != wanted:
            raise ValueError(
                f"images are float32 {images.shape}; this bundle takes float32 [B, {', '.join(map(str, wanted))}], B 1 or more, "
                "or photos."
            )
        if not np.isfinite(images.sum()):
            raise ValueError("images hold NaN or infinite values; check how they were read and normalised.")
        return np.ascontiguousarray(images)


class _Pace:
    """Time of a stage as a line over its MACs, fitted to the calls so far, the latest of which weigh most.

    In units of the first stage's seconds a MAC in the same run: a slow moment of the machine is not taken for the stage's.
    """

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, macs, seconds, macs^2, macs * seconds

    @property
    def is_known(self) -> bool:
        return self._sums[0] > 0

    def learn(self, macs: float, seconds: float) -> None:
        latest = (1.0, macs, seconds, macs * macs, macs * seconds)
        self._sums = [FORGETTING * earlier + new for earlier, new in zip(self._sums, latest, strict=True)]

    def doubt(self) -> None:
        """It was not begun for want of time: believe a little less of what it took, or one slow call would bar it for good."""
        for place in (2, 4):
            self._sums[place] *= DOUBT

    def predict(self, macs: float) -> float:
        """Time, 0 or more; 0 while nothing is known."""
        if not self.is_known:
            return 0.0
        mean_macs, mean_s, mean_square, mean_product = (each / self._sums[0] for each in self._sums[1:])
        spread = mean_square - mean_macs**2
        through_zero = mean_s / mean_macs
        if spread < 1e-6 * mean_square:  # all calls were alike
            return through_zero * macs
        slope = min(max(0.0, (mean_product - mean_macs * mean_s) / spread), through_zero)
        return mean_s + slope * (macs - mean_macs)


def _cut(x_TD: np.ndarray, layout: Layout, choice: Choice) -> tuple[np.ndarray, Layout, np.ndarray | None]:
    """The tokens that stay, in image order, and which of them are refined."""
    rows = choice.kept_T.nonzero()[0]
    if layout.is_one:
        starts = np.array([0, len(rows)])
    else:
        starts = to_starts(np.add.reduceat(choice.kept_T, layout.starts[:-1], dtype=np.int64))
    refined = None if choice.refined_T is None else choice.refined_T[rows]
    return x_TD.take(rows, axis=0), Layout(layout.cell_T[rows], starts, layout.images), refined


def _confidence(logits: np.ndarray) -> np.ndarray:
    """Largest softmax probability a row."""
    return 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)
