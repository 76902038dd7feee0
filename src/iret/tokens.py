"""A ragged batch of tokens: all images one after another, each with as many tokens as it kept.

Axes, for the whole package: `B` batch, `T` tokens of all images, `N` tokens of one image, `K` tokens kept, `D` width,
`H` heads, `E` head width, `C` channels, `Y` rows, `X` columns.

    starts  0        5     8            13
            |c p p p p|c p p|c p p p p    |      c: class token (cell -1), p: patches in the order of their cells

Norms, projections and MLPs work on `x_TD` and never look at `starts`; `iret.attention.attend` does.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Tokens between two blocks; every image begins with its class token."""

    x_TD: Float[Tensor, "T D"]
    cell_T: Int[Tensor, " T"]  # grid cell it came from; -1 for the class token
    starts: Int[Tensor, " B1"]  # B + 1: where each image begins, and the end
    is_even: bool  # every image has T / B tokens, known without reading `starts`
    size_T: Float[Tensor, " T"] | None = None  # patches each token stands for, 0 is masked; None: all 1
    most: int | None = None  # tokens of the longest image, where it is known; reading it from `starts` waits for a GPU

    @property
    def batch_size(self) -> int:
        return self.starts.shape[0] - 1

    @property
    def width(self) -> int:
        """Tokens of the longest image."""
        if self.is_even:
            return self.cell_T.shape[0] // self.batch_size
        return int(self.starts.diff().max()) if self.most is None else self.most

    def with_x(self, x_TD: Float[Tensor, "T D"]) -> "Tokens":
        # `dataclasses.replace` takes longer, and every stage and transition waits for it at batch 1
        return Tokens(x_TD, self.cell_T, self.starts, self.is_even, self.size_T, self.most)

    def image_T(self) -> Int[Tensor, " T"]:
        """The image each token belongs to."""
        images = torch.arange(self.batch_size, device=self.starts.device)
        return images.repeat_interleave(self.starts.diff(), output_size=self.cell_T.shape[0])


def pack(x_BND: Float[Tensor, "B N D"]) -> Tokens:
    """A dense batch as Tokens: class token first, then patches of cells 0, 1, ..."""
    batch, count, width = x_BND.shape
    device = x_BND.device
    return Tokens(
        x_TD=x_BND.reshape(batch * count, width),
        cell_T=torch.arange(-1, count - 1, device=device).repeat(batch),
        starts=torch.arange(0, batch * count + 1, count, device=device),
        is_even=True,
    )


def pad_index(starts: Int[Tensor, " B1"], width: int) -> tuple[Int[Tensor, "B width"], Bool[Tensor, "B width"]]:
    """Where each of `width` places per image reads its token, and whether there is one (else it reads token 0)."""
    places = torch.arange(width, device=starts.device)
    is_live = places < starts.diff()[:, None]
    return (starts[:-1, None] + places) * is_live, is_live


def places_in_padded(starts: Int[Tensor, " B1"], width: int, count: int) -> Int[Tensor, " T"]:
    """Where each of `count` packed tokens stands when every image is padded to `width`, in [0, B * width)."""
    images = torch.arange(len(starts) - 1, device=starts.device)
    gap_B = images * width - starts[:-1]
    return torch.arange(count, device=starts.device) + gap_B.repeat_interleave(starts.diff(), output_size=count)
