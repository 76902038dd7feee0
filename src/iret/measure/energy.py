"""What energy meters share: the window, its reading, and the two ways to read a sensor.

    counter (RAPL, NVML)          joules at the end minus joules at the start
    power (hwmon, Pi PMIC)        watts, sampled in the background and integrated by the trapezoid rule

Every reading names its source, what it covers (`scope`), and whether it was measured or estimated. A window that cannot be
trusted raises EnergyError; none returns a doubtful number. Read next: `sources`, which opens a meter by name.
"""

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal

import numpy as np

Kind = Literal["measured", "estimated"]
Clock = Callable[[], float]  # seconds from any origin

MAX_COUNTER_W = 500.0  # no CPU package draws more for minutes; tells one turn of a counter from two
GAP_PERIODS = 10  # sampled power says nothing of what happened in a longer gap
IDLE_MARGIN = 1.1  # sleep may end a little early


class EnergyError(ValueError):
    """A reading that cannot be had or trusted: one sentence that says why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The energy of one window: gross where `idle_w` is None, else net of that idle power, which was taken off."""

    joules: float
    time_s: float
    source: str
    scope: str
    kind: Kind
    idle_w: float | None = None

    @property
    def power_w(self) -> float:
        return self.joules / self.time_s

    def minus_idle(self, idle_w: float) -> "Reading":
        """This reading without what the idle machine would have taken in the same time.

        Raises:
            EnergyError: estimates hold no idle power; it was taken off already; or nothing would be left, which
                says that the baseline is wrong or the work drowns in its noise.
        """
        if self.kind == "estimated" or self.idle_w is not None:
            raise EnergyError(f"this reading of {self.source} holds no idle power; use it as it is.")
        if not (math.isfinite(idle_w) and idle_w >= 0):
            raise EnergyError(f"idle_w={idle_w:g} is no idle power; give watts, 0 or more.")
        left_j = self.joules - idle_w * self.time_s
        if left_j <= 0:
            raise EnergyError(
                f"{idle_w:g} W idle over {self.time_s:.3g} s is all of the {self.joules:.3g} J read from {self.source} or more; "
                "measure the idle baseline again, with the machine as quiet as in the window."
            )
        return replace(self, joules=left_j, idle_w=idle_w)


class EnergyMeter(ABC):
    """One source of energy. `with meter.window() as window: work()`, then `window.reading`; or `start()` and `stop()`.

    `resolution_s` is the shortest window to trust: repeat the work until it lasts that long. One window at a time. On an
    accelerator, synchronise before both ends: a meter cannot see work that is still queued.
    """

    def __init__(self, source: str, scope: str, *, resolution_s: float, kind: Kind = "measured") -> None:
        self.source = source  # such as "rapl:package-0"
        self.scope = scope  # what is metered, in words
        self.kind = kind
        self.resolution_s = resolution_s
        self._is_open = False

    def start(self) -> None:
        """Raises EnergyError if the sensor cannot be read, or a window is open."""
        if self._is_open:
            raise EnergyError(f"{self.source} has a window open; stop it before the next.")
        self._begin()
        self._is_open = True

    def stop(self) -> Reading:
        """Close the window. Raises EnergyError, and closes it all the same, if its reading cannot be trusted."""
        if not self._is_open:
            raise EnergyError(f"{self.source} has no window open; call start() first.")
        self._is_open = False
        energy_j, time_s = self._end()
        if time_s < self.resolution_s:
            raise EnergyError(
                f"a window of {time_s:.3g} s is too short for {self.source}; repeat the work until it lasts "
                f"{self.resolution_s:g} s."
            )
        if not (math.isfinite(energy_j) and energy_j > 0):
            raise EnergyError(
                f"{self.source} read {energy_j:g} J over {time_s:.3g} s, and running takes more than none; its sensor is "
                "stuck, not connected, or slower than this window."
            )
        return Reading(joules=energy_j, time_s=time_s, source=self.source, scope=self.scope, kind=self.kind)

    def cancel(self) -> None:
        """Close the window, if one is open, without a reading."""
        if self._is_open:
            self._is_open = False
            self._abandon()

    def window(self) -> "Window":
        return Window(self)

    @abstractmethod
    def _begin(self) -> None: ...

    @abstractmethod
    def _end(self) -> tuple[float, float]:
        """Joules, and the seconds they were spent in."""

    def _abandon(self) -> None:
        return None


class Window:
    """Starts the meter on entering and stops it on leaving; an exception in between cancels it and goes on its way."""

    def __init__(self, meter: EnergyMeter) -> None:
        self._meter = meter
        self._reading: Reading | None = None

    def __enter__(self) -> "Window":
        self._meter.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._reading = self._meter.stop()
        else:
            self._meter.cancel()

    @property
    def reading(self) -> Reading:
        if self._reading is None:
            raise EnergyError(f"this window of {self._meter.source} has no reading; read it after the `with` block.")
        return self._reading


# ---- counters


@dataclass(frozen=True, kw_only=True)
class Counter:
    """Joules since some moment. `range_j` is where the count starts again at 0; None: never."""

    read_j: Callable[[], float]
    range_j: float | None = None


class CounterMeter(EnergyMeter):
    """The sum of counters over a window.

    A counter that starts again once is put right. One that did so twice looks the same, so a window in which that is
    possible (mean power under `MAX_COUNTER_W` with one more turn added) is refused.
    """

    def __init__(
        self,
        source: str,
        scope: str,
        counters: Sequence[Counter],
        *,
        resolution_s: float,
        clock: Clock = time.perf_counter,
    ) -> None:
        super().__init__(source, scope, resolution_s=resolution_s)
        self._counters = tuple(counters)
        self._clock = clock
        self._starts_j: list[float] = []
        self._started_s = 0.0

    def _begin(self) -> None:
        self._starts_j = [counter.read_j() for counter in self._counters]
        self._started_s = self._clock()

    def _end(self) -> tuple[float, float]:
        time_s = self._clock() - self._started_s
        pairs = zip(self._counters, self._starts_j, strict=True)
        return sum(self._spent(counter, start_j, time_s) for counter, start_j in pairs), time_s

    def _spent(self, counter: Counter, start_j: float, time_s: float) -> float:
        spent_j = counter.read_j() - start_j
        if spent_j < 0:
            spent_j += counter.range_j or 0.0
        if spent_j < 0:
            raise EnergyError(f"{self.source} counted backwards, so it was reset (a driver reloaded?); measure again.")
        if counter.range_j is not None and spent_j + counter.range_j <= MAX_COUNTER_W * time_s:
            raise EnergyError(
                f"in {time_s:.0f} s the counter of {self.source} may have started again more than once; take windows "
                f"under {counter.range_j / MAX_COUNTER_W:.0f} s."
            )
        return spent_j


# ---- sampled power


class PowerMeter(EnergyMeter):
    """Watts read every `period_s` by a thread of its own, and integrated from the first sample to the last.

    `is_threaded=False`: only the ends and the caller's own calls of `sample()` are read. `samples` keeps the raw samples.
    """

    def __init__(
        self,
        source: str,
        scope: str,
        read_w: Callable[[], float],
        *,
        period_s: float,
        resolution_s: float,
        clock: Clock = time.perf_counter,
        is_threaded: bool = True,
    ) -> None:
        super().__init__(source, scope, resolution_s=resolution_s)
        self.period_s = period_s
        self._read_w = read_w
        self._clock = clock
        self._is_threaded = is_threaded
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._samples: list[tuple[float, float]] = []
        self._error: Exception | None = None

    @property
    def samples(self) -> np.ndarray:
        """(time in s, power in W) of each sample of the last window, [samples, 2]; times from the clock's own origin."""
        return np.array(self._samples, dtype=float).reshape(-1, 2)

    def sample(self) -> None:
        """Take one sample now. What goes wrong is kept for `stop()`, because a thread has nobody to tell."""
        with self._lock:
            if self._over.is_set():
                return
            try:
                before_s = self._clock()
                power_w = self._read_w()
                if not math.isfinite(power_w):
                    raise EnergyError(f"{self.source} read {power_w} W, which is no power.")
                self._samples.append(((before_s + self._clock()) / 2, power_w))
            except Exception as error:
                self._error = error
                self._over.set()

    def _begin(self) -> None:
        self._samples, self._error = [], None
        self._over.clear()
        self.sample()
        if self._error:
            raise self._error
        if self._is_threaded:
            self._thread = threading.Thread(target=self._run, name=f"iret {self.source}", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self.period_s):
            self.sample()

    def _end(self) -> tuple[float, float]:
        self.sample()
        self._abandon()
        if self._error:
            raise self._error
        time_s, power_w = self.samples.T
        gap_s = float(np.diff(time_s).max())
        if gap_s > GAP_PERIODS * self.period_s:
            raise EnergyError(
                f"{self.source} was not read for {gap_s:.3g} s of this window, at a period of {self.period_s:g} s; the machine "
                "was too busy or asleep, so measure again."
            )
        return float(((power_w[1:] + power_w[:-1]) / 2 * np.diff(time_s)).sum()), float(time_s[-1] - time_s[0])

    def _abandon(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


# ---- the idle baseline


def measure_idle(
    meter: EnergyMeter, *, time_s: float | None = None, sleep: Callable[[float], None] = time.sleep
) -> float:
    """Mean power in W while this process sleeps for `time_s` (by default just over the meter's resolution).

    Everything else that runs on the machine is in it, so keep the machine as it will be during the work.

    Raises:
        EnergyError: the meter estimates, so that it has no idle power; or the window cannot be trusted.
    """
    if meter.kind == "estimated":
        raise EnergyError(f"{meter.source} is an estimate of work done; it has no idle power to measure.")
    with meter.window() as window:
        sleep(IDLE_MARGIN * meter.resolution_s if time_s is None else time_s)
    return window.reading.power_w
