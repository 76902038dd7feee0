"""A model cut into what an engine can run: one dense graph a stage, or one graph for everything with the thresholds as inputs.

    first stage    images                                          -> tokens, received, logits
    later stage    tokens of the patches that stay, their cells,
                   pixels of those that are looked at again        -> tokens, received, logits (the last: logits alone)

Between two stages the host chooses (`iret.runtime.session`), with the code that chooses for the model. Rows of `pixels` begin
with one of zeros: its details are zero and add exactly nothing, so `source` can point there for a patch that is not refined, and
no graph has an empty axis. Only plain gathers are used, and the class token's row of attention is computed beside the
fused kernel, as in the model.

Read first: `model`. What engines cannot do: docs/export.md.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from iret.attention import Dense
from iret.lifting import Lifting, LinearLifting2d
from iret.model import Iret, Stage
from iret.runtime.cost import Shape
from iret.runtime.keep import ROUNDING_SHARE


class CoarseBand(nn.Module):
    """The coarsest band of patches, linear update steps of all levels as one fixed matrix."""

    def __init__(self, lifting: Lifting, shape: Shape) -> None:
        super().__init__()
        self.lifting = None if isinstance(lifting.levels[0], LinearLifting2d) else lifting
        if self.lifting is None:
            unit = torch.eye(shape.patch_size**2).view(-1, 1, shape.patch_size, shape.patch_size)
            self.register_buffer("matrix", lifting.coarse(unit.expand(-1, shape.in_chans, -1, -1))[:, 0].flatten(1))

    def forward(self, patches: Float[Tensor, "K C P P"]) -> Float[Tensor, "K channels"]:
        if self.lifting is not None:
            return self.lifting.coarse(patches).flatten(1)
        return (patches.flatten(2) @ self.matrix).flatten(1)


class Details(nn.Module):
    """Details of one level, read from the pixels; linear steps of all finer levels as two fixed matrices."""

    def __init__(self, lifting: Lifting, level: int) -> None:
        super().__init__()
        self.level = level
        self.lifting = None if isinstance(lifting.levels[0], LinearLifting2d) else lifting
        if self.lifting is None:
            *finer, last = lifting.levels[:level]
            for axis in ("height", "width"):
                matrix = getattr(last, axis).matrix()
                for step in reversed(finer):
                    matrix = matrix @ getattr(step, axis).coarse_matrix()
                self.register_buffer(axis, matrix)

    def forward(self, pixels: Float[Tensor, "R C P P"]) -> Float[Tensor, "R details"]:
        if self.lifting is not None:
            return self.lifting.details(pixels, self.level).flatten(1)
        bands = self.height @ (pixels @ self.width.mT)
        top, bottom = bands.chunk(2, dim=-2)
        (_, hl), (lh, hh) = top.chunk(2, dim=-1), bottom.chunk(2, dim=-1)
        return torch.stack([lh, hl, hh], dim=2).flatten(1)


class StageGraph(nn.Module):
    """The blocks of one stage and its head, on a dense batch."""

    def __init__(self, stage: Stage, is_last: bool) -> None:
        super().__init__()
        self.stage, self.is_last = stage, is_last

    def through(self, x: Float[Tensor, "B N D"], bias: Float[Tensor, "B N"] | None) -> tuple[Tensor, ...]:
        """Tokens, received [B, N] (0 at class tokens) and logits; of the last stage the logits alone."""
        x, received = self.stage.through(x, Dense(bias), is_scored=not self.is_last)
        logits = self.stage.head(self.stage.norm(x[:, 0]))
        return (logits,) if received is None else (x, received, logits)


class FirstStage(StageGraph):
    """From images to the first choice: the coarse band of every patch, thin tokens."""

    def __init__(self, model: Iret) -> None:
        super().__init__(model.stages[0], is_last=len(model.stages) == 1)
        self.grid, self.patch_size = model.shape.grid, model.shape.patch_size
        self.coarse = CoarseBand(model.lifting, model.shape)
        self.patch_embed, self.pos_embed = model.patch_embed, model.pos_embed

    def embed(self, images: Float[Tensor, "B C Y X"]) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "K C P P"]]:
        """Tokens of all patches, and the patches."""
        (rows, columns), side = self.grid, self.patch_size
        grid = images.unflatten(3, (columns, side)).unflatten(2, (rows, side))
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        x = self.patch_embed(self.coarse(patches)).unflatten(0, (-1, rows * columns))
        class_token = self.pos_embed[:, :1].expand(images.shape[0], -1, -1)
        return torch.cat([class_token, x + self.pos_embed[:, 1:]], dim=1), patches

    def forward(self, images: Float[Tensor, "B C Y X"]) -> tuple[Tensor, ...]:
        return self.through(self.embed(images)[0], None)


class LaterStage(StageGraph):
    """From the tokens that stay to the next choice: wider, with details where it looked again."""

    def __init__(self, model: Iret, index: int) -> None:
        super().__init__(model.stages[index], is_last=index == len(model.stages) - 1)
        self.transition = model.transitions[index - 1]
        self.details = Details(model.lifting, model.shape.detail_level(index))

    def transit(
        self, x: Tensor, cell: Int[Tensor, "B N"], pixels: Float[Tensor, "R C P P"], source: Int[Tensor, "B N"]
    ) -> Float[Tensor, "B N E"]:
        """`cell` is -1 for class tokens; `source` the row of `pixels` whose details a token gets, 0 for none."""
        own = self.transition
        extra = own.detail_embed(own.detail_norm(self.details(pixels)))
        place = own.pos_embed[0].index_select(0, cell.flatten() + 1) + extra.index_select(0, source.flatten())
        return own.widen(own.norm(x)) + place.unflatten(0, cell.shape)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        cell: Int[Tensor, "B N"],
        pixels: Float[Tensor, "R C P P"],
        source: Int[Tensor, "B N"],
        bias: Float[Tensor, "B N"],
    ) -> tuple[Tensor, ...]:
        return self.through(self.transit(x, cell, pixels, source), bias)


class SingleGraph(nn.Module):
    """Everything in one graph for one image, the thresholds among its inputs: drops by `nonzero` and plain gathers.

    Returns the logits, and kept and refined patches as float [S, cells]. No early exit, rule "threshold" only.
    """

    def __init__(self, model: Iret) -> None:
        super().__init__()
        self.first = FirstStage(model)
        self.later = nn.ModuleList(LaterStage(model, index) for index in range(1, len(model.stages)))
        self.num_cells, self.min_keep = model.shape.num_patches, model.shape.min_keep

    def choose(
        self, received: Float[Tensor, " N"], thresholds: Float[Tensor, " 2"]
    ) -> tuple[Int[Tensor, " n"], Tensor, Tensor]:
        """Places of the tokens that stay, class token first; and which of them are refined."""
        patches = received[1:]
        importance = patches * (patches.shape[0] / patches.sum())
        keep, refine = thresholds - ROUNDING_SHARE
        floor = importance.topk(self.min_keep).values[-1]
        kept = importance >= torch.minimum(keep, floor)
        refined = (importance >= refine) | (refine <= keep)
        always = torch.ones_like(kept[:1])
        rows = torch.cat([always, kept]).nonzero().flatten()
        torch._check(rows.shape[0] >= self.min_keep + 1)
        torch._check(rows.shape[0] <= self.num_cells + 1)
        return rows, torch.cat([~always, refined]).index_select(0, rows)

    def forward(
        self, images: Float[Tensor, "1 C Y X"], thresholds: Float[Tensor, "T 2"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, patches = self.first.embed(images)
        x, received, _ = self.first.through(x, None)
        patches = torch.cat([torch.zeros_like(patches[:1]), patches])
        cell = torch.arange(-1, self.num_cells)
        everywhere = torch.ones(self.num_cells)
        kept, refined = [everywhere], [torch.zeros(self.num_cells)]
        for index, stage in enumerate(self.later):
            rows, is_refined = self.choose(received[0], thresholds[index])
            cell, x = cell.index_select(0, rows), x.index_select(1, rows)
            again = is_refined.nonzero().flatten()
            torch._check(again.shape[0] <= self.num_cells)
            read = torch.cat([torch.zeros_like(cell[:1]), cell.index_select(0, again) + 1])
            source = is_refined.long().cumsum(0) * is_refined
            x = stage.transit(x, cell[None], patches.index_select(0, read), source[None])
            kept.append(torch.zeros(self.num_cells + 1).index_fill(0, cell + 1, 1.0)[1:])
            refined.append(torch.zeros(self.num_cells + 1).index_fill(0, read, 1.0)[1:])
            outputs = stage.through(x, None)
            if len(outputs) > 1:
                x, received, _ = outputs
        return outputs[-1], torch.stack(kept), torch.stack(refined)
