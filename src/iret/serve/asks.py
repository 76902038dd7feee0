"""What a client may ask of one image, in whichever form it came: JSON values, or text from a query or a form.

`NUMBERS` is the one table of settings and their ranges; `openapi` describes it, `read_settings` holds to it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from iret.serve.refusal import Refusal

MOST_LABELS = 1000
DIALS = ("budget", "ms", "joules", "battery_percent")  # each says where the dial goes: one at most


@dataclass(frozen=True)
class Range:
    """From `low`, itself included only where it says so, to `high`."""

    low: float
    high: float
    what: str
    has_low: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low < value <= self.high or (self.has_low and value == self.low)

    def __str__(self) -> str:
        return f"{'[' if self.has_low else '('}{self.low:g}, {self.high:g}]"


NUMBERS = {
    "budget": Range(0.0, 1.0, "share of the full model's MACs"),
    "ms": Range(0.0, 1000000.0, "milliseconds an image in the mean; needs this machine's clock"),
    "joules": Range(0.0, 1000000.0, "joules an image in the mean; needs this machine's clock"),
    "deadline_ms": Range(
        0.0, 1000000.0, "milliseconds from the request on; the last head that can be afforded answers"
    ),
    "exit_confidence": Range(0.0, 1.0, "answer at the first stage this sure"),
    "battery_percent": Range(0.0, 100.0, "of the battery that is left; a controller picks the budget", has_low=True),
    "hours_left": Range(0.0, 8760.0, "that the battery must last; with battery_percent"),
}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Settings of one image; None: not said."""

    budget: float | None = None
    ms: float | None = None
    joules: float | None = None
    deadline_ms: float | None = None
    exit_confidence: float | None = None
    battery_percent: float | None = None
    hours_left: float | None = None
    top: int = 5  # labels in the answer
    trace: bool = False  # whether the answer says what was looked at


def read_settings(
    raw: Mapping[str, Any], *, is_text: bool, names: tuple[str, ...] = (*NUMBERS, "top", "trace")
) -> dict[str, Any]:
    """Of `names`: numbers and booleans, as they are or, with `is_text`, written out.

    Raises:
        Refusal: 422 for an unknown setting and for a value of another kind or out of its range.
    """
    found: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in names:
            raise Refusal(422, f"{str(name)[:40]!r} is no setting; choose from {', '.join(names)}.")
        if name == "trace":
            found[name] = _read_flag(value, is_text)
        elif name == "top":
            found[name] = _read_count(value, is_text)
        else:
            found[name] = _read_number(name, value, is_text)
    return found


def merge(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from two places; raises `Refusal` for one that stands in both."""
    for name in one.keys() & other.keys():
        raise Refusal(422, f"{name} was given in the query and in the body; give it once.")
    return {**one, **other}


def make_ask(settings: Mapping[str, Any]) -> Ask:
    """From what `read_settings` read; raises `Refusal` for settings that contradict."""
    dials = [name for name in DIALS if name in settings]
    if len(dials) > 1:
        raise Refusal(422, f"{' and '.join(dials)} were given; each turns the dial, so give one of them.")
    if "hours_left" in settings and "battery_percent" not in settings:
        raise Refusal(422, "hours_left says how long the battery must last; give battery_percent with it.")
    return Ask(**settings)


def _read_number(name: str, value: object, is_text: bool) -> float:
    number, allowed = _to_float(value, is_text), NUMBERS[name]
    if number is None or number not in allowed:
        raise Refusal(422, f"{name}={show(value)} is not a number in {allowed}: {allowed.what}.")
    return number


def _read_count(value: object, is_text: bool) -> int:
    number = _to_float(value, is_text)
    if number is None or number != int(number) or not 1 <= number <= MOST_LABELS:
        raise Refusal(422, f"top={show(value)} is not a whole number from 1 to {MOST_LABELS}.")
    return int(number)


def _read_flag(value: object, is_text: bool) -> bool:
    if isinstance(value, bool) and not is_text:
        return value
    if is_text and value in ("true", "false"):
        return value == "true"
    raise Refusal(422, f"trace={show(value)} is neither true nor false.")


def _to_float(value: object, is_text: bool) -> float | None:
    """A finite number, None if it is none."""
    if isinstance(value, bool) or not isinstance(value, str if is_text else (int, float)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def show(value: object) -> str:
    """Enough of it to be recognised."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
