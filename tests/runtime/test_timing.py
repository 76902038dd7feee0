"""What is timed of a session's operating points, and what comes into its table. On a pretended engine: test_session."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from iret.measure.estimate import HOROWITZ, estimate_joules
from iret.measure.latency import Latency
from iret.runtime import timing
from iret.runtime.cost import Shape, block_linears, numbers_moved, plan_macs
from iret.runtime.keep import keep, read_strengths
from iret.runtime.points import PRECISIONS, OperatingPoints, Plan, Point
from iret.runtime.timing import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    clock_columns,
    estimate_image,
    estimate_point,
    fit,
    macs_of,
    mean_of_all,
    measure_session,
    replay,
    spread,
)

# 64 patches of 4 x 4, three stages
SHAPE = Shape(
    img_size=(32, 32), patch_size=4, in_chans=3, num_classes=3, embed_dims=(8, 16, 24), depths=(1, 1, 1), head_dim=8
)
PLAN = Plan((64, 40, 10), (0, 30, 10))


def point(keep: float, *plans: Plan, leaves: float | None = None) -> Point:
    return Point(
        thresholds=((keep, keep),) * 2,
        exit_confidence=leaves,
        accuracy=0.5,
        macs_mean=1.0,
        macs_p95=1.0,
        kept_mean=(64.0,) * 3,
        plans=plans,
    )


class Pretender:
    """A session that notes what it is asked, and keeps of every image what `PLAN` says."""

    def __init__(self, precision: str = "float32", is_single: bool = False) -> None:
        self.shape, self.device, self.calls = SHAPE, "here", []
        self.bundle = SimpleNamespace(precision=precision, is_single=is_single)

    def __call__(self, images, **asked):
        self.calls.append((images, asked))
        kept, refined = np.zeros((2, 3, 1, 64), bool)
        for stage in range(3):
            kept[stage, 0, : PLAN.kept[stage]] = refined[stage, 0, : PLAN.refined[stage]] = True
        grids = [each.reshape(3, 1, 8, 8) for each in (kept, refined)]
        return SimpleNamespace(trace=SimpleNamespace(exit_stage=np.array([2]), kept=grids[0], refined=grids[1]))


def table(*points: Point) -> OperatingPoints:
    return OperatingPoints(data="", num_images=1, full_macs=1, points=points)


def test_every_point_is_timed_on_noise_that_does_what_its_images_did():
    session = Pretender()
    found = measure_session(session, table(point(0.0, PLAN), point(1.0, PLAN, PLAN)), None, 1e-9)
    assert found.device == "here"
    assert len(found.ms_mean) == len(found.joules) == 2
    assert all(p50 <= p95 for p50, p95 in zip(found.ms_p50, found.ms_p95, strict=True))
    assert all(image.shape == (1, 3, 32, 32) and asked["rule"] == "topk" for image, asked in session.calls)


@pytest.mark.parametrize(("is_single", "leaves"), [(False, 0.9), (True, None)])
def test_images_that_are_given_are_run_at_the_points_themselves(is_single, leaves):
    session, images = Pretender(is_single=is_single), np.zeros((2, 3, 32, 32), np.float32)
    found = measure_session(session, table(point(0.8, leaves=leaves)), images, 1.0)
    assert all(asked == {"thresholds": ((0.8, 0.8),) * 2, "exit_confidence": leaves} for _, asked in session.calls)
    assert found.joules == (pytest.approx(estimate_image(SHAPE, "float32", point(0.8), PLAN)),)
    assert found.rounds == MAX_ROUNDS


def test_of_many_images_as_many_are_run_as_the_time_allows():
    session, images = Pretender(), np.zeros((200, 3, 32, 32), np.float32)
    images += np.arange(200)[:, None, None, None]
    measure_session(session, table(point(0.0), point(0.8)), images, 1e-9)
    assert {image.max() for image, _ in session.calls} == {100.0}  # the middle one of each point
    assert len(session.calls) < 30


@pytest.mark.parametrize(
    ("is_single", "plans", "seconds", "sentence"),
    [
        (False, (), 1.0, "these points hold no plans to replay; give session.measure some images"),
        (True, (PLAN,), 1.0, "one graph cannot replay plans; give session.measure some images"),
        (False, (PLAN,), 0.0, "seconds=0 must be above 0"),
        (False, (PLAN,), float("nan"), "seconds=nan must be above 0"),
    ],
)
def test_what_cannot_be_timed_is_refused(is_single, plans, seconds, sentence):
    with pytest.raises(ValueError, match=sentence):
        measure_session(Pretender(is_single=is_single), table(point(1.0, *plans)), None, seconds)


# ---- replaying


def test_an_image_that_left_leaves_again_and_keeps_its_counts_until_then():
    asked = replay(SHAPE, point(1.0, leaves=0.9), Plan((64, 16), (0, 8)))
    assert asked["thresholds"][0, 0] == pytest.approx([1 - 16 / 64, 1 - 8 / 64])
    assert asked["exit_confidence"].tolist() == [[np.inf, 0.0]]


def test_nothing_refined_is_a_strength_that_top_k_takes():
    strengths = replay(SHAPE, point(1.0), Plan((64, 16, 8), (0, 0, 8)))["thresholds"]
    np.testing.assert_array_equal(read_strengths(strengths, 1, 2, "topk"), strengths)
    assert keep(np.arange(16.0)[None], strengths[:, 0, 1], "topk", 0).sum() == 0


def test_a_point_that_chooses_is_timed_with_choosing_even_where_nothing_is_dropped():
    everything = Plan((64, 64, 64), (0, 64, 64))
    assert (replay(SHAPE, point(0.1), everything)["thresholds"] > 0).all()
    assert not replay(SHAPE, point(0.0), everything)["thresholds"].any()
    assert replay(SHAPE, point(0.0), everything)["exit_confidence"] is None


# ---- what fits the time


@pytest.mark.parametrize(
    ("call_s", "num_calls", "num_rounds"),
    [(0.01, 24, 15), (0.1, 24, 5), (0.2, 18, 3), (0.5, 6, 4), (5.0, 2, 3)],  # 30 s are (1 + rounds) * 2 calls a plan
)
def test_slow_sessions_are_timed_on_fewer_plans_and_never_on_fewer_rounds(monkeypatch, call_s, num_calls, num_rounds):
    now = [0.0]
    work = {(row, column): lambda: now.append(now[-1] + call_s) for row in (0, 1) for column in range(12)}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[-1])
    chosen, rounds, round_s = fit(work, 2, 30.0)
    assert (len(chosen), rounds) == (num_calls, num_rounds)
    assert round_s == pytest.approx(2 * call_s * num_calls)
    assert rounds >= MIN_ROUNDS
    assert [sum(row == each for row, _ in chosen) for each in (0, 1)] == [num_calls / 2] * 2


def test_a_device_that_is_waited_for_is_timed_with_the_wait(monkeypatch):
    now, work = [0.0], {(row, 0): lambda: None for row in (0, 1)}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[-1])
    assert fit(work, 2, 30.0, wait=lambda: now.append(now[-1] + 0.5))[1:] == (14, pytest.approx(2.0))


def test_plans_that_stay_are_the_middles_of_equal_shares():
    assert spread(12, 12) == list(range(12))
    assert spread(12, 4) == [1, 4, 7, 10]
    assert spread(12, 3) == [2, 6, 10]
    assert spread(12, 1) == [6]
    assert spread(1, 1) == [0]


# ---- the mean of all images


STAYS, LEAVES = Plan((64, 40, 10), (0, 30, 10)), Plan((64, 40), (0, 30))


def mean_like(stays: float) -> Point:
    """A point at which this share of all images stayed for the last stage, and a quarter of those whose plans are kept."""
    few = point(1.0, *[STAYS] * 3, *[LEAVES] * 9, leaves=0.9)
    macs = stays * macs_of(SHAPE, few, STAYS) + (1 - stays) * macs_of(SHAPE, few, LEAVES)
    return replace(few, macs_mean=macs, kept_mean=(64.0, 40.0, 10.0 * stays))


@pytest.mark.parametrize("stays", [0.1, 0.25, 0.4])
def test_the_mean_is_of_all_images_and_not_of_the_few_whose_plans_are_kept(stays):
    every = mean_like(stays)
    costs = [5.0] * 3 + [1.0] * 9
    assert mean_of_all(SHAPE, every, every.plans, costs) == pytest.approx(1 + 4 * stays)
    one, other = (estimate_image(SHAPE, "float32", every, plan) for plan in (STAYS, LEAVES))
    assert estimate_point(SHAPE, "float32", every) == pytest.approx(stays * one + (1 - stays) * other)


def test_the_mean_of_all_costs_no_more_than_the_dearest_of_the_few_and_no_less_than_the_cheapest():
    every = mean_like(0.25)
    costs = [5.0] * 3 + [1.0] * 9
    for macs, wanted in ((0.0, 1.0), (1e12, 5.0)):
        assert mean_of_all(SHAPE, replace(every, macs_mean=macs), every.plans, costs) == pytest.approx(wanted)


def test_few_plans_are_told_apart_by_their_macs_alone_and_equal_ones_not_at_all():
    every = mean_like(0.1)
    assert mean_of_all(SHAPE, every, [STAYS, LEAVES], [5.0, 1.0]) == pytest.approx(1.4)
    assert mean_of_all(SHAPE, every, [LEAVES] * 4, [1.0, 2.0, 3.0, 2.0]) == pytest.approx(2.0)
    assert mean_of_all(SHAPE, every, [LEAVES], [3.0]) == pytest.approx(3.0)


def test_few_plans_lie_on_one_line():
    every = mean_like(0.1)
    plans = [STAYS, Plan((64, 20, 5), (0, 20, 5)), Plan((64, 60), (0, 60)), Plan((64, 10), (0, 10))]
    costs = [5.0, 2.0, 4.0, 1.0]
    line = np.polyfit([macs_of(SHAPE, every, plan) for plan in plans], costs, 1)
    assert mean_of_all(SHAPE, every, plans, costs) == pytest.approx(np.polyval(line, every.macs_mean))


def test_a_clock_s_mean_is_of_all_images_where_plans_were_timed_and_of_those_timed_where_images_were():
    every = mean_like(0.1)
    seconds = [0.005] * 3 + [0.001] * 9
    samples = {(0, column): Latency(name="", samples_s=np.full(3, each)) for column, each in enumerate(seconds)}
    assert clock_columns(samples, [every], SHAPE)[0] == (pytest.approx(1.4),)
    assert clock_columns(samples, [every])[0] == (pytest.approx(2.0),)


def test_a_session_s_means_are_of_all_images_unless_images_were_given(monkeypatch):
    monkeypatch.setattr(timing, "mean_of_all", lambda *_: 7.0)
    points, image = table(point(1.0, PLAN, PLAN)), np.zeros((1, 3, 32, 32), np.float32)
    by_plans, by_images = (measure_session(Pretender(), points, images, 1e-9) for images in (None, image))
    assert (by_plans.ms_mean, by_plans.joules) == ((7.0,), (7.0,))
    assert by_images.ms_mean[0] < 7 and by_images.joules[0] < 7


# ---- joules


def test_joules_are_those_of_the_counted_work():
    for threshold, scored in ((1.0, True), (0.0, False)):
        work = plan_macs(SHAPE, PLAN.kept, PLAN.refined, scored=scored)
        moved = numbers_moved(SHAPE, PLAN.kept, PLAN.refined, scored=scored)
        wanted = estimate_joules(work, 4 * moved)
        assert estimate_image(SHAPE, "float32", point(threshold), PLAN) == pytest.approx(wanted)


def test_whatever_a_device_can_be_measured_in_has_an_estimate():
    joules = {precision: estimate_image(SHAPE, precision, point(1.0), PLAN) for precision in PRECISIONS}
    assert max(joules["int8"], joules["bfloat16"]) < joules["float32"] == joules["float32-onednn"]


def test_int8_takes_the_blocks_products_and_weights_for_less():
    weights, rounded = block_linears(SHAPE, PLAN.kept, scored=True)
    saved = estimate_joules(rounded, 4 * weights) - estimate_joules(rounded, weights, constants=HOROWITZ["int8"])
    full, less = (estimate_image(SHAPE, precision, point(1.0), PLAN) for precision in ("float32", "int8"))
    assert full - less == pytest.approx(saved)
    assert measure_session(Pretender("int8"), table(point(1.0, PLAN)), None, 1e-9).energy_source == "estimate:int8"
