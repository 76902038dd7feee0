"""Long counts, run by `make soak`: kills at random moments, random bytes as images."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from iret.runtime.preprocess import open_image

sys.path.insert(0, str(Path(__file__).parent / "train"))
from test_loop import environment, losses, run_script, write_images

pytestmark = pytest.mark.soak

NUM_KILLS = 20
NUM_FUZZ = 5000


def test_a_run_killed_at_twenty_random_moments_has_the_losses_of_one_that_was_not(tmp_path: Path) -> None:
    draw = random.Random(0)
    data = write_images(tmp_path / "data")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(run_script(data, whole, "TINY"), env=environment(), check=True, capture_output=True)
    kills = 0
    while kills < NUM_KILLS:
        resume = (broken / "train_state.safetensors").exists()
        victim = subprocess.Popen(
            run_script(data, broken, "TINY", resume=resume), env=environment(), stderr=subprocess.DEVNULL
        )
        try:
            victim.wait(timeout=draw.uniform(3, 12))
            break
        except subprocess.TimeoutExpired:
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            kills += 1
            time.sleep(0.1)
    if (broken / "train_state.safetensors").exists():
        subprocess.run(
            run_script(data, broken, "TINY", resume=True), env=environment(), check=True, capture_output=True
        )
    print(f"{kills} kills")
    assert kills and losses(broken) == losses(whole)


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
    print(f"{refused} of {NUM_FUZZ} refused")
    assert 0 < refused < NUM_FUZZ
