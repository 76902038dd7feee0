"""A day on battery: the controller against every fixed budget, image by image, and a picture of it.

Arrivals, the noise of single images and the weather are the same for all policies. The device is a battery, a power when
idle, and one thermal mass: `C dT/dt = P - (T - ambient) / R`. Costs and accuracy come from the `Menu`, so this is a
simulation of measured points, no measurement. Accuracies are expectations: nothing is classified.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from iret.picture import save_figure
from iret.runtime.controller import Controller, Goal, Menu, Reading

# Relative demand in equal slices of the day. "office": by the hour, busy from 8 to 18 with a dip at noon.
PROFILES = {
    "steady": (1.0,),
    "office": (1, 1, 1, 1, 1, 2, 4, 12, 25, 30, 30, 28, 18, 26, 30, 30, 28, 22, 12, 6, 4, 3, 2, 1),
    "bursts": (1.0,),
}
CLUMP = 30  # images of one burst, which come within CLUMP_S seconds
MAX_IMAGES = 2_000_000  # of one day; a list of their times takes some hundred megabytes
CLUMP_S = 15.0
NUM_SAMPLES = 288  # of a time series: every five minutes of a day


@dataclass(frozen=True, kw_only=True)
class Thermal:
    """One thermal mass; defaults are those of a small fanless board."""

    ambient_celsius: float = 25.0
    kelvin_per_watt: float = 8.0
    joules_per_kelvin: float = 60.0

    def __post_init__(self) -> None:
        if not (0 < self.kelvin_per_watt < math.inf and 0 < self.joules_per_kelvin < math.inf):
            raise ValueError("kelvin_per_watt and joules_per_kelvin must be positive.")


@dataclass(frozen=True, kw_only=True)
class Day:
    """What happens to the device. Arrivals come at or under the rate, as the token bucket of `Goal` defines it.

    Raises:
        ValueError: an unknown kind of arrivals, or a value outside its range.
    """

    hours: float = 24.0
    images_per_second: float = 1.0  # in the mean of the day
    battery_joules: float
    arrivals: str = "steady"  # a key of PROFILES
    busy: float = 0.9  # share of the stated images that come, in (0, 1]
    burst: float = 60.0  # images
    spread: float = 0.25  # an image costs its point's joules times 1 +- this
    thermal: Thermal = field(default_factory=Thermal)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arrivals not in PROFILES:
            raise ValueError(f"arrivals={self.arrivals!r} is unknown; choose from {', '.join(PROFILES)}.")
        for name in ("hours", "images_per_second", "battery_joules"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name):g} is not a positive number.")
        if not 0 < self.busy <= 1:
            raise ValueError(f"busy={self.busy:g} is outside (0, 1]; it is the share of the stated images that come.")
        if not 0 <= self.spread < 1:
            raise ValueError(f"spread={self.spread:g} is outside [0, 1); no image gives energy back.")

    def goal(self, **more: float) -> Goal:
        """What somebody would ask for who knows the rate, the hours and the profile; `more` are other fields of `Goal`."""
        return Goal(
            hours=self.hours,
            images_per_second=self.images_per_second,
            burst=self.burst,
            profile=tuple(map(float, PROFILES[self.arrivals])),
            **more,
        )

    def times(self) -> np.ndarray:
        """Arrivals in seconds, rising, float [images]. What exceeds the token bucket is not let in."""
        random = np.random.default_rng(self.seed)
        end_s, slices = 3600 * self.hours, np.array(PROFILES[self.arrivals], dtype=float)
        stated = end_s * self.images_per_second
        if stated > MAX_IMAGES:
            raise ValueError(
                f"{stated:,.0f} images are more than {MAX_IMAGES:,} that a day is played with; lower --rate or --hours."
            )
        ahead = np.concatenate([[0.0], np.cumsum(slices) / slices.sum()])
        wanted = max(1, round(self.busy * stated))
        if self.arrivals == "bursts":
            starts = random.uniform(0, 1 - min(1.0, CLUMP_S / end_s), max(1, wanted // CLUMP))
            at = (starts[:, None] + random.uniform(0, CLUMP_S / end_s, (len(starts), CLUMP))).ravel()
        else:
            at = (np.arange(wanted) + random.uniform(0, 1, wanted)) / wanted
        shares = np.sort(np.interp(at, ahead, np.linspace(0, 1, len(ahead))))  # of the day gone by
        came = stated * np.interp(shares, np.linspace(0, 1, len(ahead)), ahead)  # stated demand until then
        tokens, before, let_in = self.burst, 0.0, []
        for index, due in enumerate(came.tolist()):
            tokens, before = min(self.burst, tokens + due - before), due
            if tokens >= 1:
                tokens -= 1
                let_in.append(index)
        return end_s * shares[let_in]


@dataclass(frozen=True)
class Outcome:
    """A day of one policy. Accuracy counts answered images, `correct` is expected, series have one value a sample."""

    policy: str
    hours: float  # until the battery died, or the whole day
    lasts: bool  # whether the battery outlived the day, idle hours included
    images: int  # that came
    answered: int
    correct: float
    accuracy: float
    energy_j: float
    peak_celsius: float
    hot: int  # images answered above the cap, if the goal has one
    series: dict[
        str, np.ndarray
    ]  # hour, battery (share), budget, accuracy (unanswered are wrong), celsius; NaN: no image

    @property
    def life(self) -> str:
        return "lasts" if self.lasts else f"dies after {self.hours:.1f} h"


def simulate(menu: Menu, goal: Goal, day: Day) -> list[Outcome]:
    """The controller's day, then that of each operating point from the cheapest; the last is the dearest budget.

    A policy's name is its budget in four digits. About 6 s for a day of 86,400 images and 28 operating points, a third of
    it for the controller. Of those that last the day, the controller is right about as often as the best (promise 2 of
    `Controller`). One that does not last may be right more often: where the idle power dwarfs what images take, it dies
    seconds before the end, and loses no more than the last images.

    Raises:
        ValueError: the menu has no joules, or the goal needs more of it than it has.
    """
    if menu.joules is None:
        raise ValueError(
            "a day on battery needs the joules of every operating point; measure them on this device first."
        )
    controller = Controller(menu, goal, spread=day.spread)
    # The day begins now, not with its first image: else the idle hours before that would be set aside once more at the end.
    controller.decide(Reading(time_s=0.0, battery_joules=day.battery_joules, celsius=_rest(day, menu.idle_watts)))

    def control(time_s: float, left: float, used: float | None, celsius: float) -> float:
        reading = Reading(
            time_s=time_s, images=int(used is not None), battery_joules=left, joules=used, celsius=celsius
        )
        return controller.decide(reading).budget

    outcomes = [_play(menu, goal, day, "controller", control)]
    for budget, is_foot in zip(menu.budget, menu.is_foot, strict=True):
        if not is_foot:
            outcomes.append(_play(menu, goal, day, f"fixed {budget:.4g}", lambda *_, budget=budget: budget))
    return outcomes


Policy = Callable[[float, float, float | None, float], float]  # time, joules left, of the last image, celsius -> budget


def _rest(day: Day, idle_watts: float) -> float:
    """Degrees C where the idle device settles."""
    return day.thermal.ambient_celsius + idle_watts * day.thermal.kelvin_per_watt


def _play(menu: Menu, goal: Goal, day: Day, name: str, policy: Policy) -> Outcome:
    assert menu.joules is not None
    times = day.times().tolist()
    noise = np.random.default_rng(day.seed + 1).uniform(-day.spread, day.spread, len(times)).tolist()
    thermal, end_s = day.thermal, 3600 * day.hours
    idle, lag_s = menu.idle_watts, thermal.kelvin_per_watt * thermal.joules_per_kelvin
    rest = _rest(day, idle)
    left, celsius, now, used = day.battery_joules, rest, 0.0, None
    table: dict[float, tuple[float, float]] = {}  # budget -> joules, accuracy
    rows = []
    for time_s, extra in zip(times, noise, strict=True):
        if left < idle * (time_s - now):
            break
        left -= idle * (time_s - now)
        celsius = rest + (celsius - rest) * math.exp((now - time_s) / lag_s)
        now = time_s
        budget = policy(time_s, left, used, celsius)
        if budget not in table:
            table[budget] = menu.read("joules", budget), menu.read("accuracy", budget)
        joules, accuracy = table[budget]
        used = joules * (1 + extra)
        if left < used:
            left = 0.0
            break
        left -= used
        rows.append((time_s, left, budget, accuracy, celsius))  # hot: as it is when the image comes
        celsius += used / thermal.joules_per_kelvin
    died = len(rows) < len(times) or left < idle * (end_s - now)
    end = now + (left / idle if idle else 0.0) if died else end_s
    left = 0.0 if died else left - idle * (end_s - now)
    played = np.array(rows).reshape(-1, 5)
    cap = math.inf if goal.max_celsius is None else goal.max_celsius
    return Outcome(
        policy=name,
        hours=end / 3600,
        lasts=not died,
        images=len(times),
        answered=len(played),
        correct=float(played[:, 3].sum()),
        accuracy=float(played[:, 3].mean()) if len(played) else 0.0,
        energy_j=day.battery_joules - left,
        peak_celsius=float(played[:, 4].max(initial=rest)),
        hot=int((played[:, 4] > cap).sum()),
        series=_sample(day, np.array(times), played, end),
    )


def _sample(day: Day, times: np.ndarray, played: np.ndarray, end_s: float) -> dict[str, np.ndarray]:
    """Means over equal slices of the day; the battery as it is at their end."""
    edges = np.linspace(0, 3600 * day.hours, NUM_SAMPLES + 1)
    came, answered = (np.histogram(at, edges)[0] for at in (times, played[:, 0]))

    def mean(column: int, count: np.ndarray) -> np.ndarray:
        total = np.histogram(played[:, 0], edges, weights=played[:, column])[0]
        return np.divide(total, count, out=np.full(NUM_SAMPLES, np.nan), where=count > 0)

    last = np.searchsorted(played[:, 0], edges[1:], side="right")
    battery = np.concatenate([[day.battery_joules], played[:, 1]])[last]
    return {
        "hour": edges[1:] / 3600,
        "battery": np.where(edges[1:] > end_s, 0.0, battery) / day.battery_joules,
        "budget": mean(2, answered),
        "accuracy": mean(3, came),
        "celsius": mean(4, answered),
    }


def best_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The one with the most right answers of those that last and stay cool; None: none does."""
    fit = [outcome for outcome in outcomes if outcome.lasts and not outcome.hot]
    return max(fit, key=lambda outcome: outcome.correct, default=None)


def draw(outcomes: Sequence[Outcome], path: Path, title: str, max_celsius: float | None = None) -> None:
    """Battery, budget and accuracy over the day, and temperature where there is a cap.

    The controller is thick; the dearest fixed budget and the best that keeps the goal are named, the others thin and grey.
    """
    from matplotlib.figure import Figure  # slow to load, and only pictures need it

    controller, *fixed = outcomes
    named = {fixed[-1].policy: ("#D55E00", "--")} if fixed else {}  # Okabe and Ito's colours
    if best := best_of(fixed):
        named[best.policy] = ("#009E73", "-.")
    rows = [
        ("battery", "battery (%)", 100),
        ("budget", "budget\n(share of MACs)", 1),
        ("accuracy", "accuracy (%)", 100),
    ]
    if max_celsius is not None:
        rows.append(("celsius", "temperature (C)", 1))
    figure = Figure(figsize=(8.0, 1.2 + 1.6 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), sharex=True)
    for axes, (key, label, scale) in zip(panels, rows, strict=True):
        for outcome in [*fixed, controller]:
            color, dashes = named.get(outcome.policy, ("#BBBBBB", "-"))
            width = 1.6 if outcome.policy in named else 0.6
            text = None
            if outcome is controller:
                color, dashes, width = "#0072B2", "-", 2.6
            if outcome is controller or outcome.policy in named:
                text = f"{outcome.policy}: {outcome.life}, {outcome.correct / outcome.images:.1%} of all images right"
            hours, values = outcome.series["hour"], scale * outcome.series[key]
            seen = np.isfinite(values)
            axes.plot(hours[seen], values[seen], color=color, linestyle=dashes, linewidth=width, label=text)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    if max_celsius is not None:
        panels[-1].axhline(max_celsius, color="black", linewidth=0.8, linestyle=":")
    panels[-1].set_xlabel("hours")
    panels[-1].set_xlim(0, controller.series["hour"][-1])
    panels[0].set_title(title)
    panels[0].set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center")
    save_figure(figure, path)
