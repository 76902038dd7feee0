"""Each engine's writer on one linear layer: what the file says, holds and does not hold. Whole models: test_bundle."""

import logging
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

from iret.export import targets
from iret.export.targets import OPSET, WRITERS, write_onnx
from iret.runtime.bundle import ENGINES
from iret.runtime.engines import load_graph

pytestmark = pytest.mark.graph  # the hook that checks shapes in signatures cannot be traced


def make_layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(16, 4)


AXES = ({0: Dim("rows", min=1, max=8)},)


def test_every_kind_of_bundle_has_a_writer_and_an_ending_of_its_own():
    assert WRITERS.keys() == ENGINES.keys()
    assert len({extension for extension, _ in WRITERS.values()}) == len(WRITERS)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_gives_the_module_s_numbers_for_any_number_of_rows(tmp_path, kind):
    layer, (extension, write) = make_layer(), WRITERS[kind]
    path = tmp_path / f"graph{extension}"
    write(layer, (torch.zeros(2, 16),), AXES, path)
    run = load_graph(ENGINES[kind][0], path, 1)
    for rows in (1, 5):
        x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows))
        (found,) = run([x.numpy()])
        # sums of 16 products in float32; weights in 16 bits would be off by 1e-4
        np.testing.assert_allclose(found, layer(x).detach().numpy(), rtol=0, atol=1e-6)


def test_an_onnx_file_is_whole_of_the_opset_that_is_promised_and_names_no_file_of_this_machine(tmp_path):
    onnx = pytest.importorskip("onnx")
    write_onnx(make_layer(), (torch.zeros(2, 16),), AXES, tmp_path / "graph.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"]  # no weights beside it
    content = (tmp_path / "graph.onnx").read_bytes()
    assert b"site-packages" not in content and b".py" not in content
    graph = onnx.load(tmp_path / "graph.onnx")
    assert {(each.domain, each.version) for each in graph.opset_import if each.domain == ""} == {("", OPSET)}
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param


@pytest.mark.parametrize(
    ("kind", "library", "extra"),
    [
        ("onnx", "onnx", "export"),
        ("onnx", "onnxscript", "export"),
        ("openvino", "openvino", "openvino"),
        ("executorch", "executorch", "executorch"),
    ],
)
def test_a_library_that_is_missing_is_named_with_what_installs_it(tmp_path, monkeypatch, kind, library, extra):
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    extension, write = WRITERS[kind]
    with pytest.raises(ImportError, match=rf"{library} is not installed here; .*'iret\[{extra}\]'"):
        write(make_layer(), (torch.zeros(2, 16),), AXES, tmp_path / f"graph{extension}")
    assert not any(tmp_path.iterdir())


def test_what_exporters_say_of_themselves_is_silenced_and_our_own_voice_comes_back(caplog):
    with pytest.raises(KeyError), targets._quiet():
        logging.warning("their insides")
        warnings.warn("theirs, too", stacklevel=1)
        raise KeyError
    logging.warning("ours")
    assert [record.getMessage() for record in caplog.records] == ["ours"]
    with pytest.warns(UserWarning, match="ours"):
        warnings.warn("ours", stacklevel=1)
