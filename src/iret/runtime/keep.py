"""Keep rules in NumPy, for models on torch (`iret.selection`) and for devices without it.

Importance `r` is "times uniform attention": its mean over the live patches of an image is 1; a dead patch has -inf. Every
rule takes a strength per image; 0 keeps everything that lives, more never keeps more.

| rule        | strength                   | keeps                                                          |
|-------------|----------------------------|----------------------------------------------------------------|
| `threshold` | tau >= 0                   | r >= tau: how many depends on the image (the paper's rule)     |
| `mass`      | share in [0, 1)            | the fewest patches that hold 1 - strength of the attention     |
| `topk`      | share of live in [0, 1)    | the best ceil((1 - strength) * live): the same cost for all    |

Source: the threshold is IRET's (GLSVLSI 2024, abstract); mass and top-k are the rules of its relatives (ours to offer).
"""

from functools import lru_cache
from typing import Any

import numpy as np

RULES = ("threshold", "mass", "topk")
# A mean is off by a rounding, and then uniform attention is not 1; a share of 0.1 is not exact in binary, and then
# ceil(0.1 * 10) is 2. Wide enough for single precision.
ROUNDING_SHARE, ROUNDING_PATCHES = 1e-6, 1e-4


def keep(importance: np.ndarray, strength: np.ndarray, rule: str = "threshold", min_keep: int = 8) -> np.ndarray:
    """Kept patches, bool [B, N], of float importance [B, N] at strength [B].

    The `min_keep` best live patches always stay. Ties: `threshold` keeps all that reach tau; `mass` and `topk` keep the
    lower cell first.
    """
    check_rule(rule)
    live = importance > -np.inf
    if rule == "threshold":
        kept = live & (importance >= (strength - ROUNDING_SHARE)[:, None])
    elif rule == "topk":
        kept = keep_best(importance, np.ceil((1 - strength) * live.sum(1) - ROUNDING_PATCHES))
    else:
        kept = live & _hold_mass(np.where(live, importance, 0.0), strength)
    short = kept.sum(1) < min_keep
    if short.any():
        kept[short] |= keep_best(importance[short], np.full(short.sum(), min_keep))
    return kept


def keep_best(importance: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The `count` [B] best live patches of each image, of equal ones the lower cell first; bool [B, N] of [B, N]."""
    if not importance.shape[1]:
        return np.zeros(importance.shape, dtype=bool)
    last = np.clip(count.astype(np.int64), 1, importance.shape[1]) - 1
    least = -np.take_along_axis(np.sort(-importance, axis=1), last[:, None], axis=1)  # values sort faster than places
    kept, is_tie = importance > least, importance == least
    room = count - kept.sum(1)
    if (is_tie.sum(1) > room).any():
        is_tie &= np.cumsum(is_tie, axis=1) <= room[:, None]
    return (kept | is_tie) & (importance > -np.inf)


@np.errstate(invalid="ignore", divide="ignore")  # patches without any attention hold no share of it
def _hold_mass(importance: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """The fewest patches that hold 1 - `strength` [B] of the attention, bool [B, N]."""
    order = np.argsort(-importance, axis=1, kind="stable")
    ordered = np.take_along_axis(importance, order, axis=1) / importance.sum(1, keepdims=True)
    held_before = np.cumsum(ordered, axis=1) - ordered
    kept = np.empty(importance.shape, dtype=bool)
    np.put_along_axis(kept, order, held_before < (1 - strength - ROUNDING_SHARE)[:, None], axis=1)
    return kept | (strength <= 0)[:, None]


def check_rule(rule: str) -> None:
    """Raises ValueError for a name that is not a rule."""
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown; choose from {', '.join(RULES)}.")


def check_dials(rule: str, *, budget: object, ms: object, joules: object, thresholds: object) -> None:
    """Raises ValueError if more than one of the dials is not None, or for a rule that is none or lacks its thresholds."""
    check_rule(rule)
    dials = {"budget": budget, "ms": ms, "joules": joules, "thresholds": thresholds}
    given = [name for name, value in dials.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"give one of budget, ms, joules and thresholds, not {' and '.join(given)}.")
    if rule != "threshold" and thresholds is None:
        raise ValueError(
            f"rule={rule!r} reads thresholds as its own strengths; give them{''.join(f' in place of {name}' for name in given)}."
        )


def read_strengths(value: object, batch: int, transitions: int, rule: str = "threshold") -> np.ndarray:
    """Strengths [B, transitions, 2] (keep, refine), float64, from what a user may write.

    One number for all transitions, or a sequence of one entry per transition, each a number or a (keep, refine) pair; or
    an array [B, transitions] or [B, transitions, 2], one row an image.
    """
    if isinstance(value, np.ndarray) and value.ndim > 0:
        check_rule(rule)
        expected = (batch, transitions)
        if value.shape[:2] != expected or value.shape[2:] not in ((), (2,)):
            raise ValueError(
                f"thresholds of shape {value.shape} do not fit; give {expected} or {(*expected, 2)}, one row an image."
            )
        strengths = value.astype(np.float64)
        if strengths.ndim == 2:
            strengths = np.stack([strengths, strengths], axis=-1)
        _check_strengths(strengths, rule)
        return strengths
    return (_read_known if _is_fixed(value) else _read)(value, batch, transitions, rule)


def _is_fixed(value: object) -> bool:
    """Whether it is a number, or a tuple of such, so that what is equal to it can be read alike."""
    return type(value) in (float, int) or (type(value) is tuple and all(map(_is_fixed, value)))


def _read(value: object, batch: int, transitions: int, rule: str) -> np.ndarray:
    check_rule(rule)
    entries = list(value) if isinstance(value, (list, tuple)) else [value] * transitions
    pairs = tuple(tuple(entry) if isinstance(entry, (list, tuple)) else (entry, entry) for entry in entries)
    try:
        numbers = tuple(tuple(map(float, pair)) for pair in pairs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"thresholds={value!r} holds something that is not a number or a pair of numbers.") from error
    if len(pairs) != transitions:
        raise ValueError(
            f"{len(pairs)} thresholds were given, but the model has {transitions} transitions; "
            f"give one number for all or {transitions} entries."
        )
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"thresholds={pairs!r}: an entry is a number or a pair (keep, refine).")
    rows = np.array(numbers)
    _check_strengths(rows, rule)
    return np.broadcast_to(rows, (batch, transitions, 2))  # read-only, as it is shared


_read_known = lru_cache(maxsize=128)(_read)  # a fixed setting is read again for every image


def read_exits(value: object, batch: int, transitions: int) -> np.ndarray | None:
    """Confidences [B, transitions] at which an image leaves after a stage, from what a user may write; None: nobody does.

    One number, or a sequence of one per stage but the last (None: nobody leaves there), or an array [B] or
    [B, transitions], one row an image, where infinity stands for None.
    """
    if value is None:
        return None
    if isinstance(value, np.ndarray) and value.ndim > 0:
        exits = value.astype(np.float64)
        if exits.shape == (batch,):
            exits = np.repeat(exits[:, None], transitions, axis=1)
        if exits.shape != (batch, transitions):
            raise ValueError(
                f"exit_confidence of shape {exits.shape} does not fit; give {(batch,)} or {(batch, transitions)}, one row "
                "an image."
            )
    else:
        entries: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value] * transitions
        if len(entries) != transitions:
            raise ValueError(
                f"{len(entries)} exit confidences were given, but {transitions} stages can be left; give one number "
                f"for all or {transitions} entries."
            )
        try:
            row = [np.inf if entry is None else float(entry) for entry in entries]
        except (TypeError, ValueError) as error:
            raise ValueError(f"exit_confidence={value!r} holds something that is not a number.") from error
        exits = np.broadcast_to(row, (batch, transitions))
    if not (exits >= 0).all():  # false for NaN, too
        bad = exits[~(exits >= 0)].flat[0]
        raise ValueError(f"exit_confidence={bad:g} must be 0 (leave at once) or more; above 1 nobody leaves.")
    return exits


def _check_strengths(strengths: np.ndarray, rule: str) -> None:
    if not np.isfinite(strengths).all() or (strengths < 0).any():
        bad = strengths[~(strengths >= 0) | ~np.isfinite(strengths)].flat[0]
        raise ValueError(f"threshold {bad:g} is not allowed; thresholds are finite and 0 or more (0 keeps everything).")
    if (strengths[..., 1] < strengths[..., 0]).any():
        bad = strengths[strengths[..., 1] < strengths[..., 0]][0]
        raise ValueError(f"refine threshold {bad[1]:g} is below keep threshold {bad[0]:g}; refine needs keep or more.")
    if rule != "threshold" and (strengths >= 1).any():
        raise ValueError(
            f"strength {strengths.max():g} is not below 1; with rule={rule!r} it is the share that is dropped."
        )
