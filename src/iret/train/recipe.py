"""Recipes: everything that decides a training run, frozen. A variant is `replace` of its parent.

The run has three parts, as shares of its steps: nothing is dropped until `full_until`; then each image runs once at a
random threshold (cheap) until `sampled_until`; then every step runs full and at random thresholds, the full run teaching the
other (the sandwich rule with in-place distillation).

Source: DeiT's values where not said otherwise; the schedule of dropping is spec'd by us after CF-ViT and LengthDrop.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

PRECISIONS = ("32-true", "bf16-mixed")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. Shares and rates are in [0, 1]; `batch_size` is that of all processes together."""

    name: str
    model: str
    epochs: float
    batch_size: int
    lr: float
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: float = 5.0
    final_lr_ratio: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.9998
    drop_path_rate: float = 0.1
    precision: str = "bf16-mixed"  # or "32-true"
    eval_epochs: int = 1  # between two looks at the held-out images, whose accuracy the log keeps
    # augmentation
    crop_padding: int = 0  # pixels around the image before a random crop; 0: a random resized crop instead
    min_crop: float = 0.35  # smallest share of the area in a random resized crop
    flip: bool = True
    rand_augment: tuple[int, int] = (0, 0)  # operations an image, magnitude of 30
    mixup: float = 0.0  # alpha of the beta distribution; 0: off
    cutmix: float = 0.0
    label_smoothing: float = 0.1
    # dropping
    full_until: float = 0.3
    sampled_until: float = 0.3
    max_threshold: float = 1.5
    threshold_power: float = 1.0  # above 1: more images at small thresholds, where most of the MACs are decided
    smallest_ratio: float = (
        1.0  # first threshold : last, drawn between this and 1; `calibrate` finds the one that serves best
    )
    # loss
    stage_weights: tuple[float, ...] = (0.3, 0.5)  # of the heads before the last
    lifting_weight: float = 0.02
    teacher: str | None = None  # a model name, folder or hub id whose logits are learned too
    teacher_weight: float = 0.5

    def __post_init__(self) -> None:
        if self.eval_epochs < 1:
            raise ValueError(f"eval_epochs={self.eval_epochs} must be 1 or more.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is unknown; choose from {', '.join(PRECISIONS)}.")


def images_tiny() -> Recipe:
    """Any photos at 224 px from scratch, `iret_tiny`, DeiT's augmentation. Not run at full length here."""
    return Recipe(
        name="images_tiny",
        model="iret_tiny",
        epochs=300.0,
        batch_size=512,
        lr=5e-4,
        rand_augment=(2, 9),
        mixup=0.8,
        cutmix=1.0,
    )


def fine_tune() -> Recipe:
    """From a checkpoint (`--init`) to new data: short, gentle, dropping from the first step."""
    return Recipe(
        name="fine_tune",
        model="iret_tiny",
        epochs=30.0,
        batch_size=128,
        lr=2e-4,
        warmup_epochs=1.0,
        ema_decay=0.998,
        drop_path_rate=0.05,
        min_crop=0.6,
        full_until=0.0,
        sampled_until=0.0,
    )


def digits_nano() -> Recipe:
    """The shipped `iret_nano-cluttered-digits`; at most 20 minutes on two cores."""
    return Recipe(
        name="digits_nano",
        model="iret_nano",
        epochs=7.0,
        batch_size=64,
        lr=1e-3,
        warmup_epochs=0.25,
        ema_decay=0.995,
        drop_path_rate=0.0,
        precision="32-true",  # bf16 is slower on a CPU that has no instructions for it
        min_crop=1.0,
        flip=False,
        full_until=0.1,
        sampled_until=0.85,
        max_threshold=2.0,
    )


def cifar10_pico_cpu() -> Recipe:
    """`iret_pico` on CIFAR-10, in the time that two cores have."""
    return Recipe(
        name="cifar10_pico_cpu",
        model="iret_pico",
        epochs=15.0,
        batch_size=64,
        lr=1e-3,
        warmup_epochs=0.5,
        ema_decay=0.998,
        drop_path_rate=0.0,
        precision="32-true",  # bf16 is slower on a CPU that has no instructions for it
        crop_padding=4,
        full_until=0.6,  # late: the full model learns slowly from images that are half dropped
        sampled_until=0.6,
        max_threshold=1.5,
        threshold_power=2.0,
        smallest_ratio=0.2,
    )


def cifar10_pico() -> Recipe:
    """`iret_pico` on CIFAR-10 with a GPU: long and strongly augmented. Six minutes of it are too few (docs/LOG.md)."""
    return replace(
        cifar10_pico_cpu(),
        name="cifar10_pico",
        epochs=300.0,
        batch_size=500,
        lr=2e-3,
        warmup_epochs=10.0,
        ema_decay=0.9995,
        drop_path_rate=0.1,
        precision="bf16-mixed",
        eval_epochs=10,
        rand_augment=(2, 9),
        mixup=0.2,
        cutmix=1.0,
        full_until=0.3,
        sampled_until=0.5,
    )


def tiny_imagenet_nano() -> Recipe:
    """`iret_nano` on Tiny-ImageNet (64 px, 200 classes) with a GPU. Not run yet."""
    return replace(cifar10_pico(), name="tiny_imagenet_nano", model="iret_nano", epochs=200.0, crop_padding=8)


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (images_tiny, fine_tune, digits_nano, cifar10_pico_cpu, cifar10_pico, tiny_imagenet_nano)
}


def find_recipe(name: str) -> Recipe:
    """Raises ValueError for an unknown name, listing the known ones."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; choose from {', '.join(RECIPES)}.")
    return RECIPES[name]()
