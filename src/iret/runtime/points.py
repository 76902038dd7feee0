"""Operating points: the table thresholds -> accuracy, MACs, milliseconds and joules of one checkpoint.

`budget=0.4` asks for 40 % of the full model's MACs in the mean; the table says which thresholds give that. `ms=` and
`joules=` are looked up in the columns of the device at hand and become a budget. The table lies beside the weights as
`points.json` and is written by `iret train` and `iret calibrate`: accuracy and MACs are facts about the weights and travel,
the columns of a `DeviceTable` hold for one machine and are measured again on another.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from decimal import ROUND_CEILING, Context
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from iret.runtime.controller import BESIDE, Menu

FORMAT = 3  # 2: MACs of dropped patches had one more MLP
FILE_NAME = "points.json"
BUDGETS = (1.0, 0.75, 0.5, 0.35, 0.25)  # that cards, `iret eval` and the demo show
MAX_SETTINGS = 1024  # remembered by one table
PRECISIONS = ("float32", "float32-onednn", "bfloat16", "int8")  # what a device can be measured in: `iret.precision`
MEASURE_MODEL = (
    "`iret calibrate MODEL --device-only` and the same --threads (in Python `torch.set_num_threads`) and --precision, "
    "with --out FOLDER for a shipped model"
)
CLIFF_SHARE, CLIFF_STEP = 0.1, 0.02  # so much of the full MACs on so little of the threshold is a cliff


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How to run a model; see `Iret.run`."""

    thresholds: object = 0.0
    exit_confidence: float | None = None
    rule: str = "threshold"
    control: str = "attention"


@dataclass(frozen=True)
class Plan:
    """What one held-out image did: patches kept and refined in each stage it passed, from the first."""

    kept: tuple[int, ...]
    refined: tuple[int, ...]

    @property
    def stages_run(self) -> int:
        return len(self.kept)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting and what it gave: accuracy in [0, 1], MACs and patches an image, in the mean unless named otherwise."""

    thresholds: tuple[tuple[float, float], ...]  # (keep, refine) per transition
    exit_confidence: float | None = None
    accuracy: float
    macs_mean: float
    macs_p95: float
    kept_mean: tuple[float, ...]  # patches in each stage
    plans: tuple[Plan, ...] = ()  # a sample of images, even over their MACs: what a clock is measured on

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is dropped and nobody leaves early."""
        return self.exit_confidence is None and not np.any(self.thresholds)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Point":
        """From JSON, where tuples are lists."""
        return cls(
            **raw
            | {
                "thresholds": tuple((float(keep), float(refine)) for keep, refine in raw["thresholds"]),
                "kept_mean": tuple(raw["kept_mean"]),
                "plans": tuple(Plan(tuple(kept), tuple(refined)) for kept, refined in raw.get("plans", ())),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """`from_dict` reads it."""
        return asdict(self) | {"plans": [(plan.kept, plan.refined) for plan in self.plans]}


@dataclass(frozen=True, kw_only=True)
class DeviceTable:
    """What the points cost on one device at batch 1, an entry per point."""

    device: str  # processor, threads and number format
    ms_mean: tuple[float, ...]
    ms_p50: tuple[float, ...]
    ms_p95: tuple[float, ...]
    joules: tuple[float, ...]  # an image, above `idle_watts`
    energy_source: str
    energy_scope: str
    energy_kind: str  # "measured" or "estimated"
    rounds: int
    idle_watts: float = 0.0  # that the device draws always; 0 where nobody measured it

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "DeviceTable":
        """From JSON, where tuples are lists."""
        fixed: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()
        }
        return cls(**fixed)


@dataclass(frozen=True, kw_only=True)
class OperatingPoints:
    """Points of one model, dearest first; `frontier` says which are worth serving."""

    data: str  # what it was measured on
    num_images: int
    full_macs: int  # of `model(images)`; a budget is a share of it
    points: tuple[Point, ...]
    devices: tuple[DeviceTable, ...] = ()

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("a table of operating points needs at least one point.")
        macs = [point.macs_mean for point in self.points]
        if macs != sorted(macs, reverse=True):
            raise ValueError("operating points must be ordered from the dearest to the cheapest.")
        for table in self.devices:
            columns = (table.ms_mean, table.ms_p50, table.ms_p95, table.joules)
            if any(len(column) != len(self.points) for column in columns):
                raise ValueError(f"the columns of device {table.device!r} do not have {len(self.points)} entries.")

    @property
    def cheapest_budget(self) -> float:
        return self.points[-1].macs_mean / self.full_macs

    @cached_property
    def shares(self) -> np.ndarray:
        """Of the full MACs, cheapest first, in (0, 1]."""
        return np.array([min(1.0, point.macs_mean / self.full_macs) for point in self.points])[::-1]

    @cached_property
    def _ladder(self) -> np.ndarray:
        """Cheapest first: [points, 2 transitions + 1], thresholds and the confidence at which an image leaves."""
        rows = [
            (*np.ravel(point.thresholds), 1.0 if point.exit_confidence is None else point.exit_confidence)
            for point in self.points
        ]
        return np.array(rows, dtype=np.float64)[::-1]

    @cached_property
    def _settings(self) -> dict[float, Setting]:
        """Those that were asked for, because the same budget is asked for again at every image."""
        return {}

    def fit(self, full_macs: int, num_transitions: int) -> bool:
        """Whether they are those of a model of this cost and number of transitions."""
        return self.full_macs == full_macs and all(len(point.thresholds) == num_transitions for point in self.points)

    def has_those_of(self, other: "OperatingPoints") -> bool:
        """Whether it is the same table but for its clocks."""
        return replace(self, devices=()) == replace(other, devices=())

    # ---- from a budget to a setting

    def setting(self, budget: float) -> Setting:
        """The setting whose mean MACs are `budget` in (0, 1] times the full model's, interpolated between points.

        Where a hair of threshold drops much, nothing between can be relied on, and the cheaper of the two points is taken.

        Raises:
            ValueError: outside (0, 1], or below the cheapest point.
        """
        check_budget(budget)
        budget = float(budget)
        setting = self._settings.get(budget)
        if setting is None:  # threads may both come here: they find the same
            setting = self._interpolate(budget)
            if len(self._settings) >= MAX_SETTINGS:
                self._settings.clear()
            self._settings[budget] = setting
        return setting

    def _interpolate(self, budget: float) -> Setting:
        if budget == 1:
            return keep_all(len(self.points[0].thresholds))
        if budget < self.cheapest_budget:
            raise ValueError(
                f"budget={budget:g} is below the cheapest operating point of this model, "
                f"{round_up(self.cheapest_budget)} of its MACs; ask for that or more."
            )
        shares, ladder = self.shares, self._ladder
        above = int(np.searchsorted(shares, budget, side="right"))
        if 0 < above < len(shares) and self._is_cliff(above):
            budget = shares[above - 1]
        *flat, confidence = (float(np.interp(budget, shares, column)) for column in ladder.T)
        return Setting(
            thresholds=tuple(zip(flat[::2], flat[1::2], strict=True)),
            exit_confidence=confidence if confidence < 1 else None,
        )

    # ---- from milliseconds or joules to a budget

    def table_of(self, device: str, remedy: str = MEASURE_MODEL) -> DeviceTable:
        """Raises ValueError unless this device was measured; `remedy` says how that is done."""
        for table in self.devices:
            if table.device == device:
                return table
        known = "; ".join(table.device for table in self.devices) or "none"
        raise ValueError(f"no clock was measured on this device ({device}); known: {known}. Measure it with {remedy}.")

    def with_device(self, table: DeviceTable) -> "OperatingPoints":
        """This table with the columns of a device added or replaced."""
        others = tuple(other for other in self.devices if other.device != table.device)
        return replace(self, devices=(*others, table))

    def budget_for(
        self, device: str, *, ms: float | None = None, joules: float | None = None, remedy: str = MEASURE_MODEL
    ) -> float:
        """The budget of the most accurate position whose mean cost an image on `device` is at most that.

        Of equally accurate ones the cheapest, so never one that another beats in accuracy at no more of that cost: a larger
        budget may well be slower and worse. Accuracies are those of the table, noise included.

        Raises:
            ValueError: not exactly one of the two, not positive, below the cheapest point, or a device without columns.
        """
        if (ms is None) == (joules is None):
            raise ValueError("give one of ms and joules.")
        table = self.table_of(device, remedy)
        unit, asked = ("ms", ms) if joules is None else ("joules", joules)
        assert asked is not None
        if not asked > 0:
            raise ValueError(f"{unit}={asked:g} must be above 0.")
        menu = self.menu(table.device)
        budget = _best_within(menu, unit, asked)
        if budget is None:
            cost, share = min(zip(getattr(menu, unit), menu.budget, strict=True))
            least = Context(prec=4, rounding=ROUND_CEILING).create_decimal(repr(float(cost)))
            raise ValueError(
                f"{unit}={asked:g} is below the cheapest operating point on this device, {float(least):g} {unit} at "
                f"{round_up(share)} of the MACs; ask for that or more, or for a budget of {round_up(share)}. If this machine "
                f"was busy when it was measured, measure again with {remedy}."
            )
        return budget

    def accuracy_at(self, budget: float) -> float:
        """Of held-out images, between two points on their chord; in [0, 1]."""
        return float(np.interp(budget, self.shares, [point.accuracy for point in self.points][::-1]))

    def menu(self, device: str, idle_watts: float | None = None) -> Menu:
        """What a controller chooses from on a device that was measured; a cliff is a step there, as `setting` serves it.

        `idle_watts` in place of what the table says the device draws always.
        """
        table = self.table_of(device)
        accuracy = [point.accuracy for point in self.points]
        columns = (column[::-1] for column in (accuracy, table.ms_mean, table.ms_p95, table.joules))
        rows: list[tuple[float, ...]] = []
        for place, row in enumerate(zip(self.shares.tolist(), *columns, strict=True)):
            if rows and row[0] == rows[-1][0]:
                rows.pop()  # a threshold that drops nothing costs as much as none
            elif rows and self._is_cliff(place):
                rows.append((row[0] - BESIDE, *rows[-1][1:]))
            rows.append(row)
        return Menu(
            **dict(zip(("budget", "accuracy", "ms", "ms_p95", "joules"), zip(*rows, strict=True), strict=True)),
            idle_watts=table.idle_watts if idle_watts is None else idle_watts,
            is_estimated=table.energy_kind == "estimated",
        )

    def _is_cliff(self, above: int) -> bool:
        """Whether so little lies between a point (by its place from the cheapest) and the next cheaper one."""
        shares, ladder = self.shares, self._ladder
        return bool(
            shares[above] - shares[above - 1] > CLIFF_SHARE
            and np.abs(ladder[above] - ladder[above - 1]).max() < CLIFF_STEP
        )

    def to_json(self) -> str:
        """One point a line."""
        head = {"format": FORMAT} | {f.name: getattr(self, f.name) for f in fields(self)}
        rows: dict[str, list[dict[str, Any]]] = {
            "points": [point.to_dict() for point in self.points],
            "devices": [asdict(table) for table in self.devices],
        }
        parts = [f'"{name}": {json.dumps(value)}' for name, value in head.items() if name not in rows]
        for name, entries in rows.items():
            lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
            parts.append(f'"{name}": [\n{lines}\n ]')
        return "{\n " + ",\n ".join(parts) + "\n}\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str = FILE_NAME) -> "OperatingPoints":
        """Raises ValueError for text that is not such a table, naming `source`."""
        try:
            raw = json.loads(text)
            if raw.pop("format") != FORMAT:
                raise ValueError("written by another version of iret")
            points = tuple(Point.from_dict(point) for point in raw.pop("points"))
            devices = tuple(DeviceTable.from_dict(table) for table in raw.pop("devices"))
            return cls(points=points, devices=devices, **raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{source} is not a table of operating points ({error}); run `iret calibrate` again, in a folder without it."
            ) from error

    @classmethod
    def read(cls, folder: Path) -> "OperatingPoints | None":
        """The table in a model folder, None if there is none."""
        path = folder / FILE_NAME
        return cls.from_json(path.read_bytes(), str(path)) if path.exists() else None


def _best_within(menu: Menu, unit: str, limit: float) -> float | None:
    """The budget of the most accurate position that costs at most `limit`, of equals the cheapest; None if none does."""
    costs: tuple[float, ...] = getattr(menu, unit)
    rows = list(zip(menu.accuracy, costs, menu.budget, menu.is_foot, strict=True))
    fit = [(accuracy, -cost, -budget) for accuracy, cost, budget, _ in rows if cost <= limit]
    for (accuracy, cost, budget, is_foot), (next_accuracy, next_cost, next_budget, _) in pairwise(rows):
        if not is_foot and (cost <= limit) != (next_cost <= limit):  # the chord crosses the limit
            share = (limit - cost) / (next_cost - cost)
            across = accuracy + share * (next_accuracy - accuracy)
            fit.append((across, -limit, -(budget + share * (next_budget - budget))))
    return -max(fit)[2] if fit else None


def round_up(share: float) -> str:
    """To three digits, such that it can be asked for."""
    return f"{math.ceil(1e3 * share) / 1e3:.3f}"


def frontier(points: Sequence[Point], num_images: int) -> tuple[Point, ...]:
    """The points that none at most as dear beats in accuracy beyond noise, and one that keeps everything; dearest first.

    Noise is the 95 % interval of the difference of two accuracies on `num_images` images, as if on different ones.
    Thresholds that save nothing are no points: scoring costs more than they drop.
    """
    chosen: list[Point] = []
    best: Point | None = None
    whole = next((point for point in points if point.keeps_all), None)
    useful = [point for point in points if whole is None or point is whole or point.macs_mean < whole.macs_mean]
    ordered = sorted(useful, key=lambda point: (point.macs_mean, -point.accuracy))
    for point in ordered:
        variances = [each.accuracy * (1 - each.accuracy) / num_images for each in (point, best or point)]
        is_beaten = best is not None and best.accuracy - point.accuracy > 1.96 * sum(variances) ** 0.5
        is_again = bool(chosen) and chosen[-1].macs_mean == point.macs_mean  # nothing more was dropped
        if not is_again and (not is_beaten or point is ordered[-1]):
            chosen.append(point)
        if best is None or point.accuracy > best.accuracy:
            best = point
    return tuple(reversed(chosen))


def keep_all(num_transitions: int) -> Setting:
    """Nothing is dropped and nobody leaves early."""
    return Setting(thresholds=((0.0, 0.0),) * num_transitions)


# ---- what a model and a session both ask; `lacking` is their sentence where there is no table


def require(points: OperatingPoints | None, asker: str, lacking: str) -> OperatingPoints:
    """The table; raises ValueError where there is none."""
    if points is None:
        raise ValueError(f"{asker} needs operating points, and {lacking}, or give thresholds.")
    return points


def setting_of(points: OperatingPoints | None, budget: float, num_transitions: int, lacking: str) -> Setting:
    """As `OperatingPoints.setting`; everything needs no table."""
    check_budget(budget)
    if budget == 1:
        return keep_all(num_transitions)
    return require(points, f"budget={budget:g}", lacking).setting(budget)


def budget_of(
    points: OperatingPoints | None, device: str, *, ms: float | None, joules: float | None, lacking: str, remedy: str
) -> float:
    """As `OperatingPoints.budget_for`; what is no number is refused, too."""
    for name, value in (("ms", ms), ("joules", joules)):
        check_number(name, value, f"; for one an image give a budget each, from budget_for({name}=...)")
    table = require(points, f"ms={ms:g}" if ms is not None else f"joules={joules}", lacking)
    return table.budget_for(device, ms=ms, joules=joules, remedy=remedy)


def check_number(name: str, value: object, instead: str = "") -> None:
    """Raises ValueError for what is neither None nor one number; `instead` ends the sentence."""
    if value is not None and not isinstance(value, (int, float, np.number)):
        raise ValueError(f"{name}={value!r} must be one number{instead}.")


def check_budget(budget: float) -> None:
    """Raises ValueError unless `budget` is in (0, 1]."""
    if not 0 < budget <= 1:
        raise ValueError(f"budget={budget:g} is outside (0, 1]; it is a share of the full model's MACs.")
