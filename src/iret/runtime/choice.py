"""From attention to kept patches, on the host: what tokens there are, how important each is, which of them stay.

NumPy, on a few hundred numbers an image: there every step costs a few microseconds where a tensor operation costs ten, and a
GPU would have to be waited for in any case because counts decide shapes. A model on torch (`iret.selection`) and a bundle on
another engine (`session`) decide by this same code, so they keep the same patches.

A `Layout` says which patches have a token now, packed as the tokens are: image after image, each led by its class token.
Importance and choices are packed like it, one entry a token ([T]), the class tokens' without meaning.

Read first: `keep`, the rules.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from iret.runtime.keep import ROUNDING_SHARE, check_rule, keep


@dataclass(frozen=True)
class Layout:
    """What tokens there are, on the host."""

    cell_T: np.ndarray  # int [T]: grid cell; -1 for class tokens
    starts: np.ndarray  # int [B + 1]: where each image begins, and the end
    images: np.ndarray  # int [B]: their numbers in the whole batch
    live_T: np.ndarray | None = None  # bool [T]: not masked, class tokens included; None: all

    @staticmethod
    @lru_cache(maxsize=8)  # every run begins with it, most often for one image
    def whole(batch: int, num_cells: int) -> "Layout":
        """Every patch of every image. Runs share it: write into none of its arrays."""
        cell = np.tile(np.arange(-1, num_cells, dtype=np.int64), batch)
        return Layout(cell, np.arange(batch + 1) * (1 + num_cells), np.arange(batch))

    @property
    def is_one(self) -> bool:
        """Whether there is one image alone, where every step counts."""
        return len(self.images) == 1

    @cached_property
    def counts(self) -> np.ndarray:
        """Tokens of each image, class token included."""
        return np.diff(self.starts)

    def image_T(self) -> np.ndarray:
        """Each token's image, as numbered in the whole batch."""
        return self.images.repeat(self.counts)

    def take(self, goes_on: np.ndarray) -> tuple["Layout", np.ndarray]:
        """Of some images only, and the rows of their tokens."""
        rows = goes_on.repeat(self.counts).nonzero()[0]
        live = None if self.live_T is None else self.live_T[rows]
        return Layout(self.cell_T[rows], to_starts(self.counts[goes_on]), self.images[goes_on], live), rows


@dataclass(frozen=True)
class Choice:
    """What one transition decides, an entry a token; class tokens are kept and never refined."""

    kept_T: np.ndarray  # bool [T]
    refined_T: np.ndarray | None  # bool [T]: a subset of `kept_T`; None: every patch that is kept


def to_importance(received_T: np.ndarray, layout: Layout) -> np.ndarray:
    """Attention as "times uniform": mean 1 over the live patches of each image; float64, -inf where masked.

    NaN where a model that diverged gives no numbers; its loss says so.
    """
    received = received_T.astype(np.float64)
    if layout.is_one and layout.live_T is None:
        received[0] = 0.0
        total = float(np.add.reduce(received))
        return received * ((len(received) - 1) / total if total else np.nan)
    received[layout.starts[:-1]] = 0.0
    live, counts = layout.live_T, layout.counts
    patches = counts - 1 if live is None else np.add.reduceat(live, layout.starts[:-1], dtype=np.int64) - 1
    if live is not None:
        received = np.where(live, received, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = patches / np.add.reduceat(received, layout.starts[:-1])
        importance = received * scale.repeat(counts)
    return importance if live is None else np.where(live, importance, -np.inf)


def choose(
    importance_T: np.ndarray,
    layout: Layout,
    strengths: np.ndarray,
    rule: str = "threshold",
    min_keep: int = 8,
) -> Choice:
    """What is kept at strength `strengths[:, 0]`, at least `min_keep`, and refined at `strengths[:, 1]`, as large or larger.

    Where the two are equal, all that is kept is refined, the floor too.
    """
    if layout.is_one and rule == "threshold":  # what follows, in fewer steps
        keep_at, refine_at = strengths[0].tolist()
        kept = _keep_one(importance_T, keep_at - ROUNDING_SHARE, min_keep)
        if kept is not None:
            if keep_at == refine_at:
                return Choice(kept, None)
            refined = importance_T >= refine_at - ROUNDING_SHARE
            refined[0] = False
            return Choice(kept, refined)
    kept = _keep(importance_T, layout, strengths[:, 0], rule, min_keep)
    kept[layout.starts[:-1]] = True
    is_same = strengths[:, 0] == strengths[:, 1]
    if is_same.all():
        return Choice(kept, None)
    refined = _keep(importance_T, layout, strengths[:, 1], rule, 0) | (kept & is_same.repeat(layout.counts))
    refined[layout.starts[:-1]] = False
    return Choice(kept, refined)


def _keep_one(importance_T: np.ndarray, least: float, min_keep: int) -> np.ndarray | None:
    """Of one image what reaches `least`, or the `min_keep` best; None where ties decide, or fewer patches live."""
    kept = importance_T >= least
    kept[0] = True
    if np.count_nonzero(kept) > min_keep:
        return kept
    if len(kept) <= 1 + min_keep:
        return None
    floor = np.partition(importance_T[1:], -min_keep)[-min_keep]
    kept = importance_T >= floor
    kept[0] = True
    return kept if np.count_nonzero(kept) == 1 + min_keep else None


def _keep(importance_T: np.ndarray, layout: Layout, strength: np.ndarray, rule: str, min_keep: int) -> np.ndarray:
    """`iret.runtime.keep` of each image; what it says of class tokens means nothing."""
    check_rule(rule)
    starts, short = layout.starts, np.ones(len(layout.images), dtype=bool)
    if rule != "threshold":
        kept = np.zeros(len(importance_T), dtype=bool)
    else:
        kept = importance_T >= (strength - ROUNDING_SHARE).repeat(layout.counts)
        kept[starts[:-1]] = False
        short = np.add.reduceat(kept, starts[:-1], dtype=np.int64) < min_keep
    images = short.nonzero()[0]
    if len(images):  # sorting only here, and where the floor is reached
        first, sizes = starts[images] + 1, layout.counts[images] - 1
        places = np.arange(sizes.max())
        is_there = places < sizes[:, None]
        index = np.where(is_there, first[:, None] + places, 0)
        kept_BN = keep(np.where(is_there, importance_T[index], -np.inf), strength[images], rule, min_keep)
        kept[index[is_there]] = kept_BN[is_there]
    return kept


def cut(x_TD: np.ndarray, layout: Layout, choice: Choice) -> tuple[np.ndarray, Layout, np.ndarray | None]:
    """The tokens that stay, in image order, and which of them are refined."""
    rows = choice.kept_T.nonzero()[0]
    if layout.is_one:
        starts = np.array([0, len(rows)])
    else:
        starts = to_starts(np.add.reduceat(choice.kept_T, layout.starts[:-1], dtype=np.int64))
    refined = None if choice.refined_T is None else choice.refined_T[rows]
    return x_TD.take(rows, axis=0), Layout(layout.cell_T[rows], starts, layout.images), refined


def to_starts(counts: np.ndarray) -> np.ndarray:
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts
