"""The pictures show what the model saw: read back pixel by pixel, one photo pixel at the middle of its square."""

import numpy as np
import pytest
import torch
from PIL import Image

from iret.draw import DIM, MARGIN, OUTLINE, PANEL, VEIL, draw_focus, draw_search, draw_tradeoff, stack
from iret.model import Iret
from iret.output import Trace
from iret.runtime.cost import Shape
from iret.runtime.points import OperatingPoints, Point

SIDE, PATCH = 16, 4  # a grid of 4 x 4 patches
SCALE = PANEL // SIDE


def make_model(channels: int = 3) -> Iret:
    """Three stages, so a patch is one square at first and four after its first details."""
    shape = Shape(
        img_size=(SIDE, SIDE),
        patch_size=PATCH,
        in_chans=channels,
        num_classes=2,
        embed_dims=(16, 16, 16),
        depths=(1, 1, 1),
        head_dim=16,
    )
    return Iret(shape)


def make_pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)


def make_trace(kept: list[set[int]], refined: list[set[int]]) -> Trace:
    """Of one image, stage by stage the numbers of the cells in reading order."""
    grids = torch.zeros(2, 3, 16, dtype=torch.bool)
    for which, stages in enumerate((kept, refined)):
        for stage, cells in enumerate(stages):
            grids[which, stage, sorted(cells)] = True
    kept_grid, refined_grid = grids.view(2, 3, 1, 4, 4)
    return Trace(torch.zeros(3, 1, 2), torch.tensor([len(kept) - 1]), kept_grid, refined_grid, torch.zeros(2, 1, 4, 4))


ALL = set(range(16))
# At the first transition 12 to 15 go and 4 to 11 get details; at the second 8 to 11 go and 4 to 7 get more.
SEEN = make_trace([ALL, set(range(12)), set(range(8))], [set(), set(range(4, 12)), {4, 5, 6, 7}])


def panel(sheet: Image.Image, index: int) -> np.ndarray:
    """The pixels of one panel, [Y, X, 3]."""
    left = MARGIN + index * (PANEL + MARGIN)
    return np.asarray(sheet)[MARGIN : MARGIN + PANEL, left : left + PANEL]


def seen_at(sheet: Image.Image, index: int, cell: int) -> np.ndarray:
    """What a panel shows of a cell, one value for each of its photo's pixels, int [4, 4, 3]."""
    middles = panel(sheet, index)[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE]
    return cut(middles.astype(int), cell)


def cut(pixels: np.ndarray, cell: int) -> np.ndarray:
    row, column = divmod(cell, 4)
    return pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]


def blocks(patch: np.ndarray, side: int) -> np.ndarray:
    """A patch of 4 x 4 px as means of squares of `side`."""
    means = np.zeros((4, 4, 3))
    for row in range(0, 4, side):
        for column in range(0, 4, side):
            here = np.s_[row : row + side, column : column + side]
            means[here] = patch[here].mean((0, 1))
    return means


@pytest.mark.parametrize(
    ("stage", "cell", "side", "light"),
    [
        (1, 0, 4, 1),  # before anything is chosen
        (1, 15, 4, 1),
        (2, 0, 4, 1),  # kept without details
        (2, 4, 2, 1),  # refined once
        (2, 12, 4, DIM),  # dropped unseen
        (3, 0, 4, 1),
        (3, 4, 1, 1),  # refined twice
        (3, 8, 2, DIM),  # refined, then dropped
        (3, 12, 4, DIM),
    ],
)
def test_a_patch_is_drawn_as_finely_as_it_was_read_and_dark_once_it_is_dropped(stage, cell, side, light):
    pixels = make_pixels()
    drawn = seen_at(draw_focus(make_model(), Image.fromarray(pixels), SEEN), stage, cell)
    expected = light * blocks(cut(pixels, cell), side)
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1)  # whole numbers


def test_what_gets_details_is_outlined_in_amber_and_nothing_else():
    sheet = draw_focus(make_model(), Image.fromarray(make_pixels()), SEEN)
    for index, cells in enumerate([{4, 5, 6, 7}, set(), set(range(4, 12)), {4, 5, 6, 7}]):
        outlined = (panel(sheet, index) == OUTLINE).all(2)
        expected = np.zeros_like(outlined)
        for row, column in (divmod(cell, 4) for cell in cells):
            side = PATCH * SCALE
            square = expected[row * side : (row + 1) * side, column * side : (column + 1) * side]
            square[[0, -1]] = square[:, [0, -1]] = True
        assert np.array_equal(outlined, expected), index


def test_a_stage_that_was_not_reached_has_no_panel():
    photo = Image.fromarray(make_pixels())
    for kept, num_panels in (([ALL], 2), ([ALL, {0}], 3), ([ALL, {0}, {0}], 4)):
        sheet = draw_focus(make_model(), photo, make_trace(kept, []))
        assert sheet.width == MARGIN + num_panels * (PANEL + MARGIN)


def test_the_first_panel_is_the_centre_of_the_photo_dark_where_it_was_dropped():
    wide = Image.new("RGB", (3 * PANEL, PANEL), "red")
    wide.paste("blue", (PANEL, 0, 2 * PANEL, PANEL))  # the centre, which is all that the model gets
    first = panel(draw_focus(make_model(), wide, make_trace([ALL, ALL, set(range(8))], [])), 0)
    assert (first[: PANEL // 2] == (0, 0, 255)).all()
    assert (first[PANEL // 2 :] == (0, 0, int(VEIL * 255))).all()


def test_the_first_panel_is_finer_than_what_the_model_saw():
    stripes = np.zeros((PANEL, PANEL, 3), dtype=np.uint8)
    stripes[:, 0::2] = 255  # a pixel wide: grey to the model
    first = panel(draw_focus(make_model(), Image.fromarray(stripes), make_trace([ALL], [])), 0)
    assert np.array_equal(first, stripes)


def test_a_model_of_grey_images_is_drawn_in_grey():
    drawn = seen_at(draw_focus(make_model(channels=1), Image.fromarray(make_pixels()), SEEN), 3, 4)
    grey = np.asarray(Image.fromarray(make_pixels()).convert("L"))
    assert np.array_equal(drawn, cut(grey, 4)[..., None].repeat(3, axis=2))


def test_a_title_stands_above_the_panels():
    photo = Image.fromarray(make_pixels())
    without, titled = (draw_focus(make_model(), photo, SEEN, title) for title in ("", "chelsea.jpg: cat"))
    added = titled.height - without.height
    assert added > 0
    assert np.array_equal(np.asarray(titled)[MARGIN + added :], np.asarray(without)[MARGIN:])
    assert (np.asarray(titled)[: MARGIN + added] < 128).any()


def test_pictures_are_stacked_on_white():
    sheet = stack([Image.new("RGB", (2, 1), "red"), Image.new("RGB", (3, 2), "blue")])
    red, blue, white = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    assert np.asarray(sheet).tolist() == [
        [list(c) for c in row] for row in ((red, red, white), (blue,) * 3, (blue,) * 3)
    ]


@pytest.mark.parametrize(
    "search", [None, "mark\n", 'mark\n{"key": "a", "points": [{"macs_mean": 5.0, "accuracy": 0.5}]}\n{"key": "b", "po']
)
def test_a_search_is_drawn_whether_it_is_there_or_was_cut_off_by_a_kill(tmp_path, search):
    point = Point(thresholds=((0.0, 0.0),), accuracy=0.5, macs_mean=9.0, macs_p95=9.0, kept_mean=(4.0, 4.0))
    points = OperatingPoints(data="mine", num_images=4, full_macs=9, points=(point,))
    if search is not None:
        (tmp_path / "search.jsonl").write_text(search)
    draw_search(points, tmp_path / "search.jsonl", tmp_path / "search.png")
    with Image.open(tmp_path / "search.png") as picture:
        picture.load()


def test_the_tradeoff_is_a_picture_that_opens(tmp_path):
    curves = {f"curve {index}": ([1.0, 0.5], [0.9, 0.8 - 0.1 * index]) for index in range(3)}
    draw_tradeoff(curves, tmp_path / "tradeoff.png", "title")
    with Image.open(tmp_path / "tradeoff.png") as picture:
        picture.load()
        colours = {colour for _, colour in picture.convert("RGB").getcolors(picture.width * picture.height)}
    saturated = {colour for colour in colours if max(colour) - min(colour) > 100}
    assert len(saturated) >= 3  # one line each
