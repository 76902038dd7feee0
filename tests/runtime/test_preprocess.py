"""From a photo to an array: every kind of image a user may hand over, and every kind that is refused."""

import io
import re
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

from iret.runtime.preprocess import INTERPOLATIONS, MAX_PIXELS, Preprocess, open_image, to_rgb

# Four colours in a square say which way is up; JPEG keeps blocks of 16 px as they are.
RED, GREEN, BLUE, WHITE = (254, 0, 0), (0, 255, 1), (0, 0, 254), (255, 255, 255)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def png_with_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def quarters(*colours: tuple[int, int, int]) -> Image.Image:
    """32 x 48 px: upper left, upper right, lower left, lower right."""
    image = Image.new("RGB", (48, 32))
    for index, colour in enumerate(colours):
        image.paste(colour, (24 * (index % 2), 16 * (index // 2), 24 * (index % 2) + 24, 16 * (index // 2) + 16))
    return image


def plain(rows: int, columns: int, **options) -> Preprocess:
    """Values that can be checked by eye: nothing is blended when pixels are picked."""
    return Preprocess(
        **{"img_size": (rows, columns), "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "nearest", **options}
    )


# ---- what is refused


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.jpg does not exist or is not a file; give the path of a photo"):
        open_image(tmp_path / "gone.jpg")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        open_image(str(tmp_path))


def test_text_that_is_called_jpg_is_refused(tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("milk, eggs, bread\n")
    with pytest.raises(ValueError, match=r"notes\.jpg is not an image that Pillow can read; give a JPEG"):
        open_image(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"GIF89a", b"BM"])
def test_bytes_that_are_no_image_are_refused(content):
    with pytest.raises(ValueError, match="the image is not an image that Pillow can read"):
        open_image(content)


def test_a_truncated_jpeg_is_refused(tmp_path):
    path = tmp_path / "cut.jpg"
    whole = encode(Image.fromarray(noise(64, 64)), "JPEG")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.jpg is damaged or cut short \(.*truncated.*\); get the file again"):
        open_image(path)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_truncated_image_of_any_kind_is_refused(kind):
    whole = encode(Image.fromarray(noise(64, 64)), kind)
    with pytest.raises(ValueError, match="the image is "):
        open_image(whole[: len(whole) // 2])


def test_a_tag_of_a_wrong_type_is_refused_as_damage():
    whole = encode(Image.new("L", (8, 8)), "TIFF")
    entry = whole.index(struct.pack("<HHI", 273, 4, 1))  # where the pixels begin: one LONG, made an ASCII letter
    with pytest.raises(ValueError, match="is damaged or cut short"):
        open_image(whole[:entry] + struct.pack("<HHI", 273, 2, 1) + whole[entry + 8 :])


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (20_000, r"bomb\.png has too many pixels \(.*400000000 pixels.*\); resize it first"),  # Pillow's own limit
        (10_000, rf"bomb\.png has 10000 x 10000 pixels, more than the limit of {MAX_PIXELS}; resize it first"),
    ],
)
def test_a_huge_image_is_refused_by_its_header(tmp_path, monkeypatch, side, message):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_with_header(side, side))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    tracemalloc.start()
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        warnings.simplefilter("error")
        open_image(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_the_limit_of_pixels_is_inclusive():
    content = encode(Image.new("RGB", (10, 8)))
    assert open_image(content, max_pixels=80).size == (10, 8)
    with pytest.raises(ValueError, match="the image has 10 x 8 pixels, more than the limit of 79"):
        open_image(content, max_pixels=79)


def test_a_truncated_image_that_was_opened_elsewhere_is_refused():
    whole = encode(Image.fromarray(noise(64, 64)), "JPEG")
    with pytest.raises(ValueError, match="the image is damaged or cut short"):
        open_image(Image.open(io.BytesIO(whole[: len(whole) // 2])))


# ---- what is converted


@pytest.mark.parametrize("how", [str, Path, lambda path: path.read_bytes(), lambda path: path.open("rb"), Image.open])
def test_a_path_bytes_a_file_and_an_image_give_the_same_pixels(tmp_path, how):
    pixels, path = noise(5, 7), tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    image = open_image(how(path))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels)


def test_one_pixel_is_enough(tmp_path):
    path = tmp_path / "dot.png"
    Image.new("RGB", (1, 1), (51, 102, 255)).save(path)
    batch = plain(32, 48)(path)
    assert batch.shape == (1, 3, 32, 48)
    assert np.array_equal(np.unique(batch.reshape(3, -1), axis=1)[:, 0], np.float32([0.2, 0.4, 1.0]))


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1)])
def test_a_line_of_pixels_is_an_image(size):
    assert plain(16, 16)(Image.new("RGB", size, RED)).shape == (1, 3, 16, 16)


def test_grey_becomes_three_equal_channels():
    grey = noise(4, 4)[..., 0]
    pixels = np.asarray(open_image(encode(Image.fromarray(grey))))
    assert np.array_equal(pixels, np.stack([grey] * 3, axis=-1))


def test_black_and_white_becomes_0_and_255():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert np.asarray(open_image(encode(image))).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_cmyk_is_converted_to_the_colours_it_prints():
    inks = {(0, 255, 255, 0): (255, 0, 0), (255, 0, 255, 0): (0, 255, 0), (0, 0, 0, 255): (0, 0, 0)}
    for ink, colour in inks.items():
        image = open_image(encode(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100))
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - colour).max() <= 2  # JPEG's rounding


def test_transparent_pixels_are_laid_over_white():
    image = Image.new("RGBA", (3, 1))
    for column, alpha in enumerate((0, 128, 255)):
        image.putpixel((column, 0), (100, 0, 200, alpha))
    clear, half, solid = np.asarray(open_image(encode(image)))[0].tolist()
    assert clear == [255, 255, 255]
    assert solid == [100, 0, 200]
    assert half == [177, 127, 227]  # 255 + (value - 255) * 128 / 255, rounded


def test_transparent_grey_is_laid_over_white():
    image = Image.new("LA", (2, 1), (10, 0))
    image.putpixel((1, 0), (10, 255))
    assert np.asarray(open_image(encode(image)))[0].tolist() == [[255] * 3, [10] * 3]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_the_transparent_colour_of_a_palette_is_laid_over_white(kind):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert np.asarray(open_image(encode(image, kind)))[0].tolist() == [[10, 20, 30], [200, 100, 50]]
    with_hole = open_image(encode(image, kind, transparency=1))
    assert np.asarray(with_hole)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_the_transparent_colour_of_an_rgb_png_is_laid_over_white():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    pixels = np.asarray(open_image(encode(image, transparency=(1, 2, 3))))
    assert pixels[0].tolist() == [[255, 255, 255], [9, 9, 9]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind):
    deep = np.array([[0, 256, 257, 257 * 100, 257 * 255 - 1, 65535]], dtype=np.uint16)
    pixels = np.asarray(open_image(encode(Image.fromarray(deep), kind)))
    assert pixels[..., 0].tolist() == [[0, 0, 1, 100, 254, 255]]
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_grey_of_32_bits_and_of_floats_is_clipped_into_range():
    whole = Image.fromarray(np.array([[-5, 257 * 7, 70_000]], dtype=np.int32))
    broken = Image.fromarray(np.array([[-5.0, 7.9, 300.0]], dtype=np.float32))
    assert np.asarray(to_rgb(whole))[0, :, 0].tolist() == [0, 7, 255]
    assert np.asarray(to_rgb(broken))[0, :, 0].tolist() == [0, 7, 255]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert np.unique(np.asarray(open_image(content)).reshape(-1, 3), axis=0).tolist() == [list(RED)]


# How a picture must be stored so that it is upright once turned by its orientation: (height > width, four corners).
STORED = {
    1: (False, (RED, GREEN, BLUE, WHITE)),
    2: (False, (GREEN, RED, WHITE, BLUE)),
    3: (False, (WHITE, BLUE, GREEN, RED)),
    4: (False, (BLUE, WHITE, RED, GREEN)),
    5: (True, (RED, BLUE, GREEN, WHITE)),
    6: (True, (GREEN, WHITE, RED, BLUE)),
    7: (True, (WHITE, GREEN, BLUE, RED)),
    8: (True, (BLUE, RED, WHITE, GREEN)),
}


def corners(image: Image.Image) -> list:
    right, lower = image.width - 1, image.height - 1
    return [image.getpixel(place) for place in ((0, 0), (right, 0), (0, lower), (right, lower))]


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_photo_is_turned_upright_by_its_exif_orientation(orientation, kind):
    is_tall, colours = STORED[orientation]
    stored = quarters(*colours)
    stored = stored.resize((32, 48), Image.Resampling.NEAREST) if is_tall else stored
    assert corners(stored) == list(colours)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    upright = open_image(encode(stored, kind, exif=exif, **options))
    assert upright.size == (48, 32)
    for seen, colour in zip(corners(upright), (RED, GREEN, BLUE, WHITE), strict=True):
        assert max(abs(a - b) for a, b in zip(seen, colour, strict=True)) <= 3  # JPEG's rounding


def test_a_photo_with_exif_entries_that_break_the_standard_is_read_all_the_same():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.ResolutionUnit] = 2
    content = encode(quarters(*STORED[1][1]), "JPEG", exif=exif)
    short = struct.pack(">HH", ExifTags.Base.ResolutionUnit, 3)
    assert content.count(short) == 1
    long = struct.pack(">HH", ExifTags.Base.ResolutionUnit, 4)  # as some cameras write it
    broken = content.replace(short, long)
    assert open_image(broken).size == (32, 48)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    assert open_image(encode(Image.new("RGB", (6, 4)), exif=exif)).size == (6, 4)


def test_an_image_that_is_handed_over_is_not_changed():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.open(io.BytesIO(encode(quarters(*STORED[6][1]), "JPEG", exif=exif)))
    assert open_image(image).size == (32, 48)
    assert image.size == (48, 32)
    assert "exif" in image.info


# ---- fit


def test_an_image_of_the_right_size_passes_untouched():
    pixels = noise(6, 4)
    assert np.array_equal(plain(6, 4, interpolation="bicubic").fit(Image.fromarray(pixels)), pixels)


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_an_interpolation_is_pillows_of_that_name(name):
    photo = Image.fromarray(noise(20, 30))
    expected = np.asarray(photo.resize((12, 8), getattr(Image.Resampling, name.upper())))
    assert np.array_equal(plain(8, 12, interpolation=name).fit(photo), expected)


def test_a_wide_photo_loses_its_sides_equally():
    wide = Image.new("RGB", (100, 32), RED)
    wide.paste(BLUE, (34, 0, 66, 32))
    assert np.unique(plain(8, 8).fit(wide).reshape(-1, 3), axis=0).tolist() == [list(BLUE)]


def test_a_tall_photo_loses_top_and_bottom_equally():
    tall = Image.new("RGB", (32, 100), RED)
    tall.paste(BLUE, (0, 34, 32, 66))
    assert np.unique(plain(8, 8).fit(tall).reshape(-1, 3), axis=0).tolist() == [list(BLUE)]


def test_the_aspect_is_kept():
    square = Image.new("RGB", (64, 64), RED)
    square.paste(BLUE, (24, 24, 40, 40))
    seen = (plain(16, 32).fit(square) == BLUE).all(2)  # half the rows are cut away, both sides halved
    assert seen.sum() == 64
    assert seen[4:12, 12:20].all()


def test_the_crop_ratio_takes_the_centre():
    square = Image.new("RGB", (40, 40), RED)
    square.paste(BLUE, (10, 10, 30, 30))
    assert (plain(8, 8, crop_ratio=0.5).fit(square) == BLUE).all()
    assert (plain(8, 8, crop_ratio=1.0).fit(square) == RED).any()


def test_the_crop_ratio_holds_at_the_models_own_size():
    square = Image.new("RGB", (8, 8), RED)
    square.paste(BLUE, (2, 2, 6, 6))
    assert (plain(8, 8, crop_ratio=0.5).fit(square) == BLUE).all()


@pytest.mark.parametrize("img_size", [(224, 224), (7, 7), (112, 224)])
def test_photos_of_every_size_fit_whatever_rounding_does(img_size):
    preprocess = plain(*img_size)
    for side in range(1, 700, 3):  # at 224 px one width in 40 used to be refused by Pillow
        for size in ((side, 2 * side), (2 * side, side), (side, side)):
            assert preprocess.fit(Image.new("RGB", size)).shape == (*img_size, 3)


def test_a_grey_model_sees_one_channel():
    preprocess = Preprocess(img_size=(1, 2), mean=(0.5,), std=(0.5,))
    image = Image.new("RGB", (2, 1), WHITE)
    image.putpixel((0, 0), (0, 0, 0))
    assert preprocess.fit(image).tolist() == [[[0], [255]]]
    assert preprocess(image).tolist() == [[[[-1.0, 1.0]]]]


# ---- normalise and batch


def test_normalising_is_exact_and_moves_the_channels_first():
    preprocess = Preprocess(img_size=(1, 2), mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    pixels = np.array([[[0, 0, 0], [255, 255, 255]]], dtype=np.uint8)
    values = preprocess.normalise(pixels)
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    assert values.tolist() == [[[0.0, 1.0]], [[-1.0, 1.0]], [[-4.0, 0.0]]]


def test_many_photos_make_one_batch_in_their_order(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (9, 9), (255, 0, 0)).save(path)
    batch = plain(4, 6)([path, Image.new("RGB", (50, 5), (0, 255, 0)), encode(Image.new("L", (3, 3), 255))])
    assert batch.shape == (3, 3, 4, 6)
    assert batch.mean((2, 3)).tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, 1]]


def test_arrays_are_images_too():
    pixels = noise(4, 6)
    preprocess = plain(4, 6)
    expected = np.moveaxis(pixels.astype(np.float32) / 255, 2, 0)
    assert np.array_equal(preprocess(pixels), expected[None])
    assert np.array_equal(preprocess(np.stack([pixels, pixels[::-1]])), np.stack([expected, expected[:, ::-1]]))
    grey = preprocess(pixels[..., :1])
    assert np.array_equal(grey[0], np.stack([expected[0]] * 3))


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((1, 3, 4, 6), np.uint8)]
)
def test_other_arrays_are_refused(array):
    message = f"an array of images is uint8 [Y, X, C] or [B, Y, X, C] with 1, 3 or 4 channels, not {array.dtype} {array.shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        plain(4, 4)(array)


def test_no_image_at_all_is_refused():
    with pytest.raises(ValueError, match="no image was given"):
        plain(4, 4)([])


# ---- the settings


def test_settings_survive_a_round_trip():
    preprocess = Preprocess(img_size=(3, 5), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_ratio=0.9)
    raw = preprocess.to_dict()
    assert Preprocess.from_dict(raw) == preprocess
    assert Preprocess.from_dict({name: list(v) if isinstance(v, tuple) else v for name, v in raw.items()}) == preprocess


@pytest.mark.parametrize(
    "raw",
    [
        {"img_size": [4, 4], "mean": [0.5]},
        {"img_size": [4, 4], "mean": [0.5], "std": [0.5], "size": 4},
        {},
    ],
)
def test_settings_with_a_missing_or_unknown_key_are_refused(raw):
    with pytest.raises(ValueError, match="has the keys crop_ratio, img_size, interpolation, mean, std, not"):
        Preprocess.from_dict(raw)


@pytest.mark.parametrize(
    "change",
    [
        {"img_size": "big"},
        {"img_size": 4},
        {"img_size": [4.5, 4]},
        {"mean": None},
        {"mean": [0.5, "a", 0.5]},
        {"crop_ratio": "x"},
        {"interpolation": [1]},
        {"interpolation": {}},
    ],
)
def test_settings_of_a_wrong_kind_are_refused_by_name(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"^{name}=.* of a preprocess entry is malformed; img_size takes two whole"):
        Preprocess.from_dict({"img_size": [4, 4], "mean": [0.5] * 3, "std": [0.5] * 3, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (), "std": ()}, r"mean=\(\) and std=.* need an entry per channel each"),
        ({"std": (1.0,)}, "need an entry per channel each"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
        ({"std": (1.0, float("nan"), 1.0)}, "finite"),
        ({"mean": (0.5, float("inf"), 0.5)}, "finite"),
        ({"img_size": (0, 4)}, r"img_size=\(0, 4\) must be two positive numbers"),
        ({"crop_ratio": 0.0}, r"crop_ratio=0\.0 in \(0, 1\]"),
        ({"crop_ratio": 1.5}, r"crop_ratio=1\.5 in \(0, 1\]"),
        ({"interpolation": "area"}, "interpolation='area' is unknown; choose from nearest, bilinear, bicubic, lanczos"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plain(4, 4, **change)
