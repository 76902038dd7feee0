"""Each engine's quantiser on a graph of a tiny model: it runs, is smaller, near fp32, and leaves the choice in fp32."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import models
from iret.export import int8
from iret.export.bundle import export
from iret.export.form import Form
from iret.export.int8 import record_inputs
from iret.export.targets import WRITERS
from iret.model import Iret
from iret.runtime.bundle import ENGINES
from iret.runtime.engines import load_graph

pytestmark = pytest.mark.graph  # the hook that checks shapes in signatures cannot be traced


def make_model() -> Iret:
    """Two stages of one block, mostly weights."""
    return models.make_model(embed_dims=(64, 128), depths=(1, 1), head_dim=32)


def make_images(batch: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, 3, 24, 32)).astype(np.float32)


class Piece(nn.Module):
    """What stages are made of: products with a weight, a convolution, a gather by cells, a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.answer = nn.Linear(64, 256), nn.Linear(256, 64)
        self.places, self.band = nn.Parameter(torch.randn(13, 256)), nn.Conv2d(1, 16, 8, bias=False)

    def forward(self, x: torch.Tensor, cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedded = self.embed(x)
        y = (
            embedded
            + self.places.index_select(0, cell + 1)
            + self.band(x.unflatten(1, (1, 8, 8))).flatten(1).repeat(1, 16)
        )
        return self.answer(y + (0.1 * y @ y.mT).softmax(-1) @ y), embedded


def make_calls(count: int) -> list[list[np.ndarray]]:
    draw = np.random.default_rng(2)
    return [[draw.normal(size=(9, 64)).astype(np.float32), draw.permutation(12)[:9] - 1] for _ in range(count)]


def write_piece(path: Path, kind: str, calls=None) -> nn.Module:
    """Traced with any number of rows, and in int8 where it is calibrated on `calls`."""
    rows, piece = {0: Dim("rows", min=2, max=64)}, Piece().eval()
    WRITERS[kind][1](piece, (torch.zeros(5, 64), torch.arange(5)), (rows, rows), path, calls)
    return piece


def size(path: Path) -> int:
    return path.with_suffix(".bin").stat().st_size if path.suffix == ".xml" else path.stat().st_size


@pytest.mark.parametrize("kind", ["onnx", "openvino", "executorch"])
def test_a_graph_in_int8_runs_on_its_engine_near_the_fp32_one(tmp_path, kind):
    if kind == "openvino":
        pytest.importorskip("nncf", reason="nncf quantises for OpenVINO; pip install 'iret[openvino-int8]'")
    path = tmp_path / f"int8{WRITERS[kind][0]}"
    piece = write_piece(path, kind, make_calls(8))
    weights = 4 * sum(parameter.numel() for parameter in piece.parameters())
    assert size(path) < 0.6 * weights  # a quarter, and what is not a weight
    run = load_graph(ENGINES[kind][0], path, 1)
    fresh = make_calls(11)[8:]  # not calibrated on
    with torch.no_grad():
        expected = [piece(*map(torch.from_numpy, call))[0].numpy() for call in fresh]
    found = [run(call)[0] for call in fresh]
    error = np.sqrt(np.square(np.subtract(found, expected)).mean())
    assert 1e-3 < error / np.std(expected) < 0.08  # rounded to 8 bits, at OpenVINO what is rare is cut off, and no more
    if kind == "onnx":
        check_onnx(path)
    if kind == "openvino":
        check_openvino(path)
    if kind == "executorch":  # ranges are taken a token at a time: rows do not depend on one another
        louder = [fresh[0][0] * np.where(np.arange(9) == 3, 100, 1)[:, None].astype(np.float32), fresh[0][1]]
        others = np.arange(9) != 3
        np.testing.assert_allclose(run(louder)[1][others], run(fresh[0])[1][others], rtol=0, atol=1e-6)


def check_onnx(path: Path) -> None:
    """Products with a weight are int8, those of activations and the convolution are not, and nothing half-way is left."""
    nodes = importlib.import_module("onnx").load(path).graph.node
    is_int8 = {output: node.op_type == "DequantizeLinear" for node in nodes for output in node.output}
    products = [[is_int8.get(each) for each in node.input[:2]] for node in nodes if node.op_type in ("MatMul", "Gemm")]
    assert sorted(all(each) for each in products) == [False, False, True, True]
    assert not any(any(each) for each in products if not all(each))
    (band,) = (node for node in nodes if node.op_type == "Conv")
    assert not any(is_int8.get(each) for each in band.input)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def check_openvino(path: Path) -> None:
    """The weights of two products are int8, the convolution reads its own in fp32."""
    nodes = importlib.import_module("openvino").Core().read_model(path).get_ops()
    constants = [node for node in nodes if node.get_type_name() == "Constant"]
    assert [tuple(node.shape) for node in constants if node.get_element_type().get_type_name() == "i8"] == [
        (256, 64),
        (64, 256),
    ]
    (band,) = (node.input_value(1).get_node() for node in nodes if node.get_type_name() == "Convolution")
    assert (band.get_type_name(), band.get_element_type().get_type_name()) == ("Constant", "f32")


# ---- what is calibrated on


def test_every_graph_is_calibrated_on_what_it_was_given_at_every_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "load_graph", models.write_bundle(make_model(), tmp_path))
    images = make_images(3)
    calls = record_inputs(tmp_path, images, [(0.0, None), (50.0, None)])
    assert {name: len(seen) for name, seen in calls.items()} == {"stage_0": 3, "stage_1": 6}  # the same at any setting
    firsts = [call[0] for call in calls["stage_0"]]
    assert all(any((each == image).all() for each in firsts) for image in images[:, None])
    # everything kept, and the floor alone
    assert sorted({call[0].shape[0] for call in calls["stage_1"]}) == [5, 13]


def test_a_graph_is_calibrated_on_so_many_calls_at_most_drawn_from_all(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "MAX_CALLS", 8)
    monkeypatch.setattr(int8, "load_graph", models.write_bundle(make_model(), tmp_path))
    images = make_images(24)
    calls = record_inputs(tmp_path, images, [(0.0, None), (50.0, None)])
    assert [len(seen) for seen in calls.values()] == [8, 8]
    drawn = [int((images == call[0]).all((1, 2, 3)).argmax()) for call in calls["stage_0"]]
    assert len(set(drawn)) == 8
    assert max(drawn) > 12  # late ones, too
    assert {call[0].shape[0] for call in calls["stage_1"]} == {5, 13}


def test_a_bucket_that_no_image_fills_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "load_graph", models.write_bundle(make_model(), tmp_path, Form(buckets=(6,))))
    with pytest.raises(ValueError, match=r"no image of --data ran stage_1_6.*give more, or leave that bucket out"):
        record_inputs(tmp_path, make_images(1), [(0.0, None)])


def test_what_int8_needs_is_said_before_anything_is_written(tmp_path):
    some, one = torch.from_numpy(make_images(1)), Form(int8=True, single_graph=True)
    for form, images, way_out in ((Form(int8=True), None, "give some with --data"), (one, some, "out --single-graph")):
        with pytest.raises(ValueError, match=way_out):
            export(make_model(), tmp_path / "bundle", form=form, images=images)
    assert not any(tmp_path.iterdir())
