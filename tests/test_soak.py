"""Long counts, run by `make soak`: kills at random moments, random bytes as images."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import iret
from iret.runtime.points import OperatingPoints
from iret.runtime.preprocess import open_image
from iret.train.checkpoint import FILE_NAME
from iret.verbs.dial import SEARCH_NAME

sys.path.insert(0, str(Path(__file__).parent / "train"))
from test_loop import environment, losses, run_script, write_images

pytestmark = pytest.mark.soak

NUM_KILLS = 20
NUM_FUZZ = 5000


def keep(name: str, rows: list[tuple]) -> None:
    """Raw samples into the folder that `make soak` keeps."""
    folder = os.environ.get("IRET_SOAK_OUT")
    if folder:
        (Path(folder) / f"{name}.csv").write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")


def test_a_run_killed_at_twenty_random_moments_has_the_losses_of_one_that_was_not(tmp_path: Path) -> None:
    draw = random.Random(0)
    data = write_images(tmp_path / "data", num_train=400)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(run_script(data, whole, "TINY"), env=environment(), check=True, capture_output=True)
    kills: list[tuple] = [("kill", "steps_logged", "was_saved")]
    while len(kills) <= NUM_KILLS:
        was_saved = (broken / FILE_NAME).exists()
        victim = subprocess.Popen(
            run_script(data, broken, "TINY", resume=was_saved), env=environment(), stderr=subprocess.DEVNULL
        )
        before, deadline = len(losses(broken)), time.monotonic() + 60
        while len(losses(broken)) <= before and time.monotonic() < deadline:  # it starts, and then some
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.5))
        assert victim.poll() is None, "the run ended before it could be killed twenty times"
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        kills.append((len(kills), len(losses(broken)), was_saved))
    keep("kills", kills)
    subprocess.run(run_script(data, broken, "TINY", resume=True), env=environment(), check=True, capture_output=True)
    assert losses(broken) == losses(whole)


def test_a_calibration_killed_at_random_moments_ends_at_the_same_table(tmp_path: Path) -> None:
    draw = random.Random(1)
    data = write_images(tmp_path / "data", num_train=40)
    torch.manual_seed(0)
    model = iret.create_model("iret_pico", num_classes=2, embed_dims=(32, 32, 32), depths=(1, 1, 1))
    for stage in model.stages:
        nn.init.normal_(stage.blocks[0].attn.qkv.weight, std=0.3)  # far from uniform, so that thresholds cut
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        model.save_pretrained(folder)
    command = [sys.executable, "-m", "iret.cli", "calibrate", "--data", str(data), "--trials", "60", "--threads", "1"]
    subprocess.run([*command, str(whole)], env=environment(), check=True, capture_output=True)
    kills: list[tuple] = [("kill", "evaluations_kept")]
    while len(kills) <= NUM_KILLS:
        memory = broken / SEARCH_NAME
        before = memory.stat().st_size if memory.exists() else 0
        victim = subprocess.Popen([*command, str(broken)], env=environment(), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while (not memory.exists() or memory.stat().st_size <= before) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.1))
        assert victim.poll() is None, "the search ended before it could be killed twenty times"
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        kills.append((len(kills), len(memory.read_text().splitlines()) - 1))
    finish = [*command, str(broken)]
    subprocess.run(finish, env=environment(), check=True, capture_output=True)
    started = time.monotonic()  # nothing is left to search: it loads, walks, measures the clock and writes
    subprocess.run(finish, env=environment(), check=True, capture_output=True)
    whole_s = time.monotonic() - started
    for _ in range(NUM_KILLS):
        victim = subprocess.Popen(finish, env=environment(), stderr=subprocess.DEVNULL)
        try:
            victim.wait(draw.uniform(0, 1.1) * whole_s)
        except subprocess.TimeoutExpired:
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        there = OperatingPoints.read(broken)  # the old one or the new one, and whole
        assert there is not None
        kills.append((len(kills), len(memory.read_text().splitlines()) - 1))
    keep("calibration_kills", kills)
    subprocess.run(finish, env=environment(), check=True, capture_output=True)
    tables = [OperatingPoints.read(folder) for folder in (whole, broken)]
    assert tables[0] is not None and tables[1] is not None
    assert tables[0].points == tables[1].points
    assert len(tables[0].points) > 3


def test_the_controller_keeps_its_promises_in_a_thousand_cases_each() -> None:
    file = Path(__file__).parent / "runtime" / "test_controller.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    subprocess.run(command, env=environment() | {"IRET_CASES": "1000"}, check=True)


def test_random_bytes_are_an_image_or_a_sentence(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    photo = (Path(__file__).parents[1] / "src/iret/photos/chelsea.jpg").read_bytes()
    refused = 0
    for _ in range(NUM_FUZZ):
        damaged = bytearray(photo)
        for place in draw.integers(0, len(damaged), draw.integers(1, 40)):
            damaged[place] = draw.integers(256)
        content = bytes(damaged[: draw.integers(1, len(damaged) + 1)])
        try:
            assert open_image(content).mode == "RGB"
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    keep("fuzz", [("damaged", "refused"), (NUM_FUZZ, refused)])
    assert 0 < refused < NUM_FUZZ
