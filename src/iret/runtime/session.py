"""A bundle at work, without torch: the engine computes a stage, the host chooses, the engine computes the next.

    session = Session("bundle/")
    out = session("photo.jpg", budget=0.4)        # or ms=, joules=, thresholds=, deadline_ms=
    out.logits, out.macs, out.trace.kept          # as of `Iret.run`, as NumPy arrays

The choice between two stages is the model's own code (`choice`), so the same patches are kept but for ties by rounding. Images
of a batch keep different counts; those of similar count share a call, the shorter ones padded behind a key mask where that
is cheaper than a call of their own.

Read first: `bundle`, `choice`. The graphs: `iret.export.graphs`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iret.runtime.bundle import ENGINES, Bundle, GraphFile
from iret.runtime.choice import Choice, Layout, choose, to_importance, to_starts
from iret.runtime.cost import Shape, numbers_moved, stage_macs
from iret.runtime.engines import Graph, load_graph
from iret.runtime.keep import read_exits, read_strengths
from iret.runtime.points import OperatingPoints, Point, Setting, keep_all
from iret.runtime.preprocess import Source
from iret.runtime.record import Record

MASKED = -1e9  # of a padded key: its weight is exactly 0, and no engine makes NaN of it
# What a call costs beside its MACs: its weights are read from memory, which takes as long as this many MACs each.
MACS_A_WEIGHT = 8
RATE_MOMENTUM = 0.7


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
    """A bundle on one engine of this device."""

    def __init__(
        self,
        bundle: str | Path,
        engine: str | None = None,
        *,
        threads: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`engine` None: the first that runs this kind of bundle. `threads` None: as many as the engine likes.

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
            _Stage(
                self.bundle, index, [(graph, load_graph(self.engine, folder / graph.file, threads)) for graph in graphs]
            )
            for index, graphs in enumerate(self.bundle.stages)
        ]
        self._engine_s = 0.0
        self._rates = np.full(len(self.shape.depths), np.nan)  # seconds a MAC, by stage; learned

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

        `deadline_ms`, for the whole batch: the dearest point that should fit is taken where none is given, and
        no stage is begun that would end too late, so the last head that could be afforded answers. The first stage always runs.

        Raises:
            ValueError: images that do not fit or hold NaN, settings that do not fit, a bundle that cannot do what is asked.
        """
        x = self._read(images)
        if budget is not None and thresholds is not None:
            raise ValueError("give a budget or thresholds, not both.")
        if deadline_ms is not None and not deadline_ms > 0:
            raise ValueError(f"deadline_ms={deadline_ms} must be above 0.")
        if self.bundle.is_single and (deadline_ms is not None or exit_confidence is not None or rule != "threshold"):
            raise ValueError(
                "a single graph runs from end to end and by the rule 'threshold' alone; export without --single-graph for "
                "deadlines, early exits and other rules."
            )
        started = self._clock()
        until = np.inf if deadline_ms is None else started + deadline_ms / 1e3
        strengths, exits = self._settings(len(x), budget, thresholds, exit_confidence, until - started, rule)
        self._engine_s = 0.0
        if self.bundle.is_single:
            record, stage_logits, importance = self._run_single(x, strengths)
        else:
            record, stage_logits, importance = self._run_staged(x, strengths, exits, until, rule)
        kept, refined = record.grids()
        trace = Trace(stage_logits, record.exits, kept, refined, importance)
        logits = stage_logits[record.exits, np.arange(len(x))]
        spent = record.macs(scored=strengths.any((1, 2)))
        return Output(logits, spent, trace, self._clock() - started, self._engine_s)

    # ---- settings

    def setting(self, budget: float) -> Setting:
        """Thresholds and exit confidence for a budget, from the bundle's operating points."""
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
        if self.points is None or np.isnan(self._rates).any():
            return 1.0
        for share, point in zip(self.points.shares, self.points.points, strict=True):
            if batch * self._predict(point) <= seconds:
                return float(share)
        return float(self.points.shares[-1])

    def _predict(self, point: Point) -> float:
        """Seconds of a mean image at `point`, by the rates seen so far."""
        kept = (self.shape.num_patches, *point.kept_mean[1:])
        return sum(
            float(self._rates[stage] * stage_macs(self.shape, stage, count, count, scored=True))
            for stage, count in enumerate(kept)
        )

    # ---- running

    def _run_staged(
        self, images: np.ndarray, strengths: np.ndarray, exits: np.ndarray | None, until: float, rule: str
    ) -> tuple[Record, np.ndarray, np.ndarray]:
        """The record, logits [S, B, classes] and importance [S - 1, B, rows, columns]."""
        shape, batch = self.shape, len(images)
        num_stages, num_cells = len(shape.depths), shape.num_patches
        layout, drops = Layout.whole(batch, num_cells), bool(strengths.any())
        record = Record(shape, batch)
        stage_logits = np.full((num_stages, batch, shape.num_classes), np.nan, np.float32)
        importance = np.full((num_stages - 1, batch, num_cells), np.nan)
        refined_T: np.ndarray | None = None
        x_TD = np.empty(0, np.float32)
        for index, stage in enumerate(self._stages):
            macs = float(np.sum(stage_macs(shape, index, layout.counts - 1, layout.counts - 1, scored=True)))
            if index and self._clock() + self._rates[index] * macs > until:  # an unknown rate compares as affordable
                break
            began = self._clock()
            x_TD, received_T, logits = stage.run(images, x_TD, layout, refined_T)
            took = self._clock() - began
            self._engine_s += stage.engine_s
            self._learn(index, took / macs)
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
                patches = layout.cell_T >= 0
                importance[index, layout.image_T()[patches], layout.cell_T[patches]] = importance_T[patches]
                choice = choose(importance_T, layout, strengths[layout.images, index], rule, shape.min_keep)
                x_TD, layout, refined_T = _cut(x_TD, layout, choice)
        return record, stage_logits, importance.reshape(num_stages - 1, batch, *shape.grid)

    def _run_single(self, images: np.ndarray, strengths: np.ndarray) -> tuple[Record, np.ndarray, np.ndarray]:
        shape, batch = self.shape, len(images)
        num_stages, record = len(shape.depths), Record(shape, batch)
        stage_logits = np.full((num_stages, batch, shape.num_classes), np.nan, np.float32)
        for row in range(batch):
            logits, kept, refined = self._stages[0].call([images[row, None], strengths[row].astype(np.float32)])
            self._engine_s += self._stages[0].engine_s
            stage_logits[-1, row] = logits[0]
            record.kept[:, row], record.refined[:, row] = kept > 0, refined > 0
        record.stages_run = num_stages
        return record, stage_logits, np.full((num_stages - 1, batch, *shape.grid), np.nan)

    def _learn(self, stage: int, rate: float) -> None:
        before = self._rates[stage]
        self._rates[stage] = rate if np.isnan(before) else RATE_MOMENTUM * before + (1 - RATE_MOMENTUM) * rate

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


class _Stage:
    """The graphs of one stage, fed from packed tokens."""

    def __init__(self, bundle: Bundle, index: int, graphs: list[tuple[GraphFile, Graph]]) -> None:
        self._shape, self._index, self._max_batch = bundle.shape, index, bundle.max_batch
        self._graphs = sorted(graphs, key=lambda each: each[0].tokens or 0)
        self.engine_s = 0.0  # of the latest `run` or `call`

    def call(self, inputs: list[np.ndarray], width: int = 0) -> list[np.ndarray]:
        """The graph that takes `width` tokens an image."""
        graph = next(graph for file, graph in self._graphs if file.tokens in (None, width))
        began = time.perf_counter()
        outputs = graph(inputs)
        self.engine_s += time.perf_counter() - began
        return outputs

    def run(
        self, images: np.ndarray, x_TD: np.ndarray, layout: Layout, refined_T: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens and received attention, packed, and logits, an image a row. `refined_T` None: every patch with a token."""
        self.engine_s = 0.0
        groups = self._groups(layout.counts)
        found = [self._run_group(group, images, x_TD, layout, refined_T) for group in groups]
        if len(found) == 1:
            return found[0]
        back = np.argsort(np.concatenate(groups))
        x, received, logits = zip(*found, strict=True)
        if self._index == len(self._shape.depths) - 1:
            return np.empty(0), np.empty(0), np.concatenate(logits)[back]
        # packed group after group; back into the order of the images
        counts = layout.counts[np.concatenate(groups)]
        pieces = np.split(np.arange(counts.sum()), to_starts(counts)[1:-1])
        rows = np.concatenate([pieces[place] for place in back])
        return np.concatenate(x)[rows], np.concatenate(received)[rows], np.concatenate(logits)[back]

    def _run_group(
        self, group: np.ndarray, images: np.ndarray, x_TD: np.ndarray, layout: Layout, refined_T: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One call for the images at these places of `layout`."""
        if not self._index:
            outputs = self.call([images[layout.images[group]]], 1 + self._shape.num_patches)
            if len(outputs) == 1:  # a model of one stage
                return np.empty(0), np.empty(0), outputs[0]
            x, received, logits = outputs
            return x.reshape(-1, x.shape[-1]), received.ravel(), logits
        counts = layout.counts[group]
        width = self._width(int(counts.max()))
        offsets = np.arange(width)
        is_live = offsets < counts[:, None]
        places = np.where(is_live, layout.starts[group][:, None] + offsets, layout.starts[group][:, None])
        cell = layout.cell_T[places]
        is_read = is_live & (cell >= 0)
        if refined_T is not None:
            is_read &= refined_T[places]
        pixels = self._pixels(images, layout.images[group], cell, is_read)
        source = is_read.ravel().cumsum().reshape(is_read.shape) * is_read
        bias = np.where(is_live, np.float32(0), np.float32(MASKED))
        outputs = self.call([x_TD[places], cell, pixels, source, bias], width)
        if len(outputs) == 1:
            return np.empty(0), np.empty(0), outputs[0]
        x, received, logits = outputs
        return x[is_live], received[is_live], logits

    def _pixels(self, images: np.ndarray, owners: np.ndarray, cell: np.ndarray, is_read: np.ndarray) -> np.ndarray:
        """float32 [1 + R, C, P, P]: zeros, then the patches that are looked at again, image after image."""
        (rows, columns), side, channels = self._shape.grid, self._shape.patch_size, self._shape.in_chans
        image, token = is_read.nonzero()
        row, column = np.divmod(cell[image, token], columns)
        grid = images.reshape(len(images), channels, rows, side, columns, side)
        room = len(image) + 1 if self._graphs[0][0].tokens is None else is_read.size
        pixels = np.zeros((room, channels, side, side), np.float32)
        pixels[1 : len(image) + 1] = grid[owners[image], :, row, :, column]
        return pixels

    def _width(self, most: int) -> int:
        """Tokens an image that a graph exists for, the fewest that fit `most`."""
        return (
            most if self._graphs[0][0].tokens is None else next(f.tokens for f, _ in self._graphs if f.tokens >= most)
        )

    def _groups(self, counts: np.ndarray) -> list[np.ndarray]:
        """Places of the images that share a call."""
        batch, limit = len(counts), self._max_batch or len(counts)
        if batch == 1:
            return [np.zeros(1, np.int64)]
        if self._index == 0 or counts.min() == counts.max():
            return np.split(np.arange(batch), range(limit, batch, limit))
        weights = numbers_moved(self._shape, [0] * (self._index + 1)) - numbers_moved(self._shape, [0] * self._index)
        widths = np.array([self._width(int(count)) for count in counts])
        image = stage_macs(self._shape, self._index, widths - 1, widths - 1, scored=True)
        return group_by_count(widths, np.asarray(image), MACS_A_WEIGHT * weights, limit)


def group_by_count(counts: np.ndarray, cost: np.ndarray, call_cost: float, limit: int) -> list[np.ndarray]:
    """Images that share a call, so that all calls together cost the least: places [n] of each group, at most `limit`.

    An image of `counts` [B] tokens costs `cost` [B] alone and, padded, as much as the longest of its call; a call costs
    `call_cost` beside. Exact: the best groups are runs of the images in the order of their counts.
    """
    order = np.argsort(counts, kind="stable")
    best, cut = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=np.int64)
    for end in range(1, len(order) + 1):
        begin = np.arange(max(0, end - limit), end)
        total = best[begin] + call_cost + (end - begin) * cost[order[end - 1]]
        cheapest = int(total.argmin())
        best[end], cut[end] = total[cheapest], begin[cheapest]
    groups, end = [], len(order)
    while end:
        groups.append(np.sort(order[cut[end] : end]))
        end = int(cut[end])
    return groups[::-1]


def _cut(x_TD: np.ndarray, layout: Layout, choice: Choice) -> tuple[np.ndarray, Layout, np.ndarray | None]:
    """The tokens that stay, in image order, and which of them are refined."""
    rows = choice.kept_T.nonzero()[0]
    counts = np.add.reduceat(choice.kept_T, layout.starts[:-1], dtype=np.int64)
    refined = None if choice.refined_T is None else choice.refined_T[rows]
    return x_TD[rows], Layout(layout.cell_T[rows], to_starts(counts), layout.images), refined


def _confidence(logits: np.ndarray) -> np.ndarray:
    """Largest softmax probability a row."""
    return 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)
