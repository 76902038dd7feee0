"""The shipped models: whole, small, calibrated, and better for their attention. The science control of the spec (b.6, 12)."""

import json
from dataclasses import replace

import pytest
import torch

import iret
from iret.evaluate import evaluate
from iret.presets import CHECKPOINTS, list_checkpoints
from iret.runtime.points import Setting
from iret.train.data import open_data

DIGITS = "iret_nano-cluttered-digits"
NUM_IMAGES = 400


def test_both_models_are_shipped() -> None:
    assert list_checkpoints() == [DIGITS, "iret_pico-cifar10"]


@pytest.mark.parametrize("name", list_checkpoints())
def test_a_shipped_model_is_small_has_a_card_and_serves_a_quarter_of_its_macs(name: str) -> None:
    folder = CHECKPOINTS / name
    assert (folder / "model.safetensors").stat().st_size < 9_000_000
    card = (folder / "README.md").read_text()
    assert all(
        f"## {part}" in card for part in ("Accuracy and cost", "Is it the attention?", "Training", "Terms of the data")
    )
    assert (
        json.loads((folder / "recipe.json").read_text())["model"]
        == json.loads((folder / "config.json").read_text())["name"]
    )
    model = iret.load(name)
    assert not model.training and model.labels is not None and len(model.labels) == model.num_classes
    assert model.points is not None and model.points.cheapest_budget <= 0.25
    assert model.points.points[0].thresholds == ((0.0, 0.0), (0.0, 0.0))


@pytest.mark.parametrize("name", list_checkpoints())
def test_the_card_of_a_shipped_model_has_attention_ahead_of_chance(name: str) -> None:
    # Of the photo model only the card can say it: its data are not in the repository.
    control = (CHECKPOINTS / name / "README.md").read_text().split("## Is it the attention?")[1].split("## ")[0]
    gains = [float(row.split("|")[4]) for row in control.splitlines() if row.startswith("| 64")]
    assert len(gains) == 3 and min(gains) > 0


def test_half_the_macs_cost_the_digits_model_at_most_half_a_point() -> None:
    model = iret.load(DIGITS)
    data = open_data("cluttered-digits", "test", model.preprocessing)
    full, half = evaluate(model, data, [Setting(), model.setting(0.5)])
    assert full.num_images == 2000 and half.accuracy >= full.accuracy - 0.005


def test_on_digits_attention_beats_random_and_random_beats_inverse_at_equal_counts() -> None:
    model = iret.load(DIGITS)
    data = open_data("cluttered-digits", "test", model.preprocessing)
    attention = Setting(thresholds=(0.5, 0.5), rule="topk")
    inverse = replace(attention, control="inverse")
    chosen, upside_down = evaluate(model, data, [attention, inverse], max_images=NUM_IMAGES)
    for seed in range(3):
        torch.manual_seed(seed)
        (drawn,) = evaluate(model, data, [replace(attention, control="random")], max_images=NUM_IMAGES)
        assert drawn.kept_mean == chosen.kept_mean == upside_down.kept_mean
        assert chosen.accuracy > drawn.accuracy > upside_down.accuracy


def test_on_digits_details_for_chosen_patches_beat_coarse_bands_alone() -> None:
    model = iret.load(DIGITS)
    data = open_data("cluttered-digits", "test", model.preprocessing)
    refining = Setting(thresholds=((1.0, 1.0), (1.0, 1.0)))
    coarse = Setting(thresholds=((1.0, 1000.0), (1.0, 1000.0)))
    with_details, without = evaluate(model, data, [refining, coarse], max_images=NUM_IMAGES)
    assert with_details.accuracy > without.accuracy


def test_a_budget_on_digits_is_met_in_the_mean() -> None:
    model = iret.load(DIGITS)
    data = open_data("cluttered-digits", "test", model.preprocessing)
    budgets = (0.75, 0.5, 0.35)
    scores = evaluate(model, data, [model.setting(budget) for budget in budgets], max_images=NUM_IMAGES)
    assert model.points is not None
    for budget, score in zip(budgets, scores, strict=True):
        # 400 images: the mean of their MACs scatters by about a hundredth of itself
        assert score.macs_mean / model.points.full_macs == pytest.approx(budget, rel=0.05)
