"""Operating points: the table thresholds -> accuracy and MACs of one checkpoint, measured on held-out images.

`budget=0.4` asks for 40 % of the full model's MACs in the mean; the table says which thresholds give that. It lies beside
the weights as `points.json` and is written by `iret train` and `iret calibrate`.
"""

import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

FORMAT = 1
FILE_NAME = "points.json"
BUDGETS = (1.0, 0.75, 0.5, 0.35, 0.25)  # that cards, `iret eval` and the demo show
CLIFF_SHARE, CLIFF_STEP = 0.1, 0.02  # so much of the full MACs on so little of the threshold is a cliff


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting and what it gave: accuracy in [0, 1], MACs and patches an image, in the mean unless named otherwise."""

    thresholds: tuple[tuple[float, float], ...]  # (keep, refine) per transition
    accuracy: float
    macs_mean: float
    macs_p95: float
    kept_mean: tuple[float, ...]  # patches in each stage


@dataclass(frozen=True, kw_only=True)
class OperatingPoints:
    """Points of one model, dearest first."""

    data: str  # what it was measured on
    num_images: int
    full_macs: int  # of `model(images)`; a budget is a share of it
    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("a table of operating points needs at least one point.")
        macs = [point.macs_mean for point in self.points]
        if macs != sorted(macs, reverse=True):
            raise ValueError("operating points must be ordered from the dearest to the cheapest.")

    @property
    def cheapest_budget(self) -> float:
        return self.points[-1].macs_mean / self.full_macs

    @cached_property
    def _ladder(self) -> tuple[np.ndarray, np.ndarray]:
        """Cheapest first: shares of the full MACs [points], thresholds [points, 2 transitions]."""
        shares = np.array([point.macs_mean / self.full_macs for point in self.points])[::-1]
        return shares, np.array([point.thresholds for point in self.points])[::-1].reshape(len(shares), -1)

    def fit(self, full_macs: int, num_transitions: int) -> bool:
        """Whether they are those of a model of this cost and number of transitions."""
        return self.full_macs == full_macs and all(len(point.thresholds) == num_transitions for point in self.points)

    def thresholds(self, budget: float) -> tuple[tuple[float, float], ...]:
        """Thresholds whose mean MACs are `budget` in (0, 1] times the full model's, interpolated between points.

        Where a hair of threshold drops much, nothing between can be relied on, and the cheaper of the two points is taken.

        Raises:
            ValueError: outside (0, 1], or below the cheapest point.
        """
        check_budget(budget)
        if budget == 1:
            return tuple((0.0, 0.0) for _ in self.points[0].thresholds)
        if budget < self.cheapest_budget:
            raise ValueError(
                f"budget={budget:g} is below the cheapest operating point of this model, "
                f"{self.cheapest_budget:.3f} of its MACs; ask for that or more, or give thresholds above "
                f"{self.points[-1].thresholds}."
            )
        shares, flat = self._ladder
        above = int(np.searchsorted(shares, budget, side="right"))
        if 0 < above < len(shares) and shares[above] - shares[above - 1] > CLIFF_SHARE:
            if np.abs(flat[above] - flat[above - 1]).max() < CLIFF_STEP:
                budget = shares[above - 1]
        found = np.array([np.interp(budget, shares, column) for column in flat.T]).reshape(-1, 2)
        return tuple((float(keep), float(refine)) for keep, refine in found)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str = FILE_NAME) -> "OperatingPoints":
        """Raises ValueError for text that is not such a table, naming `source`."""
        try:
            raw = json.loads(text)
            if raw.pop("format") != FORMAT:
                raise ValueError("written by another version of iret")
            points = tuple(
                Point(
                    thresholds=tuple((float(keep), float(refine)) for keep, refine in point["thresholds"]),
                    kept_mean=tuple(point["kept_mean"]),
                    **{f.name: point[f.name] for f in fields(Point) if f.name not in ("thresholds", "kept_mean")},
                )
                for point in raw.pop("points")
            )
            return cls(points=points, **raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{source} is not a table of operating points ({error}); run `iret calibrate` again."
            ) from error

    @classmethod
    def read(cls, folder: Path) -> "OperatingPoints | None":
        """The table in a model folder, None if there is none."""
        path = folder / FILE_NAME
        return cls.from_json(path.read_bytes(), str(path)) if path.exists() else None


def check_budget(budget: float) -> None:
    """Raises ValueError unless `budget` is in (0, 1]."""
    if not 0 < budget <= 1:
        raise ValueError(f"budget={budget:g} is outside (0, 1]; it is a share of the full model's MACs.")
