"""`cluttered-digits`: a data set with no download, in the manner of cluttered translated MNIST.

Each image is one real handwritten digit (scikit-learn's, 8 x 8), enlarged by a whole number and placed at random, on a
lattice of 8 px, on a dim, mottled canvas among fragments of other digits, which lie anywhere. Most of the canvas is beside
the point, which is the point: attention has to find the digit. Originals are split between train, val and test, so no
handwriting is seen in two of them.

Everything is drawn from a counter-based generator keyed by (seed, split, index) and computed in integers, so the images are
identical on every machine.

Source: after the cluttered translated MNIST of Mnih et al. 2014, "Recurrent Models of Visual Attention"; digits
from the UCI "Optical Recognition of Handwritten Digits" data as shipped with scikit-learn (`load_digits`).
"""

from functools import cache

import numpy as np

SPLITS = {"train": 20_000, "val": 1_000, "test": 2_000}  # images, unless asked otherwise
SCALES = (3, 4)
FRAGMENT_SCALES = (1, 2)
NUM_FRAGMENTS = 12
FRAGMENT_SIDE = 4  # pixels of the original digit
LATTICE = 8  # pixels between the places where a digit may lie; with 1, twenty minutes teach a small model little


@cache
def _originals(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Digits uint8 [n, 8, 8] with values up to 240, and labels, of one split: every fifth of a class is test, every tenth val."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    place = np.zeros(len(digits.target), dtype=int)
    for label in range(10):
        (rows,) = np.nonzero(digits.target == label)
        place[rows] = np.arange(len(rows)) % 10
    own = {"test": place % 5 == 0, "val": place == 9, "train": (place % 5 != 0) & (place != 9)}[split]
    return (digits.images[own].astype(np.uint8) * 15), digits.target[own]


class ClutteredDigits:
    """Images of one split (train, val, test), made when they are asked for; `size` is (rows, columns), 64 or more each."""

    class_names = tuple(str(digit) for digit in range(10))

    def __init__(self, split: str, size: tuple[int, int] = (64, 64), length: int | None = None, seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; choose from {', '.join(SPLITS)}.")
        if min(size) < 64:
            raise ValueError(f"size={size} is too small; cluttered-digits needs 64 x 64 pixels or more.")
        self.split, self.size, self.seed = split, size, seed
        self.length = SPLITS[split] if length is None else length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Image uint8 [Y, X, 3] and label."""
        if not 0 <= index < self.length:
            raise IndexError(f"image {index} of {self.length}")
        key = [self.seed, list(SPLITS).index(self.split), index]
        draw = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        images, labels = _originals(self.split)
        canvas = _mottled(draw, self.size)
        for _ in range(NUM_FRAGMENTS * self.size[0] * self.size[1] // (64 * 64)):
            row, column = draw.integers(0, 8 - FRAGMENT_SIDE + 1, 2)
            fragment = images[draw.integers(len(images))][row : row + FRAGMENT_SIDE, column : column + FRAGMENT_SIDE]
            _paste(canvas, fragment, FRAGMENT_SCALES, 1, draw)
        chosen = int(draw.integers(len(images)))
        _paste(canvas, images[chosen], SCALES, LATTICE, draw)
        return canvas, int(labels[chosen])


def _mottled(draw: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A dim background: blocks of one tint with a little noise."""
    rows, columns = size
    tint = draw.integers(0, 48, 3)
    blocks = (tint + draw.integers(0, 24, (rows // 8 + 1, columns // 8 + 1, 3))).astype(np.uint8)
    return blocks.repeat(8, 0).repeat(8, 1)[:rows, :columns] + draw.integers(0, 16, (rows, columns, 3)).astype(np.uint8)


def _paste(
    canvas: np.ndarray, glyph: np.ndarray, scales: tuple[int, ...], lattice: int, draw: np.random.Generator
) -> None:
    """Lay an enlarged glyph over the canvas at a random place of the lattice, in a random bright colour."""
    scale = scales[draw.integers(len(scales))]
    large = glyph.repeat(scale, 0).repeat(scale, 1).astype(np.int64)
    height, width = large.shape
    top = lattice * draw.integers(0, (canvas.shape[0] - height) // lattice + 1)
    left = lattice * draw.integers(0, (canvas.shape[1] - width) // lattice + 1)
    colour = draw.integers(128, 256, 3)
    here = canvas[top : top + height, left : left + width]
    ink = large[..., None]
    here[:] = (here * (240 - ink) + colour * ink) // 240
