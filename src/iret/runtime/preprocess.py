"""From a photo to what a model takes: opening with limits, resizing, normalising. NumPy and Pillow only.

path, bytes or PIL image -> RGB, upright -> resized and cropped, uint8 [Y, X, C] -> float32 [B, C, Y, X]
"""

import io
import math
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 64_000_000  # a decoded RGB image of this size takes 192 MB
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# EXIF orientation -> what turns the image upright. ImageOps.exif_transpose also writes the EXIF data back, and fails on
# entries that break the standard, which cameras write.
TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Source = str | Path | bytes | BinaryIO | Image.Image


def open_image(source: Source, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image, upright by its EXIF orientation, fully decoded.

    Transparent pixels are laid over white, 16-bit grey is scaled to 8 bits, CMYK is converted, of an animation the first
    frame is taken.

    Raises:
        ValueError: missing, not an image, damaged, or more than `max_pixels` (seen in the header, before decoding). An image
            that Pillow has opened already is only checked for damage.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the image"
    if isinstance(source, Image.Image):
        return _decode(source, name)
    if not isinstance(source, (str, Path, bytes)) and not hasattr(source, "read"):
        raise ValueError(f"a photo is a path, bytes, an open file or a PIL image, not {type(source).__name__}.")
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise ValueError(f"{name} does not exist or is not a file; give the path of a photo.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels ({error}); resize it first.") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{name} is not an image that Pillow can read; give a JPEG, PNG or the like.") from error
    with image:
        if image.width * image.height > max_pixels:
            raise ValueError(
                f"{name} has {image.width} x {image.height} pixels, more than the limit of {max_pixels}; resize it first."
            )
        return _decode(image, name)


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        return to_rgb(image)
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, struct.error) as error:
        raise ValueError(f"{name} is damaged or cut short ({error}); get the file again.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB; see `open_image`."""
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16 bits at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a model wants its images: `img_size` (rows, columns); mean and std of pixels in [0, 1], one per channel."""

    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float = 1.0  # share of the resized image's shorter side that the centre crop takes
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        is_finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if not self.mean or len(self.std) != len(self.mean) or not is_finite or min(self.std) <= 0:
            raise ValueError(
                f"mean={self.mean} and std={self.std} need an entry per channel each, finite, std above 0."
            )
        if len(self.img_size) != 2 or min(self.img_size) < 1 or not 0 < self.crop_ratio <= 1:
            raise ValueError(
                f"img_size={self.img_size} must be two positive numbers and crop_ratio={self.crop_ratio} in (0, 1]."
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation={self.interpolation!r} is unknown; choose from {', '.join(INTERPOLATIONS)}."
            )

    def fit(self, image: Image.Image) -> np.ndarray:
        """uint8 [Y, X, C]: the centre, at `crop_ratio` of the largest crop of this shape; the aspect is kept."""
        if len(self.mean) not in (1, 3):
            raise ValueError(
                f"photos have 1 or 3 channels and this model takes {len(self.mean)}; make its input yourself."
            )
        rows, columns = self.img_size
        image = image.convert("L" if len(self.mean) == 1 else "RGB")
        scale = self.crop_ratio * min(image.width / columns, image.height / rows)
        width, height = columns * scale, rows * scale
        left, top = (image.width - width) / 2, (image.height - height) / 2
        # Clamped: at some sizes rounding puts an edge a hair outside, which Pillow refuses.
        box = (max(0.0, left), max(0.0, top), min(image.width, left + width), min(image.height, top + height))
        if image.size == (columns, rows) and self.crop_ratio == 1:
            resized = image
        else:
            resized = image.resize((columns, rows), INTERPOLATIONS[self.interpolation], box=box)
        return np.asarray(resized).reshape(rows, columns, len(self.mean))

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [..., Y, X, C] to float32 [..., C, Y, X]."""
        scaled = (pixels.astype(np.float32) / 255 - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))

    def __call__(self, images: Source | Sequence[Source] | np.ndarray) -> np.ndarray:
        """float32 [B, C, Y, X] from one photo, a list of them, or uint8 [Y, X, C] or [B, Y, X, C] of any size."""
        if isinstance(images, np.ndarray):
            if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] not in (1, 3, 4):
                raise ValueError(
                    "an array of images is uint8 [Y, X, C] or [B, Y, X, C] with 1, 3 or 4 channels, not "
                    f"{images.dtype} {images.shape}."
                )
            batch = images[None] if images.ndim == 3 else images
            sources: list = [Image.fromarray(each.squeeze(-1) if each.shape[-1] == 1 else each) for each in batch]
        else:
            sources = list(images) if isinstance(images, (list, tuple)) else [images]
        if not sources:
            raise ValueError("no image was given.")
        return self.normalise(np.stack([self.fit(open_image(source)) for source in sources]))

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping) -> "Preprocess":
        """Raises ValueError for keys that are unknown or missing and for values of another kind."""
        known = {field.name for field in fields(cls)}
        if not isinstance(raw, Mapping) or not {"img_size", "mean", "std"} <= set(raw) <= known:
            raise ValueError(f"a preprocess entry has the keys {', '.join(sorted(known))}, not {raw!r}.")
        fixed: dict[str, Any] = {}
        for name, value in raw.items():
            is_list = name in ("img_size", "mean", "std")
            kind = {"img_size": int, "interpolation": str}.get(name, (int, float))
            entries = value if is_list else [value]
            if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, kind) for entry in entries):
                raise ValueError(
                    f"{name}={value!r} of a preprocess entry is malformed; img_size takes two whole numbers, mean and std "
                    "take lists of numbers, crop_ratio a number, interpolation a name."
                )
            fixed[name] = tuple(value) if is_list else value
        return cls(**fixed)
