"""The cut itself: the tokens of the patches that stay.

Read first: `runtime.choice`, which decides on the host what stays.
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from iret.runtime.choice import Choice, Layout, to_starts
from iret.tokens import Tokens

CONTROLS = ("attention", "random", "inverse")


def select(
    tokens: Tokens, layout: Layout, choice: Choice, masked: bool = False
) -> tuple[Tokens, Layout, Bool[np.ndarray, " t"] | None]:
    """The tokens that stay, in image order, and which of them are refined (None: every patch that stays).

    Class tokens always stay. `masked` sets the size of the others to 0 instead.
    """
    kept, device = choice.kept_T, tokens.x_TD.device
    if masked:
        size = torch.from_numpy(kept.astype(np.float32)).to(device)
        live = kept if layout.live_T is None else kept & layout.live_T
        size = size if tokens.size_T is None else tokens.size_T * size
        seen = kept if choice.refined_T is None else choice.refined_T
        return replace(tokens, size_T=size), replace(layout, live_T=live), seen
    rows = kept.nonzero()[0]
    if layout.is_one:
        starts = np.array([0, len(rows)])
    else:
        starts = to_starts(np.add.reduceat(kept, layout.starts[:-1], dtype=np.int64))
    left = Layout(layout.cell_T[rows], starts, layout.images)
    refined = None if choice.refined_T is None else choice.refined_T[rows]
    return _take_rows(tokens, left, rows), left, refined


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
