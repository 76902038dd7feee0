"""What a run returns, and the record it is made from.

Read first: `model`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from iret.runtime.cost import Shape, macs
from iret.selection import Choice


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
        self.shape = shape
        self.stage_logits: list[Tensor] = []
        # kept and refined patches, [2, S, B, cells]
        self.grids = torch.zeros(2, len(shape.depths), batch, shape.num_patches, dtype=torch.bool, device=device)
        self.exit_stage: Tensor | None = None  # None: all images passed the same stages

    def add(self, stage: int, alive: Tensor, choice: Choice | None, answers: Tensor) -> None:
        """The images `alive` passed `stage` on the patches of `choice` (None: all) and its head said `answers`."""
        kept, refined = self.grids[:, stage]
        batch = len(kept)
        if len(alive) == batch:  # much cheaper at batch 1 than indexing
            kept.copy_(choice.kept) if choice else kept.fill_(True)
            refined.copy_(choice.refined) if choice else refined.fill_(stage > 0)
            self.stage_logits.append(answers)
            return
        kept[alive] = choice.kept if choice else True
        refined[alive] = choice.refined if choice else stage > 0
        if self.exit_stage is None:
            self.exit_stage = torch.full((batch,), stage - 1, device=kept.device)
        self.exit_stage[alive] = stage
        unanswered = answers.new_full((batch, answers.shape[1]), float("nan"))
        self.stage_logits.append(unanswered.index_copy(0, alive, answers))

    def finish(self, scored: np.ndarray | bool) -> Output:
        """`scored`, one for all or [B]: whether tokens of the image were chosen."""
        last, num_stages = len(self.stage_logits) - 1, len(self.shape.depths)
        device, batch = self.grids.device, self.grids.shape[2]
        if self.exit_stage is None:
            logits, exit_stage = self.stage_logits[-1], torch.full((batch,), last, device=device)
        else:
            exit_stage = self.exit_stage
            logits = torch.stack(self.stage_logits)[exit_stage, torch.arange(batch, device=device)]
        not_run = [torch.full_like(logits, float("nan"))] * (num_stages - 1 - last) if last < num_stages - 1 else []
        counts = self.grids.sum(3).cpu().numpy()
        stages_run = None if last == num_stages - 1 and self.exit_stage is None else exit_stage.cpu().numpy() + 1
        spent = torch.from_numpy(macs(self.shape, *counts, scored=scored, stages_run=stages_run)).to(device)
        kept, refined = self.grids.unflatten(3, self.shape.grid)
        return Output(logits, spent, Trace(torch.stack(self.stage_logits + not_run), exit_stage, kept, refined))
