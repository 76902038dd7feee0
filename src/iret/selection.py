"""From attention to kept tokens: importance, keep rules on tensors, the cut itself.

Importance lives on the grid, float [B, cells], -inf where no live patch is; so does every choice, bool [B, cells]. The
rules are those of `iret.runtime.keep`, which says what they mean and which these are tested against.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from iret.runtime.keep import ROUNDING_PATCHES, ROUNDING_SHARE, check_rule
from iret.tokens import Tokens

CONTROLS = ("attention", "random", "inverse")
MOMENTUM = 0.5  # of the running mean over a stage's scored blocks: the last block weighs most


@dataclass(frozen=True)
class Choice:
    """What one transition decides, per grid cell."""

    kept: Bool[Tensor, "B cells"]
    refined: Bool[Tensor, "B cells"]  # a subset of `kept`


def accumulate(
    running: Float[Tensor, " T"] | None, latest: Float[Tensor, " T"], momentum: float = MOMENTUM
) -> Float[Tensor, " T"]:
    """Running mean of the attention that patches received, over the scored blocks of one stage."""
    return latest if running is None else torch.lerp(latest, running, momentum)


def to_importance(attention_T: Float[Tensor, " T"], tokens: Tokens, num_cells: int) -> Float[Tensor, "B cells"]:
    """Attention as "times uniform": mean 1 over the live patches of each image, -inf elsewhere."""
    received, live = attention_T.float(), tokens.live_T()
    if tokens.is_even and live is None:
        received_BN = received.view(tokens.batch_size, -1)[:, 1:]
        relative = received_BN / received_BN.mean(1, keepdim=True)
        if received_BN.shape[1] == num_cells:
            return relative
        cells = tokens.cell_T.view(tokens.batch_size, -1)[:, 1:]
        return relative.new_full((tokens.batch_size, num_cells), float("-inf")).scatter_(1, cells, relative)
    where = tokens.grid_index(num_cells)
    if live is not None:
        received, where = received[live], where[live]
    grid = received.new_full((tokens.batch_size, 1 + num_cells), float("-inf"))
    grid.view(-1)[where] = received
    grid = grid[:, 1:]
    is_live = grid >= 0
    mean = grid.clamp(min=0).sum(1, keepdim=True) / is_live.sum(1, keepdim=True)
    return grid / mean


def keep(
    importance: Float[Tensor, "B cells"],
    strength: Float[Tensor, " B"],
    rule: str = "threshold",
    min_keep: int = 8,
) -> Bool[Tensor, "B cells"]:
    """`iret.runtime.keep.keep` on tensors."""
    check_rule(rule)
    if rule == "threshold":
        kept = importance >= (strength - ROUNDING_SHARE)[:, None]
        floor = min(min_keep, importance.shape[1])
        if int(kept.sum(1).min()) < floor:  # sorting only where the floor is reached
            order = importance.argsort(dim=1, descending=True, stable=True)
            kept.scatter_(1, order[:, :floor], True)
            kept &= importance > float("-inf")
        return kept
    live = importance > float("-inf")
    wide = torch.float32 if importance.device.type == "mps" else torch.float64  # which MPS lacks
    order = importance.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(1)
    kept = rank < min_keep
    if rule == "topk":
        kept |= rank < torch.ceil((1 - strength.to(wide)) * live.sum(1) - ROUNDING_PATCHES)[:, None]
    else:
        share = torch.where(live, importance, 0.0).to(wide)
        share = share / share.sum(1, keepdim=True)
        ordered = share.gather(1, order)
        held_before = ordered.cumsum(1) - ordered
        kept |= held_before.gather(1, rank) < (1 - strength.to(wide))[:, None] - ROUNDING_SHARE
        kept |= strength[:, None] <= 0
    return kept & live


def choose(
    importance: Float[Tensor, "B cells"],
    strengths: Float[Tensor, "B 2"],
    rule: str = "threshold",
    min_keep: int = 8,
    refines_all: bool = False,
) -> Choice:
    """What is kept at strength `strengths[:, 0]`, at least `min_keep`, and refined at `strengths[:, 1]`, as large or larger.

    Where the two are equal, all that is kept is refined; `refines_all` says that they are for every image, which saves a look.
    """
    kept = keep(importance, strengths[:, 0], rule, min_keep)
    if refines_all:
        return Choice(kept, kept)
    refined = keep(importance, strengths[:, 1], rule, min_keep=0)
    is_same = strengths[:, 0] == strengths[:, 1]  # such an image refines its floor too, as it would alone
    return Choice(kept, refined | (kept & is_same[:, None]))


def select(tokens: Tokens, kept: Bool[Tensor, "B cells"], masked: bool = False) -> Tokens:
    """The tokens that stay, in image order; class tokens always do. `masked` sets the size of the others to 0 instead."""
    batch, num_cells = kept.shape
    with_class = torch.nn.functional.pad(kept, (1, 0), value=True)
    stays = with_class.view(-1)
    if len(tokens.cell_T) < len(stays):  # else every cell still has its token, in order
        stays = stays[tokens.grid_index(num_cells)]
    if masked:
        size = torch.ones_like(stays, dtype=torch.float32) if tokens.size_T is None else tokens.size_T
        return replace(tokens, size_T=size * stays)
    index = stays.nonzero().squeeze(1)
    if batch == 1:
        starts, most = torch.tensor([0, len(index)], device=index.device), len(index)
    else:
        counts = with_class.sum(1)
        starts, most = torch.nn.functional.pad(counts.cumsum(0), (1, 0)), int(counts.max())
    return Tokens(
        x_TD=tokens.x_TD.index_select(0, index),
        cell_T=tokens.cell_T.index_select(0, index),
        starts=starts,
        is_even=most * batch == len(index),
        size_T=None if tokens.size_T is None else tokens.size_T[index],
        most=most,
    )


def take_images(tokens: Tokens, images: Bool[Tensor, " B"]) -> Tokens:
    """The tokens of some images only."""
    stays = images[tokens.image_T()]
    counts = tokens.starts.diff()[images]
    return Tokens(
        x_TD=tokens.x_TD[stays],
        cell_T=tokens.cell_T[stays],
        starts=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        is_even=tokens.is_even,
        size_T=None if tokens.size_T is None else tokens.size_T[stays],
    )


def check_control(control: str) -> None:
    """Raises ValueError for a name that is not a control."""
    if control not in CONTROLS:
        raise ValueError(f"control={control!r} is unknown; choose from {', '.join(CONTROLS)}.")


def replace_importance(importance: Float[Tensor, "B cells"], control: str) -> Float[Tensor, "B cells"]:
    """What a choice without attention would see: "random" or "inverse" importance on the same live patches.

    Raises:
        ValueError: another name than these or "attention", which changes nothing.
    """
    check_control(control)
    if control == "attention":
        return importance
    other = torch.rand_like(importance) if control == "random" else 1 / (1e-6 + importance)
    return torch.where(importance > float("-inf"), other, importance)
