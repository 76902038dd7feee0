"""How long calls take, measured against each other: interleaved, warmed up, raw samples kept.

    round 1: b a c    round 2: a c b    ...    each candidate once a round, in an order drawn anew

What drifts (clocks, heat, neighbours) then hits all alike, and no candidate always inherits the caches of the same other one:
a fixed order was seen to bias ratios by hundredths. Compare with `ratio`, which stays within rounds.
"""

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

MIN_RATIO_ROUNDS = 5  # a bootstrap over fewer only repeats them
NUM_RESAMPLES = 2000

Name = TypeVar("Name")


@dataclass(frozen=True, eq=False, kw_only=True)
class Latency:
    """Seconds of every timed call of one candidate, in the order of the rounds. Milliseconds are for printing."""

    name: str
    samples_s: np.ndarray  # [rounds]

    @property
    def p50_ms(self) -> float:
        return self._percentile_ms(50)

    @property
    def p95_ms(self) -> float:
        return self._percentile_ms(95)

    def _percentile_ms(self, percent: int) -> float:
        """Between samples, interpolated linearly."""
        return float(np.percentile(self.samples_s, percent)) * 1e3


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Median over the rounds of a's time / b's time, and a 95 % bootstrap interval of that median."""

    median: float
    low: float
    high: float


def measure_latency(
    candidates: Mapping[Name, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int,
    lead: int = 0,
    seed: int = 0,
    synchronize: Callable[[], object] | None = None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[Name, Latency]:
    """Call each candidate once a round, `warm_up` rounds untimed and `rounds` timed, in an order drawn from `seed`.

    Each timed call follows `lead` untimed ones of the same candidate: 1 times it as in a stream of images, its weights in the
    caches, 0 as after other work. `synchronize` (such as `torch.cuda.synchronize`) is called before and after each call, the
    second time within its time. `clock` gives nanoseconds. Threads are the caller's: see `pin_threads`, and
    `torch.set_num_threads`.

    Raises:
        ValueError: no candidates, or counts that make no measurement.
    """
    if not candidates:
        raise ValueError("there is nothing to time; give at least one candidate.")
    if rounds < 1 or warm_up < 0 or lead < 0:
        raise ValueError(f"rounds={rounds} must be 1 or more, warm_up={warm_up} and lead={lead} 0 or more.")
    wait = synchronize or (lambda: None)
    draw = random.Random(seed)
    samples: dict[Name, list[int]] = {name: [] for name in candidates}
    for round_ in range(warm_up + rounds):
        for name in draw.sample(list(candidates), len(candidates)):
            for _ in range(lead):
                candidates[name]()
            wait()
            started = clock()
            candidates[name]()
            wait()
            spent = clock() - started
            if round_ >= warm_up:
                samples[name].append(spent)
    return {name: Latency(name=str(name), samples_s=np.array(spent) * 1e-9) for name, spent in samples.items()}


def ratio(a: Latency, b: Latency, *, seed: int = 0) -> Ratio:
    """How many times as long as `b` does `a` take? Both from one `measure_latency`, so that their rounds match.

    Raises:
        ValueError: too few rounds, or not the same number of them.
    """
    if len(a.samples_s) != len(b.samples_s):
        raise ValueError(
            f"{a.name!r} has {len(a.samples_s)} rounds and {b.name!r} {len(b.samples_s)}; compare what one measure_latency timed."
        )
    if len(a.samples_s) < MIN_RATIO_ROUNDS:
        raise ValueError(f"{len(a.samples_s)} rounds are too few for an interval; take {MIN_RATIO_ROUNDS} or more.")
    if not (a.samples_s.min() > 0 and b.samples_s.min() > 0):
        raise ValueError("a call took no time at all; the clock is too coarse for it, so repeat the work in each call.")
    ratios = a.samples_s / b.samples_s
    resampled = np.random.default_rng(seed).choice(ratios, size=(NUM_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    return Ratio(median=float(np.median(ratios)), low=float(low), high=float(high))


# ---- processors


@dataclass(frozen=True, kw_only=True)
class Pinning:
    """What `pin_threads` did: the processors this process is kept on, None where it is not; and a sentence for the record."""

    processors: tuple[int, ...] | None
    note: str


@contextmanager
def pin_threads(num_processors: int) -> Iterator[Pinning]:
    """Keep all threads of this process, running and to come, on its first `num_processors`; undone on leaving.

    Where the system cannot, nothing changes and the note says so. How many threads compute is not set here: that is
    `torch.set_num_threads` or OMP_NUM_THREADS, and should be no more than `num_processors`.

    Raises:
        ValueError: fewer than one processor, or more than this process may use.
    """
    if num_processors < 1:
        raise ValueError(f"num_processors={num_processors} must be 1 or more.")
    if not hasattr(os, "sched_setaffinity"):
        yield Pinning(processors=None, note="not pinned: this system cannot keep a process on chosen processors")
        return
    usable = sorted(os.sched_getaffinity(0))
    if num_processors > len(usable):
        raise ValueError(f"num_processors={num_processors} is more than the {len(usable)} this process may use.")
    chosen = usable[:num_processors]
    try:
        _set_affinity(chosen)
    except OSError as error:
        yield Pinning(processors=None, note=f"not pinned: the system refused ({error.strerror})")
        return
    try:
        yield Pinning(processors=tuple(chosen), note=f"pinned to processors {', '.join(map(str, chosen))}")
    finally:
        _set_affinity(usable)


def _set_affinity(processors: list[int]) -> None:
    """For every thread: the call itself changes one, and a pool that runs already would stay where it is."""
    os.sched_setaffinity(0, processors)
    try:
        threads = [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        return  # no /proc: threads to come inherit it, and those that run keep theirs
    for thread in threads:
        try:
            os.sched_setaffinity(thread, processors)
        except ProcessLookupError:
            continue  # it ended meanwhile
