"""The state of a run comes back bit for bit, survives a full disk, and is refused where it does not belong."""

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from iret.train.checkpoint import FILE_NAME, FORMAT, Progress, load_state, save_state
from iret.train.recipe import Recipe
from iret.weights import write_weights

RECIPE = Recipe(name="small", model="iret_pico", epochs=1.0, batch_size=4, lr=0.1)
PROGRESS = Progress(step=3, time_s=12.5, skipped=2, seed=7)


class Run:
    """A model of one layer with its running mean and optimiser."""

    def __init__(self, seed: int, width: int = 2) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(3, width)
        self.ema = copy.deepcopy(self.model)
        groups = [{"params": [self.model.weight], "weight_decay": 0.5}, {"params": [self.model.bias]}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.1)

    def step(self, num_steps: int) -> None:
        for step in range(num_steps):
            self.model(torch.tensor([[1.0, -2.0, 0.5 * step]])).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            with torch.no_grad():
                for mean, weight in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                    mean.lerp_(weight, 0.5)

    def save(self, folder: Path, recipe: Recipe = RECIPE, progress: Progress = PROGRESS) -> None:
        save_state(folder, self.model, self.ema, self.optimizer, recipe, progress)

    def load(self, folder: Path, recipe: Recipe = RECIPE, seed: int = PROGRESS.seed) -> Progress:
        return load_state(folder, self.model, self.ema, self.optimizer, recipe, seed)

    def weights(self) -> list[list]:
        return [tensor.tolist() for part in (self.model, self.ema) for tensor in part.state_dict().values()]


def test_model_mean_optimiser_and_progress_come_back(tmp_path):
    run, again = Run(0), Run(1)
    run.step(3)
    run.save(tmp_path)
    assert os.listdir(tmp_path) == [FILE_NAME]
    assert again.load(tmp_path) == PROGRESS
    assert again.weights() == run.weights()
    for mine, theirs in zip(again.model.parameters(), run.model.parameters(), strict=True):
        found, saved = again.optimizer.state[mine], run.optimizer.state[theirs]
        assert found.keys() == saved.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(found[slot], saved[slot]) for slot in saved)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole, first, second = Run(0), Run(0), Run(1)
    whole.step(3)
    first.step(3)
    first.save(tmp_path)
    second.load(tmp_path)
    whole.step(2)
    second.step(2)
    assert second.weights() == whole.weights()


def test_a_state_before_the_first_step_has_no_optimiser_to_bring_back(tmp_path):
    run, again = Run(0), Run(1)
    run.save(tmp_path, progress=Progress())
    assert again.load(tmp_path, seed=0) == Progress()
    assert not again.optimizer.state
    assert again.weights() == run.weights()


def test_a_full_disk_leaves_the_old_state_whole(tmp_path, monkeypatch):
    run = Run(0)
    run.save(tmp_path)
    saved = run.weights()
    run.step(1)

    def refuse(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("iret.weights.os.fsync", refuse)
        with pytest.raises(OSError, match="No space left on device"):
            run.save(tmp_path, progress=replace(PROGRESS, step=4))
    assert os.listdir(tmp_path) == [FILE_NAME]
    again = Run(1)
    assert again.load(tmp_path) == PROGRESS
    assert again.weights() == saved


# ---- refusals


def test_nothing_to_resume_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{FILE_NAME} does not exist, so there is nothing to resume; leave out --res"):
        Run(0).load(tmp_path)


@pytest.mark.parametrize("kept_bytes", [0, 100, -1])
def test_a_truncated_state_is_refused(tmp_path, kept_bytes):
    Run(0).save(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ValueError, match=r"is not a whole training state \(.*\); start again without --resume"):
        Run(0).load(tmp_path)


def test_a_state_from_before_recipes_said_how_often_to_look_at_held_out_images_goes_on(tmp_path):
    Run(0).save(tmp_path)
    path = tmp_path / FILE_NAME
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    old = json.loads(metadata["recipe"])
    del old["eval_epochs"]
    write_weights(path, tensors, metadata | {"recipe": json.dumps(old)})
    Run(1).load(tmp_path)


@pytest.mark.parametrize("metadata", [{"format": FORMAT + "0"}, {"format": "pt"}, {"by": "hand"}])
def test_a_state_of_another_format_is_refused(tmp_path, metadata):
    write_weights(tmp_path / FILE_NAME, Run(0).model.state_dict(), metadata)
    with pytest.raises(ValueError, match="was written by another version of iret; start again without --resume"):
        Run(0).load(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "seed", "message"),
    [
        (replace(RECIPE, lr=0.2), 7, "belongs to another run: its lr is 0.1, now 0.2; resume with the same recipe or"),
        (replace(RECIPE, name="other"), 7, "its name is 'small', now 'other'"),
        (replace(RECIPE, betas=(0.8, 0.999)), 7, r"its betas is \[0.9, 0.999\], now \[0.8, 0.999\]"),
        (RECIPE, 8, "its seed is 7, now 8"),
    ],
)
def test_a_state_of_another_run_is_refused_and_nothing_is_loaded(tmp_path, recipe, seed, message):
    Run(0).save(tmp_path)
    other = Run(1)
    before = other.weights()
    with pytest.raises(ValueError, match=message):
        other.load(tmp_path, recipe, seed)
    assert other.weights() == before


def test_a_state_of_another_model_is_refused(tmp_path):
    Run(0, width=4).save(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{FILE_NAME} belongs to another model: bias is \(4,\), this one needs \(2,\)"
    ):
        Run(0).load(tmp_path)
