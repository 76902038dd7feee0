"""The model at fixed counts: every image keeps as many patches, chosen on its device, so that no size depends on an image.

A threshold lets counts differ, and then a GPU waits at each transition for the host to read them. With counts given, one batch
is one chain of kernels: a CUDA graph can hold it (`capture_graph`), a compiler sees constant sizes. It is the rule "topk"
of `Iret.run` with counts in place of shares, and gives the same logits but for rounding, and for ties after the first
transition: tokens stand best first here, and of equal ones the first stays.

    rule         which patches   how many            waits for the host
    threshold    attention       an image's own      at each transition
    topk         attention       alike, of a share   at each transition
    here         attention       alike, given        never

Source: ours; fixed counts are what EViT and its relatives keep (Liang et al. 2022, "EViT: Expediting Vision Transformers via
Token Reorganizations").
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from iret.compiled import make_room
from iret.lifting import LinearLifting2d
from iret.model import Iret
from iret.runtime.cost import Shape, detail_macs, full_macs, stage_macs
from iret.runtime.points import OperatingPoints, check_budget, check_number, round_up
from iret.tokens import Tokens

WARM_UP = 3  # runs before a capture, in which libraries allocate what they keep
STEPS = 1024  # between the cheapest operating point and the full model, at which `counts_at` looks


class FixedCounts(nn.Module):
    """`model`, whose weights it shares, keeping `kept` patches at each transition and looking again at the best `refined`.

    Linear lifting is copied, as one matrix a level: it is not trained here, and a model that is cast, moved or loaded into
    later needs new FixedCounts. Images that hold NaN are not refused, which would be to wait for the host: their logits are NaN.
    """

    def __init__(self, model: Iret, kept: Sequence[int], refined: Sequence[int] | None = None) -> None:
        """`refined` None: all that are kept.

        Raises:
            ValueError: counts that are not one a transition, or more than there are, or none; weights in int8 or packed.
        """
        super().__init__()
        shape = model.shape
        self.kept = read_counts(kept, shape, "kept")
        self.refined = self.kept if refined is None else read_counts(refined, shape, "refined")
        if any(again > here for again, here in zip(self.refined, self.kept, strict=True)):
            raise ValueError(
                f"refined={self.refined} is more than kept={self.kept}: only what stays is looked at again."
            )
        if model.own_precision:
            raise ValueError(
                f"fixed counts do not take a model in {model.own_precision}; give the one it was made from."
            )
        self.model, self.training = model, model.training
        self.is_linear = isinstance(model.lifting.levels[0], LinearLifting2d)
        if self.is_linear:
            with torch.inference_mode(False):  # of use in any mode
                exact = deepcopy(model.lifting).double()
                for name, level in (("coarse", None), *self._details()):
                    self.register_buffer(name, exact.matrix(level).to(model.pos_embed.dtype), persistent=False)

    def _details(self) -> list[tuple[str, int]]:
        """Names of the matrices that make details, and their levels, a transition each."""
        shape = self.model.shape
        return [(f"details_{stage}", shape.detail_level(stage)) for stage in range(1, len(shape.depths))]

    @classmethod
    def at(cls, model: Iret, budget: float) -> "FixedCounts":
        """At the counts that `counts_at` finds for `budget` in (0, 1], the share of the full MACs; at 1 everything is kept.

        Raises:
            ValueError: no operating points, or a budget below what their counts reach.
        """
        check_number("budget", budget)
        if budget == 1:
            return cls(model, (model.shape.num_patches,) * len(model.transitions))
        if model.points is None:
            raise ValueError(
                "this model has no operating points to read counts from; give counts, or run `iret calibrate`."
            )
        return cls(model, counts_at(model.points, model.shape, budget))

    @property
    def macs(self) -> int:
        """Of one image; the same for all."""
        return fixed_macs(self.model.shape, self.kept, self.refined)

    def forward(self, images: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B classes"]:
        """Logits, or features of a model without classes.

        Raises:
            ValueError: images that do not fit, or a model that was cast or moved.
        """
        stages = self.model.stages
        tokens, patches = self.embed(images)
        for index, (kept, refined) in enumerate(zip(self.kept, self.refined, strict=True)):
            live = tokens.width - 1
            is_scored = min(kept, refined) < live
            tokens, received = stages[index](tokens, is_scored)
            if is_scored:
                tokens, _ = stages[index](keep_best(tokens, received, kept), is_scored, is_rest=True)
            tokens = self.transit(index, tokens, patches)
        tokens, _ = stages[-1](tokens, is_scored=False)
        return stages[-1].answer(tokens)

    def compile(self, *args, fullgraph: bool = True, dynamic: bool | None = False, **kwargs) -> None:
        """Compile all of it in place, with the options of `torch.compile`.

        One graph a batch size and choice of counts, 64 of them in a process; the next is an error.
        """
        make_room()
        super().compile(*args, fullgraph=fullgraph, dynamic=dynamic, **kwargs)

    def embed(self, images: Float[Tensor, "B C Y X"]) -> tuple[Tokens, Float[Tensor, "cells C P P"]]:
        """Tokens of the first stage, and all patches, image after image."""
        model = self.model
        model.check_images(images)
        patches = model._patches(images)
        if not self.is_linear:
            return model._first_tokens(model.lifting.coarse(patches).flatten(1), len(images)), patches
        own, wanted = self.get_buffer("coarse"), model.pos_embed
        if (own.dtype, own.device) != (wanted.dtype, wanted.device):
            raise ValueError(
                f"the model is {wanted.dtype} on {wanted.device}, these FixedCounts were made for {own.dtype} on {own.device}; "
                "make new ones."
            )
        with torch.autocast(images.device.type, enabled=False):
            bands = (patches.flatten(2) @ own).flatten(1)
        return model._first_tokens(bands, len(images)), patches

    def transit(self, index: int, tokens: Tokens, patches: Float[Tensor, "cells C P P"]) -> Tokens:
        """Into the next stage, with the details of each image's first patches."""
        batch, (name, level) = tokens.batch_size, self._details()[index]
        first = torch.arange(0, len(patches), len(patches) // batch, device=patches.device)[:, None]
        cell_BR = tokens.cell_T.unflatten(0, (batch, -1))[:, 1 : 1 + self.refined[index]]
        pixels = patches.index_select(0, (cell_BR + first).flatten())
        if not self.is_linear:
            return self.model.transitions[index](tokens, self.model.lifting.details(pixels, level).flatten(1), None)
        # Details do not see a patch's mean; without it a flat patch has none in half precision either.
        pixels = pixels - pixels.mean((2, 3), keepdim=True)
        details = (pixels.flatten(2) @ self.get_buffer(name)).flatten(1)
        return self.model.transitions[index](tokens, details, None)


def keep_best(tokens: Tokens, received: Float[Tensor, " T"], count: int) -> Tokens:
    """The class token and the `count` patches that received most, best first; of equal ones those that stood first."""
    received_BN = received.unflatten(0, (tokens.batch_size, -1))[:, 1:]
    best = received_BN.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return take_places(tokens, nn.functional.pad(best + 1, (1, 0)))


def take_places(tokens: Tokens, place_BK: Int[Tensor, "B K"]) -> Tokens:
    """Of an even batch the tokens at these places of each image, class token at 0, in this order."""
    rows = (place_BK + tokens.starts[:-1, None]).flatten()
    starts = torch.arange(0, place_BK.numel() + 1, place_BK.shape[1], device=rows.device)
    return Tokens(tokens.x_TD.index_select(0, rows), tokens.cell_T.index_select(0, rows), starts, is_even=True)


# ---- one CUDA graph


@dataclass(frozen=True)
class CapturedGraph:
    """What `capture_graph` makes. It keeps the model alive, whose memory the graph reads."""

    model: nn.Module
    images: Tensor  # where the graph reads them
    logits: Tensor  # where it writes them
    graph: Any  # torch.cuda.CUDAGraph

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Float[Tensor, "B classes"]:
        """Logits of as many images as were captured, or fewer in the same time; they may come from the host.

        One call at a time, on the stream that is current.

        Raises:
            ValueError: other images than were captured.
        """
        wanted = self.images
        if not isinstance(images, Tensor) or (images.dtype, images.shape[1:]) != (wanted.dtype, wanted.shape[1:]):
            seen = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                f"images are {seen}; this graph takes {wanted.dtype} {tuple(wanted.shape)}: give such, or capture another."
            )
        if not 1 <= len(images) <= len(wanted):
            raise ValueError(
                f"{len(images)} images do not fit a graph of {len(wanted)}; give 1 or more, or capture another."
            )
        wanted[: len(images)].copy_(images)
        self.graph.replay()
        return self.logits[: len(images)].clone()


def capture_graph(model: nn.Module, images: Float[Tensor, "B C Y X"]) -> CapturedGraph:
    """`model` as one CUDA graph for batches of the size and dtype of `images`, without gradients.

    The model must not wait for the host: FixedCounts, or a plain ViT. What is to be compiled is compiled now. The graph reads the
    weights where they are now (do not move them), and holds the memory of one run for as long as it lives.

    Raises:
        ValueError: an Iret, which waits; under autocast; images or a model that are not on one CUDA device.
    """
    if isinstance(model, Iret):
        raise ValueError("an Iret waits for the host at its transitions; capture FixedCounts(model, ...) in its place.")
    if torch.is_autocast_enabled(images.device.type):  # the graph would read weights that autocast cast, and frees
        raise ValueError("a CUDA graph is not captured under autocast; cast the model, as by model.to(torch.bfloat16).")
    devices = {images.device, *(weight.device for weight in model.parameters())}
    if len(devices) > 1 or images.device.type != "cuda":
        raise ValueError(
            f"images and model are on {', '.join(sorted(map(str, devices)))}; a CUDA graph needs both on one CUDA device."
        )
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(images.device)
    with torch.cuda.device(images.device), torch.inference_mode(False), torch.no_grad():
        given = images.clone()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                model(given)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph, stream=aside):
            logits = model(given)
    return CapturedGraph(model, given, logits, graph)


# ---- counts and what they cost


def read_counts(counts: Sequence[int], shape: Shape, name: str) -> tuple[int, ...]:
    """One count a transition, each 1 or more; of those `kept` none above the one before.

    Raises:
        ValueError: other counts.
    """
    transitions = len(shape.depths) - 1
    try:
        found = tuple(int(count) for count in counts)
        is_right = found == tuple(counts) and len(found) == transitions and min(found) >= 1
    except (TypeError, ValueError):
        is_right = False
    if not is_right:
        raise ValueError(
            f"{name}={counts!r} must be {transitions} whole numbers of patches, one a transition, 1 or more."
        )
    if name == "kept" and any(later > before for before, later in pairwise((shape.num_patches, *found))):
        raise ValueError(
            f"kept={found} must not grow from the {shape.num_patches} patches there are: what is dropped stays so."
        )
    return found


def fixed_macs(shape: Shape, kept: Sequence[int], refined: Sequence[int]) -> int:
    """MACs of one image at these counts; only the last head answers, and nothing is scored where nothing is chosen.

    Linear details are one product from a patch's pixels, which is more than step by step.
    """
    live, last = (shape.num_patches, *kept), len(shape.depths) - 1
    total, left_rest = 0, False
    for stage, here in enumerate(live):
        scored = stage < last and min(kept[stage], refined[stage]) < here
        again = refined[stage - 1] if stage else 0
        total += int(stage_macs(shape, stage, here, again, scored=scored, has_rest=left_rest, head=stage == last))
        left_rest = scored
        if stage and shape.lifting != "dawn":
            level = shape.detail_level(stage)
            product = 3 * shape.in_chans * shape.patch_size**2 * shape.side(level) ** 2
            total += again * (product - detail_macs(shape, level))
    return total


def counts_at(points: OperatingPoints, shape: Shape, budget: float) -> tuple[int, ...]:
    """Patches to keep at each transition for at most `budget` of the full MACs: as the operating points keep in the mean.

    Points of another model with as many stages give the same shares of this grid.

    Raises:
        ValueError: a budget outside (0, 1] or below the counts of the cheapest point; points of more or fewer stages.
    """
    check_budget(budget)
    kept_shares = np.array([point.kept_mean for point in points.points])[::-1] / points.points[0].kept_mean[0]
    if kept_shares.shape[1] != len(shape.depths):
        raise ValueError(
            f"the operating points are of {kept_shares.shape[1]} stages, the model has {len(shape.depths)}."
        )
    columns = shape.num_patches * kept_shares[:, 1:].T
    found: list[tuple[int, tuple[int, ...]]] = []
    for share in np.linspace(points.shares[0], 1.0, STEPS):
        means = [np.interp(share, points.shares, column) for column in columns]
        kept = np.minimum.accumulate(np.clip(np.round(means), shape.min_keep, shape.num_patches)).astype(int).tolist()
        found.append((fixed_macs(shape, kept, kept), tuple(kept)))
    allowed = [each for each in found if each[0] <= budget * full_macs(shape)]
    if not allowed:
        least = round_up(min(found)[0] / full_macs(shape))
        raise ValueError(
            f"budget={budget:g} is below {least}, what the counts of the cheapest operating point take; ask for that or more, or "
            "give counts."
        )
    return max(allowed)[1]
