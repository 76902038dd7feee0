"""What a run returns, and the record it is made from.

Read first: `model`.
"""

from dataclasses import dataclass

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
        self.kept = torch.zeros(len(shape.depths), batch, shape.num_patches, dtype=torch.bool, device=device)
        self.refined = torch.zeros_like(self.kept)
        self.exit_stage = torch.zeros(batch, dtype=torch.int64, device=device)

    def add(self, stage: int, alive: Tensor, choice: Choice | None, answers: Tensor) -> None:
        """The images `alive` passed `stage` on the patches of `choice` (None: all) and its head said `answers`."""
        every = len(alive) == len(self.exit_stage)
        where = slice(None) if every else alive  # a slice is several times cheaper
        self.kept[stage, where] = True if choice is None else choice.kept
        self.refined[stage, where] = stage > 0 if choice is None else choice.refined
        self.exit_stage[where] = stage
        if not every:
            unanswered = answers.new_full((self.exit_stage.shape[0], answers.shape[1]), float("nan"))
            answers = unanswered.index_copy(0, alive, answers)
        self.stage_logits.append(answers)

    def finish(self, scored: bool) -> Output:
        if missing := len(self.shape.depths) - len(self.stage_logits):
            self.stage_logits += [torch.full_like(self.stage_logits[0], float("nan"))] * missing
        stage_logits = torch.stack(self.stage_logits)
        device = stage_logits.device
        logits = stage_logits[self.exit_stage, torch.arange(len(self.exit_stage), device=device)]
        counts = [grid.sum(2).cpu().numpy() for grid in (self.kept, self.refined)]
        spent = macs(self.shape, *counts, scored=scored, stages_run=self.exit_stage.cpu().numpy() + 1)
        grids = (grid.unflatten(2, self.shape.grid) for grid in (self.kept, self.refined))
        return Output(logits, torch.from_numpy(spent).to(device), Trace(stage_logits, self.exit_stage, *grids))
