"""What is counted, what is a problem, and what is tried; on outputs written by hand. Against graphs: test_graphs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from iret.export import bundle as exporting, parity as checking
from iret.export.form import PLAIN
from iret.export.parity import TIE, TOLERANCE, Parity, settings
from iret.model import Iret
from iret.output import Output, Trace
from iret.runtime.bundle import Bundle, GraphFile
from iret.runtime.cost import Shape, full_macs
from iret.runtime.points import OperatingPoints, Point
from iret.runtime.record import Output as SessionOutput, Trace as SessionTrace

# one image of 6 patches, two stages, three classes; the floor is 2
IMPORTANCE = np.array([2.0, 1.5, 1.0, 0.8, 0.5, 0.2])
KEEP, REFINE = 0.9, 1.2


def make_runs(
    kept=(0, 1, 2),
    refined=(0, 1),
    found_kept=(0, 1, 2),
    found_refined=(0, 1),
    *,
    gap=0.0,
    macs=100,
    importance=IMPORTANCE,
) -> tuple[Output, SessionOutput]:
    """What the model and a bundle did: patches of the second stage; the bundle's logits `gap` larger."""

    def cells(first, second):
        rows = np.zeros((2, 1, 2, 3), dtype=bool)
        rows[0].reshape(6)[list(first)] = True
        rows[1].reshape(6)[list(second)] = True
        return rows

    logits = np.array([[[0.1, 0.2, 0.3]], [[1.0, 2.0, 3.0]]], np.float32)
    every, here = range(6), np.array([1])
    model = Output(
        torch.from_numpy(logits[1]),
        torch.tensor([100]),
        Trace(
            torch.from_numpy(logits),
            torch.from_numpy(here),
            torch.from_numpy(cells(every, kept)),
            torch.from_numpy(cells((), refined)),
            torch.from_numpy(importance.reshape(1, 1, 2, 3)),
        ),
    )
    trace = SessionTrace(
        logits + np.float32(gap),
        here,
        cells(every, found_kept),
        cells((), found_refined),
        importance.reshape(1, 1, 2, 3),
    )
    return model, SessionOutput(logits[1] + np.float32(gap), lambda: np.array([macs]), lambda: trace, 0.0, 0.0)


def count(parity: Parity = Parity(), **options) -> Parity:  # noqa: B008 - frozen
    strengths = np.array([[[KEEP, REFINE]]])
    return parity.plus(*make_runs(**options), slice(0, 1), strengths, None, "here")


def test_what_agrees_is_counted_and_no_problem():
    assert count() == Parity(compared=1, agree=1)
    assert count(count()) == Parity(compared=2, agree=2)


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_may_differ_by_the_tolerance_and_no_more(sign):
    assert count(gap=sign * 0.9 * TOLERANCE).problem is None
    assert count(gap=sign * 1.2 * TOLERANCE).problem == "at here, image 0: logits differ by 1.2e-04"
    assert count(gap=sign * 0.9 * TOLERANCE).logit_error == pytest.approx(0.9 * TOLERANCE, rel=0.01)


def test_other_macs_for_the_same_patches_are_a_problem_in_any_precision():
    assert count(macs=99).problem == "at here, image 0: 99 MACs, not 100"
    assert count(Parity(is_exact=False), macs=99).problem == "at here, image 0: 99 MACs, not 100"


@pytest.mark.parametrize(
    ("changed", "differs"),
    [
        ({2: KEEP - 0.5 * TIE}, {"found_kept": (0, 1)}),  # at the keep threshold
        ({1: REFINE + 0.5 * TIE}, {"found_refined": (0,)}),  # at the refine threshold
        ({2: 0.3, 3: 0.3 + 0.5 * TIE}, {"found_kept": (0, 1, 3)}),  # at the last that the floor keeps
    ],
    ids=["keep", "refine", "floor"],
)
def test_another_patch_is_a_tie_where_its_importance_is_as_near_as_rounding(changed, differs):
    near, far = IMPORTANCE.copy(), IMPORTANCE.copy()
    for place, value in changed.items():
        near[place] = value
        far[place] = value + 0.05 * (1 if place % 2 else -1)
    tied, split = count(importance=near, **differs), count(importance=far, **differs)
    assert (tied.tied, tied.split, tied.problem) == (1, 0, None)
    assert (split.tied, split.split, split.problem) == (0, 1, "at here, image 0: other patches in stage 2")


def test_int8_may_keep_other_patches_and_give_other_logits_and_both_are_counted():
    found = count(count(Parity(is_exact=False), found_kept=(0, 1)), gap=0.5)
    assert (found.compared, found.split, found.tied, found.problem) == (2, 1, 0, None)
    assert found.logit_error == pytest.approx(0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_a_problem_in_any_precision(value):
    for start in (Parity(), Parity(is_exact=False)):
        assert count(start, gap=value).problem == "at here, image 0: logits are not finite"
        assert count(start, gap=value, found_kept=(0, 1)).problem == "at here, image 0: logits are not finite"


def test_every_head_must_give_numbers_and_a_single_graph_has_only_the_last():
    model, found = make_runs()
    found.trace.stage_logits[0] = np.nan
    strengths = np.array([[[KEEP, REFINE]]])
    for start, problem in (
        (Parity(), "at here, image 0: logits are not finite"),
        (Parity(is_exact=False), "at here, image 0: logits are not finite"),
        (Parity(is_single=True), None),
    ):
        assert start.plus(model, found, slice(0, 1), strengths, None, "here").problem == problem


def test_the_first_problem_is_the_one_that_is_told():
    found = count(count(macs=99), gap=1.0)
    assert found.problem == "at here, image 0: 99 MACs, not 100"
    assert found.logit_error == 1


def test_what_was_found_can_be_written_as_json():
    found = json.loads(json.dumps(count().to_dict()))
    assert (found["compared"], found["tolerance"], found["tie"], found["accuracy"]) == (1, TOLERANCE, TIE, [])


# ---- what is tried


def make_model() -> Iret:
    shape = Shape(
        img_size=(24, 32), patch_size=8, in_chans=3, num_classes=5, embed_dims=(16, 32), depths=(1, 1), head_dim=16
    )
    torch.manual_seed(0)
    return Iret(shape).eval()


def make_points(model: Iret, *shares: float) -> OperatingPoints:
    full = full_macs(model.shape)
    points = [
        Point(
            thresholds=((float(at), float(at)),),
            accuracy=0.5,
            macs_mean=s * full,
            macs_p95=s * full,
            kept_mean=(12.0, 12 * s),
        )
        for at, s in enumerate(shares)
    ]
    return OperatingPoints(data="made up", num_images=9, full_macs=full, points=tuple(points))


def test_the_budgets_of_the_bundle_s_table_are_tried_its_cheapest_last():
    model = make_model()
    model.points = make_points(model, 1.0, 0.1)  # not the bundle's, whose may be without exits
    bundle = Bundle(
        name="tiny",
        kind="onnx",
        is_single=True,
        precision="float32",
        shape=model.shape,
        preprocess=model.preprocessing,
        labels=None,
        points=make_points(model, 1.0, 0.6, 0.42),
        stages=((GraphFile("model"),),),
        max_batch=1,
        checksums={"model": ""},
    )
    tried = settings(model, bundle)
    assert [name for name, _, _ in tried] == ["budget 1.00", "budget 0.75", "budget 0.50", "budget 0.42"]
    assert tried[-1][1] == ((2.0, 2.0),)
    tried = settings(model, replace(bundle, points=None))
    assert len(tried) == 5
    assert tried[0] == ("thresholds 0.0", 0.0, None)


def test_made_up_images_are_the_same_every_time_and_differ_in_structure():
    model = make_model()
    images = checking.noise_and_blobs(model)
    assert images.shape == (8, 3, 24, 32)
    assert torch.equal(images, checking.noise_and_blobs(model))
    roughness = (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3))
    assert roughness[-1] > 2 * roughness[0]


# ---- what differs is refused


@pytest.mark.parametrize(("precision", "is_refused"), [("float32", True), ("int8", False)])
@pytest.mark.parametrize(("bias", "sentence"), [(1.0, "logits differ by 1.0e.00"), (float("nan"), "not finite")])
def test_a_graph_that_differs_is_refused_and_leaves_nothing(
    tmp_path, monkeypatch, precision, is_refused, bias, sentence
):
    """The "engine" is torch on the graphs of a model whose last head has another bias."""
    changed = make_model()
    with torch.no_grad():
        changed.stages[-1].head.bias += bias
    jobs = {job.name + ".onnx": job.graph for job in exporting._jobs(changed, "onnx", PLAIN)}

    def load(engine, path, threads):
        def run(inputs):
            with torch.no_grad():
                return [each.numpy() for each in jobs[path.name](*map(torch.from_numpy, inputs))]

        return run

    def open_session(folder, engine, threads):
        session = checking_session(folder, engine, threads=threads, load=load)
        session.bundle = replace(session.bundle, precision=precision)
        return session

    monkeypatch.setattr(checking, "Session", open_session)
    monkeypatch.setitem(exporting.WRITERS, "onnx", (".onnx", lambda *args: args[3].write_bytes(b"graph")))
    monkeypatch.setattr(exporting, "share_weights", lambda paths: None)
    if not is_refused and np.isfinite(bias):
        _, parity = exporting.export(make_model(), tmp_path / "bundle")
        assert parity.logit_error == pytest.approx(1, abs=1e-4)
        return
    with pytest.raises(ValueError, match=rf"does not answer as the model does: .*{sentence}.*Nothing was kept"):
        exporting.export(make_model(), tmp_path / "bundle")
    assert not any(tmp_path.iterdir())


checking_session = checking.Session


def test_graphs_that_changed_places_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "check", lambda *args: Parity())
    monkeypatch.setitem(exporting.WRITERS, "onnx", (".onnx", lambda *args: args[3].write_text(args[3].name)))
    monkeypatch.setattr(exporting, "share_weights", lambda paths: None)
    bundle, _ = exporting.export(make_model(), tmp_path / "bundle")
    bundle.verify(tmp_path / "bundle")
    first, second = (tmp_path / "bundle" / f"stage_{index}.onnx" for index in (0, 1))
    first.rename(tmp_path / "first")
    second.rename(first)
    (tmp_path / "first").rename(second)
    with pytest.raises(ValueError, match=r"stage_0.onnx is damaged or was changed; copy the bundle again\."):
        checking_session(tmp_path / "bundle")
