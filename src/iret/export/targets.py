"""Graphs written for one engine each: `write(module, inputs, axes, path, calls)`; in int8 where `calls` are given.

ONNX by torch's exporter, OpenVINO by its converter from the same ONNX graph, ExecuTorch lowered to XNNPACK for CPUs of phones and
boards. What was tried and on which versions: docs/export.md.
"""

import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iret.export.int8 import Calls, quantize_executorch, quantize_onnx, quantize_openvino
from iret.runtime.engines import import_or_say

# Opset 20 is the first with Gelu; ONNX Runtime 1.20 and OpenVINO 2024.5 read it.
OPSET = 20
SHARED_NAME = "weights.bin"  # `serve/page/worker.js` knows it, too
SHARED_ALIGNMENT = 4096  # bytes, so that ONNX Runtime can map them
MIN_SHARED = 16_384  # bytes; smaller ones are not worth a look into another file

Axes = tuple[dict[int, Any], ...]  # per input: dimension -> torch.export.Dim; a dimension that is not named is fixed


def write_onnx(
    module: nn.Module, inputs: tuple[Tensor, ...], axes: Axes | None, path: Path, calls: Calls | None = None
) -> None:
    """One ONNX file with its weights inside; outputs have the module's `output_names`, if it has any."""
    for library in ("onnx", "onnxscript"):
        import_or_say(library, "export")
    with _quiet():
        names = getattr(module, "output_names", None)
        program = torch.onnx.export(
            module, inputs, output_names=names, dynamo=True, dynamic_shapes=axes, opset_version=OPSET, verbose=False
        )
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # where in the source each node came from: a fifth of a small file, and paths
            for value in node.outputs:
                value.metadata_props.clear()
        program.save(str(path), external_data=False)
        if calls is not None:
            quantize_onnx(path, calls)


def share_weights(paths: Sequence[Path]) -> None:
    """Move weights that several of these ONNX files hold into one file beside them, from which all of them read.

    The last MLP of a stage is in two graphs: a head asks for it at once, the tokens that stay in the next.
    """
    onnx = import_or_say("onnx", "export")
    shared = paths[0].parent / SHARED_NAME
    # That of the fp32 graphs that an int8 bundle was calibrated with; a session may still map it.
    shared.unlink(missing_ok=True)
    models = {path: onnx.load(path) for path in paths}
    large = [
        [each for each in model.graph.initializer if len(each.raw_data) >= MIN_SHARED] for model in models.values()
    ]
    holders = Counter(data for tensors in large for data in {each.raw_data for each in tensors})
    if max(holders.values(), default=1) == 1:
        return
    offsets: dict[bytes, int] = {}
    with shared.open("wb") as file:
        for tensor in chain(*large):
            data = tensor.raw_data
            if holders[data] == 1:
                continue
            if data not in offsets:
                file.write(bytes(-file.tell() % SHARED_ALIGNMENT))
                offsets[data] = file.tell()
                file.write(data)
            onnx.external_data_helper.set_external_data(tensor, SHARED_NAME, offsets[data], len(data))
            tensor.ClearField("raw_data")
    for path, model in models.items():
        path.write_bytes(model.SerializeToString())


def write_openvino(
    module: nn.Module, inputs: tuple[Tensor, ...], axes: Axes | None, path: Path, calls: Calls | None = None
) -> None:
    """An .xml with its .bin of weights in fp32 beside it."""
    ov = import_or_say("openvino", "openvino")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "graph.onnx"
        write_onnx(module, inputs, axes, source)
        graph = ov.convert_model(str(source))
        if calls is not None:
            graph = quantize_openvino(graph, calls)
        ov.save_model(graph, str(path), compress_to_fp16=False)


def write_executorch(
    module: nn.Module, inputs: tuple[Tensor, ...], axes: Axes | None, path: Path, calls: Calls | None = None
) -> None:
    """A .pte, everything that XNNPACK takes lowered to it."""
    import_or_say("executorch", "executorch")
    with _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        exported = torch.export.export(module, inputs, dynamic_shapes=axes, strict=False)
        if calls is not None:
            quantized = quantize_executorch(exported.module(), calls)
            exported = torch.export.export(quantized, inputs, dynamic_shapes=axes, strict=False)
        program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
        path.write_bytes(program.buffer)


Writer = Callable[[nn.Module, tuple[Tensor, ...], Axes | None, Path, Calls | None], None]
WRITERS: dict[str, tuple[str, Writer]] = {
    "onnx": (".onnx", write_onnx),
    "openvino": (".xml", write_openvino),
    "executorch": (".pte", write_executorch),
}


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' warnings are about their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
