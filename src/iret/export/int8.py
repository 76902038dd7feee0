"""A bundle's graphs in int8, by each engine's own quantiser: weights per channel, activations by ranges seen in calibration.

Only products with a weight are quantised; attention between tokens, norms and the choice stay in fp32. Calibrated on what the
stages really got: the fp32 bundle runs the calibration images at several budgets, and every graph's inputs are recorded.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iret.runtime.engines import Graph, import_or_say, load_graph
from iret.runtime.session import Session

MAX_CALLS = 64  # a graph is calibrated on at most so many

Calls = list[Sequence[np.ndarray]]


def record_inputs(folder: Path, images: np.ndarray, settings: Sequence[tuple[object, object]]) -> dict[str, Calls]:
    """What every graph of the fp32 bundle in `folder` is given on `images`, one at a time, at each (thresholds, exits)."""
    calls: dict[str, Calls] = {}

    def load(engine: str, path: Path, threads: int | None) -> Graph:
        graph, seen = load_graph(engine, path, threads), calls.setdefault(path.name, [])

        def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
            seen.append([each.copy() for each in inputs])
            return graph(inputs)

        return run

    session = Session(folder, load=load)
    for row in range(len(images)):
        for thresholds, exits in settings:
            session(images[row, None], thresholds=thresholds, exit_confidence=exits)
    unused = [name for name, seen in calls.items() if not seen]
    if unused:
        raise ValueError(
            f"no image of --data ran {unused[0]}, so it cannot be calibrated; give more, or leave that bucket out."
        )
    draw = random.Random(0)
    return {name: draw.sample(seen, min(len(seen), MAX_CALLS)) for name, seen in calls.items()}


def quantize_onnx(path: Path, calls: Calls) -> None:
    """ONNX Runtime's static quantiser, in place: QDQ, int8 weights per channel, uint8 activations."""
    quantization: Any = import_or_say("onnxruntime.quantization", "export")
    onnx = import_or_say("onnx", "export")
    names = [each.name for each in onnx.load(path).graph.input]

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
        extra_options={"MatMulConstBOnly": True},
    )
    source.unlink()


def quantize_openvino(graph: Any, calls: Calls) -> Any:
    """NNCF's post-training quantisation with its settings for transformers."""
    nncf = import_or_say("nncf", "openvino-int8")
    nncf.set_log_level(40)  # errors
    return nncf.quantize(graph, nncf.Dataset(calls), model_type=nncf.ModelType.TRANSFORMER)
