"""The description of a bundle: how it is written and what it must agree with. Damaged ones: test_session."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from iret.runtime.bundle import FILE_NAME, Bundle, GraphFile, checksum
from iret.runtime.cost import Shape, full_macs
from iret.runtime.points import OperatingPoints, Point
from iret.runtime.preprocess import Preprocess

SHAPE = Shape(img_size=(16, 16), patch_size=4, in_chans=3, num_classes=2, embed_dims=(8, 8), depths=(1, 1), head_dim=8)


def make_bundle(**changes) -> Bundle:
    described = dict(
        name="described",
        kind="onnx",
        is_single=False,
        precision="float32",
        shape=SHAPE,
        preprocess=Preprocess(img_size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3),
        labels=("cat", "dog"),
        points=None,
        stages=((GraphFile("a"),), (GraphFile("b", 7), GraphFile("c", 17))),
        max_batch=1,
        checksums={"a": "", "b": "", "c": ""},
        versions={"numpy": "2"},
        check={"tied": 0},
    )
    return Bundle(**described | changes)


def make_points(macs: int, transitions: int) -> OperatingPoints:
    everything = Point(
        thresholds=((0.0, 0.0),) * transitions,
        accuracy=0.5,
        macs_mean=float(macs),
        macs_p95=1.0,
        kept_mean=(16.0, 16.0),
    )
    return OperatingPoints(data="made up", num_images=1, full_macs=macs, points=(everything,))


@pytest.mark.parametrize("is_convolved", [False, True])
def test_convolutions_are_noted(tmp_path, is_convolved):
    make_bundle(is_convolved=is_convolved).write(tmp_path)
    assert Bundle.read(tmp_path).is_convolved == is_convolved


def test_what_is_written_is_read_again(tmp_path):
    bundle = make_bundle(points=make_points(full_macs(SHAPE), 1))
    bundle.write(tmp_path)
    assert Bundle.read(tmp_path) == bundle
    bundle.with_check({"tied": 3}).write(tmp_path)
    assert Bundle.read(tmp_path).check == {"tied": 3}
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, step):
    make_bundle().write(tmp_path)
    before = (tmp_path / FILE_NAME).read_bytes()

    def fail(path: Path, *rest) -> None:
        path.touch()
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, fail)
        with pytest.raises(OSError, match="no space"):
            make_bundle(name="another").write(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("macs, transitions", [(full_macs(SHAPE) + 1, 1), (full_macs(SHAPE), 2)])
def test_operating_points_of_another_model_are_refused(macs, transitions):
    with pytest.raises(ValueError, match="operating points are another model's; export the model again"):
        make_bundle(points=make_points(macs, transitions))


def test_an_openvino_graph_is_its_weights_too():
    whole = {"kind": "openvino", "stages": ((GraphFile("a.xml"),), (GraphFile("b.xml"),))}
    files = dict.fromkeys(("a.xml", "a.bin", "b.xml", "b.bin"), "")
    assert make_bundle(**whole, checksums=files).kind == "openvino"
    del files["b.bin"]
    with pytest.raises(ValueError, match="a graph has no checksum"):
        make_bundle(**whole, checksums=files)


@pytest.mark.parametrize("max_batch", [0, -1, True])
def test_a_largest_batch_is_a_whole_number_or_none(tmp_path, max_batch):
    make_bundle().write(tmp_path)
    raw = json.loads((tmp_path / FILE_NAME).read_text())
    (tmp_path / FILE_NAME).write_text(json.dumps(raw | {"max_batch": max_batch}))
    with pytest.raises(ValueError, match=f"max_batch is {max_batch!r}"):
        Bundle.read(tmp_path)


def test_models_without_labels_have_bundles_too():
    assert make_bundle(labels=None).labels is None


def test_a_checksum_is_sha_256(tmp_path):
    path = tmp_path / "graph"
    path.write_bytes(b"abc" * 100_000)
    assert checksum(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_files_that_nobody_vouches_for_are_not_looked_at(tmp_path):
    (tmp_path / "a").write_bytes(b"graph")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    vouched = replace(make_bundle(), stages=((GraphFile("a"),),) * 2, checksums={"a": checksum(tmp_path / "a")})
    vouched.verify(tmp_path)
    (tmp_path / "a").write_bytes(b"grape")
    with pytest.raises(ValueError, match="a is damaged or was changed; copy the bundle again"):
        vouched.verify(tmp_path)
