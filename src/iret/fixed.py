"""The model at fixed counts: every image keeps as many patches, chosen on its device, so that no size depends on an image.

A threshold lets counts differ, and then a GPU waits at each transition for the host to read them. With counts given, one batch
is one chain of kernels: a CUDA graph can hold it (`capture_graph`), a compiler sees constant sizes. It is the rule "topk"
of `Iret.run` with the counts in place of shares, and gives the same logits.

    rule         which patches   how many            waits for the host
    threshold    attention       an image's own      at each transition
    topk         attention       alike, of a share   at each transition
    here         attention       alike, given        never

Source: ours; fixed counts are what EViT and its relatives keep (Liang et al. 2022, "EViT: Expediting Vision Transformers via
Token Reorganizations").
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from iret.export.graphs import Lift
from iret.lifting import LinearLifting2d
from iret.model import MAX_GRAPHS, Iret
from iret.runtime.cost import Shape, full_macs, stage_macs
from iret.runtime.points import OperatingPoints, check_budget, round_up
from iret.tokens import Tokens

WARM_UP = 3  # runs before a capture, in which libraries allocate what they keep
STEPS = 1024  # between the cheapest operating point and the full model, at which `counts_at` looks


class FixedCounts(nn.Module):
    """`model`, whose weights it shares, keeping `kept` patches at each transition and looking again at the best `refined`.

    Cast and move the model first; linear lifting stays as it is then. Images that hold NaN give logits of NaN: to refuse them
    would be to wait.
    """

    def __init__(self, model: Iret, kept: Sequence[int], refined: Sequence[int] | None = None) -> None:
        """`refined` None: all that are kept.

        Raises:
            ValueError: counts that are not one a transition, or more than there are, or none.
        """
        super().__init__()
        shape = model.shape
        self.kept = read_counts(kept, shape, "kept")
        self.refined = self.kept if refined is None else read_counts(refined, shape, "refined")
        if any(again > here for again, here in zip(self.refined, self.kept, strict=True)):
            raise ValueError(
                f"refined={self.refined} is more than kept={self.kept}: only what stays is looked at again."
            )
        self.model = model
        self.is_linear = isinstance(model.lifting.levels[0], LinearLifting2d)
        lifting = deepcopy(model.lifting).cpu().float() if self.is_linear else model.lifting
        levels = [None, *(shape.detail_level(stage) for stage in range(1, len(shape.depths)))]
        self.lifts = nn.ModuleList(Lift(lifting, shape, level) for level in levels)
        self.lifts.to(model.pos_embed.device, model.pos_embed.dtype)

    @classmethod
    def at(cls, model: Iret, budget: float) -> "FixedCounts":
        """At the counts that `counts_at` finds for `budget` in (0, 1], the share of the full MACs.

        Raises:
            ValueError: no operating points, or a budget below what their counts reach.
        """
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
        """Logits, of the model's dtype."""
        stages = self.model.stages
        tokens, place_BN, patches = self.embed(images)
        for index, (kept, refined) in enumerate(zip(self.kept, self.refined, strict=True)):
            tokens, received = stages[index](tokens, is_scored=min(kept, refined) < place_BN.shape[1] - 1)
            if received is not None:
                tokens, place_BN = keep_best(tokens, place_BN, received, kept)
            tokens = self.transit(index, tokens, place_BN, patches)
        tokens, _ = stages[-1](tokens, is_scored=False)
        return stages[-1].answer(tokens)

    def compile(self, *args, fullgraph: bool = True, dynamic: bool | None = False, **kwargs) -> None:
        """Compile all of it in place, one graph a batch size, with the options of `torch.compile`."""
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, MAX_GRAPHS)
        super().compile(*args, fullgraph=fullgraph, dynamic=dynamic, **kwargs)

    def embed(
        self, images: Float[Tensor, "B C Y X"]
    ) -> tuple[Tokens, Int[Tensor, "B N"], Float[Tensor, "cells C P P"]]:
        """Tokens of the first stage, their places (0 the class token, 1 + cell a patch), and all patches."""
        model, batch = self.model, len(images)
        model.check_images(images)
        patches = model._patches(images)
        x_BND = (
            F.pad(model.patch_embed(self.lifts[0](patches)).unflatten(0, (batch, -1)), (0, 0, 1, 0)) + model.pos_embed
        )
        place_BN = torch.arange(x_BND.shape[1], device=images.device).expand(batch, -1)
        return even(x_BND, place_BN), place_BN, patches

    def transit(self, index: int, tokens: Tokens, place_BN: Int[Tensor, "B N"], patches: Tensor) -> Tokens:
        """Into the next stage, with the details of each image's first patches."""
        cells = len(patches) // len(place_BN)
        first = torch.arange(-1, len(patches) - 1, cells, device=patches.device)[:, None]
        rows = (place_BN[:, 1 : 1 + self.refined[index]] + first).flatten()
        pixels = patches.index_select(0, rows)
        if self.is_linear:  # its details do not see the mean; without it a flat patch has none in half precision either
            pixels = pixels - pixels.mean((2, 3), keepdim=True)
        return self.model.transitions[index](tokens, self.lifts[1 + index](pixels), None)


def even(x_BND: Float[Tensor, "B N D"], place_BN: Int[Tensor, "B N"]) -> Tokens:
    """Tokens of images that have the same number of them."""
    starts = torch.arange(0, place_BN.numel() + 1, place_BN.shape[1], device=x_BND.device)
    return Tokens(x_BND.flatten(0, 1), place_BN.flatten() - 1, starts, is_even=True)


def keep_best(
    tokens: Tokens, place_BN: Int[Tensor, "B N"], received: Float[Tensor, " T"], count: int
) -> tuple[Tokens, Int[Tensor, "B K"]]:
    """The class token and the `count` patches that received most, best first; of equal ones the lower cell first."""
    batch, width = place_BN.shape
    order = received.view(batch, width)[:, 1:].sort(dim=1, descending=True, stable=True).indices[:, :count]
    chosen = F.pad(order + 1, (1, 0))
    rows = (chosen + torch.arange(0, batch * width, width, device=chosen.device)[:, None]).flatten()
    place_BN = place_BN.gather(1, chosen)
    return even(tokens.x_TD.index_select(0, rows).unflatten(0, (batch, -1)), place_BN), place_BN


def capture_graph(model: nn.Module, images: Float[Tensor, "B C Y X"]) -> Callable[[Tensor], Tensor]:
    """`model` as one CUDA graph for batches of the size and dtype of `images`; it must not wait for the host, as `FixedCounts`.

    What it gives takes up to B images, on any device, and returns their logits, without gradients. A `model` to
    be compiled is compiled now. The graph reads the weights where they are now: do not move them.

    Raises:
        ValueError: under autocast, or images that are not on a CUDA device; later, images that do not fit the graph.
    """
    if torch.is_autocast_enabled(images.device.type):  # the graph would read weights that autocast cast, and frees
        raise ValueError("a CUDA graph is not captured under autocast; cast the model, as by model.to(torch.bfloat16).")
    if not images.is_cuda:
        raise ValueError(f"images are on {images.device}; a CUDA graph needs them, and the model, on a CUDA device.")
    given, graph, aside = images.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream(images.device)
    with torch.no_grad():
        aside.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                model(given)
        torch.cuda.current_stream(images.device).wait_stream(aside)
        with torch.cuda.graph(graph):
            logits = model(given)

    def replay(images: Tensor) -> Tensor:
        if len(images) > len(given) or images.shape[1:] != given.shape[1:]:
            raise ValueError(
                f"images of shape {tuple(images.shape)} do not fit a graph of {tuple(given.shape)}; give as many or fewer "
                "of that size, or capture another."
            )
        given[: len(images)].copy_(images, non_blocking=True)
        graph.replay()
        return logits[: len(images)].clone()

    return replay


# ---- counts and what they cost


def read_counts(counts: Sequence[int], shape: Shape, name: str) -> tuple[int, ...]:
    """One count a transition, each 1 or more and none above the one before.

    Raises:
        ValueError: other counts.
    """
    transitions = len(shape.depths) - 1
    found = tuple(int(count) for count in counts if float(count).is_integer())
    if len(found) != len(counts) or len(found) != transitions or min(found) < 1:
        raise ValueError(
            f"{name}={tuple(counts)} must be {transitions} whole numbers of patches, one a transition, 1 or more."
        )
    if name == "kept" and any(later > before for before, later in pairwise((shape.num_patches, *found))):
        raise ValueError(
            f"kept={found} must not grow from the {shape.num_patches} patches there are: what is dropped stays so."
        )
    return found


def fixed_macs(shape: Shape, kept: Sequence[int], refined: Sequence[int]) -> int:
    """MACs of one image at these counts; only the last head answers, and nothing is scored where nothing is chosen."""
    live, last = (shape.num_patches, *kept), len(shape.depths) - 1
    scored = [min(step) < here for here, step in zip(live, zip(kept, refined, strict=True), strict=False)]
    return sum(
        int(stage_macs(shape, stage, live[stage], (0, *refined)[stage], scored=is_scored, head=stage == last))
        for stage, is_scored in enumerate((*scored, False))
    )


def counts_at(points: OperatingPoints, shape: Shape, budget: float) -> tuple[int, ...]:
    """Patches to keep at each transition for at most `budget` of the full MACs: as the operating points keep in the mean.

    Points of another model give the same shares of this grid.

    Raises:
        ValueError: a budget outside (0, 1] or below the counts of the cheapest point.
    """
    check_budget(budget)
    shares = points.shares
    kept_shares = [np.array(point.kept_mean[1:]) / point.kept_mean[0] for point in points.points]
    columns = shape.num_patches * np.array(kept_shares)[::-1].T
    found: list[tuple[int, tuple[int, ...]]] = []
    for share in np.linspace(shares[0], 1.0, STEPS):
        means = [np.interp(share, shares, column) for column in columns]
        kept = np.minimum.accumulate(np.clip(np.round(means), shape.min_keep, shape.num_patches)).astype(int).tolist()
        found.append((fixed_macs(shape, kept, kept), tuple(kept)))
    allowed = [each for each in found if each[0] <= budget * full_macs(shape)]
    if not allowed:
        least = round_up(min(found)[0] / full_macs(shape))
        raise ValueError(f"budget={budget:g} is below {least}, what the counts of the cheapest operating point take.")
    return max(allowed)[1]
