"""Interleaved timing on a clock that the candidates themselves advance, ratios with intervals, and pinning."""

import os
import threading

import numpy as np
import pytest

from iret.measure import latency
from iret.measure.latency import Latency, measure_latency, pin_threads, ratio


class Clock:
    """Nanoseconds that only `work` moves; `calls` is who worked, in order."""

    def __init__(self) -> None:
        self.now = 0
        self.calls: list[str] = []

    def __call__(self) -> int:
        return self.now

    def work(self, name: str, *durations: int):
        """A candidate that takes these times, one a call, then starts again."""
        count = 0

        def call() -> None:
            nonlocal count
            self.calls.append(name)
            self.now += durations[count % len(durations)]
            count += 1

        return call


def latency_of(name: str, *samples_s: float) -> Latency:
    return Latency(name=name, samples_s=np.array(samples_s))


# ---- timing


def test_every_timed_call_is_kept_in_seconds_and_warm_up_is_not():
    clock = Clock()
    candidates = {"a": clock.work("a", 90, 1, 2, 3), "b": clock.work("b", 80, 10, 20, 30)}
    found = measure_latency(candidates, rounds=3, warm_up=1, clock=clock)
    assert found["a"].samples_s == pytest.approx([1e-9, 2e-9, 3e-9], rel=1e-12)  # one rounding of the product
    assert found["b"].samples_s == pytest.approx([1e-8, 2e-8, 3e-8], rel=1e-12)
    assert found["b"].name == "b"


def test_each_candidate_runs_once_a_round_in_an_order_drawn_anew():
    clock = Clock()
    measure_latency({name: clock.work(name, 1) for name in "abc"}, rounds=20, warm_up=2, clock=clock)
    rounds = ["".join(clock.calls[start : start + 3]) for start in range(0, len(clock.calls), 3)]
    assert len(rounds) == 22
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert len(set(rounds)) == 6  # 22 draws of 6 orders; seed 0 meets them all


def test_the_order_follows_from_the_seed():
    def orders(seed: int) -> list[str]:
        clock = Clock()
        measure_latency({name: clock.work(name, 1) for name in "abc"}, rounds=9, warm_up=0, seed=seed, clock=clock)
        return clock.calls

    assert orders(3) == orders(3)
    assert orders(3) != orders(4)


def test_work_that_is_still_queued_is_waited_for_before_and_within_the_time():
    clock, queued = Clock(), [7]  # 7 ns are queued before the first call

    def launch() -> None:
        clock.now += 1
        queued.append(100)

    def synchronize() -> None:
        clock.now += sum(queued)
        queued.clear()

    found = measure_latency({"kernel": launch}, rounds=2, warm_up=0, synchronize=synchronize, clock=clock)
    assert found["kernel"].samples_s == pytest.approx([101e-9, 101e-9], rel=1e-12)


def test_percentiles_are_interpolated_and_printed_in_milliseconds():
    found = latency_of("a", 0.001, 0.002, 0.003, 0.004, 0.010)
    assert found.p50_ms == pytest.approx(3.0)
    assert found.p95_ms == pytest.approx(4 + 0.8 * 6)  # position 0.95 * 4 = 3.8


def test_calls_that_lead_are_not_timed_and_of_the_same_candidate():
    clock = Clock()
    candidates = {"a": clock.work("a", 500, 700, 1), "b": clock.work("b", 800, 900, 2)}
    found = measure_latency(candidates, rounds=4, warm_up=0, lead=2, clock=clock)
    assert found["a"].samples_s == pytest.approx([1e-9] * 4, rel=1e-12)
    assert found["b"].samples_s == pytest.approx([2e-9] * 4, rel=1e-12)
    threes = [set(clock.calls[start : start + 3]) for start in range(0, len(clock.calls), 3)]
    assert [len(names) for names in threes] == [1] * 8


@pytest.mark.parametrize(("rounds", "warm_up", "lead"), [(0, 1, 0), (1, -1, 0), (1, 0, -1)])
def test_counts_that_measure_nothing_are_refused(rounds, warm_up, lead):
    with pytest.raises(ValueError, match=f"rounds={rounds} must be 1 or more, warm_up={warm_up} and lead={lead} 0 or"):
        measure_latency({"a": lambda: None}, rounds=rounds, warm_up=warm_up, lead=lead)


def test_nothing_to_time_is_refused():
    with pytest.raises(ValueError, match="at least one candidate"):
        measure_latency({}, rounds=1, warm_up=0)


# ---- ratios


def test_a_ratio_stays_within_rounds_and_so_does_not_see_drift():
    drift = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    found = ratio(latency_of("a", *(3 * drift)), latency_of("b", *drift))
    assert (found.median, found.low, found.high) == (3.0, 3.0, 3.0)


def test_the_interval_holds_the_median_and_narrows_with_rounds():
    noise = np.random.default_rng(0).normal(2.0, 0.1, size=400)
    few = ratio(latency_of("a", *noise[:20]), latency_of("b", *np.ones(20)))
    many = ratio(latency_of("a", *noise), latency_of("b", *np.ones(400)))
    assert few.low < few.median < few.high
    assert many.low < 2.0 < many.high
    assert many.high - many.low < (few.high - few.low) / 2  # sqrt(20) = 4.5 in expectation


def test_a_ratio_needs_matching_and_enough_rounds_and_times_above_zero():
    five = latency_of("five", *[1.0] * 5)
    with pytest.raises(ValueError, match="'five' has 5 rounds and 'six' 6"):
        ratio(five, latency_of("six", *[1.0] * 6))
    with pytest.raises(ValueError, match="4 rounds are too few .* take 5 or more"):
        ratio(latency_of("four", *[1.0] * 4), latency_of("four", *[1.0] * 4))
    with pytest.raises(ValueError, match="clock is too coarse"):
        ratio(five, latency_of("instant", 1.0, 1.0, 0.0, 1.0, 1.0))


# ---- pinning


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no sched_setaffinity")
def test_running_and_new_threads_are_pinned_and_let_go_again():
    before, leave, seen = os.sched_getaffinity(0), threading.Event(), []
    running = threading.Thread(target=leave.wait)
    running.start()
    try:
        with pin_threads(1) as pinning:
            assert os.sched_getaffinity(0) == os.sched_getaffinity(running.native_id) == {min(before)}
            new = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
            new.start()
            new.join()
        assert seen == [{min(before)}]
        assert pinning.processors == (min(before),)
        assert pinning.note == f"pinned to processors {min(before)}"
        assert os.sched_getaffinity(0) == os.sched_getaffinity(running.native_id) == before
    finally:
        leave.set()
        running.join()


def test_a_system_that_cannot_pin_says_so_and_goes_on(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pin_threads(1) as pinning:
        assert pinning.processors is None
    assert "cannot keep a process on chosen processors" in pinning.note


def test_a_system_that_refuses_says_so_and_goes_on(monkeypatch):
    def refuse(thread, processors):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", refuse, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: {0, 1}, raising=False)
    with pin_threads(2) as pinning:
        assert pinning == latency.Pinning(
            processors=None, note="not pinned: the system refused (Operation not permitted)"
        )


def test_no_processor_and_more_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: {2, 5}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, processors: None, raising=False)
    with pytest.raises(ValueError, match="num_processors=0 must be 1 or more"), pin_threads(0):
        pass
    with pytest.raises(ValueError, match="num_processors=3 is more than the 2 this process may use"), pin_threads(3):
        pass
