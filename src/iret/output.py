"""What a run returns, and the record it is made from.

Read first: `model`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from iret.runtime.cost import Shape, macs
from iret.selection import Layout


@dataclass(frozen=True)
class Trace:
    """What one run looked at. A stage that an image did not reach is False in `kept` and NaN in `stage_logits`."""

    stage_logits: Float[Tensor, "S B classes"]
    exit_stage: Int[Tensor, " B"]  # index of the stage whose head answered
    kept: Bool[Tensor, "S B Y X"]  # patches computed in each stage
    refined: Bool[Tensor, "S B Y X"]  # patches whose details were added on the way into each stage


@dataclass(frozen=True)
class Output:
    """Answer and cost of one run."""

    logits: Float[Tensor, "B classes"]
    macs: Int[Tensor, " B"]  # multiply-accumulates spent on each image
    trace: Trace | None


class Record:
    """What one run did, stage by stage, for all its images."""

    def __init__(self, shape: Shape, batch: int, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.stage_logits: list[Tensor] = []
        self.kept, self.refined = np.zeros((2, len(shape.depths), batch, shape.num_patches), dtype=bool)
        self.exit_stage: np.ndarray | None = None  # None: all images passed the same stages

    def add(self, stage: int, layout: Layout, refined_T: np.ndarray | None, answers: Tensor) -> None:
        """The images of `layout` passed `stage` on its live patches and its head said `answers`.

        `refined_T`: tokens whose details entered here; None: those of every patch.
        """
        batch, alive = self.kept.shape[1], layout.images
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
        if len(alive) == batch:
            self.stage_logits.append(answers)
            return
        if self.exit_stage is None:
            self.exit_stage = np.full(batch, stage - 1)
        self.exit_stage[alive] = stage
        unanswered = answers.new_full((batch, answers.shape[1]), float("nan"))
        self.stage_logits.append(unanswered.index_copy(0, torch.from_numpy(alive).to(self.device), answers))

    def finish(self, scored: np.ndarray | bool) -> Output:
        """`scored`, one for all or [B]: whether tokens of the image were chosen."""
        last, num_stages, batch = len(self.stage_logits) - 1, len(self.shape.depths), self.kept.shape[1]
        exits = np.full(batch, last) if self.exit_stage is None else self.exit_stage
        exit_stage = torch.from_numpy(exits).to(self.device)
        if self.exit_stage is None:
            logits = self.stage_logits[-1]
        else:
            logits = torch.stack(self.stage_logits)[exit_stage, torch.arange(batch, device=self.device)]
        not_run = [torch.full_like(logits, float("nan"))] * (num_stages - 1 - last)
        stages_run = None if exits.min() == num_stages - 1 else exits + 1
        spent = macs(self.shape, self.kept.sum(2), self.refined.sum(2), scored=scored, stages_run=stages_run)
        kept, refined = (
            torch.from_numpy(grid).to(self.device).unflatten(2, self.shape.grid) for grid in (self.kept, self.refined)
        )
        trace = Trace(torch.stack(self.stage_logits + not_run), exit_stage, kept, refined)
        return Output(logits, torch.from_numpy(spent).to(self.device), trace)
