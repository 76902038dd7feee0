"""The engines behind one call, played by modules that only note what they are asked. The engines themselves: tests/export."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from iret.runtime import engines
from iret.runtime.engines import LOADERS, check_threads, load_graph

PATH = Path("stage_0")
EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino", "executorch": "executorch"}


class NotedLock:
    """Says whether it is held."""

    is_held = False

    def __enter__(self) -> None:
        assert not NotedLock.is_held
        NotedLock.is_held = True

    def __exit__(self, *error) -> None:
        NotedLock.is_held = False


# ---- any engine


def test_an_unknown_engine_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="engine='tflite' is unknown; choose from onnxruntime, openvino, executorch"):
        load_graph("tflite", PATH)


@pytest.mark.parametrize("engine", LOADERS)
def test_a_missing_engine_names_the_extra_that_brings_it(monkeypatch, engine):
    def fail(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(
        ImportError, match=rf"is not installed here; install it with: pip install 'iret\[{EXTRAS[engine]}\]'"
    ):
        load_graph(engine, PATH)


@pytest.mark.parametrize("threads", [0, -1, True, False, 1.0, "2", float("nan")])
def test_threads_are_a_whole_number_of_one_or_more(threads):
    with pytest.raises(ValueError, match=f"threads={threads!r} must be a whole number, 1 or more; leave it out"):
        check_threads(threads)


@pytest.mark.parametrize("threads", [None, 1, 64])
def test_threads_that_can_be_had_are_taken(threads):
    check_threads(threads)


# ---- ONNX Runtime


def play_onnxruntime(monkeypatch, error: Exception | None = None, is_taken: bool = False) -> tuple[list, list]:
    """What sessions are made with, and the arenas that are registered; `is_taken`: the program has one of its own."""
    noted: list = []
    arenas: list[tuple] = []

    class InferenceSession:
        def __init__(self, path: str, options, providers: list[str]) -> None:
            if error:
                raise error
            assert vars(options)["session.use_env_allocators"] == "1"
            assert not options.enable_mem_pattern
            noted.append((path, options.intra_op_num_threads, options.inter_op_num_threads, providers))

        def get_inputs(self) -> list:
            return [SimpleNamespace(name="x"), SimpleNamespace(name="cell")]

        def run(self, outputs, inputs: dict) -> list:
            assert outputs is None
            return [inputs["x"] + 1, inputs["cell"] * 2]

    class SessionOptions(SimpleNamespace):
        def add_session_config_entry(self, key: str, value: str) -> None:
            setattr(self, key, value)

    def create_and_register_allocator(memory: tuple, config: None) -> None:
        arenas.append(memory)
        if is_taken:
            raise RuntimeError("An allocator for this device has already been registered")

    played = SimpleNamespace(
        SessionOptions=SessionOptions,
        InferenceSession=InferenceSession,
        OrtMemoryInfo=lambda *words: words,
        OrtAllocatorType=SimpleNamespace(ORT_ARENA_ALLOCATOR="arena"),
        OrtMemType=SimpleNamespace(DEFAULT="default"),
        create_and_register_allocator=create_and_register_allocator,
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", played)
    monkeypatch.setattr(engines, "_registered", [])
    return noted, arenas


@pytest.mark.parametrize(("threads", "asked"), [(None, 0), (3, 3)])  # its 0 is "as many as I like"
def test_onnx_runtime_gets_its_threads_and_runs_on_the_cpu(monkeypatch, threads, asked):
    noted, _ = play_onnxruntime(monkeypatch)
    load_graph("onnxruntime", PATH, threads)
    assert noted == [("stage_0", asked, 1, ["CPUExecutionProvider"])]


@pytest.mark.parametrize("is_taken", [False, True])
def test_graphs_of_one_process_share_the_one_arena_that_is_registered(monkeypatch, is_taken):
    noted, arenas = play_onnxruntime(monkeypatch, is_taken=is_taken)
    for _ in range(3):
        load_graph("onnxruntime", PATH)
    assert len(noted) == 3
    assert arenas == [("Cpu", "arena", 0, "default")]


def test_arrays_go_in_in_the_order_of_the_graph_and_none_may_be_missing(monkeypatch):
    play_onnxruntime(monkeypatch)
    graph = load_graph("onnxruntime", PATH)
    assert graph([np.ones(1), np.full(1, 5.0)]) == [[2], [10]]
    with pytest.raises(ValueError):
        graph([np.ones(1)])


def test_what_onnx_runtime_cannot_load_is_said_in_its_first_line(monkeypatch):
    play_onnxruntime(monkeypatch, RuntimeError("\n  bad opset 99 \nat line 7\nat line 8"))
    with pytest.raises(ValueError, match=r"ONNX Runtime cannot load stage_0: bad opset 99$"):
        load_graph("onnxruntime", PATH)


def test_an_engine_that_fails_without_a_word_is_named_by_its_error(monkeypatch):
    play_onnxruntime(monkeypatch, RuntimeError(""))
    with pytest.raises(ValueError, match="cannot load stage_0: RuntimeError"):
        load_graph("onnxruntime", PATH)


# ---- OpenVINO


def play_openvino(monkeypatch, error: Exception | None = None) -> tuple[list, np.ndarray]:
    noted: list = []
    buffer = np.zeros(2, np.float32)  # it writes its answers where the last ones were

    class Request:
        def infer(self, inputs: list, share_inputs: bool) -> dict:
            assert NotedLock.is_held
            buffer[:] = inputs[0]
            return {0: buffer}

    def compile_model(path: str, device: str, config: dict):
        if error:
            raise error
        noted.append((path, device, config))
        return SimpleNamespace(create_infer_request=Request)

    core = SimpleNamespace(compile_model=compile_model)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core))
    monkeypatch.setattr(engines, "Lock", NotedLock)
    return noted, buffer


def test_openvino_computes_in_float32_on_so_many_threads(monkeypatch):
    noted, _ = play_openvino(monkeypatch)
    for threads in (None, 2):
        load_graph("openvino", PATH, threads)
    (_, device, free), (_, _, bound) = noted
    assert device == "CPU"
    assert free["INFERENCE_PRECISION_HINT"] == "f32"
    assert "INFERENCE_NUM_THREADS" not in free
    assert bound == free | {"INFERENCE_NUM_THREADS": 2}


def test_openvino_s_answers_outlive_its_next_call_and_its_calls_take_turns(monkeypatch):
    play_openvino(monkeypatch)
    graph = load_graph("openvino", PATH)
    (first,), (second,) = graph([np.float32([1, 2])]), graph([np.float32([3, 4])])
    assert (first.tolist(), second.tolist()) == ([1, 2], [3, 4])
    assert not NotedLock.is_held


def test_what_openvino_cannot_load_is_said(monkeypatch):
    play_openvino(monkeypatch, RuntimeError("Exception from core.cpp:\nunknown op"))
    with pytest.raises(ValueError, match="OpenVINO cannot load stage_0: Exception from core.cpp:"):
        load_graph("openvino", PATH)


# ---- ExecuTorch


def play_executorch(monkeypatch, error: Exception | None = None) -> list:
    noted: list = []

    class Tensor:
        def __init__(self, array: np.ndarray) -> None:
            assert array.flags.c_contiguous
            self.array = array

        def numpy(self) -> np.ndarray:
            return self.array

    def execute(tensors: list) -> list:
        assert NotedLock.is_held
        return [Tensor(each.array * 2) for each in tensors]

    def load_program(path: Path):
        if error:
            raise error
        return SimpleNamespace(load_method=lambda name: SimpleNamespace(execute=execute))

    runtime = SimpleNamespace(get=lambda: SimpleNamespace(load_program=load_program))
    library = SimpleNamespace(_unsafe_reset_threadpool=noted.append)
    for name, module in (
        ("executorch.runtime", SimpleNamespace(Runtime=runtime)),
        ("executorch.extension.pybindings.portable_lib", library),
        ("torch", SimpleNamespace(from_numpy=Tensor)),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(engines, "Lock", NotedLock)
    return noted


def test_executorch_takes_any_array_in_turn_and_sets_its_threads_where_asked(monkeypatch):
    noted = play_executorch(monkeypatch)
    load_graph("executorch", PATH)
    assert noted == []
    graph = load_graph("executorch", PATH, 3)
    assert noted == [3]
    (found,) = graph([np.arange(6.0).reshape(2, 3).T])
    assert found.tolist() == [[0, 6], [2, 8], [4, 10]]
    assert not NotedLock.is_held


def test_what_executorch_cannot_load_is_said(monkeypatch):
    play_executorch(monkeypatch, RuntimeError("error 0x23"))
    with pytest.raises(ValueError, match="ExecuTorch cannot load stage_0: error 0x23"):
        load_graph("executorch", PATH)
