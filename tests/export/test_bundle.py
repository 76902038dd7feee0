"""Bundles as engines run them: written, checked, loaded without torch; and what is refused or leaves nothing behind.

Tracing a model takes seconds, so the models here are tiny; `.ci/run` exports a shipped one for every engine.
"""

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import iret
import models
from iret.export import bundle as exporting, targets
from iret.export.bundle import export
from iret.export.form import Form
from iret.export.int8 import quantize_onnx
from iret.export.parity import Parity
from iret.model import Iret
from iret.runtime.bundle import FILE_NAME, Bundle
from iret.runtime.cost import full_macs
from iret.runtime.engines import JOINERS, load_graph
from iret.runtime.points import DeviceTable, OperatingPoints, Point
from iret.runtime.session import Session

pytestmark = pytest.mark.graph  # the hook that checks shapes in signatures cannot be traced

SOURCE = str(Path(iret.__file__).parents[1])


def make_model(**options) -> Iret:
    """Two stages of one block, mostly weights, and labels."""
    model = models.make_model(**{"embed_dims": (64, 128), "depths": (1, 1), "head_dim": 32, **options})
    model.labels = ("a", "b", "c", "d", "e")
    return model


def make_images(batch: int = 8) -> torch.Tensor:
    return torch.randn(batch, 3, 24, 32, generator=torch.Generator().manual_seed(1))


Written = tuple[Path, Bundle, Parity]


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> Written:
    """`make_model()` written as ONNX, for every test that can do with its graphs."""
    folder = tmp_path_factory.mktemp("onnx") / "bundle"
    return folder, *export(make_model(), folder)


def copy_graphs(folder: Path, monkeypatch) -> None:
    """In place of tracing: graphs are those of the bundle `folder`, whatever the model; int8 where they are calibrated."""

    def write(module, inputs, axes, path, calls=None):
        onnx.save(onnx.load(folder / f"stage_{int(len(inputs) > 1)}.onnx"), path)  # with the weights that it shares
        if calls is not None:
            quantize_onnx(path, calls)

    monkeypatch.setitem(targets.WRITERS, "onnx", (".onnx", write))
    monkeypatch.setattr(targets, "write_onnx", write)  # whose file becomes OpenVINO's


def assert_right(folder: Path, bundle: Bundle, parity: Parity) -> None:
    """Of a bundle just written: it keeps the model's patches and gives its answers, and nothing else is left."""
    assert (parity.split, parity.problem) == (0, None)
    assert parity.compared == 5 * 2 * 8  # thresholds, batch sizes, images
    assert 0 < parity.logit_error < 1e-4
    assert Bundle.read(folder) == bundle
    assert bundle.check["compared"] == 80
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_executorch_keeps_the_model_s_patches_and_gives_its_answers(tmp_path):
    assert_right(tmp_path / "bundle", *export(make_model(), tmp_path / "bundle", "executorch"))


def test_openvino_keeps_the_model_s_patches_and_gives_its_answers(traced, tmp_path, monkeypatch):
    copy_graphs(traced[0], monkeypatch)
    assert_right(tmp_path / "bundle", *export(make_model(), tmp_path / "bundle", "openvino"))


def test_openvino_runs_one_image_whole_in_one_call_once_it_knows_the_stages(traced, tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    shutil.copytree(traced[0], folder)
    session, image = Session(folder, "openvino"), make_images(1).numpy()
    first = session(image)
    for _ in range(2):
        session(image)
    assert not session._whole.is_made
    again = session(image)
    assert session._whole.is_made
    assert 0 < again.engine_s < again.time_s < 0.1  # making it is no part of a run
    np.testing.assert_allclose(again.trace.stage_logits, first.trace.stage_logits, rtol=0, atol=1e-5)
    assert np.ptp(again.trace.stage_logits) > 0.01
    assert (again.trace.kept == first.trace.kept).all() and (again.trace.refined == first.trace.refined).all()
    assert again.trace.exit_stage.tolist() == [1] and again.macs.tolist() == first.macs.tolist()
    assert again.trace.importance.shape == first.trace.importance.shape and np.isnan(again.trace.importance).all()
    # what drops, leaves early, has a deadline or company goes stage by stage, and is not disturbed
    monkeypatch.setattr(session._whole, "run", None)
    for setting in ({"thresholds": 1.0}, {"exit_confidence": 0.99}, {"deadline_ms": 1e6}):
        session(image, **setting)
    assert session(make_images(2).numpy()).logits.shape == (2, 5)
    # nor are graphs joined that somebody else loaded, or those of another engine
    watched = Session(folder, "openvino", load=lambda *file: load_graph(*file))
    assert watched._whole is None and Session(folder, "onnxruntime")._whole is None


def test_a_folder_that_changed_meanwhile_is_not_joined(traced, tmp_path, caplog):
    folder = tmp_path / "bundle"
    shutil.copytree(traced[0], folder)
    session, image = Session(folder, "openvino"), make_images(1).numpy()
    first = session(image)
    (folder / "stage_1.onnx").write_bytes(b"of another model")
    for _ in range(5):
        assert (session(image).logits == first.logits).all()
    assert [record.getMessage() for record in caplog.records] == [
        f"stages are run one by one, because they could not be joined: {folder / 'stage_1.onnx'} is damaged or was changed; "
        "copy the bundle again."
    ]
    shutil.rmtree(folder)
    assert (session(image).logits == first.logits).all()


def test_threads_that_want_the_whole_at_once_make_it_once_or_do_without(traced, monkeypatch):
    made = []

    def join(paths, inputs, threads):
        made.append(paths)
        time.sleep(0.05)
        raise RuntimeError("no memory")

    monkeypatch.setitem(JOINERS, "openvino", join)
    session, image = Session(traced[0], "openvino"), make_images(1).numpy()
    for _ in range(3):
        expected = session(image).logits
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: session(image).logits, range(8)))
    assert all((each == expected).all() for each in found)
    assert len(made) == 1


def test_a_bundle_of_an_older_format_is_replaced(traced, tmp_path, monkeypatch):
    copy_graphs(traced[0], monkeypatch)
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "stage_0.onnx").touch()
    (folder / FILE_NAME).write_text(json.dumps({"format": 1, "checksums": {"stage_0.onnx": "0"}}))
    with pytest.raises(
        ValueError, match="has format 1; this version of iret reads bundles of format 4: export the model again"
    ):
        Session(folder)
    bundle, _ = export(make_model(), folder)
    assert Bundle.read(folder) == bundle


def test_onnx_runtime_keeps_the_model_s_patches_and_gives_its_answers(traced):
    assert_right(*traced)


def test_every_engine_of_a_kind_runs_it(traced):
    assert exporting.check(make_model(), traced[0], engine="openvino").problem is None


@pytest.mark.parametrize("form", [Form(single_graph=True), Form(buckets=(6,))], ids=str)
def test_the_other_forms_answer_the_same(tmp_path, form):
    bundle, parity = export(make_model(), tmp_path / "bundle", form=form)
    assert (parity.split, parity.problem) == (0, None)
    assert len(bundle.stages[-1]) == (2 if form.buckets else 1)
    assert bundle.max_batch == 1
    if form.single_graph:  # what programs without a session ask it by
        outputs = onnxruntime.InferenceSession(tmp_path / "bundle" / "model.onnx").get_outputs()
        assert [each.name for each in outputs] == ["logits", "kept_1", "refined_1", "importance_1"]


@pytest.mark.parametrize("form", [Form(), Form(buckets=(6, 12)), Form(int8=True)], ids=str)
def test_weights_that_several_graphs_hold_are_kept_once(tmp_path, form):
    model, folder = make_model(embed_dims=(64, 96), head_dim=32), tmp_path / "bundle"
    bundle, parity = export(model, folder, form=form, images=make_images())
    assert parity.problem is None
    assert exporting.check(model, folder, engine="openvino").problem is None
    assert "weights.bin" in bundle.checksums
    large = []
    for graph in (each for stage in bundle.stages for each in stage):
        tensors = onnx.load(folder / graph.file).graph.initializer  # with what other files hold of it
        large += [each.raw_data for each in tensors if len(each.raw_data) >= 16_384]
    assert len(large) > len(set(large)), "some are in two graphs"
    written = sum((folder / name).stat().st_size for name in bundle.checksums)
    assert (folder / "weights.bin").stat().st_size == sum(map(len, {each for each in large if large.count(each) > 1}))
    assert written < sum(map(len, large)) or form.int8  # whose graphs have more nodes than weights, so small a model
    (folder / "weights.bin").unlink()
    with pytest.raises(ValueError, match="weights.bin is missing; a bundle is moved as a whole folder"):
        Session(folder)


def test_an_int8_bundle_keeps_no_weights_of_the_fp32_graphs_it_was_calibrated_with(tmp_path):
    model = make_model(embed_dims=(32, 64), head_dim=32)  # 16 KiB a layer of the MLP in fp32, 4 in int8
    plain, _ = export(model, tmp_path / "plain")
    int8, _ = export(model, tmp_path / "int8", form=Form(int8=True), images=make_images())
    assert "weights.bin" in plain.checksums
    assert "weights.bin" not in int8.checksums and not (tmp_path / "int8" / "weights.bin").exists()


def test_a_single_graph_shares_with_nobody_and_has_no_rest_of_a_head(tmp_path):
    model, folder = make_model(embed_dims=(64, 96), head_dim=32), tmp_path / "bundle"
    bundle, _ = export(model, folder, form=Form(single_graph=True))
    assert "weights.bin" not in bundle.checksums
    sizes = [len(each.raw_data) for each in onnx.load(folder / "model.onnx").graph.initializer]
    assert sizes.count(4 * 4 * 64**2) == 2 * model.shape.depths[0]  # fc1 and fc2 of each block of the first stage


@pytest.mark.parametrize("is_single", [False, True])
def test_convolutions_in_an_engine_answer_the_same(tmp_path, is_single):
    form = Form(convolutions=True, single_graph=is_single)
    model, folder = make_model(embed_dims=(64, 256)), tmp_path / "bundle"
    bundle, parity = export(model, folder, form=form)
    assert (parity.split, parity.problem, bundle.is_convolved) == (0, None, True)
    assert exporting.check(model, folder, engine="openvino").problem is None
    graph = onnx.load(folder / bundle.stages[-1][0].file).graph
    assert sum(node.op_type == "Conv" for node in graph.node) == 6 + is_single  # and the coarse band


def test_int8_is_smaller_and_says_how_often_it_agrees(traced, tmp_path, monkeypatch):
    copy_graphs(traced[0], monkeypatch)
    int8, parity = export(make_model(), tmp_path / "int8", form=Form(int8=True), images=make_images())
    sizes = [
        sum((folder / file).stat().st_size for file in bundle.checksums)
        for folder, bundle in (traced[:2], (tmp_path / "int8", int8))
    ]
    assert sizes[1] < 0.5 * sizes[0]
    assert int8.precision == "int8"
    assert parity.compared == 80
    assert parity.agree > 64


def test_a_session_needs_no_torch(traced, tmp_path):
    images = make_images(3)
    np.save(tmp_path / "images.npy", images.numpy())
    code = f"""
import sys
sys.path.insert(0, {SOURCE!r})
sys.modules["torch"] = None  # as if it were not installed
import numpy as np
import onnxruntime
import iret
out = iret.Session({str(traced[0])!r}, threads=1)(np.load({str(tmp_path / "images.npy")!r}), thresholds=1.0)
np.save({str(tmp_path / "logits.npy")!r}, out.logits)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with torch.no_grad():
        expected = make_model().run(images, 1.0).logits
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=0, atol=1e-4)


# ---- what is refused, and what a failure leaves


@pytest.mark.parametrize(
    ("kind", "form", "sentence"),
    [
        ("coreml", Form(), "choose from onnx, openvino, executorch"),
        ("executorch", Form(single_graph=True), "leave out --single-graph"),
        ("onnx", Form(single_graph=True, buckets=(8,)), "not both"),
        ("onnx", Form(buckets=(3,)), r"outside \[4, 12\]"),
        ("onnx", Form(buckets=(13,)), r"outside \[4, 12\]"),
        ("onnx", Form(int8=True), "with --data"),
        ("openvino", Form(convolutions=True), "on ONNX Runtime alone, not on openvino; leave out --convolutions"),
        ("executorch", Form(convolutions=True), "on ONNX Runtime alone, not on executorch; leave out --convolutions"),
        ("onnx", Form(convolutions=True, int8=True), "--int8 or --convolutions, not both"),
        ("onnx", Form(convolutions=True), "64, 128 wide, and convolutions are faster from 256 on; leave out"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_before_anything_is_written(tmp_path, kind, form, sentence):
    with pytest.raises(ValueError, match=sentence):
        export(make_model(), tmp_path / "bundle", kind, form)
    assert not any(tmp_path.iterdir())


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="not a bundle"):
        export(make_model(), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_a_folder_with_more_than_a_bundle_is_left_alone(tmp_path):
    """A benchmark's bundle.json, or a file of the user's beside a bundle."""
    (tmp_path / FILE_NAME).write_text('{"rows": []}')
    with pytest.raises(ValueError, match="not a bundle"):
        export(make_model(), tmp_path)
    assert (tmp_path / FILE_NAME).read_text() == '{"rows": []}'


def test_what_a_save_that_was_killed_left_does_not_bar_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "check", lambda *args: Parity())
    monkeypatch.setitem(exporting.WRITERS, "onnx", (".onnx", lambda *args: args[3].write_bytes(b"graph")))
    monkeypatch.setattr(exporting, "share_weights", lambda paths: None)
    export(make_model(), tmp_path / "bundle")
    (tmp_path / "bundle" / f".{FILE_NAME}.4711").write_text("{")
    export(make_model(), tmp_path / "bundle")
    assert not (tmp_path / "bundle" / f".{FILE_NAME}.4711").exists()


def test_a_grid_that_has_nothing_to_drop_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a grid of 4 patches has nothing to drop; use a larger image"):
        export(make_model(img_size=(16, 16)), tmp_path / "bundle")


def test_a_model_without_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no classes"):
        export(make_model(num_classes=0), tmp_path / "bundle")


def test_a_bundle_that_differs_is_not_kept_and_an_older_one_stays(traced, tmp_path, monkeypatch):
    shutil.copytree(traced[0], tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()}
    other = make_model()
    with torch.no_grad():
        other.stages[-1].head.bias += 1
    copy_graphs(traced[0], monkeypatch)
    with pytest.raises(ValueError, match="logits differ by 1.0e.00"):
        export(other, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()} == before


def test_an_older_bundle_is_replaced_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "check", lambda *args: Parity())
    monkeypatch.setitem(exporting.WRITERS, "onnx", (".onnx", lambda *args: args[3].write_bytes(b"graph")))
    monkeypatch.setattr(exporting, "share_weights", lambda paths: None)
    export(make_model(), tmp_path / "bundle", form=Form(buckets=(6,)))
    export(make_model(), tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    names = sorted(path.name for path in (tmp_path / "bundle").iterdir())
    assert names == [FILE_NAME, "labels.txt", "stage_0.onnx", "stage_1.onnx"]


def test_the_same_bundle_written_again_keeps_what_was_measured_of_it_and_another_says_what_it_drops(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(exporting, "check", lambda *args: Parity())
    content = [b"graph"]
    monkeypatch.setitem(exporting.WRITERS, "onnx", (".onnx", lambda *args: args[3].write_bytes(content[0])))
    monkeypatch.setattr(exporting, "share_weights", lambda paths: None)
    model, out, said = make_model(), tmp_path / "bundle", []
    full = float(full_macs(model.shape))
    point = Point(thresholds=((0.0, 0.0),), accuracy=0.5, macs_mean=full, macs_p95=full, kept_mean=(12.0,) * 2)
    one = dict.fromkeys(("ms_mean", "ms_p50", "ms_p95", "joules"), (1.0,))
    clock = DeviceTable(device="a board", **one, energy_source="", energy_scope="", energy_kind="estimated", rounds=3)
    older, newer = replace(clock, device="the model's", rounds=4), replace(clock, device="the model's", rounds=5)
    model.points = OperatingPoints(data="d", num_images=1, full_macs=round(full), points=(point,), devices=(older,))
    bundle, _ = export(model, out)
    replace(bundle, points=bundle.points.with_device(clock)).write(out)
    model.points = model.points.with_device(newer)
    again, _ = export(model, out, say=said.append)
    assert Bundle.read(out).points.devices == again.points.devices == (newer, clock)
    content[0] = b"another"
    export(model, out, say=said.append)
    assert Bundle.read(out).points.devices == (newer,)
    assert [line for line in said if "dropped" in line] == [
        "the bundle is new, so clocks of the one before are dropped; measure again: a board"
    ]


def test_a_graph_that_the_engine_cannot_load_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "check", lambda *args: Parity())
    monkeypatch.setitem(exporting.WRITERS, "onnx", (".onnx", lambda *args: args[3].write_bytes(b"graph")))
    monkeypatch.setattr(exporting, "share_weights", lambda paths: None)
    export(make_model(), tmp_path / "bundle")
    for engine in ("onnxruntime", "openvino"):
        with pytest.raises(ValueError, match="cannot load"):
            Session(tmp_path / "bundle", engine)


def test_bundle_json_holds_what_a_device_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "check", lambda *args: replace(Parity(), compared=1))
    monkeypatch.setitem(exporting.WRITERS, "onnx", (".onnx", lambda *args: args[3].write_bytes(b"graph")))
    monkeypatch.setattr(exporting, "share_weights", lambda paths: None)
    export(make_model(), tmp_path / "bundle")
    raw = json.loads((tmp_path / "bundle" / FILE_NAME).read_text())
    assert raw["labels"] == ["a", "b", "c", "d", "e"]
    assert raw["preprocess"]["img_size"] == [24, 32]
    assert raw["shape"]["patch_size"] == 8
    assert raw["versions"]["torch"] == metadata.version("torch")
    assert set(raw["checksums"]) == {"labels.txt", "stage_0.onnx", "stage_1.onnx"}
    assert raw["check"]["compared"] == 1
