"""Accuracy and cost of a model on labelled images, at several settings in one pass over the data."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from iret.model import Iret
from iret.runtime.points import Setting
from iret.train.data import ImageData, make_loader


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a setting gave: shares in [0, 1], MACs and patches an image."""

    setting: Setting
    num_images: int
    num_skipped: int  # corrupt, not counted in `num_images`
    accuracy: float
    stage_accuracy: tuple[float | None, ...]  # of each stage's head over the images that reached it, None without any
    macs_mean: float
    macs_p95: float
    kept_mean: tuple[float, ...]  # patches in each stage
    time_s: float  # of the model alone, all images


@torch.inference_mode()
def evaluate(
    model: Iret,
    data: ImageData,
    settings: Sequence[Setting],
    *,
    batch_size: int = 100,
    max_images: int | None = None,
    workers: int = 0,
) -> list[Score]:
    """One Score per setting. The model is left in eval mode, on its device.

    Raises:
        ValueError: no image could be read, or the data's classes are not the model's.
    """
    if batch_size < 1 or (max_images is not None and max_images < 1):
        raise ValueError(f"batch_size={batch_size} and max_images={max_images} must be 1 or more.")
    check_classes(model, data)
    model.eval()
    device = model.pos_embed.device
    tallies = [_Tally() for _ in settings]
    seen = num_skipped = 0
    loader = make_loader(data, batch_size, seed=0, epoch=0, shuffle=False, workers=workers, drop_last=False)
    for pixels, labels, skipped in loader:
        num_skipped += skipped
        if max_images is not None:
            pixels, labels = pixels[: max_images - seen], labels[: max_images - seen]
        if len(labels):
            images = model.normalise(pixels.to(device).float() / 255)
            for tally, setting in zip(tallies, settings, strict=True):
                tally.add(model, images, labels.to(device), setting)
        seen += len(labels)
        if seen == max_images:
            break
    if not seen:
        raise ValueError(f"none of the images could be read ({num_skipped} skipped as corrupt); nothing was evaluated.")
    return [tally.score(setting, seen, num_skipped) for tally, setting in zip(tallies, settings, strict=True)]


def check_classes(model: Iret, data: ImageData) -> None:
    """Raises ValueError unless the data's labels mean what the model's outputs mean."""
    if model.labels is not None and tuple(data.class_names) != model.labels:
        raise ValueError(
            f"the data has {data.num_classes} classes ({', '.join(data.class_names[:3])}, ...), the model was trained on "
            f"{len(model.labels)} ({', '.join(model.labels[:3])}, ...); fine-tune it with `iret train --init MODEL`."
        )
    if data.num_classes != model.num_classes:
        raise ValueError(f"the data has {data.num_classes} classes, the model {model.num_classes}.")


def points_unsure(accuracies: Iterable[float], num_images: int) -> float:
    """Half of the widest of their 95 % intervals, in percentage points, by Agresti and Coull."""
    rates = [(accuracy * num_images + 2) / (num_images + 4) for accuracy in accuracies]
    return 196 * max((rate * (1 - rate) / (num_images + 4)) ** 0.5 for rate in rates)


class _Tally:
    """Running sums of one setting."""

    def __init__(self) -> None:
        self.correct: list[np.ndarray] = []
        self.stage_correct: list[np.ndarray] = []
        self.reached: list[np.ndarray] = []
        self.macs: list[np.ndarray] = []
        self.kept: list[np.ndarray] = []
        self.time_s = 0.0

    def add(self, model: Iret, images: torch.Tensor, labels: torch.Tensor, setting: Setting) -> None:
        started = time.perf_counter()
        out = model.run(images, setting.thresholds, setting.exit_confidence, rule=setting.rule, control=setting.control)
        self.correct.append((out.logits.argmax(1) == labels).cpu().numpy())  # reading the answer ends the device's work
        self.time_s += time.perf_counter() - started
        self.stage_correct.append((out.trace.stage_logits.argmax(2) == labels).cpu().numpy())
        self.reached.append((~out.trace.stage_logits[..., 0].isnan()).cpu().numpy())
        self.macs.append(out.macs.cpu().numpy())
        self.kept.append(out.trace.kept.sum((2, 3)).cpu().numpy())

    def score(self, setting: Setting, num_images: int, num_skipped: int) -> Score:
        macs, kept = np.concatenate(self.macs), np.concatenate(self.kept, axis=1)
        reached, stage_correct = np.concatenate(self.reached, axis=1), np.concatenate(self.stage_correct, axis=1)
        return Score(
            setting=setting,
            num_images=num_images,
            num_skipped=num_skipped,
            accuracy=float(np.concatenate(self.correct).mean()),
            stage_accuracy=tuple(
                float((right & there).sum() / there.sum()) if there.any() else None
                for right, there in zip(stage_correct, reached, strict=True)
            ),
            macs_mean=float(macs.mean()),
            macs_p95=float(np.percentile(macs, 95)),
            kept_mean=tuple(float(count) for count in kept.mean(1)),
            time_s=self.time_s,
        )
