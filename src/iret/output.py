"""What a run returns, and the record it is made from.

Read first: `model`.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from iret.runtime.choice import Layout
from iret.runtime.cost import Shape
from iret.runtime.record import Record as HostRecord


@dataclass(frozen=True)
class Trace:
    """What one run looked at. A stage that an image did not reach is False in `kept` and `refined`, and NaN elsewhere."""

    stage_logits: Float[Tensor, "S B classes"]
    exit_stage: Int[Tensor, " B"]  # index of the stage whose head answered
    kept: Bool[Tensor, "S B Y X"]  # patches computed in each stage
    refined: Bool[Tensor, "S B Y X"]  # patches whose details were added on the way into each stage
    importance: Float[Tensor, "S-1 B Y X"]  # "times uniform", what each choice saw; NaN elsewhere


@dataclass(frozen=True)
class Output:
    """Answer and cost of one run."""

    logits: Float[Tensor, "B classes"]
    macs: Int[Tensor, " B"]  # multiply-accumulates spent on each image
    trace: Trace | None = field(repr=False)  # it would fill pages


class Record:
    """What one run did and what its heads said."""

    def __init__(self, shape: Shape, batch: int, device: torch.device) -> None:
        self.host, self.device = HostRecord(shape, batch), device
        self.stage_logits: list[Tensor] = []

    def add(self, stage: int, layout: Layout, refined_T: np.ndarray | None, answers: Tensor) -> None:
        """The images of `layout` passed `stage` and its head said `answers`; see `iret.runtime.record`."""
        self.host.add(stage, layout, refined_T)
        if len(layout.images) < self.host.batch:
            unanswered = answers.new_full((self.host.batch, answers.shape[1]), float("nan"))
            answers = unanswered.index_copy(0, torch.from_numpy(layout.images).to(self.device), answers)
        self.stage_logits.append(answers)

    def see(self, transition: int, layout: Layout, importance_T: np.ndarray, strengths: np.ndarray) -> None:
        """What `transition` chose by; see `iret.runtime.record`."""
        self.host.see(transition, layout, importance_T, strengths)

    def answer(self) -> Float[Tensor, "B classes"]:
        """What the last head said that each image passed."""
        if self.host.exit_stage is None:
            return self.stage_logits[-1]
        exit_stage = torch.from_numpy(self.host.exits).to(self.device)
        return torch.stack(self.stage_logits)[exit_stage, torch.arange(self.host.batch, device=self.device)]

    def finish(self, scored: np.ndarray | bool) -> Output:
        """`scored`, one for all or [B]: whether tokens of the image were chosen."""
        logits, exit_stage = self.answer(), torch.from_numpy(self.host.exits).to(self.device)
        not_run = [torch.full_like(logits, float("nan"))] * (len(self.host.shape.depths) - len(self.stage_logits))
        importance = self.host.importance().astype(np.float32)
        grids = (torch.from_numpy(grid).to(self.device) for grid in (*self.host.grids, importance))
        trace = Trace(torch.stack(self.stage_logits + not_run), exit_stage, *grids)
        return Output(logits, torch.from_numpy(self.host.macs(scored)).to(self.device), trace)
