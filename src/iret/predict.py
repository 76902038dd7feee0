"""Labels for photos, with what they cost: the main job, one image at a time as a device would do it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from iret.model import Iret
from iret.output import Trace
from iret.runtime.cost import full_macs


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answer. `macs_share` is of the full model; `time_s` the model alone, batch 1, after one warm-up run."""

    image: str
    label: str
    confidence: float
    kept: tuple[int, ...]  # patches in each stage
    refined: tuple[int, ...]
    exit_stage: int  # counted from 1
    macs: int
    macs_share: float
    time_s: float


@torch.inference_mode()
def predict(
    model: Iret,
    image: str | Image.Image,
    *,
    thresholds: object = 0.0,
    exit_confidence: float | None = None,
    name: str | None = None,
) -> tuple[Prediction, Trace]:
    """The answer for one photo, and what was looked at.

    Raises:
        ValueError: an image that cannot be read, thresholds that do not fit.
    """
    x = model.preprocess(image)
    model.run(x, thresholds, exit_confidence)
    started = time.perf_counter()
    out = model.run(x, thresholds, exit_confidence)
    confidence, index = out.logits.softmax(1).max(1)
    best = int(index)  # reading it waits for the device
    time_s = time.perf_counter() - started
    assert out.trace is not None  # an Iret always has one
    macs = int(out.macs)
    prediction = Prediction(
        image=name or str(image),
        label=model.labels[best] if model.labels else str(best),
        confidence=float(confidence),
        kept=tuple(out.trace.kept.sum((1, 2, 3)).tolist()),
        refined=tuple(out.trace.refined.sum((1, 2, 3)).tolist()),
        exit_stage=int(out.trace.exit_stage) + 1,
        macs=macs,
        macs_share=macs / full_macs(model.shape),
        time_s=time_s,
    )
    return prediction, out.trace


def read_thresholds(words: Sequence[str]) -> object:
    """`["1.0"]` -> 1.0 for all transitions; `["1.0", "1.2:1.5"]` -> (1.0, (1.2, 1.5)), one entry per transition.

    Raises:
        ValueError: a word that is not a number or keep:refine.
    """
    entries: list[float | tuple[float, ...]] = []
    for word in words:
        try:
            numbers = [float(part) for part in word.split(":")]
        except ValueError as error:
            raise ValueError(f"threshold {word!r} is not a number or keep:refine, e.g. 1.0 or 1.2:1.5.") from error
        if len(numbers) > 2:
            raise ValueError(f"threshold {word!r} has {len(numbers)} parts; write keep or keep:refine.")
        entries.append(numbers[0] if len(numbers) == 1 else tuple(numbers))
    return entries[0] if len(entries) == 1 and isinstance(entries[0], float) else tuple(entries)
