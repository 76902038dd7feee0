"""A model cut into what an engine can run: one dense graph a stage, or one graph for everything with the thresholds as inputs.

    first stage    images                                          -> tokens, received, logits
    later stage    tokens of the patches that stay, their cells,
                   pixels of those that are looked at again        -> tokens, received, logits (the last: logits alone)

Between two stages the host chooses (`iret.runtime.session`), with the code that chooses for the model; the MLP of a stage's last
block, which each token passes by itself, is left to those that stay, in the next graph. Rows of `pixels` begin
with one of zeros: its details are zero and add exactly nothing, so `source` can point there for a patch that is not refined, and
no graph has an empty axis. Only plain gathers are used.

Read first: `blocks`. What engines cannot do: docs/export.md.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from iret.export.blocks import Blocks, Rest
from iret.lifting import Lifting, LinearLifting2d
from iret.model import Iret
from iret.runtime.cost import Shape
from iret.runtime.keep import ROUNDING_SHARE


class Coarse(nn.Module):
    """The coarsest band of every patch of images, flat, cell after cell, images side by side.

    Linear steps of all levels are one fixed matrix from a patch's pixels: more MACs than step by step, one product in place of
    many tiny ones; they stay below those of the embedding that follows. As a convolution it reads the pixels where they are.
    """

    kernel: Tensor

    def __init__(self, lifting: Lifting, shape: Shape) -> None:
        super().__init__()
        self.in_chans, self.patch_size = shape.in_chans, shape.patch_size
        self.is_linear = isinstance(lifting.levels[0], LinearLifting2d)
        if self.is_linear:
            kernel = lifting.matrix().t().contiguous()
            self.register_buffer("kernel", kernel.unflatten(1, (1, shape.patch_size, -1)))
        else:
            self.lifting = lifting

    def forward(self, images: Float[Tensor, "B C Y X"]) -> Float[Tensor, "K band"]:
        if not self.is_linear:
            return self.lifting.coarse(patches_of(images, self.patch_size)).flatten(1)
        channels = images.flatten(0, 1)[:, None]
        bands = F.conv2d(channels, self.kernel, stride=self.patch_size).unflatten(0, (-1, self.in_chans))
        return bands.permute(3, 4, 0, 1, 2).flatten(3).flatten(0, 2)


class Details(nn.Module):
    """The details that one level of lifting finds in patches, flat; of linear steps by one fixed matrix, as `Coarse`."""

    def __init__(self, lifting: Lifting, level: int) -> None:
        super().__init__()
        self.level, self.is_linear = level, isinstance(lifting.levels[0], LinearLifting2d)
        if self.is_linear:
            self.register_buffer("matrix", lifting.matrix(level))
        else:
            self.lifting = lifting

    def forward(self, patches: Float[Tensor, "K C P P"]) -> Float[Tensor, "K band"]:
        if not self.is_linear:
            return self.lifting.details(patches, self.level).flatten(1)
        return (patches.flatten(2) @ self.matrix).flatten(1)


def patches_of(images: Float[Tensor, "B C Y X"], side: int) -> Float[Tensor, "K C P P"]:
    """Patches of every cell, cell after cell, images side by side."""
    return images.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(2, 4, 0, 1, 3, 5).flatten(0, 2)


class StageGraph(nn.Module):
    """The blocks of one stage and its head, on a dense batch.

    `is_convolved`, here and below: linear layers of blocks whose tokens are wide are 1x1 convolutions.
    """

    def __init__(self, model: Iret, index: int, *, is_convolved: bool) -> None:
        super().__init__()
        stage, is_scored = model.stages[index], index < len(model.stages) - 1
        self.blocks = Blocks(stage, is_scored, is_convolved)
        self.rest = Rest(stage, is_convolved) if is_scored else nn.Identity()
        self.norm, self.head = stage.norm, stage.head

    def through(self, x: Float[Tensor, "NB D"], batch: int, bias: Float[Tensor, "B N"] | None) -> tuple[Tensor, ...]:
        """Tokens [N, B, D], received [B, N] (0 at class tokens) and logits; of the last stage the logits alone."""
        x, received = self.blocks(x, batch, None if bias is None else bias[:, None, None])
        logits = self.head(self.norm(self.rest(x[:batch])))  # the class tokens come first
        return (logits,) if received is None else (x.reshape(-1, batch, x.shape[1]), F.pad(received, (1, 0)), logits)


class FirstStage(StageGraph):
    """From images to the first choice: the coarse band of every patch, thin tokens."""

    def __init__(self, model: Iret, *, is_convolved: bool = False) -> None:
        super().__init__(model, 0, is_convolved=is_convolved)
        self.num_cells = model.shape.num_patches
        self.coarse = Coarse(model.lifting, model.shape)
        self.patch_embed = model.patch_embed
        class_token, positions = model.pos_embed.detach()[0, :, None].tensor_split([1])
        self.register_buffer("class_token", class_token.clone())
        self.register_buffer("positions", positions.clone())

    def embed(self, images: Float[Tensor, "B C Y X"]) -> Float[Tensor, "NB D"]:
        """Class tokens, and tokens cell after cell, images side by side."""
        x = self.patch_embed(self.coarse(images)).reshape(self.num_cells, images.shape[0], -1) + self.positions
        return torch.cat([self.class_token.expand(-1, images.shape[0], -1), x]).flatten(0, 1)

    def forward(self, images: Float[Tensor, "B C Y X"]) -> tuple[Tensor, ...]:
        return self.through(self.embed(images), images.shape[0], None)


class LaterStage(StageGraph):
    """From the tokens that stay to the next choice: wider, with details where it looked again."""

    def __init__(self, model: Iret, index: int, *, is_convolved: bool = False) -> None:
        super().__init__(model, index, is_convolved=is_convolved)
        self.before = Rest(model.stages[index - 1], is_convolved)
        self.transition = model.transitions[index - 1]
        self.details = Details(model.lifting, model.shape.detail_level(index))

    def transit(
        self, x: Float[Tensor, "NB D"], place: Int[Tensor, " NB"], pixels: Tensor, source: Int[Tensor, " NB"]
    ) -> Float[Tensor, "NB E"]:
        """`place`: 0 of class tokens, 1 + cell of patches. `source`: the row of `pixels` whose details it gets, 0 for none."""
        own: Any = self.transition
        extra = own.detail_embed(own.detail_norm(self.details(pixels)))
        added = own.pos_embed[0].index_select(0, place) + extra.index_select(0, source)
        return own.widen(own.norm(self.before(x))) + added

    def forward(
        self,
        x: Float[Tensor, "N B D"],
        cell: Int[Tensor, "N B"],
        pixels: Float[Tensor, "R C P P"],
        source: Int[Tensor, "N B"],
        bias: Float[Tensor, "B N"],
    ) -> tuple[Tensor, ...]:
        x_TD = self.transit(x.flatten(0, 1), cell.flatten() + 1, pixels, source.flatten())
        return self.through(x_TD, x.shape[1], bias)


class SingleGraph(nn.Module):
    """Everything in one graph for one image, the thresholds among its inputs: drops by `nonzero` and plain gathers.

    Returns the logits and, of each transition, the tokens that stay, those looked at again, and importance of all before it,
    in the order of `output_names`. Tokens are numbered: 0 the class token, 1 + cell a patch. The class token leads each list; its
    importance is infinite and its pixels are zero, so that it stays and no detail is added to it.
    No early exit, rule "threshold" only.
    """

    def __init__(self, model: Iret, *, is_convolved: bool = False) -> None:
        super().__init__()
        self.first = FirstStage(model, is_convolved=is_convolved)
        self.later = nn.ModuleList(
            LaterStage(model, index, is_convolved=is_convolved) for index in range(1, len(model.stages))
        )
        self.num_cells, self.min_keep = model.shape.num_patches, model.shape.min_keep
        self.patch_size = model.shape.patch_size
        steps = range(1, len(model.stages))
        self.output_names = (
            "logits",
            *(f"{each}_{step}" for step in steps for each in ("kept", "refined", "importance")),
        )

    def choose(self, importance: Float[Tensor, " N"], thresholds: Float[Tensor, " 2"]) -> tuple[Tensor, Tensor]:
        """Rows of the tokens that stay, and which of them are refined, the class token among both."""
        keep, refine = thresholds
        floor = importance.topk(1 + self.min_keep).values[-1]
        rows = (importance >= torch.minimum(keep, floor)).nonzero().flatten()
        torch._check(rows.shape[0] >= self.min_keep + 1)
        torch._check(rows.shape[0] <= self.num_cells + 1)
        return rows, ((importance >= refine) | (refine <= keep)).index_select(0, rows)

    def forward(self, images: Float[Tensor, "1 C Y X"], thresholds: Float[Tensor, "T 2"]) -> tuple[Tensor, ...]:
        x, received = self.first.blocks(self.first.embed(images), 1, None)
        patches = patches_of(images, self.patch_size)
        pixels = torch.cat([torch.zeros_like(patches[:1]), patches])
        tokens, thresholds, seen = torch.arange(1 + self.num_cells), thresholds - ROUNDING_SHARE, []
        for index, stage in enumerate(self.later):
            patch = received[0]
            importance = F.pad(patch * (patch.shape[0] / patch.sum()), (1, 0), value=torch.inf)
            rows, is_refined = self.choose(importance, thresholds[index])
            tokens, x = tokens.index_select(0, rows), x.index_select(0, rows)
            again = is_refined.nonzero().flatten()
            torch._check(again.shape[0] <= self.num_cells + 1)
            refined = tokens.index_select(0, again)
            source = (is_refined.long().cumsum(0) - 1) * is_refined
            x = stage.transit(x, tokens, pixels.index_select(0, refined), source)
            seen += [tokens, refined, importance]
            x, received = stage.blocks(x, 1, None)
        return stage.head(stage.norm(x[:1])), *seen
