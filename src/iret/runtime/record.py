"""What a run looked at, noted on the host while it runs, whatever engine computes.

Read first: `choice`.
"""

import numpy as np

from iret.runtime.choice import Layout
from iret.runtime.cost import Shape, macs, plan_macs


class Record:
    """What one run did, stage by stage, for all its images."""

    def __init__(self, shape: Shape, batch: int) -> None:
        self.shape = shape
        self.kept, self.refined = np.zeros((2, len(shape.depths), batch, shape.num_patches), dtype=bool)
        self.exit_stage: np.ndarray | None = None  # int [B]; None: all images passed the same stages
        self.stages_run = 0

    def add(self, stage: int, layout: Layout, refined_T: np.ndarray | None) -> None:
        """The images of `layout` passed `stage` on its live patches.

        `refined_T`: tokens whose details entered here; None: those of every patch.
        """
        batch, alive = self.kept.shape[1], layout.images
        self.stages_run = stage + 1
        if batch == 1 and layout.live_T is None:  # the same in fewer steps: an engine waits for them
            cells = layout.cell_T[1:]
            self.kept[stage, 0, cells] = True
            if stage:
                if refined_T is None:
                    self.refined[stage] = self.kept[stage]
                else:
                    self.refined[stage, 0, cells[refined_T[1:]]] = True
            return
        is_live = layout.cell_T >= 0 if layout.live_T is None else (layout.cell_T >= 0) & layout.live_T
        if len(is_live) == self.kept[stage].size + batch and layout.live_T is None:
            self.kept[stage] = True
        else:
            self.kept[stage, layout.image_T()[is_live], layout.cell_T[is_live]] = True
        if stage and refined_T is None:
            self.refined[stage] = self.kept[stage]
        elif stage:
            is_refined = is_live & refined_T
            self.refined[stage, layout.image_T()[is_refined], layout.cell_T[is_refined]] = True
        if len(alive) < batch:
            if self.exit_stage is None:
                self.exit_stage = np.full(batch, stage - 1)
            self.exit_stage[alive] = stage

    @property
    def exits(self) -> np.ndarray:
        """int [B]: the last stage each image passed, whose head answers for it."""
        return np.full(self.kept.shape[1], self.stages_run - 1) if self.exit_stage is None else self.exit_stage

    def macs(self, scored: np.ndarray | bool) -> np.ndarray:
        """int64 [B]: multiply-accumulates spent on each image; `scored`, one for all or [B]: whether tokens were chosen."""
        if self.kept.shape[1] == 1:  # the same in fewer steps
            counts = (
                np.count_nonzero(grid[: self.stages_run, 0], axis=1).tolist() for grid in (self.kept, self.refined)
            )
            return np.array([plan_macs(self.shape, *counts, scored=bool(np.any(scored)))], dtype=np.int64)
        exits = self.exits
        stages_run = None if exits.min() == len(self.shape.depths) - 1 else exits + 1
        return macs(self.shape, self.kept.sum(2), self.refined.sum(2), scored=scored, stages_run=stages_run)

    def grids(self) -> tuple[np.ndarray, np.ndarray]:
        """Kept and refined patches, bool [S, B, rows, columns]."""
        form = (*self.kept.shape[:2], *self.shape.grid)
        return self.kept.reshape(form), self.refined.reshape(form)
