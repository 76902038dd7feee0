"""A bundle's graphs in int8, by each engine's own quantiser: weights per channel; activations by ranges seen in calibration, on
ExecuTorch by those of each token as it comes.

Only products with a weight are quantised; attention between tokens, norms and the choice stay in fp32. Calibrated on what the
stages really got: the fp32 bundle runs the calibration images at several budgets, and every graph's inputs are recorded.
"""

import io
import random
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from iret.runtime.engines import Graph, import_or_say, load_graph
from iret.runtime.session import Session

MAX_CALLS = 64  # a graph is calibrated on at most so many

Calls = list[Sequence[np.ndarray]]


def record_inputs(folder: Path, images: np.ndarray, settings: Sequence[tuple[object, object]]) -> dict[str, Calls]:
    """What every graph of the fp32 bundle in `folder` is given on `images`, one at a time, at each (thresholds, exits).

    Of more than `MAX_CALLS` a graph, so many drawn at random; the first stage, given the same at every setting, gets each image
    once.
    """
    calls: dict[str, Calls] = {}
    draw, is_first = random.Random(0), True

    def load(engine: str, path: Path, threads: int | None) -> Graph:
        graph, seen, met = load_graph(engine, path, threads), calls.setdefault(path.name, []), 0

        def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
            nonlocal met
            if is_first or len(inputs) > 1:
                met += 1
                place = len(seen) if met <= MAX_CALLS else draw.randrange(met)  # every call stays with equal chance
                if place < MAX_CALLS:
                    seen[place : place + 1] = [[each.copy() for each in inputs]]
            return graph(inputs)

        return run

    session = Session(folder, load=load)
    for row in range(len(images)):
        for place, (thresholds, exits) in enumerate(settings):
            is_first = place == 0
            session(images[row, None], thresholds=thresholds, exit_confidence=exits)
    unused = [name for name, seen in calls.items() if not seen]
    if unused:
        raise ValueError(
            f"no image of --data ran {unused[0]}, so it cannot be calibrated; give more, or leave that bucket out."
        )
    return calls


def quantize_onnx(path: Path, calls: Calls) -> None:
    """ONNX Runtime's static quantiser, in place: QDQ, int8 weights per channel, uint8 activations; of products with a weight."""
    quantization: Any = import_or_say("onnxruntime.quantization", "export")
    onnx = import_or_say("onnx", "export")
    graph = onnx.load(path).graph
    names, weights = [each.name for each in graph.input], {each.name for each in graph.initializer}

    rest = (dict(zip(names, inputs, strict=True)) for inputs in calls)
    reader = type("Reader", (quantization.CalibrationDataReader,), {"get_next": lambda self: next(rest, None)})
    source = path.with_suffix(".fp32.onnx")
    path.rename(source)
    quantization.quantize_static(
        str(source),
        str(path),
        reader(),
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        # its own option for that, MatMulConstBOnly, is not heeded for QDQ
        nodes_to_exclude=[
            node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in weights
        ],
    )
    source.unlink()


def quantize_openvino(graph: Any, calls: Calls) -> Any:
    """NNCF's post-training quantisation with its settings for transformers, of products with a weight alone."""
    nncf = import_or_say("nncf", "openvino-int8")
    nncf.set_log_level(40)  # errors
    others = [
        node.get_friendly_name()
        for node in graph.get_ops()
        if node.get_type_name() in ("Convolution", "Gather")  # from pixels to the coarse band; positions
        or (node.get_type_name() == "MatMul" and node.input_value(1).get_node().get_type_name() != "Constant")
    ]
    with redirect_stdout(io.StringIO()):  # progress bars
        return nncf.quantize(
            graph,
            nncf.Dataset(calls),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=others),
        )


def quantize_executorch(module: nn.Module, calls: Calls) -> nn.Module:
    """XNNPACK's quantiser on the linear layers of an exported graph, ranges taken at run time; `calls` run through it once."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    class LinearQuantizer(XNNPACKQuantizer):
        def transform_for_annotation(self, model: Any) -> Any:
            """As it is: the quantiser's own step makes a float of every number that is added, of cells to gather by, too."""
            return model

    quantizer = LinearQuantizer()
    quantizer.set_module_type(nn.Linear, get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    prepared = prepare_pt2e(module, quantizer)
    prepared(*map(torch.from_numpy, calls[0]))
    return convert_pt2e(prepared)
