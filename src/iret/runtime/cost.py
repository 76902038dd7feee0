"""Closed-form multiply-accumulates (MACs) of an Iret, from a frozen shape and token counts.

A MAC is one multiply and one add of a matrix product or convolution, the convention of torch's `FlopCounterMode` (which
reports twice this number) and of fvcore. Norms, softmax, GELU and sums are not counted, by them or by us. Per block of
`n` tokens (class token included) and width `D`:  12 n D^2 + 2 n^2 D  at an MLP ratio of 4;  8 of the 12 are its MLP (2 n D H
of one H channels wide), which in the last block of a stage that chooses only the tokens pass that stay.

Counts may be Python ints or integer arrays of any shape, one entry per image. Read next: `points`.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache, cached_property
from typing import Any

import numpy as np

LIFTINGS = ("linear", "haar", "dawn")
IMPORTANCES = ("cls", "column")

Count = Any  # int or integer array: one number per image


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Everything that decides what an Iret computes; sizes in pixels, `embed_dims` and `depths` one entry per stage.

    An MLP is `mlp_ratio` times as wide inside as the tokens, which has to be whole; `iret.narrow` lowers it in a trained model.
    `scored_blocks` is how many of a stage's last blocks the class row is read in; the column mean is read in the last alone.
    A model of S stages lifts each patch over S - 1 levels, so `patch_size` is divisible by 2^(S - 1).
    """

    img_size: tuple[int, int]
    patch_size: int
    in_chans: int
    num_classes: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    head_dim: int = 32
    mlp_ratio: int | float = 4
    lifting: str = "linear"
    importance: str = "cls"
    scored_blocks: int = 2

    def __post_init__(self) -> None:
        for name in ("img_size", "embed_dims", "depths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists are welcome; a shape is hashed
        rows, columns = self.img_size
        if min(rows, columns) < self.patch_size or rows % self.patch_size or columns % self.patch_size:
            raise ValueError(
                f"img_size={rows}x{columns} is not a whole number of {self.patch_size} px patches; "
                f"choose multiples of {self.patch_size}."
            )
        if len(self.embed_dims) != len(self.depths) or len(self.depths) < 2 or min(self.depths) < 1:
            raise ValueError(
                f"embed_dims={self.embed_dims} and depths={self.depths} need one entry per stage, two stages or more."
            )
        if self.patch_size % 2**self.levels:
            raise ValueError(
                f"patch_size={self.patch_size} cannot be halved {self.levels} times; {len(self.depths)} stages need "
                f"a multiple of {2**self.levels}."
            )
        if any(dim % self.head_dim for dim in self.embed_dims) or list(self.embed_dims) != sorted(self.embed_dims):
            raise ValueError(
                f"embed_dims={self.embed_dims} must not shrink and be multiples of head_dim={self.head_dim}."
            )
        for value, names, what in (
            (self.lifting, LIFTINGS, "lifting"),
            (self.importance, IMPORTANCES, "importance"),
        ):
            if value not in names:
                raise ValueError(f"{what}={value!r} is unknown; choose from {', '.join(names)}.")
        for name, least in (("in_chans", 1), ("num_classes", 0), ("scored_blocks", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if not 0 < self.mlp_ratio < math.inf or any(self.mlp_ratio * dim % 1 for dim in self.embed_dims):
            raise ValueError(
                f"mlp_ratio={self.mlp_ratio:g} must be above 0 and make MLPs of whole widths of embed_dims={self.embed_dims}, "
                "as 1 and 2 do."
            )

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        """Without what is remembered: words hash differently in another process."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def _hash(self) -> int:
        """Tables are kept by shape, and looked up while an engine waits."""
        return hash(astuple(self))

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Shape":
        """From JSON, where tuples are lists."""
        fixed: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()
        }
        return cls(**fixed)

    @cached_property
    def levels(self) -> int:
        return len(self.depths) - 1

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @cached_property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @cached_property
    def min_keep(self) -> int:
        """Patches that always stay: 8 of 196, never fewer than 4."""
        return max(4, self.num_patches // 24)

    def mlp_dim(self, stage: int) -> int:
        """Channels inside an MLP of `stage`."""
        return int(self.mlp_ratio * self.embed_dims[stage])

    def side(self, level: int) -> int:
        """Pixels along one side of a patch's approximation after `level` lifting levels."""
        return self.patch_size // 2**level

    def detail_level(self, stage: int) -> int:
        """The lifting level whose details enter at `stage` (1, 2, ...): coarse ones first."""
        return self.levels - stage + 1


def level_macs(shape: Shape, level: int, with_details: bool) -> int:
    """One lifting level of one patch: its coarse band alone, or all four bands."""
    half = shape.side(level)
    channels, side = shape.in_chans, 2 * half
    if shape.lifting == "dawn":  # two small convolutions a position, along the width and then along the height
        position = 4 * channels * 2 * channels + 2 * channels * channels
        return position * half * (2 * (side + side) if with_details else side + half)
    made = side if with_details else half  # rows of the step's matrix; it has `side` columns
    return channels * (side * side * made + made * side * made)


def coarse_macs(shape: Shape) -> int:
    """The coarsest band of one patch; linear update steps of all levels are one matrix."""
    if shape.lifting == "dawn":
        return sum(level_macs(shape, level, with_details=False) for level in range(1, shape.levels + 1))
    return shape.in_chans * shape.patch_size**2 * shape.side(shape.levels) ** 2


def detail_macs(shape: Shape, level: int) -> int:
    """The details of one level of one patch, from its pixels."""
    finer = sum(level_macs(shape, earlier, with_details=False) for earlier in range(1, level))
    return finer + level_macs(shape, level, with_details=True)


def block_macs(shape: Shape, stage: int, tokens: Count) -> Count:
    """One block of `stage` on `tokens` tokens, the class token included."""
    dim = shape.embed_dims[stage]
    return 4 * tokens * dim * dim + 2 * tokens * tokens * dim + mlp_macs(shape, stage, tokens)


def mlp_macs(shape: Shape, stage: int, tokens: Count) -> Count:
    """The MLP of one block of `stage`."""
    return 2 * tokens * shape.embed_dims[stage] * shape.mlp_dim(stage)


def scoring_macs(shape: Shape, stage: int, tokens: Count) -> Count:
    """Reading the importance off the last blocks of `stage`."""
    dim = shape.embed_dims[stage]
    if shape.importance == "column":
        return tokens * (tokens - 1) * dim
    return min(shape.scored_blocks, shape.depths[stage]) * (tokens - 1) * dim


def embed_macs(shape: Shape) -> int:
    """Coarse lifting and first embedding of all patches of one image."""
    coarse_size = shape.in_chans * shape.side(shape.levels) ** 2
    return shape.num_patches * (coarse_macs(shape) + coarse_size * shape.embed_dims[0])


def transition_macs(shape: Shape, stage: int, kept: Count, refined: Count) -> Count:
    """Widening `kept` patches and the class token into `stage`, adding details to `refined` of them."""
    level = shape.detail_level(stage)
    detail_size = 3 * shape.in_chans * shape.side(level) ** 2
    dim = shape.embed_dims[stage]
    widen = (kept + 1) * shape.embed_dims[stage - 1] * dim
    return widen + refined * (detail_macs(shape, level) + detail_size * dim)


def stage_macs(
    shape: Shape,
    stage: int,
    kept: Count,
    refined: Count,
    *,
    scored: bool,
    has_rest: bool | None = None,
    head: bool = True,
) -> Count:
    """MACs of one stage with what leads into it; `kept` and `refined` count patches, without the class token.

    If `scored`, the last block's MLP counts in the next stage, for the tokens that stay, and here only for the class token, where
    a head needs it; the last stage has no such end. `has_rest`: the stage before left its MLP to this one; None: as `scored`.
    """
    lead_in = embed_macs(shape) if stage == 0 else transition_macs(shape, stage, kept, refined)
    tokens = kept + 1
    total = lead_in + shape.depths[stage] * block_macs(shape, stage, tokens)
    if stage and (scored if has_rest is None else has_rest):
        total = total + mlp_macs(shape, stage - 1, tokens)
    if scored and stage < len(shape.depths) - 1:
        total = total + scoring_macs(shape, stage, tokens) - mlp_macs(shape, stage, tokens - 1 if head else tokens)
    if head:
        total = total + shape.embed_dims[stage] * shape.num_classes
    return total


@cache
def coefficients(shape: Shape, scored: bool) -> tuple[tuple[int, int, int, int], ...]:
    """Of each stage, whose MACs are  a + b kept + c kept^2 + d refined:  (a, b, c, d), read off `stage_macs` at four points."""
    rows = []
    for stage in range(len(shape.depths)):
        none, one, two, refined = (
            int(stage_macs(shape, stage, kept, refined, scored=scored))
            for kept, refined in ((0, 0), (1, 0), (2, 0), (0, 1))
        )
        square = (two - 2 * one + none) // 2
        rows.append((none, one - none - square, square, refined - none))
    return tuple(rows)


@cache
def _columns(shape: Shape, scored: bool) -> np.ndarray:
    """The same, int64 [4, S, 1]."""
    return np.array(coefficients(shape, scored), dtype=np.int64).T[..., None]


def macs(shape: Shape, kept: Count, refined: Count, *, scored: Any, stages_run: Count | None = None) -> np.ndarray:
    """MACs of `Iret.run` per image, int64 [B].

    `kept` and `refined` are [S, B] patches in each stage (`kept[0]` is all of them, `refined[0]` is not read); `scored`,
    a bool or [B], says whether tokens were chosen; `stages_run` [B] counts the stages an image passed before it exited.
    """
    kept, refined = np.asarray(kept, dtype=np.int64), np.asarray(refined, dtype=np.int64)
    constant, linear, square, detail = np.where(scored, _columns(shape, True), _columns(shape, False))
    spent = constant + (linear + square * kept) * kept + detail * refined
    if stages_run is not None:
        spent = spent * (np.arange(len(spent))[:, None] < np.asarray(stages_run))
    return spent.sum(0)


def plan_macs(shape: Shape, kept: Sequence[int], refined: Sequence[int], *, scored: bool) -> int:
    """`macs` of one image that passed `len(kept)` stages with so many patches kept and refined in each."""
    counts = zip(coefficients(shape, scored), kept, refined, strict=False)
    return sum(
        constant + (linear + square * here) * here + detail * again
        for (constant, linear, square, detail), here, again in counts
    )


def full_macs(shape: Shape) -> int:
    """MACs of `model(images)` on one image: nothing scored or dropped, only the last head."""
    num_stages = len(shape.depths)
    every = shape.num_patches
    return sum(
        int(stage_macs(shape, stage, every, every, scored=False, head=stage == num_stages - 1))
        for stage in range(num_stages)
    )


def numbers_moved(shape: Shape, kept: Sequence[int], refined: Sequence[int] | None = None, *, scored: bool) -> int:
    """Numbers to and from memory for one image that passed `len(kept)` stages at batch 1; `refined` None: all that is kept.

    Every weight of a linear layer and of the lifting is read once, every input and output of a linear layer moved once; all
    else stays on the chip: the lifting, between the pixels it reads and the layer that takes its bands; biases; norms.
    `scored`: whether tokens were chosen.
    """
    pixels, coarse_size = shape.in_chans * shape.patch_size**2, shape.in_chans * shape.side(shape.levels) ** 2
    total = lifting_weights(shape) + block_linears(shape, kept, scored=scored)[0] + shape.embed_dims[0] * coarse_size
    total += shape.num_patches * (pixels + shape.embed_dims[0])
    for stage, patches in enumerate(kept):
        dim = shape.embed_dims[stage]
        total += shape.depths[stage] * 6 * (patches + 1) * dim  # attention's
        total += 2 * _mlp_tokens(shape, kept, stage, scored) * (dim + shape.mlp_dim(stage))
        if shape.num_classes:
            total += dim * shape.num_classes + dim + shape.num_classes
        if stage:
            before, detail_size = (
                shape.embed_dims[stage - 1],
                3 * shape.in_chans * shape.side(shape.detail_level(stage)) ** 2,
            )
            again = patches if refined is None else refined[stage]
            total += (before + detail_size) * dim + (patches + 1) * (before + dim) + again * (pixels + dim)
    return total


def block_linears(shape: Shape, kept: Sequence[int], *, scored: bool) -> tuple[int, int]:
    """(weights, MACs) of the linear layers of the blocks, which `iret.precision` may round to int8, as `numbers_moved` counts."""
    weights = work = 0
    for stage, (dim, depth, patches) in enumerate(zip(shape.embed_dims, shape.depths, kept, strict=False)):
        weights += depth * (4 * dim**2 + 2 * dim * shape.mlp_dim(stage))
        work += 4 * depth * (patches + 1) * dim**2
        work += mlp_macs(shape, stage, _mlp_tokens(shape, kept, stage, scored))
    return weights, work


def _mlp_tokens(shape: Shape, kept: Sequence[int], stage: int, scored: bool) -> int:
    """Tokens that pass MLPs of `stage`, over all its blocks; if scored, of the last those that stay, and the head's own."""
    here = kept[stage] + 1
    if not scored or stage == len(shape.depths) - 1:
        return shape.depths[stage] * here
    stay = kept[stage + 1] + 1 if stage + 1 < len(kept) else 0
    return (shape.depths[stage] - 1) * here + stay + 1


def lifting_weights(shape: Shape) -> int:
    """Of all levels: four operators each, of three taps (linear), of none (Haar), or of two convolutions (DAWN)."""
    each = {"linear": 3, "haar": 0, "dawn": 10 * shape.in_chans**2}[shape.lifting]
    return shape.levels * 4 * each
