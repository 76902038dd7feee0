"""Whether a bundle answers as the model does: the same images, at several budgets, alone and in a batch.

In fp32 every kept and refined patch has to be the same but for ties by rounding (importance within `TIE` of the threshold, or of
the last patch that stays), which are counted, as are exits whose confidence is as near; and every head's logits within
`TOLERANCE` where all that agrees. int8 answers differently by nature: there agreement is counted, and only what no rounding
explains is a problem (logits that are no numbers, MACs that do not follow from the patches). What it is worth: `accuracy`.

Read first: `iret.runtime.session`, which runs the bundle.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from iret.export.accuracy import Accuracy, HeldOut, judge
from iret.model import Iret
from iret.output import Output
from iret.runtime.bundle import Bundle
from iret.runtime.keep import read_exits, read_strengths
from iret.runtime.points import BUDGETS
from iret.runtime.record import Output as SessionOutput
from iret.runtime.session import Session

TOLERANCE = 1e-4  # of logits
TIE = 1e-4  # of importance, which is 1 in the mean
THRESHOLDS: tuple[object, ...] = (0.0, 0.8, 1.0, (0.9, 1.2), 1.5)  # where there are no operating points
BATCHES = (1, 8)


@dataclass(frozen=True)
class Parity:
    """How far a bundle is from the model. Counts are of (image, setting, batch size)."""

    compared: int = 0
    tied: int = 0  # kept or refined other patches, every one of them a tie by rounding
    split: int = 0  # kept or refined other patches, and not by a tie
    agree: int = 0  # the same answer, whatever was kept
    logit_error: float = 0.0  # largest difference where the same patches were kept
    problem: str | None = None  # the first thing that is not as it must be
    is_exact: bool = True  # fp32: other patches and other logits are problems
    is_single: bool = False  # one graph, which has the last head alone
    accuracy: tuple[Accuracy, ...] = ()  # of int8, on images that it was not calibrated on

    def plus(
        self,
        model: Output,
        found: SessionOutput,
        rows: slice,
        strengths: np.ndarray,
        exits: np.ndarray | None,
        where: str,
    ) -> "Parity":
        """With one more run: the images `rows` of the model's, at `strengths` [B, transitions, 2] and `exits` [B, transitions].

        `where` names it.
        """
        assert model.trace is not None
        problem, tied, split, error = self.problem, 0, 0, self.logit_error
        kept, refined = model.trace.kept[:, rows].numpy(), model.trace.refined[:, rows].numpy()
        stages, left = model.trace.stage_logits[:, rows].numpy(), model.trace.exit_stage[rows].numpy()
        logits, macs = model.logits[rows].numpy(), model.macs[rows].numpy()
        for row in range(len(logits)):
            here = f"at {where}, image {rows.start + row}"
            heads = slice(found.trace.exit_stage[row] if self.is_single else 0, found.trace.exit_stage[row] + 1)
            if not np.isfinite(found.trace.stage_logits[heads, row]).all():
                problem = problem or f"{here}: logits are not finite"
            last = min(left[row], found.trace.exit_stage[row])  # that both passed
            differs = (kept[:, row] != found.trace.kept[:, row]) | (refined[:, row] != found.trace.refined[:, row])
            differs = differs[: last + 1]
            if differs.any():
                stage = int(differs.any((1, 2)).argmax())
                importance = found.trace.importance[stage - 1, row]
                edges = [*strengths[row, stage - 1], importance[found.trace.kept[stage, row]].min()]
                is_tie = (np.abs(importance[differs[stage]][:, None] - edges).min(1) <= TIE).all()
                fault = f"{here}: other patches in stage {stage + 1}"
            elif left[row] != found.trace.exit_stage[row]:
                sure = 1 / np.exp(stages[last, row] - stages[last, row].max()).sum()
                is_tie = exits is not None and abs(sure - exits[row, last]) <= TIE
                fault = f"{here}: left after stage {found.trace.exit_stage[row] + 1}, not {left[row] + 1}"
            else:
                gaps = np.abs(stages[heads, row] - found.trace.stage_logits[heads, row]).max(1)
                error = float(np.max([error, *gaps]))  # NaN stays NaN
                if self.is_exact and not (gaps <= TOLERANCE).all():
                    problem = problem or f"{here}: logits differ by {gaps.max():.1e}"
                if macs[row] != found.macs[row]:
                    problem = problem or f"{here}: {found.macs[row]} MACs, not {macs[row]}"
                continue
            tied, split = tied + is_tie, split + (not is_tie)
            problem = problem or (fault if self.is_exact and not is_tie else None)
        return replace(
            self,
            compared=self.compared + len(logits),
            tied=self.tied + int(tied),
            split=self.split + int(split),
            agree=self.agree + int((logits.argmax(1) == found.logits.argmax(1)).sum()),
            logit_error=error,
            problem=problem,
        )

    def to_dict(self) -> dict[str, Any]:
        """For `bundle.json`."""
        return asdict(self) | {"accuracy": [asdict(each) for each in self.accuracy], "tolerance": TOLERANCE, "tie": TIE}

    def __str__(self) -> str:
        return (
            f"{self.compared} comparisons: same answer {self.agree}; other patches kept by a tie {self.tied}, otherwise "
            f"{self.split}; largest difference of logits {self.logit_error:.1e}"
        )


def check(
    model: Iret,
    folder: Path,
    images: Tensor | None = None,
    held_out: HeldOut | None = None,
    *,
    engine: str | None = None,
    threads: int | None = None,
) -> Parity:
    """Compare a bundle with the model on `images` [B, C, Y, X]; None: noise and smooth blobs. int8 is judged on `held_out`, too.

    Raises:
        ValueError: a bundle that differs; says where first.
    """
    session = Session(folder, engine, threads=threads)
    parity = compare(model, session, noise_and_blobs(model) if images is None else images)
    if parity.problem is not None:
        raise ValueError(f"the bundle does not answer as the model does: {parity.problem}. Nothing was kept.")
    if parity.is_exact or held_out is None:
        return parity
    return replace(parity, accuracy=judge(model, session, held_out))


@torch.inference_mode()
def compare(model: Iret, session: Session, images: Tensor, batches: tuple[int, ...] = BATCHES) -> Parity:
    """The bundle against the model at every setting of `settings`, in batches of these sizes."""
    parity = Parity(is_exact=session.bundle.precision == "float32", is_single=session.bundle.is_single)
    for name, thresholds, exit_confidence in settings(model, session.bundle):
        expected = model.run(images, thresholds, exit_confidence)
        strengths = read_strengths(thresholds, len(images), len(model.transitions))
        exits = read_exits(exit_confidence, len(images), len(model.transitions))
        for size in batches:
            for start in range(0, len(images), size):
                rows = slice(start, min(start + size, len(images)))
                found = session(images[rows].numpy(), thresholds=thresholds, exit_confidence=exit_confidence)
                own = None if exits is None else exits[rows]
                parity = parity.plus(expected, found, rows, strengths[rows], own, f"{name}, batches of {size}")
    return parity


def settings(model: Iret, bundle: Bundle) -> list[tuple[str, object, float | None]]:
    """What is tried: (name, thresholds, exit confidence)."""
    points = bundle.points
    if points is None:
        every = len(model.transitions)
        tried = [[each] * every if isinstance(each, tuple) else each for each in THRESHOLDS]
        return [(f"thresholds {each}", each, None) for each in tried]
    budgets = [budget for budget in BUDGETS if budget > points.cheapest_budget] + [points.cheapest_budget]
    found = [(f"budget {budget:.2f}", points.setting(budget)) for budget in budgets]
    return [(name, each.thresholds, each.exit_confidence) for name, each in found]


def noise_and_blobs(model: Iret, count: int = 8, seed: int = 0) -> Tensor:
    """Images [count, C, Y, X] with little and much structure, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    shape = model.shape
    size = (count, shape.in_chans, *shape.img_size)
    blobs = F.interpolate(torch.randn(*size[:2], 4, 4, generator=generator), size=size[2:], mode="bicubic")
    share = torch.linspace(0, 1, count).view(-1, 1, 1, 1)
    return share * torch.randn(size, generator=generator) + (1 - share) * blobs
