"""The engines a bundle's graphs run on, behind one call: arrays in the graph's order of inputs, arrays out.

Threads may call one graph at the same time; only ONNX Runtime computes their calls side by side. Nothing here knows what a
graph computes. An engine is imported when it is asked for, so a device needs only its own.
"""

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from iret.runtime.pages import on_huge_pages

Graph = Callable[[Sequence[np.ndarray]], list[np.ndarray]]  # what it returns, no later call writes to
# An input of a graph that is joined to others, as `join_openvino` takes it.
Place = np.ndarray | tuple[int, ...] | None


def load_graph(engine: str, path: Path, threads: int | None = None) -> Graph:
    """A graph ready to run on the CPU with so many threads (None: as many as the engine likes).

    Raises:
        ImportError: the engine is not installed; says how to install it.
        ValueError: an engine that is unknown, or that cannot load the file.
    """
    if engine not in LOADERS:
        raise ValueError(f"engine={engine!r} is unknown; choose from {', '.join(LOADERS)}.")
    return LOADERS[engine](path, threads)


def loading(engine: str) -> AbstractContextManager[None]:
    """To load graphs of `engine` in: on ONNX Runtime their weights lie on huge pages afterwards. OpenVINO does not gain by it."""
    return on_huge_pages() if engine == "onnxruntime" else nullcontext()


def check_threads(threads: object) -> None:
    """Raises ValueError for anything but a whole number, 1 or more, or None."""
    if threads is not None and (type(threads) is not int or threads < 1):
        raise ValueError(
            f"threads={threads!r} must be a whole number, 1 or more; leave it out for as many as the engine likes."
        )


def import_or_say(module: str, extra: str) -> Any:
    """The module; an ImportError that names the extra that brings it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed here; install it with: pip install 'iret[{extra}]'") from error


def _load_onnxruntime(path: Path, threads: int | None) -> Graph:
    ort = import_or_say("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    # The stages of a run take their memory from one arena, piece by piece, and so are given what the last one left in the cache.
    # An arena each and a plan of it, the default, take 3 to 4 % longer (docs/LOG.md, 2026-11-26).
    _register_arena(ort)
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.enable_mem_pattern = False
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"ONNX Runtime cannot load {path}: {_first_line(error)}") from error
    names = [each.name for each in session.get_inputs()]

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return session.run(None, dict(zip(names, inputs, strict=True)))

    return run


_register_once = Lock()
_registered: list[Any] = []  # the modules of ONNX Runtime whose sessions share an arena; one, but for tests


def _register_arena(ort: Any) -> None:
    """One arena on the CPU for all sessions that ask for it, as long as the process lives. Another would replace it."""
    with _register_once:
        if ort not in _registered:
            info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
            # Where the program has one, older versions say so; errors here share no base class.
            with suppress(Exception):
                ort.create_and_register_allocator(info, None)
            _registered.append(ort)


def _load_openvino(path: Path, threads: int | None) -> Graph:
    ov = import_or_say("openvino", "openvino")
    try:
        return _compile_openvino(ov, str(path), threads)
    except RuntimeError as error:
        raise ValueError(f"OpenVINO cannot load {path}: {_first_line(error)}") from error


def _compile_openvino(ov: Any, model: Any, threads: int | None) -> Graph:
    """`model`: its path, or the graph itself."""
    # Its CPU plug-in would compute in bf16 where the processor can; the answers must not depend on the machine.
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
    in_turn = Lock()

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        with in_turn:
            found = request.infer(list(inputs), share_inputs=True)
            return [found[place].copy() for place in range(len(found))]  # the next call writes there again

    return run


def join_openvino(paths: Sequence[Path], inputs: Sequence[Sequence[Place]], threads: int | None) -> Graph:
    """Graphs that run one after another as a single one of fixed sizes, which OpenVINO runs faster; it holds the weights again.

    `inputs` of each graph: an array, which it is then always; the shape of what the joined graph is given there, float32; or
    None, the first output of the graph before. It returns the last output of each.
    """
    ov = import_or_say("openvino", "openvino")
    core, given, last, latest = ov.Core(), [], [], None
    for path, places in zip(paths, inputs, strict=True):
        model = core.read_model(str(path))
        for parameter, place in zip(model.get_parameters(), places, strict=True):
            if isinstance(place, tuple):
                parameter.set_partial_shape(ov.PartialShape(place))
                given.append(parameter)
            else:
                source = latest if place is None else ov.opset13.constant(place).output(0)
                parameter.output(0).replace(source)
        results = model.get_results()
        latest = results[0].input_value(0)
        last.append(results[-1].input_value(0))
    joined = ov.Model([ov.opset13.result(output) for output in last], given)
    joined.validate_nodes_and_infer_types()
    return _compile_openvino(ov, joined, threads)


def _load_executorch(path: Path, threads: int | None) -> Graph:
    """Its Python binding speaks torch tensors, and so brings torch; on a device it is called from C++, Java or Swift."""
    runtime = import_or_say("executorch.runtime", "executorch").Runtime.get()
    torch = importlib.import_module("torch")
    if threads:
        importlib.import_module("executorch.extension.pybindings.portable_lib")._unsafe_reset_threadpool(threads)
    try:
        method = runtime.load_program(path).load_method("forward")
    except RuntimeError as error:
        raise ValueError(f"ExecuTorch cannot load {path}: {_first_line(error)}") from error
    in_turn = Lock()

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        tensors = [torch.from_numpy(np.ascontiguousarray(each)) for each in inputs]
        with in_turn:
            return [each.numpy() for each in method.execute(tensors)]

    return run


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


LOADERS: dict[str, Callable[[Path, int | None], Graph]] = {
    "onnxruntime": _load_onnxruntime,
    "openvino": _load_openvino,
    "executorch": _load_executorch,
}

# Engines on which graphs that run one after another are faster as one of fixed sizes.
JOINERS = {"openvino": join_openvino}
