"""What int8 costs: the bundle and the fp32 model on images that calibration has not seen, at the full budget and below it.

Both run the same images, so their difference is a paired one: its interval is far narrower than that of either accuracy.

Read first: `parity`, which asks whether a bundle computes what the model does; here the question is what it is worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from iret.evaluate import check_classes
from iret.model import Iret
from iret.runtime.points import OperatingPoints, Setting
from iret.runtime.session import Session
from iret.train.data import ImageData, make_loader

BATCH_SIZE = 8  # the most that an ExecuTorch program takes
LOWER_BUDGETS = (0.5, 0.25)  # the cheapest point where that is dearer
LOWER_THRESHOLDS = (0.8, 1.0)  # where there are no operating points


@dataclass(frozen=True)
class HeldOut:
    """Images that nothing was calibrated on; `name` is what tables call their data."""

    data: ImageData
    name: str

    def fits(self, model: Iret) -> bool:
        """Whether its labels are of the model's classes."""
        try:
            check_classes(model, self.data)
        except ValueError:
            return False
        return True


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """One setting on so many images. Top-1 and shares in [0, 1]; top-1 None where the labels are not of the model's classes."""

    setting: str
    images: int
    model: float | None
    bundle: float | None
    interval: float | None  # half of the 95 % interval of bundle - model
    same_answer: float
    same_cells: float  # of the patches that either computes after its first stage, those that both do


def settings_judged(points: OperatingPoints | None, num_transitions: int) -> dict[str, Setting]:
    """Name -> setting: everything kept, and two below."""
    if points is None:
        each = {at: Setting(thresholds=((at, at),) * num_transitions) for at in (0.0, *LOWER_THRESHOLDS)}
        return {f"thresholds {at:g}": setting for at, setting in each.items()}
    budgets = (1.0, *(max(budget, points.cheapest_budget) for budget in LOWER_BUDGETS))
    return {f"budget {budget:.2f}": points.setting(budget) for budget in budgets}


@torch.inference_mode()
def judge(model: Iret, session: Session, held_out: HeldOut) -> tuple[Accuracy, ...]:
    """An Accuracy for each of `settings_judged`; empty where no image could be read."""
    has_labels = held_out.fits(model)
    tried = settings_judged(session.points, len(model.transitions))
    rows: dict[str, list[np.ndarray]] = {name: [] for name in tried}
    for pixels, labels, _ in make_loader(held_out.data, BATCH_SIZE, seed=0, epoch=0, shuffle=False, drop_last=False):
        if not len(labels):
            continue
        images = model.normalise(pixels.float() / 255)
        for name, setting in tried.items():
            expected = model.run(images, setting.thresholds, setting.exit_confidence)
            found = session(images.numpy(), thresholds=setting.thresholds, exit_confidence=setting.exit_confidence)
            assert expected.trace is not None
            answers = np.stack([expected.logits.argmax(1).numpy(), found.logits.argmax(1)])
            cells = np.stack([expected.trace.kept[1:].numpy(), found.trace.kept[1:]])
            both, either = cells.all(0).sum((0, 2, 3)), cells.any(0).sum((0, 2, 3))
            rows[name].append(np.stack([*answers, labels.numpy(), both, either]))
    return tuple(_summarise(name, np.concatenate(parts, axis=1), has_labels) for name, parts in rows.items() if parts)


def _summarise(name: str, columns: np.ndarray, has_labels: bool) -> Accuracy:
    """`columns` [5, images]: answers of model and bundle, labels, patches that both and that either computed."""
    model, bundle, labels, both, either = columns
    gain = (bundle == labels).astype(float) - (model == labels)
    return Accuracy(
        setting=name,
        images=columns.shape[1],
        model=float((model == labels).mean()) if has_labels else None,
        bundle=float((bundle == labels).mean()) if has_labels else None,
        interval=float(1.96 * gain.std() / len(gain) ** 0.5) if has_labels else None,
        same_answer=float((model == bundle).mean()),
        same_cells=float(both.sum() / max(either.sum(), 1)),
    )


def split(data: ImageData, num_images: int, num_held_out: int, seed: int = 0) -> tuple[ImageData, ImageData]:
    """So many images to calibrate and check on, and others to judge on, both drawn at random.

    Of fewer than twice `num_images`, half are held out (if any are asked for), so that no image is in both.
    """
    order = np.random.default_rng(seed).permutation(len(data))
    if num_held_out:
        num_images = min(num_images, max(1, len(data) // 2))
    return _take(data, order[:num_images]), _take(data, order[num_images:][:num_held_out])


def _take(data: ImageData, places: Sequence[int] | np.ndarray) -> ImageData:
    rows = np.asarray(data.rows)[places]
    return ImageData(rows, data.read, data.class_names, data.preprocess, data.on_corrupt, data.split)
