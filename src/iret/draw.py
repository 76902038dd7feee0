"""Pictures: what a model looked at coarsely, in detail, and dropped; accuracy against cost."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from iret.model import Iret
from iret.output import Trace
from iret.picture import save_figure
from iret.runtime.points import OperatingPoints
from iret.runtime.preprocess import Source, open_image

PANEL = 288  # pixels along the longer side of one panel
MARGIN = 10
DIM = 0.18  # brightness of dropped patches in the panel of a stage
VEIL = 0.4  # and over the photo
OUTLINE = (255, 176, 0)  # amber: told apart from photos and by colour-blind eyes


def draw_focus(model: Iret, image: Source, trace: Trace, title: str = "") -> Image.Image:
    """One row of panels: the photo under the outcome, then each stage as it saw the photo.

    In a stage's panel a patch is drawn at the resolution its token holds: coarse squares where only coarse bands were read,
    sharper with an amber outline where details were added on the way into the stage, dark where it was dropped. Over the
    photo, what the last stage dropped is dark and what was ever refined of the rest is outlined.
    """
    photo = open_image(image)
    seen = _as_rgb(model.preprocessing.fit(photo))
    (rows, columns, _), size = seen.shape, model.shape.patch_size
    scale = max(1, round(PANEL / max(rows, columns)))
    fine = replace(model.preprocessing, img_size=(rows * scale, columns * scale))
    stages = [stage for stage in range(len(model.stages)) if trace.kept[stage, 0].any()]
    kept, refined = (grid[:, 0].cpu().numpy() for grid in (trace.kept, trace.refined))
    last, ever = kept[stages[-1]], refined.any(0) & kept[stages[-1]]
    panels = [_outlined(_shaded(_as_rgb(fine.fit(photo)), last, VEIL), ever)]
    captions = ["dark: dropped; amber: read in detail"]
    resolution = np.zeros(model.shape.grid, dtype=int)  # details seen so far, per patch
    for stage in stages:
        resolution += refined[stage]
        view = _shaded(_as_read(seen, size, 2 ** (model.shape.levels - resolution)), kept[stage], DIM)
        panels.append(_outlined(view.repeat(scale, 0).repeat(scale, 1), refined[stage]))
        num_kept, num_refined = int(kept[stage].sum()), int(refined[stage].sum())
        captions.append(f"stage {stage + 1}: {num_kept} of {kept[stage].size} patches, {num_refined} refined")
    return _in_a_row([Image.fromarray(panel) for panel in panels], captions, title)


def _as_rgb(pixels: np.ndarray) -> np.ndarray:
    return pixels.repeat(3 // pixels.shape[2], axis=2)


def _as_read(photo: np.ndarray, size: int, steps: np.ndarray) -> np.ndarray:
    """Every patch of side `size` as means of squares of its entry in `steps` [rows, columns]."""
    view = np.empty(photo.shape)
    for row, column in np.ndindex(steps.shape):
        here = np.s_[row * size : (row + 1) * size, column * size : (column + 1) * size]
        step = steps[row, column]
        means = photo[here].astype(float).reshape(size // step, step, size // step, step, -1).mean((1, 3))
        view[here] = means.repeat(step, 0).repeat(step, 1)
    return view


def _shaded(pixels: np.ndarray, kept: np.ndarray, dim: float) -> np.ndarray:
    light = np.where(kept, 1.0, dim)
    (rows, columns), sides = kept.shape, pixels.shape
    return (pixels * light.repeat(sides[0] // rows, 0).repeat(sides[1] // columns, 1)[..., None]).astype(np.uint8)


def _outlined(pixels: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """With the edges of the marked cells [rows, columns] in amber."""
    picture, side = Image.fromarray(pixels), pixels.shape[0] // cells.shape[0]
    pen = ImageDraw.Draw(picture)
    for row, column in np.argwhere(cells).tolist():
        left, top = column * side, row * side
        pen.rectangle((left, top, left + side - 1, top + side - 1), outline=OUTLINE)
    return np.asarray(picture)


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
    figure.legend(loc="outside lower center")
    save_figure(figure, path)


def draw_search(points: OperatingPoints, search: Path, path: Path) -> None:
    """Every setting that a search tried (a file of `calibrate.Memory`, if it is there) and the points that are served."""
    from matplotlib.figure import Figure

    from iret.calibrate import read_memory  # with what reads data, which other pictures do without

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    rows = [row for each in read_memory(search)[1].values() for row in each]
    if rows:
        tried = np.array([(row["macs_mean"] / points.full_macs, 100 * row["accuracy"]) for row in rows])
        axes.plot(*tried.T, ".", color="0.7", markersize=3, label="tried in the search (on fewer images)")
    served = np.array([(point.macs_mean / points.full_macs, 100 * point.accuracy) for point in points.points])
    axes.plot(*served.T, "o-", color="#0072b2", label=f"served, {points.num_images} held-out images of {points.data}")
    axes.set_xlabel("MACs an image, share of the full model")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    save_figure(figure, path)
