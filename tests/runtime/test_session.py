"""A session with an engine that only pretends: how it groups, when it stops, what it refuses. Answers: tests/export."""

import json
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pytest
from PIL import Image

from iret.runtime import engines
from iret.runtime.bundle import FILE_NAME, Bundle, GraphFile, checksum
from iret.runtime.controller import Controller, Decision, Goal, Menu, Reading
from iret.runtime.cost import Shape, full_macs, numbers_moved, plan_macs, stage_macs
from iret.runtime.points import DeviceTable, OperatingPoints, Plan, Point
from iret.runtime.preprocess import Preprocess
from iret.runtime.record import Trace
from iret.runtime.session import Session
from iret.runtime.stage import MACS_A_WEIGHT, group_by_count

# 16 patches of 4 x 4, three stages
SHAPE = Shape(
    img_size=(16, 16), patch_size=4, in_chans=3, num_classes=3, embed_dims=(8, 16, 24), depths=(1, 1, 1), head_dim=8
)
HALF = (0.5, 0.5, 0.5)


def point(keep: float, share: float, accuracy: float) -> Point:
    kept = (16.0, 16 * share, 16 * share)
    macs = share * full_macs(SHAPE)
    return Point(
        thresholds=((keep, keep),) * 2, accuracy=accuracy, macs_mean=macs, macs_p95=macs, kept_mean=kept
    )  # fmt: skip


POINTS = OperatingPoints(
    data="made up",
    num_images=100,
    full_macs=full_macs(SHAPE),
    points=(point(0.0, 1.0, 0.9), point(0.9, 0.7, 0.8), point(1.1, 0.4, 0.7)),
)


class Pretender:
    """Graphs that note what they are given, let time pass, and find the first patches the most important.

    `seconds(stage, images, tokens)` is what a call takes on `clock`.
    """

    def __init__(self, seconds=lambda stage, images, tokens: 0.0) -> None:
        self.now, self.seconds, self.calls = 0.0, seconds, []

    def clock(self) -> float:
        return self.now

    def load(self, engine: str, path: Path, threads: int | None):
        stage = int(path.stem.split("_")[1])

        def run(inputs):
            tokens, batch = (17, len(inputs[0])) if stage == 0 else inputs[0].shape[:2]
            self.calls.append((stage, batch, tokens, [each.shape for each in inputs]))
            self.now += self.seconds(stage, batch, tokens)
            if stage:
                self.check(*inputs)
            # logits tell which stage answered; brighter images look at fewer patches
            logits = np.eye(3, dtype=np.float32)[np.full(batch, stage)]
            if stage == 2:
                return [logits]
            light = inputs[0].mean((1, 2, 3)) if stage == 0 else inputs[0][0, :, 0]
            x = np.broadcast_to(light[:, None], (tokens, batch, SHAPE.embed_dims[stage])).astype(np.float32)
            received = np.exp(-np.abs(light[:, None]) * np.arange(tokens)).astype(np.float32)
            return [x, received, logits]

        return run

    @staticmethod
    def check(x, cell, pixels, source, bias) -> None:
        """What every later stage may rely on."""
        assert x.dtype == pixels.dtype == bias.dtype == np.float32
        assert cell.dtype == source.dtype == np.int64
        assert all(each.flags.c_contiguous for each in (x, cell, pixels, source, bias))
        assert not pixels[0].any()
        cell, source = cell.T, source.T
        assert (cell[:, 0] == -1).all()
        assert (source[cell < 0] == 0).all()
        assert set(source[source > 0]) == set(range(1, source.max() + 1))
        live = bias == 0
        assert live[:, 0].all()
        assert (source[~live] == 0).all()
        for row, alive in zip(cell, live, strict=True):
            assert (np.diff(row[alive]) > 0).all()


def make_session(folder: Path, engine: Pretender, controller=None, **options) -> Session:
    described = dict(
        name="pretended",
        kind="onnx",
        is_single=False,
        precision="float32",
        shape=SHAPE,
        preprocess=Preprocess(img_size=(16, 16), mean=HALF, std=HALF),
        labels=("a", "b", "c"),
        points=POINTS,
        stages=tuple((GraphFile(f"stage_{index}"),) for index in range(3)),
        max_batch=None,
        checksums={},
    )
    described |= options
    for graph in (graph for stage in described["stages"] for graph in stage):
        (folder / graph.file).touch()
        described["checksums"].setdefault(graph.file, checksum(folder / graph.file))
    (folder / FILE_NAME).write_text(Bundle(**described).to_json())
    return Session(folder, threads=1, clock=engine.clock, load=engine.load, controller=controller)


def make_images(*light: float) -> np.ndarray:
    return np.full((len(light), 3, 16, 16), np.array(light, np.float32)[:, None, None, None])


# ---- what runs


def test_a_trace_is_not_made_while_the_caller_waits_for_an_answer(tmp_path, monkeypatch):
    session, made = make_session(tmp_path, Pretender()), []
    make = Trace.of
    monkeypatch.setattr(Trace, "of", lambda *args: made.append(1) or make(*args))
    outs = [session(make_images(*light), thresholds=(1.0, 1.0)) for light in ((0.3,), (0.3, 2.0))]
    assert not made
    assert [out.trace.kept.shape[1] for out in outs] == [1, 2]
    assert outs[0].trace is outs[0].trace
    assert len(made) == 2


@pytest.mark.parametrize(("engine", "times"), [("onnxruntime", 1), ("openvino", 0)])
def test_weights_move_to_huge_pages_once_all_are_loaded_on_the_engine_that_gains(tmp_path, monkeypatch, engine, times):
    loaded, moved = [], []

    @contextmanager
    def note():
        yield
        moved.append(len(loaded))

    def load(*what):
        loaded.append(what)
        return lambda inputs: []

    make_session(tmp_path, Pretender())
    monkeypatch.setattr(engines, "on_huge_pages", note)
    Session(tmp_path, engine, load=load)
    assert len(loaded) == 3
    assert moved == [3] * times


def test_images_of_a_batch_keep_their_own_counts_and_share_calls(tmp_path):
    engine = Pretender()
    session = make_session(tmp_path, engine)
    light = (0.0, 0.3, 0.0, 2.0)
    together = session(make_images(*light), thresholds=(1.0, 1.0))
    counts = together.trace.kept.sum((2, 3))
    assert counts[1].tolist() == [16, 5, 16, 4]  # uniform attention stays; 4 is the floor
    for row, each in enumerate(light):
        alone = session(make_images(each), thresholds=(1.0, 1.0))
        assert (alone.trace.kept[:, 0] == together.trace.kept[:, row]).all()
        assert alone.macs == together.macs[row]
        np.testing.assert_allclose(alone.trace.importance[:, 0], together.trace.importance[:, row], rtol=1e-12)


def test_an_image_that_is_sure_leaves_and_the_others_go_on(tmp_path):
    session = make_session(tmp_path, Pretender())
    sure = float(np.exp(1) / (np.exp(1) + 2))
    out = session(make_images(0.1, 0.1), thresholds=0.5, exit_confidence=np.array([sure - 1e-3, sure + 1e-3]))
    assert out.trace.exit_stage.tolist() == [0, 2]
    assert out.logits.argmax(1).tolist() == [0, 2]
    assert np.isnan(out.trace.stage_logits[1:, 0]).all()
    assert not out.trace.kept[1:, 0].any()
    assert out.macs[0] == stage_macs(SHAPE, 0, 16, 16, scored=True)


def test_an_image_that_stays_keeps_its_own_thresholds_and_exits(tmp_path):
    """The first leaves after a stage, the second keeps all, the third drops and is sure after the second stage."""
    session = make_session(tmp_path, Pretender())
    sure = float(np.exp(1) / (np.exp(1) + 2))
    images, thresholds = make_images(0.3, 0.3, 0.3), np.array([[2.0, 2.0], [0.0, 0.0], [1.0, 1.0]])
    exits = np.array([[0.0, 0.0], [1.1, 1.1], [1.1, sure - 1e-3]])
    out = session(images, thresholds=thresholds, exit_confidence=exits)
    assert out.trace.exit_stage.tolist() == [0, 2, 1]
    assert out.trace.kept.sum((2, 3)).tolist() == [[16, 16, 16], [0, 16, 5], [0, 16, 0]]
    assert np.isnan(out.trace.importance[:, 1]).all(), "it has no threshold, so nothing was chosen"
    assert np.isfinite(out.trace.importance[0, 2]).all()


def test_a_budget_an_image_is_looked_up_in_the_bundle_s_table(tmp_path):
    session = make_session(tmp_path, Pretender())
    out = session(make_images(0.3, 0.3, 0.3), np.array([1.0, 0.7, 0.4]))
    counts = out.trace.kept.sum((2, 3))[1]
    assert counts[0] == 16 > counts[1] > counts[2] >= 4
    by_thresholds = session(make_images(0.3), thresholds=0.9)
    assert (by_thresholds.trace.kept[:, 0] == out.trace.kept[:, 1]).all()


def test_refined_patches_are_a_subset_and_their_pixels_are_sent(tmp_path):
    engine = Pretender()
    session = make_session(tmp_path, engine)
    out = session(make_images(0.3), thresholds=((0.5, 1.5), (0.5, 0.5)))
    assert 0 < out.trace.refined[1].sum() < out.trace.kept[1].sum()
    assert (out.trace.refined <= out.trace.kept).all()
    assert engine.calls[1][3][2] == (1 + out.trace.refined[1].sum(), 3, 4, 4)
    assert (out.trace.refined[2] == out.trace.kept[2]).all()


def test_graphs_of_fixed_counts_get_the_smallest_that_fits(tmp_path):
    engine = Pretender()
    stages = (
        (GraphFile("stage_0"),),
        *(tuple(GraphFile(f"stage_{k}_{n}", n + 1) for n in (16, 6)) for k in (1, 2)),
    )
    session = make_session(tmp_path, engine, stages=stages, max_batch=1)
    out = session(make_images(0.3, 0.0), thresholds=1.0)
    assert out.trace.kept.sum((2, 3))[1].tolist() == [5, 16]
    assert sorted(call[:3] for call in engine.calls if call[0] == 1) == [(1, 1, 7), (1, 1, 17)]
    assert all(call[3][2][0] == call[2] for call in engine.calls if call[0])  # pixels have a fixed size, too


def test_more_images_than_a_call_takes_are_split(tmp_path):
    engine = Pretender()
    session = make_session(tmp_path, engine, max_batch=2)
    out = session(make_images(*[0.3] * 5), thresholds=1.0)
    assert [call[1] for call in engine.calls if call[0] == 0] == [2, 2, 1]
    assert max(call[1] for call in engine.calls) == 2
    assert (out.macs == out.macs[0]).all()


# ---- deadlines


class Machine:
    """Seconds of stages that jitter, and that turn slow all at once: all of them, or one alone, for some calls."""

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        self.call_s, self.token_s = 10 ** self.draw.uniform(-5, -3, 3), 10 ** self.draw.uniform(-6, -3, 3)
        self.jitter, self.factors = self.draw.uniform(0, 1), np.ones(3)
        self.spent: list[tuple[int, float]] = []

    def turn(self) -> None:
        """Before a call, one time in ten: slow, or as usual again."""
        if self.draw.random() < 0.1:
            self.factors = np.ones(3)
            which = self.draw.choice([0, 1, 2, 3, 4])  # a stage, all, none
            self.factors[slice(which, which + 1) if which < 3 else slice(3 * (which == 4), 3)] = (
                10 ** self.draw.uniform(0, 2)
            )

    def seconds(self, stage: int, images: int, tokens: int) -> float:
        steady = self.call_s[stage] + self.token_s[stage] * images * tokens
        self.spent.append((stage, steady * self.factors[stage] * self.draw.lognormal(0, self.jitter)))
        return self.spent[-1][1]


def test_two_thousand_deadlines_are_missed_by_the_last_stage_at_most(tmp_path):
    """The last stage was begun before the deadline, or is the first; whatever it took, nothing came after it."""
    late = in_vain = stages = 0
    for seed in range(20):
        machine = Machine(seed)
        draw, engine = machine.draw, Pretender(machine.seconds)
        (tmp_path / str(seed)).mkdir()
        session = make_session(tmp_path / str(seed), engine)
        usual_s = (machine.call_s + machine.token_s * 17).sum()
        for _ in range(100):
            machine.turn()
            machine.spent.clear()
            deadline_s, began = usual_s * 10 ** draw.uniform(-1.5, 1.5), engine.now
            setting = [{}, {"budget": 0.6}, {"thresholds": draw.uniform(0, 2)}, {"exit_confidence": 0.5}][
                draw.integers(4)
            ]
            light = draw.choice([0.0, 0.3, 2.0], draw.choice([1, 1, 1, 3])).tolist()
            out = session(make_images(*light), deadline_ms=1e3 * deadline_s, **setting)
            last = max(stage for stage, _ in machine.spent)
            last_s = sum(seconds for stage, seconds in machine.spent if stage == last)
            assert engine.now - began <= deadline_s + last_s + 1e-9
            assert engine.now - last_s <= began + deadline_s + 1e-9 or last == 0
            assert (out.trace.exit_stage == out.logits.argmax(1)).all()  # the last head that ran answers
            assert out.trace.exit_stage.max() == last
            is_late = engine.now - began > deadline_s
            late, in_vain, stages = late + is_late, in_vain + (is_late and last > 0), stages + last
    assert late > 100  # there was something to miss: the first stage always runs
    assert 0 < in_vain < 80  # of 2000: later stages were seldom begun that ended too late
    assert 1000 < stages < 3500  # of 4000: it stopped early, and not at once


def test_photos_that_take_all_the_time_to_read_are_answered_by_the_first_stage(tmp_path, monkeypatch):
    engine = Pretender(lambda stage, images, tokens: 1e-3 * images * tokens)
    session = make_session(tmp_path, engine)
    read = Preprocess.__call__

    def read_slowly(self, images):
        engine.now += 1.0
        return read(self, images)

    monkeypatch.setattr(Preprocess, "__call__", read_slowly)
    session(make_images(0.3))
    for deadline_ms, last in ((500.0, 0), (1500.0, 2)):
        began = engine.now
        out = session(np.zeros((16, 16, 3), np.uint8), deadline_ms=deadline_ms)
        assert out.trace.exit_stage.tolist() == [last]
        assert engine.now - began <= max(1.017, deadline_ms / 1e3)


def test_a_steady_machine_meets_every_deadline_it_can_and_uses_the_time(tmp_path):
    engine = Pretender(lambda stage, images, tokens: 1e-3 * images * tokens)
    session = make_session(tmp_path, engine)
    session(make_images(0.3))  # learns the pace
    stages = []
    for deadline_ms in (16.0, 18.0, 40.0, 56.0):
        began = engine.now
        out = session(make_images(0.3), deadline_ms=deadline_ms)
        stages.append(int(out.trace.exit_stage[0]))
        assert engine.now - began <= max(17e-3, deadline_ms / 1e3)
    assert stages[0] == stages[1] == 0  # the first stage always runs
    assert all(earlier <= later for earlier, later in pairwise(stages))
    assert stages[-1] == 2
    assert out.trace.kept.all()  # enough time for everything


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_deadline_a_little_too_short_for_the_last_stage_is_kept_all_the_same(tmp_path, share):
    engine = Pretender(lambda stage, images, tokens: 1e-3 * images * tokens)
    session = make_session(tmp_path, engine)
    session(make_images(0.0))
    late = 0
    for _ in range(500):
        began = engine.now
        session(make_images(0.0), 1.0, deadline_ms=34 + 17 * share)
        late += engine.now - began > 1e-3 * (34 + 17 * share)
    assert 0 < late <= 0.03 * 500  # it is tried now and then, for it could have become faster


def test_one_slow_call_does_not_bar_the_later_stages_for_good(tmp_path):
    slow = [1.0]
    engine = Pretender(lambda stage, images, tokens: 1e-3 * images * tokens * (slow[0] if stage else 1))
    session = make_session(tmp_path, engine)
    slow[0] = 30.0
    session(make_images(0.3))
    slow[0] = 1.0
    stages = [int(session(make_images(0.3), thresholds=0.5, deadline_ms=60.0).trace.exit_stage[0]) for _ in range(200)]
    assert stages[0] == 0
    assert stages[-20:] == [2] * 20


def test_a_slow_moment_of_the_whole_machine_is_forgotten_at_once(tmp_path):
    slow = [30.0]
    engine = Pretender(lambda stage, images, tokens: 1e-3 * images * tokens * slow[0])
    session = make_session(tmp_path, engine)
    session(make_images(0.3))
    slow[0] = 1.0
    assert session(make_images(0.3), thresholds=0.5, deadline_ms=60.0).trace.exit_stage.tolist() == [2]


def test_under_a_deadline_a_dearer_point_that_is_worse_is_not_served(tmp_path):
    engine = Pretender(lambda stage, images, tokens: 1e-3 * images * tokens)
    worse = replace(POINTS, points=(replace(POINTS.points[0], accuracy=0.79), *POINTS.points[1:]))
    session = make_session(tmp_path, engine, points=worse)
    session(make_images(0.3))
    assert session(make_images(0.3), deadline_ms=1e6).budget.tolist() == [pytest.approx(0.7)]


def test_too_little_time_for_everything_takes_a_cheaper_point_of_the_table(tmp_path):
    engine = Pretender(lambda stage, images, tokens: 1e-3 * images * tokens)
    session = make_session(tmp_path, engine)
    session(make_images(0.3))
    out = session(make_images(0.3), deadline_ms=45.0)
    assert out.trace.exit_stage.tolist() == [2]
    assert out.trace.kept[1].sum() < 16


# ---- milliseconds and joules


def make_table(device: str) -> DeviceTable:
    columns = {"ms_mean": (10.0, 6.0, 2.0), "ms_p50": (10.0, 6.0, 2.0), "ms_p95": (12.0, 7.0, 3.0)}
    meter = {"energy_source": "fake:0", "energy_scope": "a board", "energy_kind": "measured"}
    return DeviceTable(device=device, **columns, joules=(0.5, 0.4, 0.1), **meter, rounds=3)


def measured(session: Session) -> Session:
    session.bundle = replace(session.bundle, points=POINTS.with_device(make_table(session.device)))
    return session


def test_milliseconds_and_joules_become_the_largest_budget_they_pay_for(tmp_path):
    session = measured(make_session(tmp_path, Pretender()))
    assert session.device.endswith(", onnxruntime, 1 thread, float32")
    for asked, budget in (({"ms": 4.0}, 0.55), ({"ms": 99.0}, 1.0), ({"joules": 0.1}, 0.4), ({"joules": 0.25}, 0.55)):
        assert session.budget_for(**asked) == pytest.approx(budget)
        out, same = session(make_images(0.3, 0.3), **asked), session(make_images(0.3, 0.3), budget)
        np.testing.assert_allclose(out.budget, [budget, budget])
        assert (out.trace.kept == same.trace.kept).all()
    assert session(make_images(0.3), thresholds=1.0).budget is None
    assert session(make_images(0.3)).budget.tolist() == [1.0]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"ms": 1.0}, "ms=1 is below the cheapest operating point on this device, 2"),
        ({"joules": 0.0}, "joules=0 must be above 0"),
        ({"ms": float("nan")}, "ms=nan must be above 0"),
        ({}, "give one of ms and joules"),
        ({"ms": 5.0, "joules": 1.0}, "give one of ms and joules"),
    ],
)
def test_milliseconds_and_joules_that_cannot_be_had_are_refused(tmp_path, asked, sentence):
    with pytest.raises(ValueError, match=sentence):
        measured(make_session(tmp_path, Pretender())).budget_for(**asked)


def test_a_session_too_slow_for_what_is_asked_is_told_to_measure_itself_again(tmp_path):
    session = measured(make_session(tmp_path, Pretender()))
    with pytest.raises(ValueError, match=r"0\.400 of the MACs; .* measure again with session\.measure\(\)") as refusal:
        session(make_images(0.0), ms=1.0)
    assert "iret calibrate" not in str(refusal.value)


def test_a_clock_of_another_engine_is_never_taken_for_this_one(tmp_path):
    points = POINTS.with_device(make_table("this processor, 1 thread, float32"))
    session = make_session(tmp_path, Pretender(), points=points)
    with pytest.raises(
        ValueError, match=r"onnxruntime.*known: this processor, 1 thread, float32\. Measure it with session.measure"
    ):
        session(make_images(0.3), ms=5.0)


PLANS = (Plan((16, 16, 16), (0, 16, 16)), Plan((16, 6, 5), (0, 6, 5)), Plan((16,), (0,)))


def make_plans(*plans: Plan) -> OperatingPoints:
    """`POINTS` with a plan each, the last of which leaves early."""
    points = [replace(point, plans=(plan,)) for point, plan in zip(POINTS.points, plans, strict=True)]
    return replace(POINTS, points=(*points[:2], replace(points[2], exit_confidence=0.9)))


def test_a_model_folder_is_to_be_exported_first(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=rf"{tmp_path} is a model folder; `iret export {tmp_path} --out BUNDLE` makes"):
        Session(tmp_path)


def test_a_measured_session_keeps_its_clock_in_the_bundle(tmp_path):
    engine = Pretender()
    session = make_session(tmp_path, engine, points=make_plans(*PLANS))
    table = session.measure(seconds=1e-3)
    assert {call[:3] for call in engine.calls} == {(0, 1, 17), (1, 1, 17), (2, 1, 17), (1, 1, 7), (2, 1, 6)}
    assert (table.device, table.rounds, table.energy_kind) == (session.device, 3, "estimated")
    session.save()
    again = Session(tmp_path, threads=1, load=engine.load)
    assert again.points.table_of(session.device) == table
    assert 0 < again.budget_for(ms=1e6) <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE_NAME, "stage_0", "stage_1", "stage_2"]
    with pytest.raises(ValueError, match="no clock was measured"):
        Session(tmp_path, threads=2, load=engine.load).budget_for(ms=1e6)


def test_a_plan_that_refines_nothing_is_measured_too(tmp_path):
    engine = Pretender()
    nothing = Plan((16, 8, 5), (0, 0, 5))  # refine threshold above what any patch reaches
    session = make_session(tmp_path, engine, points=make_plans(PLANS[0], nothing, PLANS[2]))
    session.measure(seconds=1e-3)
    pixels = {call[3][2][0] for call in engine.calls if call[:3] == (1, 1, 9)}
    assert pixels == {1}  # the row of zeros alone


def test_clocks_of_two_sessions_of_one_bundle_are_both_kept(tmp_path):
    engine = Pretender()
    one = make_session(tmp_path, engine, points=make_plans(*PLANS))
    two = Session(tmp_path, threads=2, load=engine.load)
    for session in (one, two):
        session.measure(seconds=1e-3)
        session.save()
    assert {table.device for table in Bundle.read(tmp_path).points.devices} == {one.device, two.device}


@pytest.mark.parametrize("changed", ["graphs", "points"])
def test_a_clock_is_not_saved_into_a_bundle_that_was_exported_meanwhile(tmp_path, changed):
    engine = Pretender()
    older = make_session(tmp_path, engine, points=make_plans(*PLANS))
    older.measure(seconds=1e-3)
    if changed == "graphs":
        (tmp_path / "stage_1").write_bytes(b"other weights")
    make_session(tmp_path, engine, points=make_plans(PLANS[0], PLANS[1], Plan((16, 4), (0, 4))))
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(ValueError, match="was exported again since this session was made; open it anew"):
        older.save()
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_a_session_that_measured_nothing_has_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match=r"no clock was measured .* Measure it with session\.measure\(\)"):
        make_session(tmp_path, Pretender()).save()


# ---- a controller


class Notebook:
    """Turns the dial to 0.4 and notes what it is asked and told."""

    def __init__(self) -> None:
        self.heard: list[tuple] = []

    def next(self, images: int) -> Decision:
        self.heard.append(("next", images))
        return Decision(0.4, 0.7, "made up", (), ())

    def note(self, time_s: float, images: int) -> None:
        self.heard.append(("note", round(time_s, 9), images))


def test_a_controller_is_asked_before_a_call_and_told_after_it(tmp_path):
    engine, notebook = Pretender(lambda stage, images, tokens: 1.0), Notebook()
    session = make_session(tmp_path, engine, notebook)
    out = session(make_images(0.3, 0.3))
    assert notebook.heard == [("next", 2), ("note", 3.0, 2)]
    assert out.decision.reason == "made up"
    assert out.budget.tolist() == [0.4, 0.4]
    assert (out.trace.kept == session(make_images(0.3, 0.3), 0.4).trace.kept).all()
    assert session(make_images(0.3), thresholds=1.0).decision is None
    assert len(notebook.heard) == 2  # a call with a budget or thresholds of its own goes past it


def test_a_call_that_fails_is_not_noted_and_the_next_one_is_asked_for_again(tmp_path):
    broken = [True]

    def seconds(stage, images, tokens):
        if broken.pop() if broken else False:
            raise RuntimeError("the engine is gone")
        return 1.0

    notebook = Notebook()
    session = make_session(tmp_path, Pretender(seconds), notebook)
    with pytest.raises(ValueError, match="NaN"):
        session(make_images(np.nan))
    assert notebook.heard == []
    with pytest.raises(RuntimeError):
        session(make_images(0.3))
    session(make_images(0.3))
    assert notebook.heard == [("next", 1), ("next", 1), ("note", 3.0, 1)]


class Clockwork:
    """A real controller, its clock that of the engine."""

    def __init__(self, menu: Menu, goal: Goal, engine: Pretender) -> None:
        self.controller, self.engine = Controller(menu, goal), engine
        self.answered, self.time_s = 0, 0.0

    def next(self, images: int) -> Decision:
        ms = 1e3 * self.time_s / self.answered if self.answered else None
        return self.controller.decide(Reading(time_s=self.engine.now, images=self.answered, ms=ms), images)

    def note(self, time_s: float, images: int) -> None:
        self.answered, self.time_s = images, time_s


def test_a_controller_turns_the_dial_down_when_calls_take_longer_than_the_table_says(tmp_path):
    slow = [1.0]
    engine = Pretender(lambda stage, images, tokens: 2e-4 * tokens * slow[0])  # the table's 10 ms at 51 tokens
    menu = POINTS.with_device(make_table("here")).menu("here")
    session = make_session(tmp_path, engine, Clockwork(menu, Goal(deadline_ms=16.0), engine))
    assert [session(make_images(0.3)).budget[0] for _ in range(20)] == [1.0] * 20
    slow[0] = 2.0
    found = [session(make_images(0.3)) for _ in range(60)][-1]
    assert found.budget[0] < 0.95 and found.engine_s <= 0.016
    slow[0] = 1.0
    assert [session(make_images(0.3)).budget[0] for _ in range(300)][-1] > 0.98


# ---- threads


def test_a_call_within_a_call_changes_nothing_of_it(tmp_path):
    """As if another thread ran meanwhile, at the worst moment: while a stage is computed."""
    engine = Pretender()
    session = make_session(tmp_path, engine)
    alone = session(make_images(0.3, 0.0), thresholds=1.0, deadline_ms=1e6)
    inner = []

    def seconds(stage, images, tokens):
        if stage == 1 and not inner:
            inner.append(None)
            inner[0] = session(make_images(2.0), thresholds=((0.5, 1.5), (0.5, 0.5)))
        return 0.0

    engine.seconds = seconds
    out = session(make_images(0.3, 0.0), thresholds=1.0, deadline_ms=1e6)
    assert out.engine_s > inner[0].engine_s > 0  # its own time, with all that went on meanwhile
    assert (out.trace.kept == alone.trace.kept).all()
    assert (out.macs == alone.macs).all()


def test_threads_that_share_a_session_get_their_own_answers(tmp_path):
    engine = Pretender()
    session = make_session(tmp_path, engine)
    light = (0.0, 0.1, 0.3, 2.0)
    expected = [session(make_images(each), thresholds=1.0).macs[0] for each in light]
    assert len(set(expected)) == 4
    together, found = Barrier(4), {}

    def seconds(stage, images, tokens):
        if stage == 1:
            together.wait(10)  # all four are between their first stage and their second
        return 0.0

    engine.seconds = seconds

    def ask(each):
        found[each] = [session(make_images(each), thresholds=1.0, deadline_ms=1e6).macs[0] for _ in range(5)]

    threads = [Thread(target=ask, args=(each,)) for each in light]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {each: [macs] * 5 for each, macs in zip(light, expected, strict=True)}


@pytest.mark.parametrize("threads", [0, -1, True])
def test_threads_below_one_are_refused_before_anything_is_loaded(tmp_path, threads):
    with pytest.raises(ValueError, match=rf"threads={threads!r} must be a whole number, 1 or more"):
        Session(tmp_path / "nowhere", threads=threads)


# ---- what it takes and refuses


def test_photos_are_preprocessed_and_arrays_are_taken_as_they_are(tmp_path):
    session = make_session(tmp_path, Pretender())
    grey = Image.new("RGB", (20, 16), (255, 255, 255))
    path = tmp_path / "photo.png"
    grey.save(path)
    expected = session(make_images(1.0), thresholds=1.0)
    for images in (grey, str(path), path.read_bytes(), [grey], np.full((16, 16, 3), 255, np.uint8)):
        out = session(images, thresholds=1.0)
        assert (out.trace.kept == expected.trace.kept).all()


@pytest.mark.parametrize(
    ("images", "options", "sentence"),
    [
        (make_images(0.0)[:, :1], {}, r"images are float32 \(1, 1, 16, 16\); this bundle takes"),
        (make_images(0.0)[:0], {}, "B 1 or more"),
        (make_images(np.nan), {}, "NaN"),
        (make_images(0.0), {"budget": 0.5, "thresholds": 1.0}, "give one of .* not budget and thresholds"),
        (make_images(0.0), {"budget": 0.5, "ms": 5.0}, "give one of .* not budget and ms"),
        (make_images(0.0), {"ms": 5.0, "joules": 1.0}, "give one of .* not ms and joules"),
        (make_images(0.0), {"joules": 1.0, "thresholds": 1.0}, "give one of .* not joules and thresholds"),
        (make_images(0.0), {"budget": 0.1}, "cheapest"),
        (make_images(0.0), {"budget": 1.5}, r"\(0, 1\]"),
        (make_images(0.0), {"budget": np.array([0.5, 0.5])}, "does not fit 1 images"),
        (make_images(0.0), {"thresholds": -1.0}, "0 or more"),
        (make_images(0.0), {"thresholds": (1.0, 1.0, 1.0)}, "2 transitions"),
        (make_images(0.0), {"rule": "nonsense", "thresholds": 0.0}, "unknown"),
        (make_images(0.0), {"rule": "topk", "budget": 0.5}, "give them"),
        (make_images(0.0), {"deadline_ms": 0.0}, "above 0"),
        (make_images(0.0), {"deadline_ms": float("nan")}, "above 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path, images, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_session(tmp_path, Pretender())(images, **options)


@pytest.mark.graph  # the hook that checks signatures would refuse them first
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ms": [5.0, 6.0]}, r"ms=\[5.0, 6.0\] must be one number; .*a budget each, from budget_for\(ms=...\)"),
        ({"joules": "1"}, "joules='1' must be one number; .*from budget_for"),
        ({"deadline_ms": "5"}, r"deadline_ms='5' must be one number\."),
        ({"deadline_ms": [5]}, r"deadline_ms=\[5\] must be one number\."),
        ({"budget": {}}, "budget={} must be one number, or one an image"),
        ({"budget": "x"}, "budget='x' must be one number, or one an image"),
    ],
)
def test_what_is_no_number_is_refused_in_a_sentence(tmp_path, options, sentence):
    session = measured(make_session(tmp_path, Pretender()))
    with pytest.raises(ValueError, match=sentence):
        session(make_images(0.0, 0.0), **options)
    with pytest.raises(ValueError, match="seconds='a' must be one number"):
        session.measure(seconds="a")


def test_without_operating_points_a_budget_names_the_command(tmp_path):
    session = make_session(tmp_path, Pretender(), points=None)
    with pytest.raises(ValueError, match="budget=0.5 needs operating points.*iret calibrate"):
        session(make_images(0.0), 0.5)
    with pytest.raises(ValueError, match="ms=5 needs operating points.*iret calibrate"):
        session(make_images(0.0), ms=5.0)
    with pytest.raises(ValueError, match="a clock needs operating points"):
        session.measure()
    assert session(make_images(0.0)).trace.kept.all()


def test_a_single_graph_refuses_what_needs_a_host_between_stages(tmp_path):
    session = make_session(tmp_path, Pretender(), is_single=True, stages=((GraphFile("stage_0"),),))
    for options in ({"deadline_ms": 5.0}, {"exit_confidence": 0.9}, {"rule": "topk", "thresholds": 0.5}):
        with pytest.raises(ValueError, match="without --single-graph"):
            session(make_images(0.0), **options)


def test_a_budget_that_a_bundle_has_no_points_for_is_refused_with_the_way_out_of_its_kind(tmp_path):
    for folder, options, way_out in (
        (tmp_path / "stages", {}, "run `iret calibrate MODEL`"),
        (tmp_path / "one", {"is_single": True, "stages": ((GraphFile("stage_0"),),)}, "export it with --data"),
    ):
        folder.mkdir()
        with pytest.raises(ValueError, match=way_out):
            make_session(folder, Pretender(), points=None, **options)(make_images(0.3), budget=0.5)


def test_a_single_graph_has_no_importance_where_nothing_was_chosen(tmp_path):
    """As in a run of stages."""

    def load(engine, path, threads):
        step = [np.arange(17), np.arange(17), np.ones(17, np.float32)]
        return lambda inputs: [np.ones((1, 3), np.float32), *step, *step]

    make_session(tmp_path, Pretender(), is_single=True, stages=((GraphFile("stage_0"),),))
    session = Session(tmp_path, load=load)
    assert np.isnan(session(make_images(0.0)).trace.importance).all()
    assert (session(make_images(0.0), thresholds=1.0).trace.importance == 1).all()


def test_images_of_a_single_graph_are_each_noted_as_their_own(tmp_path):
    """One that has no threshold beside one that has: counts, cost and pictures stay with their image."""
    seen = []

    def load(engine, path, threads):
        def run(inputs):
            seen.append(inputs[1].copy())
            drops = bool(inputs[1].any())
            kept, refined = (np.arange(1 + (count if drops else 16)) for count in (4, 2))
            first, second = (np.full(count, 2.0, np.float32) for count in (17, len(kept)))
            return [np.full((1, 3), float(drops), np.float32), kept, refined, first, kept, refined, second]

        return run

    make_session(tmp_path, Pretender(), is_single=True, stages=((GraphFile("stage_0"),),))
    out = Session(tmp_path, load=load)(make_images(0.0, 0.0), thresholds=np.array([[0.0, 0.0], [1.0, 1.0]]))
    assert [thresholds.max() for thresholds in seen] == [0, 1]
    assert out.logits[:, 0].tolist() == [0, 1]
    shape = Bundle.read(tmp_path).shape
    ways = (((16, 16, 16), (0, 16, 16), False), ((16, 4, 4), (0, 2, 2), True))
    assert out.macs.tolist() == [plan_macs(shape, kept, refined, scored=flag) for kept, refined, flag in ways]
    assert out.trace.kept.sum((2, 3)).T.tolist() == [list(kept) for kept, _, _ in ways]
    assert out.trace.refined.sum((2, 3)).T.tolist() == [list(refined) for _, refined, _ in ways]


# ---- bundles


def test_a_bundle_is_read_as_it_was_written(tmp_path):
    make_session(tmp_path, Pretender())
    bundle = Bundle.read(tmp_path)
    assert bundle.points == POINTS
    assert bundle.shape == SHAPE
    assert bundle.to_json() == (tmp_path / FILE_NAME).read_text()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "has format None"),
        (b'{"format": 99}', "was written by a newer iret, in format 99; update iret to read it"),
        (b'{"format": 3}', "has format 3; this version of iret reads bundles of format 4"),
        (b'{"format": 4}', "does not describe a bundle"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_damaged_description_is_refused(tmp_path, content, sentence):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        Session(tmp_path)


def test_a_folder_without_a_bundle_names_the_command(tmp_path):
    with pytest.raises(ValueError, match="iret export MODEL"):
        Session(tmp_path)


def test_a_file_that_was_changed_or_lost_is_refused(tmp_path):
    graph = tmp_path / "stage_0"
    make_session(tmp_path, Pretender())
    graph.write_bytes(b"weights")
    with pytest.raises(ValueError, match="damaged or was changed"):
        Session(tmp_path)
    graph.unlink()
    with pytest.raises(ValueError, match="is missing"):
        Session(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kind": "coreml"}, "none of onnx, openvino, executorch"),
        ({"precision": "fp8"}, "precision 'fp8' is none of float32, int8"),
        ({"stages": []}, "graphs of 0 stages"),
        ({"stages": [[{"file": "stage_0"}], [{"file": "stage_1"}]]}, "graphs of 2 stages"),
        ({"stages": [[{"file": "stage_0"}], [], [{"file": "stage_2"}]]}, "a stage has no graph"),
        ({"stages": [[{"file": f"stage_{n}", "tokens": 7}] for n in range(3)]}, "no graph takes every patch"),
        ({"stages": [[{"file": "../stage_0"}], [{"file": "stage_1"}], [{"file": "stage_2"}]]}, "no checksum"),
        ({"checksums": {"../stage_0": "", "stage_0": "", "stage_1": "", "stage_2": ""}}, "a file has a path"),
        ({"checksums": []}, "does not describe a bundle"),
        ({"labels": ["a"]}, "not as many as its classes"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"preprocess": {"img_size": [8, 8], "mean": HALF, "std": HALF}}, "another size"),
    ],
)
def test_a_description_that_contradicts_itself_is_refused(tmp_path, changes, sentence):
    make_session(tmp_path, Pretender())
    raw = json.loads((tmp_path / FILE_NAME).read_text())
    (tmp_path / FILE_NAME).write_text(json.dumps(raw | changes))
    with pytest.raises(ValueError, match=sentence) as refusal:
        Session(tmp_path, load=Pretender().load)
    assert str(tmp_path / FILE_NAME) in str(refusal.value)


def test_an_engine_that_cannot_is_refused(tmp_path):
    make_session(tmp_path, Pretender())
    with pytest.raises(ValueError, match="choose from onnxruntime, openvino"):
        Session(tmp_path, "executorch")


def test_a_call_is_reckoned_with_the_weights_it_reads_the_last_mlp_of_the_stage_before_among_them(
    tmp_path, monkeypatch
):
    costs = []

    def group(counts, cost, call_cost, limit):
        costs.append(call_cost / MACS_A_WEIGHT)
        return group_by_count(counts, cost, call_cost, limit)

    monkeypatch.setattr("iret.runtime.stage.group_by_count", group)
    make_session(tmp_path, Pretender())(make_images(0.1, 0.9), thresholds=np.array([[0.0, 0.0], [2.0, 2.0]]))
    stages = [numbers_moved(SHAPE, [0] * count, scored=True) for count in (1, 2, 3)]
    assert costs == [stages[1] - stages[0] + 8 * 8**2, stages[2] - stages[1] + 8 * 16**2]
