"""The embedded data set: the same bytes on every machine, originals kept apart, and mistakes refused."""

import hashlib

import numpy as np
import pytest

from iret.train.digits import SPLITS, ClutteredDigits, _originals, _paste

# sha256 over image bytes and label of images 0 to 63 at 64 x 64 px and seed 0. The shipped digits model was trained and
# scored on these: if they change, so does its data set, and its card is wrong.
CHECKSUMS = {
    "train": "c503054d398983bfd352d2141c90c2e65339e7312dd0a4261183f00e7c556a5d",
    "val": "b54cfbb209a4378976ebd36e2d05924624068e679cdd7d5fa1bfcba817849af6",
    "test": "170521eb57c2517ec19877cf5d1c5a3e670bb69d0350ea325a9f8add90b346bc",
}
# The same over the image bytes alone of test images 0 to 7 at 96 x 128 px.
CHECKSUM_LARGE = "74cbbd5e4921b6c4b1b1d147671e2e8d9da2dd9b94661cf4855a80b321434465"


@pytest.mark.parametrize("split", CHECKSUMS)
def test_the_images_are_the_same_on_every_machine(split):
    digits, found = ClutteredDigits(split), hashlib.sha256()
    for index in range(64):
        pixels, label = digits[index]
        found.update(pixels.tobytes() + bytes([label]))
    assert found.hexdigest() == CHECKSUMS[split]


def test_larger_images_are_the_same_on_every_machine():
    digits = ClutteredDigits("test", size=(96, 128))
    images = [digits[index][0] for index in range(8)]
    assert {image.shape for image in images} == {(96, 128, 3)}
    assert hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest() == CHECKSUM_LARGE


def test_no_original_is_in_two_splits_and_every_one_is_in_one():
    seen = {split: {digit.tobytes() for digit in _originals(split)[0]} for split in SPLITS}
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]
    assert {split: len(digits) for split, digits in seen.items()} == {"train": 1257, "val": 176, "test": 364}


@pytest.mark.parametrize("split", SPLITS)
def test_every_class_has_its_share_of_originals_and_images(split):
    counts = np.bincount(_originals(split)[1], minlength=10)
    assert counts.max() - counts.min() <= 6
    digits = ClutteredDigits(split)
    drawn = np.bincount([digits[index][1] for index in range(500)], minlength=10)
    assert drawn.min() > 23 and drawn.max() < 77  # 50 each, four standard deviations of 6.7


def test_an_image_depends_on_seed_split_and_index_alone():
    pixels, label = ClutteredDigits("train", seed=3)[5]
    again = ClutteredDigits("train", seed=3, length=10)
    again[0], again[7]  # what was asked for before does not matter
    assert np.array_equal(again[5][0], pixels)
    assert again[5][1] == label
    for other in (
        ClutteredDigits("train", seed=4)[5],
        ClutteredDigits("val", seed=3)[5],
        ClutteredDigits("train", seed=3)[6],
    ):
        assert not np.array_equal(other[0], pixels)


def test_an_image_is_colour_bytes_and_its_label_a_digit():
    digits = ClutteredDigits("val")
    pixels, label = digits[0]
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert type(label) is int
    assert digits.class_names == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


@pytest.mark.parametrize(("split", "length"), SPLITS.items())
def test_a_split_has_its_length_unless_asked_otherwise(split, length):
    assert len(ClutteredDigits(split)) == length
    assert len(ClutteredDigits(split, length=7)) == 7
    assert len(list(ClutteredDigits(split, length=7))) == 7


def test_a_glyph_covers_the_canvas_as_its_ink_says():
    glyph = np.array([[0, 120], [240, 240]], dtype=np.uint8)
    canvas = np.full((6, 6, 3), 40, dtype=np.uint8)
    _paste(canvas, glyph, (3,), 1, np.random.default_rng(0))  # 2 x 2 px enlarged 3 times fills the canvas
    colour = canvas[5, 5].astype(int)
    assert colour.min() >= 128
    expected = np.array([[np.full(3, 40), (40 + colour) // 2], [colour, colour]])
    assert np.array_equal(canvas, expected.repeat(3, 0).repeat(3, 1))


def test_an_enlarged_digit_lies_anywhere_on_a_lattice_of_the_canvas():
    places = set()
    draw = np.random.default_rng(0)
    for _ in range(400):
        canvas = np.zeros((13, 17, 3), dtype=np.uint8)
        _paste(canvas, np.full((2, 2), 240, dtype=np.uint8), (2,), 4, draw)
        rows, columns = np.nonzero(canvas[..., 0])
        assert len(rows) == 16
        places.add((rows.min(), columns.min()))
    assert places == {(row, column) for row in (0, 4, 8) for column in (0, 4, 8, 12)}


# ---- what is refused


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='all' is unknown; choose from train, val, test"):
        ClutteredDigits("all")


@pytest.mark.parametrize("size", [(63, 64), (64, 32)])
def test_a_small_canvas_is_refused(size):
    with pytest.raises(ValueError, match=r"size=.* is too small; cluttered-digits needs 64 x 64 pixels or more"):
        ClutteredDigits("train", size=size)


@pytest.mark.parametrize("index", [-1, 5])
def test_an_image_outside_the_split_is_an_index_error(index):
    with pytest.raises(IndexError, match=f"image {index} of 5"):
        ClutteredDigits("train", length=5)[index]
