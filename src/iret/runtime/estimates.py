"""Running estimates under the controller: what is left, what can still come, what things cost here, how hot it is.

Each takes readings that may be missing or wrong and appends a sentence to `doubts` where it does not believe one.
What is believed when, and why, stands at `iret.runtime.controller.Controller`.
"""

import math
from collections.abc import Sequence

import numpy as np

# At first demand and costs are believed as stated; this many images weigh as much as that belief.
DEMAND_IMAGES, COST_IMAGES = 3, 10
SMOOTHING = 0.01  # weight of one image in measured / predicted
LATE = 0.05  # share of images that may miss a deadline
# Tables time calls in a row, with warm caches: until images tell, a deadline reckons with so many times the 95th percentile.
HASTE = 1.25
EASE = 0.05  # share by which a 95th percentile must have fallen to be believed; a rise is believed at once
FACTORS = 0.25, 4.0  # believable measured / predicted
SETTLE_IMAGES = 16  # a gauge above the reckoning, or far steeper than it, is believed after falling so for so long
BLUR = 0.5  # a gauge tells what images take once one reading more or less makes so small a part of it
STUCK_SHARE = 0.03  # a gauge that stands while this share of the battery is used is called stuck
HEAT_MARGIN_K = 5.0  # below the cap the cost is taken back in proportion
HEAT_RECOVERY = 0.2  # share of the margin it has to cool before it may cost more again
HEAT_STALE_S = 60.0  # without a reading for so long, the cap is assumed to be reached
CELSIUS = -40.0, 150.0  # outside it is a sensor's error code


def read_number(value: object) -> float | None:
    """A finite number of 0 or more, else None."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if 0 <= number < math.inf else None


class Factor:
    """Measured / predicted joules: at first a plain mean, then exponentially weighted."""

    def __init__(self) -> None:
        self.value, self._base, self._count = 1.0, 1.0, COST_IMAGES
        self._belief = 1.0  # how much of `value` is still what was believed at first
        self._squares = 0.0  # of the weights of all images in it

    def take(self, measured: float | None, table: float, images: int, doubts: list[str]) -> float:
        """Learn from one measurement of what the table puts at `table`; returns what to believe it was."""
        number = read_number(measured)
        if not number or math.isnan(table):  # 0 is a meter that sleeps
            if measured is not None and not number:
                doubts.append(f"joules measured as {measured}")
            return table * self.value
        ratio = min(max(number / table, FACTORS[0] * self._base), FACTORS[1] * self._base)
        if ratio != number / table:
            doubts.append(f"joules measured at {number / table:.3g} times the table's")
        # Clipped, not a median: costs are skewed, and the median of skewed costs is not their mean.
        bounded = min(max(ratio, self.value / 2), self.value * 2)
        self._count += images
        weight = max(images / self._count, 1 - (1 - SMOOTHING) ** images)
        self.value += weight * (bounded - self.value)
        self._belief *= 1 - weight
        self._squares = (1 - weight) ** 2 * self._squares + weight**2 / images
        return table * ratio

    def careful(self, spread: float) -> float:
        """`value`, or the mean of the measurements alone where that is more: at first `value` is mostly belief.

        Where that mean lies two standard errors above the table, so that the table is off, one is added. `spread` is how far an
        image's cost lies from the mean, as a share of it.
        """
        known = 1 - self._belief
        if not known:
            return self.value
        mean = (self.value - self._belief * self._base) / known
        error = mean * spread * math.sqrt(self._squares) / known
        return max(self.value, mean + error if mean - 2 * error > 1 else mean)

    @property
    def room(self) -> float:
        """How many times what is believed now an image can believably take: at most that many times the table's."""
        return FACTORS[1] * min(1.0, self._base / self.value)

    def rescale(self, ratio: float) -> None:
        """The table is off: things cost `ratio` times what was believed, and what is believable lies around that."""
        self.value = self._base = max(1.0, ratio * self.value)
        self._count, self._belief, self._squares = COST_IMAGES, 1.0, 0.0


class Deadline:
    """How the milliseconds here compare with the table: their 95th percentile over the table's, exponentially weighted.

    A quantile and not a mean, for the images that come may spread otherwise than those of the table. The table counts as ten
    images, one of which takes its 95th percentile. Some 460 images are remembered, and sorted at each measurement.
    """

    def __init__(self, ms: float) -> None:
        self.ms = ms
        self.heard = 1.0  # of what was measured, and of the table as it fades
        self.value = HASTE  # to go by: more than was heard until ten images were timed, and then up to `EASE` more
        self._ratios, self._weights = np.ones(1), np.ones(1)
        self._rest = COST_IMAGES - 1.0  # weight of what the table puts below
        self._count = 0

    def take(self, measured: float | None, table: float, images: int, doubts: list[str]) -> None:
        """Learn from the mean milliseconds of some images, which stands for each; `table` is the table's 95th percentile."""
        number = read_number(measured)
        if not number:
            if measured is not None:
                doubts.append(f"ms measured as {measured}")
            return
        ratio = number / table
        if ratio > FACTORS[1]:
            doubts.append(f"ms measured at {ratio:.3g} times the table's 95th percentile")
        fading, recent = (1 - SMOOTHING) ** images, self._weights > SMOOTHING
        self._ratios = np.append(self._ratios[recent], ratio)
        self._weights = np.append(self._weights[recent] * fading, (1 - fading) / SMOOTHING)
        self._rest *= fading
        self._count += images
        self.heard = self._quantile()
        wanted = max(self.heard, HASTE) if self._count < COST_IMAGES else self.heard
        if not self.value * (1 - EASE) <= wanted <= self.value:
            self.value = wanted

    def _quantile(self) -> float:
        """The least of what was heard that is exceeded by `LATE` of all or less."""
        slowest = np.argsort(-self._ratios)
        late = self._weights[slowest].cumsum()
        return float(self._ratios[slowest[np.searchsorted(late, LATE * (self._rest + late[-1]), side="right")]])

    @property
    def limit(self) -> float:
        """The table's 95th percentile to stay under."""
        return self.ms / self.value

    def explain(self, fastest: float) -> str | None:
        """Why it cannot be held, where the least of the table's 95th percentiles is `fastest`; None where it can."""
        ms = fastest * self.heard
        return f"95 of 100 images take up to {ms:.3g} ms at the fastest that is left" if ms > self.ms else None


class Thermometer:
    """The median of the last three readings, and how much of the range of costs it leaves."""

    def __init__(self, cap: float) -> None:
        self.cap, self.celsius, self._share, self._age_s = cap, math.nan, 0.0, math.inf
        self._recent: list[float] = []
        self._last_s = -math.inf

    def take(self, celsius: float | None, time_s: float, doubts: list[str]) -> None:
        try:
            value = math.nan if celsius is None else float(celsius)
        except (TypeError, ValueError):
            value = math.nan
        if CELSIUS[0] <= value <= CELSIUS[1]:
            self._recent, self._last_s = [*self._recent[-2:], value], time_s
            self.celsius = sorted(self._recent)[len(self._recent) // 2]
        elif celsius is not None:
            doubts.append(f"temperature read as {celsius}")
        elif math.isnan(self.celsius):
            doubts.append("no temperature sensor was found, so the cheapest point is served")
        else:
            doubts.append(f"the temperature sensor is silent; after {HEAT_STALE_S:g} s the cap counts as reached")
        self._age_s = time_s - self._last_s

    @property
    def is_stale(self) -> bool:
        return self._age_s > HEAT_STALE_S

    @property
    def is_over(self) -> bool:
        return self.celsius > self.cap

    @property
    def reason(self) -> str:
        if self.is_stale:
            return "temperature: no reading, so the cap is assumed to be reached"
        return f"temperature: {self.celsius:.1f} C, {self.cap:g} C allowed"

    def limit(self, cheapest: float, dearest: float) -> float:
        """The cost to stay under: the dearest up to the margin below the cap, the cheapest at the cap."""
        share = 0.0 if self.is_stale else min(max((self.cap - self.celsius) / HEAT_MARGIN_K, 0.0), 1.0)
        if share < self._share or share >= min(1.0, self._share + HEAT_RECOVERY):
            self._share = share
        return cheapest + self._share * (dearest - cheapest)


class Battery:
    """Joules left, never more than a truthful gauge says; None while nobody has said anything."""

    def __init__(self, full_joules: float | None) -> None:
        self.left = self._full = full_joules
        self.is_confirmed = False  # the gauge has told what images take, or ...
        self.has_overruled = False  # ... even that table and meter are so far off that it alone is believed
        self._highest, self._last = 0.0, math.inf
        self._finest = math.inf  # the least that it ever fell by: its steps are no larger
        self._mark: float | None = None  # a reading; since then, reckoned:
        self._used, self._idle, self._blur, self._images = 0.0, 0.0, 0.0, 0
        self._steep: list[tuple[float, float, float, int]] = []  # falls in a row: J over reckoned J, both, images

    def spend(self, used: float, images: int, idle: float = 0.0) -> None:
        """Joules reckoned for so many images, and for the idle device meanwhile."""
        if self.left is not None:
            self.left = max(0.0, self.left - used - idle)
        self._used, self._idle, self._images = self._used + used, self._idle + idle, self._images + images
        self._blur = max(self._blur, used + idle)  # a gauge that moves in steps is late by up to one such spell

    def read(
        self, joules: float | None, share: float | None, doubts: list[str], room: float = FACTORS[1]
    ) -> tuple[float, int] | None:
        """Believe the gauge at once if it is below the reckoning, else after it has fallen plausibly for a while.

        Returns, each time that it tells what images take, this over what was reckoned, and of how many images: from `FACTORS[0]`
        to `room`, or above where it overrules the reckoning.
        """
        gauge = self._hear(joules, share, doubts)
        if gauge is None:
            return None
        if self.left is None or gauge < self.left:
            self.left = gauge
        moves = gauge < self._last
        if moves and self._last < math.inf:
            self._finest = min(self._finest, self._last - gauge)
        self._last, self._highest, blur = gauge, max(self._highest, gauge), min(self._blur, self._finest)
        fall, used, images = 0.0 if self._mark is None else self._mark - gauge, self._used, self._images
        taken, most = fall - self._idle, room * used  # by the images
        if fall < 0:
            doubts.append("the battery gauge rose; it is believed once it falls again as it should")
        if self._mark is None or fall < 0:
            self._steep = []
            self._restart(gauge)
        elif used and taken > most + blur:
            self._steep.append((taken / used, taken, used, images))
            self._restart(gauge)
            return self._overrule()
        elif moves and images >= SETTLE_IMAGES:
            if self.has_overruled or fall >= FACTORS[0] * (used + self._idle):
                self.left = gauge
                if blur <= BLUR * used:
                    self._restart(gauge)
                    self._steep, self.is_confirmed = [], True
                    return min(max(taken / used, FACTORS[0]), room), images
        elif fall == 0 and used + self._idle > STUCK_SHARE * self._highest:
            doubts.append("the battery gauge does not move; energy is reckoned instead")
        return None

    def _hear(self, joules: float | None, share: float | None, doubts: list[str]) -> float | None:
        """What the gauge says in joules."""
        gauge = read_number(joules)
        if gauge is None and self._full is not None:
            part = read_number(share)
            gauge = part * self._full if part is not None and part <= 1 else None
        if gauge is not None or (joules is None and share is None):
            return gauge
        if joules is None and self._full is None and (part := read_number(share)) is not None and part <= 1:
            doubts.append(
                f"the battery's gauge says {part:.0%} and no energy; give the full one's (--battery-wh, battery_joules)"
            )
        else:
            doubts.append(f"battery read as {f'a share of {share}' if joules is None else f'{joules} J'}")
        return None

    def _restart(self, gauge: float) -> None:
        self._mark, self._used, self._idle, self._blur, self._images = gauge, 0.0, 0.0, 0.0, 0

    def _overrule(self) -> tuple[float, int] | None:
        """The slope of falls that go on being far too steep: without the first, which may be the rest of a whole
        percent, and without the steepest, for each of these may be a jump."""
        _, taken, used, images = zip((0.0, 0.0, 0.0, 0), *sorted(self._steep[1:])[:-1], strict=True)
        if sum(images) < SETTLE_IMAGES:
            return None
        self._steep, self.is_confirmed, self.has_overruled = [], True, True
        return sum(taken) / sum(used), sum(images)


class Demand:
    """The stated demand as a token bucket, and how much of it comes in fact."""

    def __init__(self, hours: float, images_per_second: float, burst: float, profile: Sequence[float]) -> None:
        self.end_s, self.time_s = 3600 * hours, 0.0
        self.stated = self.end_s * images_per_second  # images of the day
        self.all = self.stated + burst  # most that can come
        slices = np.array(profile or (1.0,))
        self._slices: list[float] = (slices / slices.sum()).tolist()
        self._ahead = [0.0, *np.cumsum(self._slices).tolist()]  # share of the demand that comes before each slice
        self._burst = self._tokens = burst
        self._count, self._share = 0, 0.0

    def take(self, time_s: float, images: int, doubts: list[str]) -> None:
        """Go on to `time_s`; `images` came since."""
        before, self.time_s = self._share, min(time_s, self.end_s)
        whole, part = divmod(self.time_s / self.end_s * len(self._slices), 1.0)
        self._share = self._ahead[int(whole)] + part * (self._slices[int(whole)] if part else 0.0)
        self._count += images
        tokens = self._tokens + self.stated * (self._share - before) - images
        if tokens < -1e-6 and time_s < self.end_s:
            doubts.append("more images come than the goal states")
        self._tokens = min(max(tokens, 0.0), self._burst)

    @property
    def most(self) -> float:
        """Images that can still come."""
        return self.stated * (1 - self._share) + self._tokens

    @property
    def expected(self) -> float:
        """Images that come if the rest of the day is thinned from the stated demand as it was so far."""
        seen = (self._count + DEMAND_IMAGES) / (self.stated * self._share + DEMAND_IMAGES)
        return seen * self.stated * (1 - self._share)
