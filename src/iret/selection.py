"""From attention to kept tokens: importance, choice, and the cut itself.

What is decided is decided on the host, in NumPy, on a few hundred numbers an image: there every step costs a few microseconds
where a tensor operation costs ten, and a GPU would have to be waited for in any case because counts decide shapes. A device
without torch runs the same rules (`iret.runtime.keep`), so it keeps the same patches.

A `Layout` says on the host which patches have a token now, packed as the tokens are: image after image, each led by its class
token. Importance and choices are packed like it, one entry a token, the class tokens' without meaning.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from iret.runtime.keep import ROUNDING_SHARE, check_rule, keep_one
from iret.tokens import Tokens

CONTROLS = ("attention", "random", "inverse")
MOMENTUM = 0.5  # of the running mean over a stage's scored blocks: the last block weighs most


@dataclass(frozen=True)
class Layout:
    """What tokens there are, on the host."""

    cell_T: Int[np.ndarray, " T"]  # grid cell; -1 for class tokens
    starts: Int[np.ndarray, " B1"]  # B + 1: where each image begins, and the end
    images: Int[np.ndarray, " B"]  # their numbers in the whole batch
    live_T: Bool[np.ndarray, " T"] | None = None  # not masked, class tokens included; None: all

    @classmethod
    def whole(cls, batch: int, num_cells: int) -> "Layout":
        """Every patch of every image."""
        cell = np.tile(np.arange(-1, num_cells), batch)
        return cls(cell, np.arange(batch + 1) * (1 + num_cells), np.arange(batch))

    @property
    def is_one(self) -> bool:
        """Whether there is one image alone, where every step counts."""
        return len(self.images) == 1

    @property
    def counts(self) -> Int[np.ndarray, " B"]:
        """Tokens of each image, class token included."""
        return np.diff(self.starts)

    def image_T(self) -> Int[np.ndarray, " T"]:
        """Each token's image, as numbered in the whole batch."""
        return self.images.repeat(self.counts)

    def take(self, goes_on: Bool[np.ndarray, " B"]) -> tuple["Layout", Int[np.ndarray, " t"]]:
        """Of some images only, and the rows of their tokens."""
        rows = goes_on.repeat(self.counts).nonzero()[0]
        live = None if self.live_T is None else self.live_T[rows]
        return Layout(self.cell_T[rows], _starts(self.counts[goes_on]), self.images[goes_on], live), rows


@dataclass(frozen=True)
class Choice:
    """What one transition decides, an entry a token; class tokens are kept and never refined."""

    kept_T: Bool[np.ndarray, " T"]
    refined_T: Bool[np.ndarray, " T"] | None  # a subset of `kept_T`; None: every patch that is kept


def accumulate(
    running: Float[Tensor, " T"] | None, latest: Float[Tensor, " T"], momentum: float = MOMENTUM
) -> Float[Tensor, " T"]:
    """Running mean of the attention that patches received, over the scored blocks of one stage."""
    return latest if running is None else torch.lerp(latest, running, momentum)


@np.errstate(invalid="ignore", divide="ignore")  # a model that diverged gives no numbers; its loss says so
def to_importance(received_T: Float[np.ndarray, " T"], layout: Layout) -> Float[np.ndarray, " T"]:
    """Attention as "times uniform": mean 1 over the live patches of each image; float64, -inf where masked."""
    received = received_T.astype(np.float64)
    if layout.is_one and layout.live_T is None:
        received[0] = 0.0
        return received * ((len(received) - 1) / received.sum())
    received[layout.starts[:-1]] = 0.0
    live, counts = layout.live_T, layout.counts
    patches = counts - 1 if live is None else np.add.reduceat(live, layout.starts[:-1], dtype=np.int64) - 1
    if live is not None:
        received = np.where(live, received, 0.0)
    scale = patches / np.add.reduceat(received, layout.starts[:-1])
    importance = received * scale.repeat(counts)
    return importance if live is None else np.where(live, importance, -np.inf)


def choose(
    importance_T: Float[np.ndarray, " T"],
    layout: Layout,
    strengths: Float[np.ndarray, "B 2"],
    rule: str = "threshold",
    min_keep: int = 8,
) -> Choice:
    """What is kept at strength `strengths[:, 0]`, at least `min_keep`, and refined at `strengths[:, 1]`, as large or larger.

    Where the two are equal, all that is kept is refined, the floor too.
    """
    kept = _keep(importance_T, layout, strengths[:, 0], rule, min_keep)
    kept[layout.starts[:-1]] = True
    is_same = strengths[:, 0] == strengths[:, 1]
    if is_same.all():
        return Choice(kept, None)
    refined = _keep(importance_T, layout, strengths[:, 1], rule, 0) | (kept & is_same.repeat(layout.counts))
    refined[layout.starts[:-1]] = False
    return Choice(kept, refined)


def _keep(importance_T: np.ndarray, layout: Layout, strength: np.ndarray, rule: str, min_keep: int) -> np.ndarray:
    """`iret.runtime.keep` of each image; what it says of class tokens means nothing."""
    check_rule(rule)
    starts, short = layout.starts, np.ones(len(layout.images), dtype=bool)
    if rule != "threshold":
        kept = np.zeros(len(importance_T), dtype=bool)
    elif layout.is_one:
        kept = importance_T >= strength[0] - ROUNDING_SHARE
        if np.count_nonzero(kept[1:]) >= min_keep:
            return kept
    else:
        kept = importance_T >= (strength - ROUNDING_SHARE).repeat(layout.counts)
        kept[starts[:-1]] = False
        short = np.add.reduceat(kept, starts[:-1], dtype=np.int64) < min_keep  # sorting only where the floor is reached
    for image in short.nonzero()[0]:
        patches = slice(starts[image] + 1, starts[image + 1])
        kept[patches] = keep_one(importance_T[patches], strength[image], rule, min_keep)
    return kept


def select(tokens: Tokens, layout: Layout, choice: Choice, masked: bool = False) -> tuple[Tokens, Layout]:
    """The tokens that stay, in image order; class tokens always do. `masked` sets the size of the others to 0 instead."""
    kept, device = choice.kept_T, tokens.x_TD.device
    if masked:
        size = torch.from_numpy(kept.astype(np.float32)).to(device)
        live = kept if layout.live_T is None else kept & layout.live_T
        size = size if tokens.size_T is None else tokens.size_T * size
        return replace(tokens, size_T=size), replace(layout, live_T=live)
    rows = kept.nonzero()[0]
    if layout.is_one:
        starts = np.array([0, len(rows)])
    else:
        starts = _starts(np.add.reduceat(kept, layout.starts[:-1], dtype=np.int64))
    left = Layout(layout.cell_T[rows], starts, layout.images)
    return _take_rows(tokens, left, rows), left


def take_images(
    tokens: Tokens, layout: Layout, goes_on: Bool[np.ndarray, " B"]
) -> tuple[Tokens, Layout, Int[np.ndarray, " t"]]:
    """The tokens of some images only, one at least; and their rows."""
    left, rows = layout.take(goes_on)
    return _take_rows(tokens, left, rows), left, rows


def _take_rows(tokens: Tokens, layout: Layout, rows: np.ndarray) -> Tokens:
    """The tokens of these rows, which `layout` describes."""
    device = tokens.x_TD.device
    index = torch.from_numpy(rows).to(device)
    most = len(rows) if layout.is_one else int(layout.counts.max())
    return Tokens(
        x_TD=tokens.x_TD.index_select(0, index),
        cell_T=torch.from_numpy(layout.cell_T).to(device),
        starts=torch.from_numpy(layout.starts).to(device),
        is_even=most * len(layout.images) == len(rows),
        size_T=None if tokens.size_T is None else tokens.size_T[index],
        most=most,
    )


def _starts(counts: np.ndarray) -> np.ndarray:
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def check_control(control: str) -> None:
    """Raises ValueError for a name that is not a control."""
    if control not in CONTROLS:
        raise ValueError(f"control={control!r} is unknown; choose from {', '.join(CONTROLS)}.")


def replace_importance(importance_T: Float[np.ndarray, " T"], control: str) -> Float[np.ndarray, " T"]:
    """What a choice without attention would see: "random" or "inverse" importance on the same live patches.

    Raises:
        ValueError: another name than these or "attention", which changes nothing.
    """
    check_control(control)
    if control == "attention":
        return importance_T
    other = torch.rand(importance_T.shape).double().numpy() if control == "random" else 1 / (1e-6 + importance_T)
    return np.where(importance_T > -np.inf, other, importance_T)
