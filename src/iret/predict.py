"""Labels for photos, with what they cost: the main job, one image at a time as a device would do it."""

import time
from dataclasses import dataclass

import torch
from PIL import Image

from iret.model import Iret
from iret.output import Trace
from iret.runtime.cost import full_macs
from iret.runtime.points import Setting

EVERYTHING = Setting()


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answer. `macs_share` is of the full model; `time_s` the model alone, batch 1; warm it up before you believe it."""

    image: str
    label: str
    confidence: float
    kept: tuple[int, ...]  # patches in each stage
    refined: tuple[int, ...]
    exit_stage: int  # index of the stage whose head answered, as in a trace
    macs: int
    macs_share: float
    time_s: float


def warm_up(model: Iret, setting: Setting = EVERYTHING) -> None:
    """Runs on nothing in particular, one image each as `predict` times it, the last as `setting` says but in all stages.

    The first run of a process pays for starting threads and loading kernels, and the first of a shape for laying it out.
    """
    image = torch.zeros(1, model.shape.in_chans, *model.shape.img_size, device=model.pos_embed.device)
    with torch.inference_mode():
        model.run(image, 2.0)  # drops
        model.run(image, setting.thresholds, rule=setting.rule)


@torch.inference_mode()
def predict(
    model: Iret,
    image: str | Image.Image,
    *,
    setting: Setting = EVERYTHING,
    name: str | None = None,
) -> tuple[Prediction, Trace]:
    """The answer for one photo, and what was looked at.

    Raises:
        ValueError: an image that cannot be read, thresholds that do not fit.
    """
    x = model.preprocess(image)
    started = time.perf_counter()
    out = model.run(x, setting.thresholds, setting.exit_confidence, rule=setting.rule, control=setting.control)
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
        exit_stage=int(out.trace.exit_stage),
        macs=macs,
        macs_share=macs / full_macs(model.shape),
        time_s=time_s,
    )
    return prediction, out.trace
