"""Iret: look coarsely everywhere, let attention choose where to look again, sample detail only there, drop the rest.

    image -> patches -> update steps (lifting) -> coarse band of every patch
      stage 1  blocks on all patches, thin tokens; the class token's attention says what matters   -> head 1
      transition: drop below the keep threshold, and only then the stage's last MLP; widen, add details above the refine threshold
      stage 2  wider blocks on fewer tokens                                                        -> head 2
      ...      until the last stage                                                                -> head S

One trained model serves every threshold; at threshold 0 nothing is dropped. Reads top to bottom; what a keep rule does
is in `runtime.choice`, what it costs in `runtime.cost`, what stands around it (labels, points, folder) in `classifier`.

Source: "Incremental Resolution Enhancing Transformer" (IRET), GLSVLSI 2024, pp. 620-625, abstract. Widths, depths, the
form of the transition, the accumulation of attention and the auxiliary heads are ours (the full text was not available); early
exit is the journal version's anytime prediction; to drop between attention and MLP is EViT's (Liang et al. 2022, abstract).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from iret.attention import ATTENTIONS, head_shares, receive
from iret.classifier import Classifier
from iret.compiled import compile_parts, run_in_parts
from iret.lifting import Lifting, lifting_penalty
from iret.output import Output, Record
from iret.runtime.choice import Layout, choose, to_importance
from iret.runtime.cost import Shape
from iret.runtime.keep import check_dials, read_exits, read_strengths
from iret.runtime.points import Plan, Point
from iret.runtime.timing import strengths_of
from iret.selection import check_control, replace_importance, select, take_images
from iret.tokens import Tokens, pack
from iret.vit import NORM_EPS, Block, init_linear, sincos_positions

Budget = float | Sequence[float] | np.ndarray | Tensor  # one for all images, or one an image


class Stage(nn.Module):
    """Blocks of one width, with the head that can answer after them."""

    head_shares: Tensor

    def __init__(self, shape: Shape, index: int, attention: str, drop_path_rates: list[float]) -> None:
        super().__init__()
        dim = shape.embed_dims[index]
        self.importance = shape.importance
        self.num_scored = min(shape.scored_blocks, shape.depths[index]) if shape.importance == "cls" else 1
        heads = dim // shape.head_dim
        self.blocks = nn.ModuleList(
            Block(dim, heads, shape.mlp_dim(index), rate, ATTENTIONS[attention]) for rate in drop_path_rates
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.head = nn.Linear(dim, shape.num_classes) if shape.num_classes else nn.Identity()
        self.register_buffer("head_shares", head_shares(self.num_scored, heads), persistent=False)

    def forward(
        self, tokens: Tokens, is_scored: bool, is_rest: bool = False
    ) -> tuple[Tokens, Float[Tensor, " T"] | None]:
        """The tokens; if scored before the last MLP, and the attention received. `is_rest`: those that stay, after that MLP."""
        if is_rest:
            return tokens.with_x(self.blocks[-1].mlp_half(tokens.x_TD, tokens)), None
        is_dense = tokens.is_even and tokens.size_T is None
        x = tokens.x_TD.unflatten(0, (tokens.batch_size, -1)) if is_dense else tokens.x_TD
        found, unscored = [], len(self.blocks) - self.num_scored if is_scored else len(self.blocks)
        for place, block in enumerate(self.blocks):
            step = block.attention_half if is_scored and block is self.blocks[-1] else block
            x, evidence = step(x, None if is_dense else tokens, None if place < unscored else self.importance)
            if evidence is not None:
                found.append(evidence.logits)
        return tokens.with_x(x.flatten(0, -2)), receive(found, tokens, self.head_shares) if found else None

    def answer(self, tokens: Tokens, is_scored: bool = False) -> Float[Tensor, "B classes"]:
        """Logits. `is_scored`: the tokens were, so class tokens pass the rest here; in training by a drop path of their own."""
        first_BD = tokens.x_TD[:1] if tokens.batch_size == 1 else tokens.x_TD[tokens.starts[:-1]]
        if is_scored:
            first_BD = self.blocks[-1].mlp_half(first_BD[:, None], None)[:, 0]
        return self.head(self.norm(first_BD))


class Transition(nn.Module):
    """Widens the tokens that stay and adds the details of those that are looked at again.

    t <- W LN(t) + E LN(details) + position; W starts as [I; 0], so that the old channels pass and new ones are added.
    The norm of the details has no scale or shift: an unrefined patch, all details 0, adds exactly nothing.
    """

    def __init__(self, shape: Shape, stage: int) -> None:
        super().__init__()
        before, dim = shape.embed_dims[stage - 1], shape.embed_dims[stage]
        detail_size = 3 * shape.in_chans * shape.side(shape.detail_level(stage)) ** 2
        self.norm = nn.LayerNorm(before, eps=NORM_EPS)
        self.widen = nn.Linear(before, dim)
        self.detail_norm = nn.LayerNorm(detail_size, elementwise_affine=False)
        self.detail_embed = nn.Linear(detail_size, dim, bias=False)
        self.pos_embed = nn.Parameter(sincos_positions(shape.grid, dim))

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.detail_embed.weight, std=self.detail_embed.in_features**-0.5)
        with torch.no_grad():
            self.widen.weight.copy_(torch.eye(*self.widen.weight.shape))

    def forward(self, tokens: Tokens, details: Float[Tensor, "K *band"], rows: Int[Tensor, " K"] | None) -> Tokens:
        """`details` are those of the tokens in `rows`; None: of the first patches of each image, as many in all of them."""
        x = self.widen(self.norm(tokens.x_TD)) + self.pos_embed[0].index_select(0, tokens.cell_T + 1)
        extra = self.detail_embed(self.detail_norm(details.flatten(1))).to(x.dtype)
        if rows is None:
            each = len(details) // tokens.batch_size
            x.unflatten(0, (tokens.batch_size, -1))[:, 1 : 1 + each] += extra.unflatten(0, (-1, each))
        else:
            x.index_add_(0, rows, extra)
        return tokens.with_x(x)


class Iret(Classifier):
    """The model. `model(images)` is a drop-in classifier; `model.run` also says what was looked at and what it cost."""

    def __init__(
        self, shape: Shape, *, attention: str = "softmax", drop_path_rate: float = 0.0, name: str = "iret"
    ) -> None:
        super().__init__(shape, attention=attention, name=name)
        if attention not in ATTENTIONS:
            raise ValueError(f"attention={attention!r} is unknown; choose from {', '.join(ATTENTIONS)}.")
        rates = torch.linspace(0, drop_path_rate, sum(shape.depths)).split(shape.depths)
        self.lifting = Lifting(shape.lifting, shape.in_chans, shape.patch_size, shape.levels)
        self.patch_embed = nn.Linear(shape.in_chans * shape.side(shape.levels) ** 2, shape.embed_dims[0])
        self.pos_embed = nn.Parameter(sincos_positions(shape.grid, shape.embed_dims[0]))
        self.stages = nn.ModuleList(Stage(shape, index, attention, rate.tolist()) for index, rate in enumerate(rates))
        self.transitions = nn.ModuleList(Transition(shape, stage) for stage in range(1, len(shape.depths)))
        init_linear(self)
        nn.init.trunc_normal_(self.patch_embed.weight, std=self.patch_embed.in_features**-0.5)
        for transition in self.transitions:
            transition.init_weights()

    # ---- looking

    def forward(
        self,
        images: Float[Tensor, "B C Y X"],
        budget: Budget = 1.0,
        *,
        ms: float | None = None,
        joules: float | None = None,
    ) -> Float[Tensor, "B classes"]:
        """Logits; `budget` in (0, 1] is the share of the full MACs to spend in the mean, one for all or [B], one an image.

        In its place `ms` or `joules` an image, in the mean at batch 1 on this device (`iret calibrate`).

        Raises:
            ValueError: no operating points, a budget outside (0, 1] or below the cheapest of them, a device without a clock.
        """
        if torch.compiler.is_dynamo_compiling():  # by torch.compile(model), which would trace the choice, too
            return run_in_parts(self, images, budget, ms=ms, joules=joules)
        if ms is not None or joules is not None:
            if not (isinstance(budget, (int, float)) and budget == 1):
                raise ValueError("give one of budget, ms and joules.")
            budget = self.budget_for(ms=ms, joules=joules)
        if isinstance(budget, (int, float, np.number)) and budget == 1:
            return self.stages[-1].head(self.forward_features(images)[:, 0])
        self.check_images(images)
        thresholds, confidence = self._look_up(budget, len(images))
        strengths = read_strengths(thresholds, len(images), len(self.transitions))
        return self._answer(images, strengths, read_exits(confidence, len(images), len(self.transitions)))

    def _answer(
        self, images: Tensor, strengths: np.ndarray, exits: np.ndarray | None, rule: str = "threshold"
    ) -> Tensor:
        """The logits alone of what `run` describes."""
        if exits is None:
            return self.look(images, strengths, rule=rule)
        record = Record(self.shape, len(images), images.device)
        self.look(images, strengths, record, exits, rule=rule)
        return record.answer()

    def _look_up(self, budget: Budget, batch: int) -> tuple[object, object]:
        """Thresholds and exit confidence, as `run` takes them, for a budget or one an image."""
        if isinstance(budget, (int, float, np.number)):
            setting = self.setting(float(budget))
            return setting.thresholds, setting.exit_confidence
        if not isinstance(budget, (list, tuple, np.ndarray, Tensor)):
            raise ValueError(f"budget={budget!r} must be one number, or one an image.")
        try:
            if not isinstance(budget, Tensor):
                budget = torch.from_numpy(np.array(budget, dtype=np.float64, order="C"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"budget={budget!r} must be one number, or one an image.") from error
        budget = budget if budget.ndim else budget.expand(batch)
        if budget.shape != (batch,):
            raise ValueError(f"budget of shape {tuple(budget.shape)} does not fit {batch} images; give one each.")
        settings = [self.setting(each) for each in budget.tolist()]
        thresholds = np.array([setting.thresholds for setting in settings], dtype=np.float64)
        exits = [setting.exit_confidence for setting in settings]
        if all(each is None for each in exits):
            return thresholds, None
        return thresholds, np.array([np.inf if each is None else each for each in exits])

    def forward_features(self, images: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B N D"]:
        """Normalised tokens of the last stage with nothing dropped, class token first."""
        self.check_images(images)
        tokens, patches = self._embed(images)
        self._check_numbers(images, tokens.x_TD)
        layout = Layout.whole(len(images), self.shape.num_patches)
        for index, stage in enumerate(self.stages):
            if index:
                tokens = self._transit(index, tokens, patches, layout, None)
            tokens, _ = stage(tokens, is_scored=False)
        return self.stages[-1].norm(tokens.x_TD).unflatten(0, (len(images), -1))

    def run(
        self,
        images: Float[Tensor, "B C Y X"],
        thresholds: object = None,
        exit_confidence: object = None,
        *,
        budget: Budget | None = None,
        ms: float | None = None,
        joules: float | None = None,
        rule: str = "threshold",
        control: str = "attention",
        masked: bool = False,
    ) -> Output:
        """Look, choose, look again; each image on its own, whatever else is in the batch.

        How much to look, one of them: `thresholds`; `budget`, `ms` or `joules` as in `forward`, whose exit confidence an
        `exit_confidence` replaces. Without any nothing is dropped.

        `thresholds`: times uniform attention; one number for all transitions, or one entry per transition, each a number
        or (keep, refine) with refine >= keep; or a tensor [B, transitions] or [B, transitions, 2]. Other keep rules read
        them as strengths (`iret.runtime.keep`). An image leaves after the first stage whose softmax maximum reaches
        `exit_confidence`: one number, one per stage but the last, or a tensor [B] or [B, transitions]. `control` replaces
        the attention by a "random" or its "inverse", to measure what attention is worth. `masked` computes dropped tokens as
        well but lets nobody see them: the same answer, static sizes.

        Raises:
            ValueError: images that do not fit or hold NaN, thresholds that do not fit or that a `rule` lacks, a budget that
                cannot be had, or two ways of saying how much.
        """
        self.check_images(images)
        if not self.num_classes:
            raise ValueError(
                "this model has no classes to answer with; call forward_features, or reset_classifier(N) first."
            )
        check_control(control)
        check_dials(rule, budget=budget, ms=ms, joules=joules, thresholds=thresholds)
        if ms is not None or joules is not None:
            budget = self.budget_for(ms=ms, joules=joules)
        if budget is not None:
            thresholds, own = self._look_up(budget, len(images))
            exit_confidence = own if exit_confidence is None else exit_confidence
        thresholds = 0.0 if thresholds is None else thresholds
        strengths = read_strengths(_to_numpy(thresholds), len(images), len(self.transitions), rule)
        exits = read_exits(_to_numpy(exit_confidence), len(images), len(self.transitions))
        record = Record(self.shape, len(images), images.device)
        self.look(images, strengths, record, exits, rule=rule, control=control, masked=masked)
        return record.finish(scored=np.any(strengths, axis=(1, 2), keepdims=True)[:, 0, 0])

    def look(
        self,
        images: Tensor,
        strengths: np.ndarray,
        record: Record | None = None,
        exits: np.ndarray | None = None,
        *,
        rule: str = "threshold",
        control: str = "attention",
        masked: bool = False,
    ) -> Tensor:
        """What `run` describes, at strengths [B, transitions, 2] and exits [B, transitions]; the last answers.

        Without a `record` no other head runs.
        """
        layout = Layout.whole(len(images), self.shape.num_patches)
        drops, refined_T = bool(strengths.any()), None  # None: every patch that has a token
        tokens, patches = self._embed(images)
        # by the attention received, from which int8 hides NaN, as DAWN hides infinities
        is_told_later = drops and self.shape.lifting != "dawn" and self.own_precision != "int8"
        if not is_told_later:
            self._check_numbers(images, tokens.x_TD)
        for index, stage in enumerate(self.stages):
            is_last = index == len(self.stages) - 1
            is_scored = drops and not is_last
            if index:
                tokens = self._transit(index, tokens, patches, layout, refined_T)
            tokens, received = stage(tokens, is_scored)
            if record is not None or is_last:
                answers = stage.answer(tokens, is_scored).float()
            if record is not None:
                record.add(index, layout, refined_T, answers)
            if is_last:
                break
            seen_T = None if received is None else received.float().cpu().numpy()
            if is_told_later and not index and not math.isfinite(seen_T.sum()):  # fewer numbers, on the host already
                self.refuse_no_numbers(images)
            if exits is not None:
                confidence = answers.detach().softmax(1).amax(1).cpu().numpy()
                goes_on = confidence < exits[:, index].astype(np.float32)
                if not goes_on.any():
                    break
                if not goes_on.all():
                    strengths, exits = strengths[goes_on], exits[goes_on]
                    tokens, layout, rows = take_images(tokens, layout, goes_on)
                    seen_T = None if seen_T is None else seen_T[rows]
            if seen_T is not None:
                importance_T = replace_importance(to_importance(seen_T, layout), control)
                if record is not None:
                    record.see(index, layout, importance_T, strengths)
                choice = choose(importance_T, layout, strengths[:, index], rule, self.shape.min_keep)
                tokens, layout, refined_T = select(tokens, layout, choice, masked)
                tokens, _ = stage(tokens, is_scored, is_rest=True)
        return answers

    def replay(self, images: Float[Tensor, "B C Y X"], plans: Sequence[Plan], point: Point) -> Tensor:
        """The work that `plans` say other images were at `point`, an image each, whatever these show: a logit means nothing."""
        strengths, exits = strengths_of(plans, len(self.transitions), point)
        return self._answer(images, strengths, None if point.exit_confidence is None else exits, rule="topk")

    def _patches(self, images: Tensor) -> Tensor:
        """[B * cells, C, P, P], image after image."""
        (rows, columns), size = self.shape.grid, self.shape.patch_size
        grid = images.unflatten(3, (columns, size)).unflatten(2, (rows, size))  # [B, C, rows, P, columns, P]
        return grid.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

    def _embed(self, images: Tensor) -> tuple[Tokens, Tensor]:
        """Stage-1 tokens from the coarse bands, and the patches that details are read from."""
        patches = self._patches(images)
        return self._first_tokens(self.lifting.coarse(patches).flatten(1), len(images)), patches

    def _first_tokens(self, bands: Float[Tensor, "cells band"], batch: int) -> Tokens:
        x_BND = F.pad(self.patch_embed(bands).unflatten(0, (batch, -1)), (0, 0, 1, 0))
        return pack(x_BND + self.pos_embed)

    def _transit(
        self, stage: int, tokens: Tokens, patches: Tensor, layout: Layout, refined_T: Bool[np.ndarray, " T"] | None
    ) -> Tokens:
        """Into `stage`, with the details of the patches in `refined_T` (None: of all that have a token)."""
        level, num_cells = self.shape.detail_level(stage), self.shape.num_patches
        if refined_T is None and len(patches) == num_cells:  # one image
            if len(layout.cell_T) <= num_cells:
                patches = patches.index_select(0, tokens.cell_T[1:])
            return self.transitions[stage - 1](tokens, self.lifting.details(patches, level), None)
        is_refined = layout.cell_T >= 0 if refined_T is None else (layout.cell_T >= 0) & refined_T
        rows = is_refined.nonzero()[0]
        if len(rows) < len(patches):
            places = layout.image_T()[rows] * num_cells + layout.cell_T[rows]
            patches = patches.index_select(0, torch.from_numpy(places).to(patches.device))
        details = self.lifting.details(patches, level)
        return self.transitions[stage - 1](tokens, details, torch.from_numpy(rows).to(patches.device))

    def _check_numbers(self, images: Tensor, x_TD: Tensor) -> None:
        """Raises ValueError for images that hold NaN or infinite values.

        Seen in their first tokens `x_TD`, which are fewer numbers and have a part of every pixel. Not where DAWN's tanh makes
        numbers of infinities. (Where patches drop, `look` sees it in the attention received: each token has a part of that.)
        """
        if torch.compiler.is_compiling():
            return  # reading a value would break the graph
        seen = images if self.shape.lifting == "dawn" else x_TD
        total = seen.sum(dtype=torch.promote_types(seen.dtype, torch.float32)).item()
        if not math.isfinite(total):
            self.refuse_no_numbers(images)

    def lifting_loss(self, images: Float[Tensor, "B C Y X"]) -> Float[Tensor, ""]:
        """The lifting regulariser, mean over levels."""
        x, losses = self._patches(images), []
        for level in self.lifting.levels:
            ll, details = level(x)
            losses.append(lifting_penalty(x, ll, details))
            x = ll
        return torch.stack(losses).mean()

    def compile(self, *, dynamic: bool | None = True, **options) -> None:
        """Compile the blocks and transitions in place, with the options of `torch.compile`.

        Choosing stays eager, so no graph depends on how many tokens an image keeps. Graphs differ by stage, by whether it is
        scored or its rest, and by batches of one, of equal and of different counts; more room is made for them.

        Raises:
            ValueError: weights packed by `iret.precision.to_onednn`, which torch's compiler does not take.
        """
        if self.own_precision == "float32-onednn":
            raise ValueError("packed weights are not compiled; compile the model that it was made from, in float32.")
        compile_parts(*self.stages, *self.transitions, dynamic=dynamic, **options)

    def reset_classifier(self, num_classes: int) -> None:
        """New heads for `num_classes` classes in every stage (0: none, features only); labels and points are dropped."""
        self.shape = replace(self.shape, num_classes=num_classes)
        for stage, dim in zip(self.stages, self.shape.embed_dims, strict=True):
            stage.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
            init_linear(stage.head)
            stage.head.to(self.pos_embed.device)
        self.labels, self.points = None, None


def _to_numpy(value: object) -> object:
    return value.detach().double().cpu().numpy() if isinstance(value, Tensor) else value
