"""The benchmark's verdict on memory: what it calls growth, and what it does not."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"
BASE, MB = 400_000_000, 1_000_000


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("serve_load", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_load"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["serve_load"]


def judged(bench, resident) -> dict:
    """100 s, 250 images a second; `resident(second)` is seen each second."""
    samples = [bench.Sample("mixed", 1.0, 0.004 * each, 0.004, 200, 1) for each in range(25_000)]
    names = ["budget 1"] * 40 + ["mixed"] * 40 + ["overload"] * 10 + ["mixed, after overload"] * 10
    return bench.judge_memory([(name, float(second), resident(second)) for second, name in enumerate(names)], samples)


def test_noise_and_a_crowd_that_leaves_again_are_no_growth(bench):
    noise = np.random.default_rng(0).integers(-5 * MB, 5 * MB, 100)
    found = judged(bench, lambda second: BASE + int(noise[second]) + (80 * MB if 80 <= second < 90 else 0))
    assert abs(found["growth"]) < 0.02
    assert abs(found["bytes_an_image"]) < 100
    assert found["images"] > bench.ENOUGH


def test_a_leak_of_a_kilobyte_an_image_is_seen(bench):
    found = judged(bench, lambda second: BASE + 1024 * 250 * second)
    assert found["growth"] < bench.GROWTH  # by itself it would pass
    assert found["bytes_an_image"] == pytest.approx(1024, rel=0.01)


def test_what_overload_leaves_behind_is_growth(bench):
    found = judged(bench, lambda second: BASE + (40 * MB if second >= 60 else 0))
    assert found["growth"] == pytest.approx(0.1)
