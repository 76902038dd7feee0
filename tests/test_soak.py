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

from iret.runtime.preprocess import open_image
from iret.train.checkpoint import FILE_NAME

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
