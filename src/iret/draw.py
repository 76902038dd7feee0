"""Pictures: what a model looked at coarsely, in detail, and dropped; accuracy against cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from iret.model import Iret
from iret.output import Trace
from iret.runtime.preprocess import Source, open_image

PANEL = 288  # pixels along the longer side of one panel
MARGIN = 10
DIM = 0.18  # brightness of dropped patches
OUTLINE = (255, 176, 0)  # amber: told apart from photos and by colour-blind eyes


def draw_focus(model: Iret, image: Source, trace: Trace, title: str = "") -> Image.Image:
    """One row of panels: the photo as the model got it, then each stage as it saw it.

    A patch is drawn at the resolution its token holds: coarse squares where only coarse bands were read, sharper with an
    amber outline where details were added on the way into the stage, dark where it was dropped.
    """
    pixels = model.preprocessing.fit(open_image(image))
    photo = Image.fromarray(pixels.repeat(3 // pixels.shape[2], axis=2))
    scale = max(1, round(PANEL / max(photo.size)))
    panels = [photo.resize((photo.width * scale, photo.height * scale), Image.Resampling.BICUBIC)]
    captions = ["input"]
    num_stages, size = len(model.stages), model.shape.patch_size
    resolution = np.zeros(model.shape.grid, dtype=int)  # details seen so far, per patch
    for stage in range(num_stages):
        kept, refined = (grid[stage, 0].cpu().numpy() for grid in (trace.kept, trace.refined))
        if not kept.any():
            break
        resolution += refined
        panels.append(_draw_stage(np.asarray(photo), kept, refined, resolution, model.shape.levels, size, scale))
        captions.append(f"stage {stage + 1}: {int(kept.sum())} of {kept.size} patches, {int(refined.sum())} refined")
    return _in_a_row(panels, captions, title)


def _draw_stage(
    photo: np.ndarray,
    kept: np.ndarray,
    refined: np.ndarray,
    resolution: np.ndarray,
    levels: int,
    size: int,
    scale: int,
) -> Image.Image:
    canvas = np.zeros_like(photo)
    for row, column in np.ndindex(kept.shape):
        here = np.s_[row * size : (row + 1) * size, column * size : (column + 1) * size]
        step = 2 ** (levels - resolution[row, column])
        patch = photo[here].astype(float)
        means = patch.reshape(size // step, step, size // step, step, -1).mean((1, 3))
        seen = means.repeat(step, 0).repeat(step, 1)
        canvas[here] = seen if kept[row, column] else DIM * seen
    picture = Image.fromarray(canvas).resize((photo.shape[1] * scale, photo.shape[0] * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for row, column in zip(*np.nonzero(refined), strict=True):
        left, top, side = column * size * scale, row * size * scale, size * scale
        pen.rectangle((left, top, left + side - 1, top + side - 1), outline=OUTLINE)
    return picture


def _in_a_row(panels: Sequence[Image.Image], captions: Sequence[str], title: str) -> Image.Image:
    font = ImageFont.load_default(size=13)
    width = sum(panel.width + MARGIN for panel in panels) + MARGIN
    top = 30 if title else MARGIN
    sheet = Image.new("RGB", (width, top + max(panel.height for panel in panels) + 30), "white")
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((MARGIN, 8), title, fill="black", font=ImageFont.load_default(size=15))
    left = MARGIN
    for panel, caption in zip(panels, captions, strict=True):
        sheet.paste(panel, (left, top))
        pen.text((left, top + panel.height + 6), caption, fill="black", font=font)
        left += panel.width + MARGIN
    return sheet


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other on white."""
    width, height = max(p.width for p in pictures), sum(p.height for p in pictures)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def draw_tradeoff(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, title: str) -> None:
    """Accuracy (percent) against the share of the full MACs; `curves` maps a name to (shares, accuracies in [0, 1])."""
    from matplotlib.figure import Figure  # slow to load, and only pictures need it

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, (shares, accuracies)), marker in zip(curves.items(), "osD^vP*X" * 4, strict=False):
        axes.plot(shares, [100 * accuracy for accuracy in accuracies], marker=marker, label=name)
    axes.set_xlabel("MACs an image, share of the full model")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title(title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
