"""The controller: battery, deadline and heat -> budget of the next images. NumPy only.

    controller = Controller(points.menu(device), Goal(hours=24, images_per_second=1))
    while True:
        decision = controller.decide(Reading(time_s=time.monotonic(), battery_joules=gauge()))
        model(next_image(), budget=decision.budget)

It takes the most accurate position on the dial that fits. What it promises for the battery, and why, stands at
`Controller`; `iret.simulate` plays a day of it against fixed budgets.
"""

import math
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise

import numpy as np

from iret.runtime.estimates import FACTORS, Battery, Deadline, Demand, Factor, Thermometer, read_number

STEP = 0.005  # the dial is cut into rungs; each costs at most this share more than the one before
BAND, GAIN = 0.02, 0.005  # hysteresis: a smaller drift of the cost (share) and gain of accuracy does not turn the dial
BESIDE = 1e-6  # share of the MACs between the edge of a cliff and its foot: closer than twice this, a menu is a step
FAILURE = 1e-6  # the probability with which the promise for the battery may fail


@dataclass(frozen=True, kw_only=True)
class Menu:
    """What the dial of one model costs on one device, one entry per operating point, cheapest budget first.

    Between neighbours the dial is continuous and everything lies on the chord; those closer than 2e-6 are the foot and the
    edge of a cliff, with nothing between. Accuracy, ms and joules need not rise with the budget. Joules are those an image
    adds to `idle_watts`, which the device draws always.

    Raises:
        ValueError: no points, columns of unequal length, or values outside the ranges given here.
    """

    budget: tuple[float, ...]  # share of the full MACs, strictly rising, in (0, 1]
    accuracy: tuple[float, ...]  # in [0, 1]
    ms: tuple[float, ...] | None = None  # mean latency of an image
    ms_p95: tuple[float, ...] | None = None
    joules: tuple[float, ...] | None = None  # mean of an image
    idle_watts: float = 0.0
    is_estimated: bool = False  # joules are reckoned from MACs, not measured

    def __post_init__(self) -> None:
        if not self.budget:
            raise ValueError("a menu needs at least one operating point.")
        for name in ("accuracy", "ms", "ms_p95", "joules"):
            column = getattr(self, name)
            if column is None:
                continue
            if len(column) != len(self.budget):
                raise ValueError(f"{name} has {len(column)} entries for {len(self.budget)} budgets; give one each.")
            for value in column:
                if name == "accuracy" and not 0 <= value <= 1:
                    raise ValueError(f"accuracy {value:g} is outside [0, 1].")
                if name != "accuracy" and not 0 < value < math.inf:
                    raise ValueError(f"{name} {value:g} is not a positive number.")
        if any(not 0 < share <= 1 for share in self.budget) or any(np.diff(self.budget) <= 0):
            raise ValueError(f"budgets {self.budget} must rise strictly within (0, 1]; give the cheapest first.")
        if not 0 <= self.idle_watts < math.inf:
            raise ValueError(f"idle_watts={self.idle_watts:g} must be 0 or more.")

    @property
    def is_foot(self) -> tuple[bool, ...]:
        """Which entries are no operating point, but the foot of a cliff: what the next cheaper point gives."""
        return (*(right - left <= 2 * BESIDE for left, right in pairwise(self.budget)), False)

    def read(self, name: str, budget: float) -> float:
        """A column at any budget: on the chord or, inside the step of a cliff, at its foot."""
        below = max(int(np.searchsorted(self.budget, budget, side="right")) - 1, 0)
        return float(np.interp(self.budget[below] if self.is_foot[below] else budget, self.budget, getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What must hold. At least one of a battery's hours, a deadline, a temperature and an accuracy.

    Arrivals are "at or under the stated rate" if every stretch of the day brings at most `burst` images more than its
    share of `hours * 3600 * images_per_second` (a token bucket). Shares are equal per second, or follow `profile`.

    Raises:
        ValueError: nothing to hold, a rate without hours or the reverse, or a value outside its range.
    """

    hours: float | None = None  # from the first reading; the battery must last so long ...
    images_per_second: float | None = None  # ... at this rate, in the mean
    burst: float = 10.0  # images, 1 or more
    profile: tuple[float, ...] = ()  # relative demand in equal slices of the hours; empty: even
    battery_joules: float | None = None  # a full battery; for gauges that read a share, or if there is no gauge
    deadline_ms: float | None = None  # for the 95th percentile of images; one of a batch counts as their mean
    max_celsius: float | None = None
    min_accuracy: float | None = None  # in (0, 1]; yields to all others, see Controller

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "profile" and value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field.name}={value:g} is not a positive number.")
        if all(goal is None for goal in (self.hours, self.deadline_ms, self.max_celsius, self.min_accuracy)):
            raise ValueError("a goal needs hours with images_per_second, deadline_ms, max_celsius or min_accuracy.")
        if (self.hours is None) != (self.images_per_second is None):
            raise ValueError("hours and images_per_second belong together; give both.")
        if self.burst < 1:
            raise ValueError(f"burst={self.burst:g} is below 1; one image always comes at once.")
        if self.min_accuracy is not None and self.min_accuracy > 1:
            raise ValueError(f"min_accuracy={self.min_accuracy:g} is above 1; it is a share of right answers.")
        if self.profile and not (all(0 <= share < math.inf for share in self.profile) and sum(self.profile) > 0):
            raise ValueError("profile holds relative demands: 0 or more, and not all 0.")


@dataclass(slots=True, kw_only=True)
class Reading:
    """What the sensors say; None is missing, and NaN, infinite or negative values count as missing."""

    time_s: float | None  # monotonic clock; one that goes back stands still
    images: int | None = None  # answered since the last reading; None: as many as the last decision was for
    battery_joules: float | None = None  # left
    battery_share: float | None = None  # left, of `Goal.battery_joules`; used where there are no joules
    joules: float | None = None  # of those images together, above idle
    ms: float | None = None  # of those images, their mean
    celsius: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The budget for the next images, and why."""

    budget: float  # in (0, 1]
    accuracy: float  # expected
    reason: str  # one sentence
    broken: tuple[str, ...]  # of "temperature", "deadline", "battery", "accuracy": cannot be met now, or not be judged
    doubts: tuple[str, ...]  # what is wrong with a sensor or a statement


class Controller:
    """Picks the most accurate position of the dial that fits the goal.

    Positions are *rungs*: the operating points, and between them so many that each costs at most 0.5 % more than the next. The
    most accurate that fits is taken, of equals the cheapest, so never one that another rung matches in accuracy at no more of any
    cost that governs: joules for a battery, p95 for a deadline, joules, else ms, else the budget for heat or a floor alone. It
    does not alternate between two far rungs to reach the concave hull: an image's answer would depend on its turn, most dents of
    a measured table are noise, and what a dent leaves over is spent later anyway.

    *Promise 1, the battery lasts.* Let at most `A = hours * 3600 * images_per_second + burst` images come, under the token bucket
    of `Goal`; let an image at a rung of c joules take c (1 + x), |x| <= spread, x of mean 0 whatever came before; let gauge and
    clock be truthful and each decision serve as many images as it was asked for; and let the cheapest rung be affordable: at
    first at least `idle_watts * 3600 * hours + reserve(A)` joules are left, where `reserve(m) = c_min (m + min(spread m, s spread
    sqrt(m)))`, s = sqrt(2 ln(A / 1e-6)). Then the battery lasts, except with probability 1e-6. Proof: k images are served above
    the cheapest rung only if, all k at their dearest, the reserve for all that can still come is left. So after the last such
    decision the rest, all at the cheapest rung, dies only if its noise exceeds s spread sqrt(m): by Azuma and Doob of probability
    exp(-s^2 / 2), once for each of A decisions that may be the last. Costs measured above the table's raise all of this, and
    those below it lower none.

    *Promise 2, little is lost.* If besides at least 1,000 images come, thinned evenly from the stated demand to a constant,
    unknown share of at least a tenth (of n images one in each n-th part of the demand), with 1.1 times the energy of promise 1,
    if only the battery binds, and the best accuracy for a cost rises at most in proportion to the cost (no cliffs; dominated
    points are allowed), then the mean accuracy is at least 98 % of that of every fixed budget, so of every table point, that
    survives the day on 97 % of the energy without the slack of the reserve, `reserve(A) - c_min A + burst c_min` (less than 1 %
    of a day of 86,400 images, some 7 % of one of 1,000). Reason: `left / expected images` is spent on each, which is what the
    best fixed budget spends; what is saved or overspent comes back into the quotient; the share is learned within a few images.
    Seen: of 2,600 random days of 900 to 1,500 images, half of them with just the energy for some table point, nine in ten lost
    less than 0.01 % against the best one; the worst of 4,600 such days 0.9 %. Not promised: to match a point that takes the
    battery to its last joule, which nobody can know in advance (worst of 644 such days: 97.6 %); arrivals at random, of which n
    tell the share to 1 / sqrt(n) only (worst of 3,500 days: 98.8 %; of 3,900 with just the energy for a point three fell below 98
    %, one to 95.8 %); arrivals that stop or surge against the stated profile: a day that goes on as stated begins alike, and
    whoever keeps promise 1 has to keep every joule for it. The battery lasts all the same.

    *What yields.* Heat first (the device is at stake), then the deadline, the battery, the accuracy. What cannot be met is
    approached as closely as possible and named in `broken`. A floor under the accuracy never lets the battery run ahead of its
    pace: it would only be missed by more later. Alone, it asks for the cheapest rung above it.

    *Sensors.* Missing or impossible values are skipped and named in `doubts`. Between readings of the gauge, energy is reckoned
    from measured or, without a meter, corrected predicted costs. A gauge below the reckoning is believed at once; one above it
    only after it fell plausibly for 16 images, so neither if it is stuck nor if it jumps up, and a charger only once it is
    unplugged. Measured / predicted joules are held within 1/4 to 4, a single measurement to a factor of two, and one below 1
    never loosens promise 1: with a truthful gauge the battery lasts whatever the meter says. A gauge that goes on falling faster
    than that, over 16 images and in more than two falls, so not by a jump, overrules table and meter and is the only meter from
    then on: estimates are of the arithmetic alone, often a thousandth of what a device takes. Until this is known, some 20 images
    by a fine gauge, or 4 % of the battery by one in whole percent, go at the wrong cost; with 40 of the dearest images and a
    fifth of the energy to spare the battery lasts all the same (seen: on each of 10,000 days with costs 2 to 2,000 times the
    table's, three quarters of them up to 6.5, where it is longest in doubt). A deadline goes by the 95th percentile of measured
    over the table's milliseconds in some hundred images, at first a quarter above it. Without a gauge a full battery of
    `Goal.battery_joules` is assumed; without that too, nothing is known, and the cheapest rung (above the floor) is taken. The
    thermometer is a median of three; without one for a minute the cap is assumed to be reached. Not to be seen: a thermometer
    that is stuck, a clock that leaps ahead, a gauge and a meter that lie alike.

    Raises:
        ValueError: the goal needs a column that the menu does not have.
    """

    def __init__(self, menu: Menu, goal: Goal, spread: float = 0.25) -> None:
        if goal.hours is not None and menu.joules is None:
            raise ValueError("a battery needs the joules of every operating point; measure them on this device first.")
        if goal.deadline_ms is not None and menu.ms_p95 is None:
            raise ValueError("a deadline needs ms_p95 of every operating point; measure them on this device.")
        if not 0 <= spread < math.inf:
            raise ValueError(f"spread={spread:g} must be 0 or more.")
        self.goal = goal
        self._rungs = _cut(menu, goal)
        self._spread, self._idle_watts, self._is_estimated = spread, menu.idle_watts, menu.is_estimated
        self._joule_factor = Factor()
        self._deadline = None if goal.deadline_ms is None else Deadline(goal.deadline_ms)
        self._heat = None if goal.max_celsius is None else Thermometer(goal.max_celsius)
        self._battery = self._demand = None
        if goal.hours is not None and goal.images_per_second is not None:
            self._battery = Battery(goal.battery_joules)
            self._demand = Demand(goal.hours, goal.images_per_second, goal.burst, goal.profile)
            self._sigmas = math.sqrt(2 * math.log(self._demand.all / FAILURE))
        self._held: int | None = None
        self._planned = 0  # images of the last decision
        self._start: float | None = None
        self._time_s = 0.0  # since the first reading

    def decide(self, reading: Reading, images: int = 1) -> Decision:
        """The budget for the next `images` images, 1 or more; ask again before more are run."""
        doubts: list[str] = []
        self._take(reading, doubts)
        self._planned = images
        rungs, goal, heat, deadline, battery = self._rungs, self.goal, self._heat, self._deadline, self._battery
        broken: list[str] = []
        fits, best, reason, limit, pace = rungs.all, 0, "nothing binds: the most accurate position", math.inf, math.inf
        if heat is not None:
            fits, first, _ = _within(fits, rungs.cost, heat.limit(rungs.cheapest, rungs.dearest))
            if heat.is_over or heat.is_stale:
                broken.append("temperature")
            if first != best:
                best, reason = first, heat.reason
        if deadline is not None:
            fits, first, _ = _within(fits, rungs.ms_p95, deadline.limit)
            if first != best:
                best, reason = first, f"deadline: {deadline.ms:g} ms, for 95 of 100 images"
            if trouble := deadline.explain(rungs.ms_p95[first]):
                broken.append("deadline")
                doubts.append(trouble)
        if battery is not None and battery.left is not None:
            cheapest = rungs.cheapest if fits is rungs.all else float(rungs.joules[fits].min())
            limit, pace, is_met = self._afford(cheapest, images)
            limit = max(limit, cheapest)
            _, first, _ = _within(fits, rungs.joules, min(limit, pace))
            if not is_met:
                broken.append("battery")
            if first != best:
                best = first
                reason = f"battery: {max(pace, 0.0) * self._joule_factor.value:.3g} J an image are affordable"
                if limit < pace:
                    reason = "battery: the rest is kept for the images that can still come"
        elif battery is not None:
            broken.append("battery")
            best = self._frugal(fits)
            reason = "battery: neither gauge nor --battery-wh (battery_joules) says what is left, so as cheap as can be"
        elif rungs.is_unlimited:
            best, floor = self._frugal(fits), min(goal.min_accuracy or 0.0, float(rungs.accuracy.max()))
            reason = f"accuracy: as cheap as {floor:.6g} allows"
        held = self._held = self._turn(fits, best, limit, pace)
        if goal.min_accuracy is not None and rungs.accuracy[held] < goal.min_accuracy:
            broken.append("accuracy")
        return Decision(float(rungs.budget[held]), float(rungs.accuracy[held]), reason, tuple(broken), tuple(doubts))

    def _frugal(self, fits: np.ndarray) -> int:
        """The cheapest above the floor, if there is one: nothing else is asked, or nobody knows what else is affordable."""
        enough = fits & (self._rungs.accuracy >= (self.goal.min_accuracy or 0.0))
        if not enough.any():
            if self._battery is None:
                return 0
            enough = fits
        return int(np.where(enough, self._rungs.cost, np.inf).argmin())

    def _turn(self, fits: np.ndarray, best: int, limit: float, pace: float) -> int:
        """Hysteresis: what is held stays unless it no longer fits, runs ahead of the pace, or there is something to gain."""
        rungs, held = self._rungs, self._held
        if held is None or not fits[held]:
            return best
        cost, accuracy = rungs.cost, rungs.accuracy
        if limit < math.inf and rungs.joules[held] > min(limit, pace * (1 + BAND)):
            return best
        if best < held and (
            cost[best] > cost[held] * (1 + BAND)
            or accuracy[best] > accuracy[held] + GAIN
            or rungs.joules[best] * (1 + BAND) < pace < math.inf  # affordable for a while
        ):
            return best
        return held

    def _afford(self, cheapest: float, images: int) -> tuple[float, float, bool]:
        """Joules that one of the next images may take by the table: at most, and to last evenly.

        Third, whether all that can still come is affordable at the cheapest rung.
        """
        assert self._battery is not None and self._battery.left is not None and self._demand is not None
        demand, factor = self._demand, self._joule_factor
        usable = self._battery.left - self._idle_watts * (demand.end_s - demand.time_s)
        # Costs below the table's must not loosen the promise.
        likely, careful = max(1.0, factor.value), max(1.0, factor.careful(self._spread))
        later = max(demand.most - images, 0.0)
        noise = self._spread * min(later, self._sigmas * math.sqrt(later))
        limit = (usable / careful - cheapest * (later + noise)) / (images * (1 + self._spread))
        pace = usable / (max(demand.expected, images) * factor.value)
        return limit, pace, usable >= likely * cheapest * (later + images) or demand.time_s == demand.end_s

    def _take(self, reading: Reading, doubts: list[str]) -> None:
        """Account for what was answered since the last reading, and hear the sensors."""
        now, held = read_number(reading.time_s), self._held
        if self._start is None:
            self._start = now
        time_s = self._time_s if now is None or self._start is None else now - self._start
        if now is None or time_s < self._time_s:
            doubts.append("the clock gives no time or went back")
        passed_s = max(0.0, time_s - self._time_s)
        self._time_s += passed_s
        used, count = 0.0, read_number(reading.images)
        joules = None if self._battery is not None and self._battery.has_overruled else reading.joules
        # Nothing before the first decision was ours.
        images = 0 if held is None else self._planned if count is None else int(count)
        if held is not None and images:
            used = self._joule_factor.take(joules, images * float(self._rungs.joules[held]), images, doubts)
            if self._deadline is not None:
                self._deadline.take(reading.ms, float(self._rungs.ms_p95[held]), images, doubts)
        if self._heat is not None:
            self._heat.take(reading.celsius, self._time_s, doubts)
        if self._battery is not None and self._demand is not None:
            self._demand.take(self._time_s, images, doubts)
            self._battery.spend(used, images, self._idle_watts * passed_s)
            self._hear(self._battery, reading, joules is not None, doubts)

    def _hear(self, battery: Battery, reading: Reading, is_metered: bool, doubts: list[str]) -> None:
        """What the gauge says of the costs: a correction where there is no meter, and far off it overrules all else."""
        factor = self._joule_factor
        seen = battery.read(reading.battery_joules, reading.battery_share, doubts, factor.room)
        if seen is not None and battery.has_overruled and not FACTORS[0] < seen[0] <= factor.room:
            factor.rescale(seen[0])
        elif seen is not None and not is_metered:
            factor.take(seen[0] * factor.value, 1.0, seen[1], doubts)
        if battery.has_overruled:
            doubts.append(f"the gauge falls {factor.value:.1f} times faster than the table says; it alone is believed")
        elif self._is_estimated and not battery.is_confirmed:
            doubts.append("the table's joules are estimates, and no gauge has confirmed them yet")


# ---- the dial


@dataclass(frozen=True)
class _Rungs:
    """Positions of the dial, the most accurate first, of equals the cheapest: the first that fits is not dominated."""

    budget: np.ndarray
    accuracy: np.ndarray
    cost: np.ndarray  # in what governs first
    joules: np.ndarray  # NaN where the menu has none, as is ms_p95
    ms_p95: np.ndarray
    is_unlimited: bool  # only a floor is asked for

    @cached_property
    def all(self) -> np.ndarray:
        return np.ones(len(self.accuracy), dtype=bool)

    @cached_property
    def cheapest(self) -> float:
        return float(self.cost.min())

    @cached_property
    def dearest(self) -> float:
        return float(self.cost[0])  # worth taking


def _cut(menu: Menu, goal: Goal) -> _Rungs:
    columns = {f.name: getattr(menu, f.name) for f in fields(Menu) if isinstance(getattr(menu, f.name), tuple)}
    budgets = np.array(columns["budget"], dtype=float)
    shares = [budgets]
    for name in columns.keys() - {"accuracy"}:
        for left, right, low, high, is_foot in zip(
            budgets, budgets[1:], columns[name], columns[name][1:], menu.is_foot, strict=False
        ):
            if low != high and not is_foot:
                stops = np.geomspace(low, high, 1 + math.ceil(abs(math.log(high / low)) / STEP))[1:-1]
                shares.append(left + (right - left) * (stops - low) / (high - low))
    at = np.unique(np.concatenate(shares))
    table = {name: np.interp(at, budgets, column) for name, column in columns.items()}
    main = next(name for name in ("joules", "ms", "budget") if name in table)
    governing: list[str] = [main] if goal.hours is not None or goal.max_celsius is not None else []
    governing += ["ms_p95"] if goal.deadline_ms is not None else []
    costs = np.stack([table[name] for name in governing or [main]])
    accuracy = table["accuracy"]
    order = np.lexsort((*costs[::-1], -accuracy))
    kept = {name: column[order] for name, column in table.items()}
    extra = {name: kept.get(name, np.full(len(order), np.nan)) for name in ("joules", "ms_p95")}
    return _Rungs(kept["budget"], kept["accuracy"], costs[0][order], **extra, is_unlimited=not governing)


def _within(fits: np.ndarray, cost: np.ndarray, limit: float) -> tuple[np.ndarray, int, bool]:
    """Those of `fits` that cost at most `limit`, the first of them, whether there are any; the cheapest if not."""
    met = fits & (cost <= limit)
    first = int(met.argmax())
    if met[first]:
        return met, first, True
    met = fits & (cost <= cost[fits].min())
    return met, int(met.argmax()), False
