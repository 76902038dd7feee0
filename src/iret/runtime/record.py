"""What a run of a session returns; and the record of what was looked at, noted while any run goes on, on whatever engine.

Noting takes next to no time, because an engine waits for it; grids are made of the notes when somebody wants to see them.

Read first: `choice`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from iret.runtime.choice import Layout
from iret.runtime.controller import Decision
from iret.runtime.cost import Shape, macs, plan_macs


@dataclass(frozen=True, eq=False)  # arrays have no one answer to ==
class Trace:
    """What one run looked at; a stage that an image did not reach is False in `kept` and `refined`, and NaN elsewhere."""

    stage_logits: np.ndarray  # float32 [S, B, classes]
    exit_stage: np.ndarray  # int [B]: index of the stage whose head answered
    kept: np.ndarray  # bool [S, B, rows, columns]: patches computed in each stage
    refined: np.ndarray  # bool [S, B, rows, columns]: patches whose details were added on the way into each stage
    importance: np.ndarray  # float [S - 1, B, rows, columns]: "times uniform", what each choice saw; NaN elsewhere

    @classmethod
    def of(cls, record: "Record | SingleRecord", stage_logits: np.ndarray) -> "Trace":
        """Of a run that is over, and what its heads said."""
        return cls(stage_logits, record.exits, *record.grids, record.importance())


@dataclass(frozen=True, eq=False)  # arrays have no one answer to ==
class Output:
    """Answer and cost of one run, as of `Iret.run`, and where the time went."""

    logits: np.ndarray  # float32 [B, classes]
    count: Callable[[], np.ndarray] = field(repr=False)  # makes `macs`, when somebody asks for them
    look: Callable[[], Trace] = field(repr=False)  # makes `trace`, likewise
    time_s: float  # of all of it, but for preprocessing, making these two and, once in a session, joining its stages
    engine_s: float  # of that, inside the engine
    budget: np.ndarray | None = None  # float [B]: where the dial stood; None where thresholds were given
    decision: Decision | None = None  # of the controller, where it was asked

    @cached_property
    def macs(self) -> np.ndarray:
        """int64 [B]: multiply-accumulates spent on each image."""
        return self.count()

    @cached_property
    def trace(self) -> Trace:
        """What the run looked at."""
        return self.look()


class Record:
    """What one run did, stage by stage, for all its images."""

    def __init__(self, shape: Shape, batch: int) -> None:
        self.shape, self.batch = shape, batch
        self.exit_stage: np.ndarray | None = None  # int [B]; None: all images passed the same stages
        self._passed: list[tuple[Layout, np.ndarray | None]] = []  # of each stage
        # importance and strengths by the transition that chose by them
        self._seen: dict[int, tuple[Layout, np.ndarray, np.ndarray]] = {}

    def add(self, stage: int, layout: Layout, refined_T: np.ndarray | None) -> None:
        """The images of `layout` passed `stage`, the next one, on its live patches.

        `refined_T`: tokens whose details entered here; None: those of every patch.
        """
        assert stage == len(self._passed), "stages are noted in their order, each once"
        self._passed.append((layout, refined_T))
        if len(layout.images) < self.batch:
            if self.exit_stage is None:
                self.exit_stage = np.full(self.batch, stage - 1)
            self.exit_stage[layout.images] = stage

    def see(self, transition: int, layout: Layout, importance_T: np.ndarray, strengths: np.ndarray) -> None:
        """What `transition` chose by. `strengths` [n, transitions, 2] of the images of `layout`: all 0, nothing was chosen."""
        self._seen[transition] = layout, importance_T, strengths

    @property
    def exits(self) -> np.ndarray:
        """int [B]: the last stage each image passed, whose head answers for it."""
        return np.full(self.batch, len(self._passed) - 1) if self.exit_stage is None else self.exit_stage

    def answer(self, stage_logits: np.ndarray) -> np.ndarray:
        """[B, classes] of [S, B, classes]: what the last head said that each image passed."""
        if self.exit_stage is None:
            return stage_logits[len(self._passed) - 1].copy()
        return stage_logits[self.exit_stage, np.arange(self.batch)]

    def macs(self, scored: np.ndarray | bool) -> np.ndarray:
        """int64 [B]: multiply-accumulates spent on each image; `scored`, one for all or [B]: whether tokens were chosen."""
        if self.batch == 1 and all(layout.live_T is None for layout, _ in self._passed):  # the same in fewer steps
            kept = [len(layout.cell_T) - 1 for layout, _ in self._passed]
            refined = [
                count if refined_T is None else int(np.count_nonzero(refined_T[1:]))
                for count, (_, refined_T) in zip(kept, self._passed, strict=True)
            ]
            return np.array([plan_macs(self.shape, kept, refined, scored=bool(np.any(scored)))], dtype=np.int64)
        kept, refined = (grid.sum((2, 3)) for grid in self.grids)
        exits = self.exits
        stages_run = None if exits.min() == len(self.shape.depths) - 1 else exits + 1
        return macs(self.shape, kept, refined, scored=scored, stages_run=stages_run)

    @cached_property
    def grids(self) -> tuple[np.ndarray, np.ndarray]:
        """Kept and refined patches, bool [S, B, rows, columns], once the run is over."""
        kept, refined = np.zeros((2, len(self.shape.depths), self.batch, self.shape.num_patches), dtype=bool)
        for stage, (layout, refined_T) in enumerate(self._passed):
            is_patch = _is_patch(layout)
            kept[stage, layout.image_T()[is_patch], layout.cell_T[is_patch]] = True
            if stage and refined_T is None:
                refined[stage] = kept[stage]
            elif stage:
                is_refined = is_patch & refined_T
                refined[stage, layout.image_T()[is_refined], layout.cell_T[is_refined]] = True
        form = (*kept.shape[:2], *self.shape.grid)
        return kept.reshape(form), refined.reshape(form)

    def importance(self) -> np.ndarray:
        """float [S - 1, B, rows, columns]: what each transition chose by; NaN where nothing was to be chosen."""
        grid = np.full((len(self.shape.depths) - 1, self.batch, self.shape.num_patches), np.nan)
        for transition, (layout, importance_T, strengths) in self._seen.items():
            is_patch = _is_patch(layout) & strengths.any((1, 2)).repeat(layout.counts)
            grid[transition, layout.image_T()[is_patch], layout.cell_T[is_patch]] = importance_T[is_patch]
        return grid.reshape(*grid.shape[:2], *self.shape.grid)


def _is_patch(layout: Layout) -> np.ndarray:
    """bool [T]: of a patch that is alive, no class token."""
    return layout.cell_T >= 0 if layout.live_T is None else (layout.cell_T >= 0) & layout.live_T


@dataclass(frozen=True, eq=False)
class SingleRecord:
    """What a graph that chooses inside did, of images that all passed every stage; read as a `Record` is."""

    shape: Shape
    # of an image, for each transition: tokens that stay, and that are refined (0 the class token, leading, 1 + cell a patch); and
    # importance of all before it
    found: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]
    strengths: np.ndarray  # [B, transitions, 2]: all 0 of an image, nothing was to be chosen

    @property
    def exits(self) -> np.ndarray:
        """int [B]: the last stage, whose head answers."""
        return np.full(len(self.found), len(self.shape.depths) - 1)

    def answer(self, stage_logits: np.ndarray) -> np.ndarray:
        """[B, classes] of [S, B, classes]: what the last head said."""
        return stage_logits[-1].copy()

    def macs(self, scored: np.ndarray | bool) -> np.ndarray:
        """int64 [B]: multiply-accumulates spent on each image; `scored`, one for all or [B]: whether tokens were chosen."""
        flags = np.broadcast_to(scored, len(self.found)).tolist()
        spent = []
        for seen, flag in zip(self.found, flags, strict=True):
            kept, refined = ([len(step[place]) - 1 for step in seen] for place in range(2))
            spent.append(plan_macs(self.shape, [self.shape.num_patches, *kept], [0, *refined], scored=flag))
        return np.array(spent, dtype=np.int64)

    @cached_property
    def grids(self) -> tuple[np.ndarray, np.ndarray]:
        """Kept and refined patches, bool [S, B, rows, columns]."""
        stages = len(self.shape.depths)
        both = np.zeros((2, stages, len(self.found), 1 + self.shape.num_patches), dtype=bool)
        both[0, 0] = True
        for image, seen in enumerate(self.found):
            for stage, (kept, refined, _) in enumerate(seen, start=1):
                both[0, stage, image, kept], both[1, stage, image, refined] = True, True
        kept, refined = both[..., 1:].reshape(2, stages, len(self.found), *self.shape.grid)
        return kept, refined

    def importance(self) -> np.ndarray:
        """float [S - 1, B, rows, columns]: what each transition chose by; NaN where nothing was to be chosen."""
        grid = np.full((len(self.shape.depths) - 1, len(self.found), self.shape.num_patches), np.nan)
        for image in np.flatnonzero(self.strengths.any((1, 2))):
            tokens = np.arange(1 + self.shape.num_patches)
            for transition, (kept, _, importance) in enumerate(self.found[image]):
                grid[transition, image, tokens[1:] - 1] = importance[1:]
                tokens = kept
        return grid.reshape(*grid.shape[:2], *self.shape.grid)
