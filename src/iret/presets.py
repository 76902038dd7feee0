"""Named sizes of Iret, each a function that returns its frozen `Shape`, and the names of the shipped checkpoints.

Parameters and MACs in the docstrings are those of the default number of classes at full budget, one image; a test
counts them again. `iret_tiny`, `iret_small` and `iret_pico` follow the shapes of the spec; the others are ours.
"""

from collections.abc import Callable
from pathlib import Path

from iret.runtime.cost import Shape


def iret_tiny() -> Shape:
    """224 px, patch 16, widths 64-128-192, depths 4/4/4: 3,401,552 parameters, 703,638,016 MACs."""
    return Shape(
        img_size=(224, 224),
        patch_size=16,
        in_chans=3,
        num_classes=1000,
        embed_dims=(64, 128, 192),
        depths=(4, 4, 4),
    )


def iret_small() -> Shape:
    """224 px, patch 16, widths 128-256-384, depths 4/4/4: 12,370,640 parameters, 2,495,042,560 MACs."""
    return Shape(
        img_size=(224, 224),
        patch_size=16,
        in_chans=3,
        num_classes=1000,
        embed_dims=(128, 256, 384),
        depths=(4, 4, 4),
        head_dim=64,
    )


def iret_base() -> Shape:
    """224 px, patch 16, widths 256-512-768, depths 4/4/4: 47,020,496 parameters, 9,370,052,608 MACs."""
    return Shape(
        img_size=(224, 224),
        patch_size=16,
        in_chans=3,
        num_classes=1000,
        embed_dims=(256, 512, 768),
        depths=(4, 4, 4),
        head_dim=64,
    )


def iret_nano() -> Shape:
    """64 px, patch 8, widths 64-128-192, depths 3/3/3: 2,249,072 parameters, 148,545,280 MACs."""
    return Shape(
        img_size=(64, 64),
        patch_size=8,
        in_chans=3,
        num_classes=200,
        embed_dims=(64, 128, 192),
        depths=(3, 3, 3),
    )


def iret_pico() -> Shape:
    """32 px, patch 4, widths 64-128-192, depths 3/3/3: 2,150,774 parameters, 146,619,520 MACs."""
    return Shape(
        img_size=(32, 32),
        patch_size=4,
        in_chans=3,
        num_classes=10,
        embed_dims=(64, 128, 192),
        depths=(3, 3, 3),
    )


PRESETS: dict[str, Callable[[], Shape]] = {
    preset.__name__: preset for preset in (iret_pico, iret_nano, iret_tiny, iret_small, iret_base)
}


def preset(name: str) -> Shape:
    """Raises ValueError for an unknown name, listing the known ones."""
    if name not in PRESETS:
        raise ValueError(f"model {name!r} is unknown; choose from {', '.join(PRESETS)}.")
    return PRESETS[name]()


CHECKPOINTS = Path(__file__).parent / "checkpoints"


def list_checkpoints() -> list[str]:
    """Names of the trained models in the package, for `iret.load`."""
    return sorted(folder.name for folder in CHECKPOINTS.iterdir() if folder.is_dir()) if CHECKPOINTS.is_dir() else []
