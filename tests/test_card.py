"""The model card: figures from scores typed by hand, and the whole card of a small model."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from iret import card
from iret.card import write_card
from iret.evaluate import Score
from iret.model import Iret
from iret.runtime.cost import Shape, full_macs
from iret.runtime.points import OperatingPoints, Point
from iret.train.checkpoint import Progress, save_state
from iret.train.data import ImageData
from iret.train.recipe import find_recipe

SHAPE = Shape(
    img_size=(16, 16), patch_size=4, in_chans=3, num_classes=2, embed_dims=(16, 16), depths=(1, 1), head_dim=16
)


def make_model(*shares: float) -> Iret:
    """With operating points at these shares of its MACs, the first one whole."""
    torch.manual_seed(0)
    model = Iret(SHAPE, name="small").eval()
    full = full_macs(SHAPE)
    points = tuple(
        Point(
            thresholds=((1 - share, 1 - share),),
            accuracy=share,
            macs_mean=share * full,
            macs_p95=share * full,
            kept_mean=(16.0, 8.0),
        )
        for share in shares
    )
    model.points = OperatingPoints(data="mine", num_images=1, full_macs=full, points=points) if points else None
    return model


def make_data(count: int = 6, split: str = "test") -> ImageData:
    draw = np.random.default_rng(0)
    rows = [(draw.integers(0, 256, (16, 16, 3)).astype(np.uint8), index % 2) for index in range(count)]
    return ImageData(range(count), rows.__getitem__, ("a", "b"), Iret(SHAPE).preprocessing, "skip", split)


def write(model: Iret, folder: Path, data_name: str = "mine", **options) -> str:
    return write_card(model, "Title", folder, make_data(), data_name, **options)


def test_a_validation_split_is_not_called_a_test(tmp_path):
    model = make_model(1.0, 0.5)
    text = write_card(model, "Title", tmp_path, make_data(split="val"), "mine")
    assert "6 val images, all rows from these weights; thresholds found on the same images, so no test." in text


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")][2:]


def test_the_card_has_its_head_its_sections_and_only_lines_that_end(tmp_path):
    text = write(make_model(1.001, 0.2), tmp_path)
    assert re.match(r"---\nlibrary_name: iret\nlicense: apache-2.0\npipeline_tag: \S+\n---\n# Title\n\n`small` ", text)
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == [
        "Accuracy and cost",
        "Is it the attention?",
        "Training",
        "Terms of the data",
    ]
    assert f"{full_macs(SHAPE):,} MACs at full budget" in text
    assert f"{sum(p.numel() for p in Iret(SHAPE).parameters()):,} parameters" in text
    assert "6 test images" in text
    assert text.endswith("\n")


def test_the_card_of_a_narrowed_model_says_so(tmp_path):
    shape = replace(SHAPE, mlp_ratio=1.5)
    text = write(Iret(shape, name="small").eval(), tmp_path)
    assert (
        f"{full_macs(shape):,} MACs at full budget, its MLPs 1.5 times as wide as their tokens in place of 4." in text
    )
    for ratio in (4, 6):
        assert "MLPs" not in write(Iret(replace(SHAPE, mlp_ratio=ratio), name="small").eval(), tmp_path)


def test_no_more_images_than_asked_for_are_measured(tmp_path):
    assert "4 test images" in write(make_model(1.001, 0.2), tmp_path, max_images=4)


@pytest.mark.parametrize(
    ("shares", "budgets"),
    [((1.001, 0.2), ["1", "0.75", "0.5", "0.35", "0.25"]), ((1.001, 0.35), ["1", "0.75", "0.5", "0.35"])],
)
def test_budgets_below_the_cheapest_point_are_left_out(tmp_path, shares, budgets):
    assert [row[0] for row in rows(write(make_model(*shares), tmp_path), "Accuracy and cost")] == budgets


@pytest.mark.parametrize("shares", [(), (1.001,)])
def test_a_model_that_serves_the_full_budget_alone_gets_a_card_of_that(tmp_path, shares):
    # The full run costs a little over 1, because its other heads answer too.
    text = write(make_model(*shares), tmp_path)
    assert [row[0] for row in rows(text, "Accuracy and cost")] == ["1"]
    assert ("no operating points were found yet" in text, "thresholds found on" in text) == (not shares, bool(shares))


def test_the_table_says_which_images_a_head_is_judged_on(tmp_path):
    text = write(make_model(1.001, 0.5), tmp_path)
    assert (
        "| budget | top-1 | of full MACs | patches a stage | each head, of the images that got there |\n|---|" in text
    )


def test_figures_are_those_of_the_scores(tmp_path, monkeypatch):
    random_accuracies = iter([0.5, 0.7, 0.6] * 3)  # three seeds for each of three shares
    seeds = []

    def typed(model, data, settings, *, max_images):
        scores = []
        for setting in settings:
            is_random = setting.control == "random"
            seeds.extend([torch.initial_seed()] if is_random else [])
            accuracy = next(random_accuracies) if is_random else 0.8 if setting.rule == "topk" else 0.912
            scores.append(
                Score(
                    setting=setting,
                    num_images=123,
                    num_skipped=0,
                    accuracy=accuracy,
                    stage_accuracy=(0.5, accuracy),
                    macs_mean=0.49 * full_macs(SHAPE),
                    macs_p95=0.0,
                    kept_mean=(16.0, 7.5 if setting.rule == "threshold" else 16 * (1 - setting.thresholds[0])),
                    time_s=0.0,
                )
            )
        return scores

    monkeypatch.setattr(card, "evaluate", typed)
    text = write(make_model(1.001, 0.5), tmp_path)
    assert rows(text, "Accuracy and cost")[2] == ["0.5", "91.20%", "49.0%", "16.0 / 7.5", "50.0 / 91.2"]
    assert rows(text, "Is it the attention?") == [
        [kept, "80.00%", "60.00% (50.00% to 70.00%)", "+20.00"] for kept in ("16 / 11", "16 / 8", "16 / 5")
    ]
    assert seeds == [0, 1, 2] * 3


def test_the_comparison_with_chance_keeps_the_same_number_in_every_image(tmp_path):
    kept = [row[0] for row in rows(write(make_model(1.001, 0.5), tmp_path), "Is it the attention?")]
    assert kept == ["16 / 12", "16 / 8", "16 / 5"]  # 0.7 of 16 is 11.2, 0.3 of it 4.8, rounded up


def test_a_card_is_the_same_when_it_is_written_again(tmp_path):
    model = make_model(1.001, 0.2)
    assert write(model, tmp_path) == write(model, tmp_path)


def test_training_is_told_from_the_state_beside_the_weights(tmp_path):
    model = make_model(1.001, 0.5)
    assert "No training state lies beside these weights." in write(model, tmp_path)
    recipe = replace(find_recipe("digits_nano"), lr=0.125)
    optimizer = torch.optim.AdamW(model.parameters())
    save_state(tmp_path, model, copy.deepcopy(model), optimizer, recipe, Progress(step=1200, time_s=930.0, seed=7))
    told = write(model, tmp_path).split("## Training\n\n")[1].split("\n\n")[0]
    assert told.startswith("Recipe `digits_nano`, seed 7: 1200 steps in 16 minutes (model=iret_nano, ")
    assert "lr=0.125" in told
    assert "name=" not in told


@pytest.mark.parametrize(
    ("data_name", "terms"),
    [("cifar10", "CIFAR-10 (JPEG)"), ("cluttered-digits", "UCI data set"), ("mine", "Not known to this package")],
)
def test_terms_of_the_data_are_told_where_they_are_known(tmp_path, data_name, terms):
    text = write(make_model(1.001, 0.5), tmp_path, data_name)
    assert terms in text.split("## Terms of the data\n")[1]
    assert f"2 classes of {data_name}:" in text


def test_a_static_model_trained_beside_it_is_named(tmp_path):
    assert "without a dial" not in write(make_model(1.0, 0.5), tmp_path)
    found = {
        "macs": 146_500_000,
        "embed_dim": 136,
        "minutes": 124.0,
        "steps": 14_900,
        "epochs": 20.11,
        "test_top1": 0.7123,
    }
    (tmp_path / card.STATIC_NAME).write_text(json.dumps(found))
    text = write(make_model(1.0, 0.5), tmp_path)
    assert "146.5 M MACs at any image (width 136, as many blocks)" in text
    assert "own steps take there: 14,900 steps (20.1 epochs), 71.23%" in text


def test_a_static_model_of_as_many_epochs_names_no_minutes(tmp_path):
    found = {"macs": 1, "embed_dim": 4, "minutes": None, "steps": 3431, "epochs": 72.3, "test_top1": 0.5}
    (tmp_path / card.STATIC_NAME).write_text(json.dumps(found))
    assert "on the same images for 3,431 steps (72.3 epochs), 50.00%" in write(make_model(1.0, 0.5), tmp_path)
