"""What holds of every table of operating points, whatever was tried to find it.

The labels are the model's own answers with everything kept, so dropping costs accuracy as it does on a trained model.
"""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from iret import calibrate as calibrate_module
from iret.calibrate import RATIOS, calibrate
from iret.evaluate import Setting, evaluate
from iret.model import Iret
from iret.runtime.cost import Shape, full_macs
from iret.runtime.points import OperatingPoints
from iret.train.data import ImageData

NUM_IMAGES = 48


def make_model() -> Iret:
    """24 patches of 8 x 8, three stages, 5 classes; attention and answers far from uniform, so that thresholds cut."""
    torch.manual_seed(0)
    shape = Shape(
        img_size=(32, 48),
        patch_size=8,
        in_chans=3,
        num_classes=5,
        embed_dims=(16, 32, 48),
        depths=(1, 1, 1),
        head_dim=16,
    )
    model = Iret(shape).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.weight") or "head" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_data(model: Iret, shift: int = 0) -> ImageData:
    """Images with the model's own answer as label, `shift` classes further."""
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (32, 48, 3)).astype(np.uint8)) for _ in range(NUM_IMAGES)]
    with torch.no_grad():
        answers = model(model.preprocess(images)).argmax(1).tolist()
    rows = [(image, (answer + shift) % 5) for image, answer in zip(images, answers, strict=True)]
    return ImageData(range(NUM_IMAGES), rows.__getitem__, tuple("abcde"), model.preprocessing, "skip")


def shares(table: OperatingPoints) -> list[float]:
    return [point.macs_mean / table.full_macs for point in table.points]


def test_points_go_from_the_whole_model_down():
    model = make_model()
    table = calibrate(model, make_data(model), data_name="mine")
    assert len(table.points) > 4
    assert shares(table) == sorted(shares(table), reverse=True)
    assert len(set(shares(table))) == len(table.points)
    whole = table.points[0]
    assert whole.thresholds == ((0.0, 0.0), (0.0, 0.0))
    assert whole.kept_mean == (24.0, 24.0, 24.0)
    assert whole.accuracy == 1.0
    assert whole.macs_mean == whole.macs_p95 == full_macs(model.shape) + 5 * (16 + 32)  # all heads answer


def test_neighbouring_points_lie_close():
    model = make_model()
    table = calibrate(model, make_data(model), data_name="mine")
    steps = -np.diff(shares(table))
    thresholds = np.diff([point.thresholds[-1][0] for point in table.points])
    assert np.all((steps <= 0.05) | (thresholds <= 0.01))


def test_the_table_says_what_it_was_measured_on_and_survives_its_file():
    model = make_model()
    table = calibrate(model, make_data(model), data_name="mine", max_images=10)
    assert (table.data, table.num_images, table.full_macs) == ("mine", 10, full_macs(model.shape))
    assert OperatingPoints.from_json(table.to_json()) == table


def test_a_measured_point_is_served_exactly_on_the_same_images():
    model = make_model()
    data = make_data(model)
    table = calibrate(model, data, data_name="mine")
    measured = table.points[1:]  # the first is the budget of 1
    settings = [Setting(thresholds=table.thresholds(share)) for share in shares(table)[1:]]
    for point, score in zip(measured, evaluate(model, data, settings), strict=True):
        for part in ("accuracy", "macs_mean", "macs_p95", "kept_mean"):
            assert asdict(score)[part] == asdict(point)[part], part


def test_budgets_between_points_are_met_on_the_same_images():
    model = make_model()
    data = make_data(model)
    table = calibrate(model, data, data_name="mine")
    budgets = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    assert table.cheapest_budget < min(budgets)
    scores = evaluate(model, data, [Setting(thresholds=table.thresholds(budget)) for budget in budgets])
    served = [score.macs_mean / table.full_macs for score in scores]
    assert served == pytest.approx(budgets, abs=0.05)  # cost is not linear in the threshold


def test_a_budget_is_not_overspent_where_a_hair_of_threshold_drops_nearly_everything():
    model = make_model()
    for stage in model.stages:
        for block in stage.blocks:
            block.attn.qkv.weight.data *= 1e-3  # attention so even that no threshold drops half
    data = make_data(model)
    table = calibrate(model, data, data_name="mine")
    assert table.cheapest_budget < 0.5
    (score,) = evaluate(model, data, [Setting(thresholds=table.thresholds(0.5))])
    assert score.macs_mean / table.full_macs < 0.55


def test_thresholds_rise_by_one_ratio_from_the_first_transition_to_the_last():
    model = make_model()
    table = calibrate(model, make_data(model), data_name="mine")
    ratios = {round(point.thresholds[0][0] / point.thresholds[1][0], 6) for point in table.points[1:]}
    assert len(ratios) == 1 and ratios.pop() in RATIOS


def test_the_ratio_is_the_one_that_keeps_most_accuracy(monkeypatch):
    model = make_model()
    monkeypatch.setattr(calibrate_module, "_worth", lambda model, data, ratio, num_images: -abs(ratio - 0.35))
    table = calibrate(model, make_data(model), data_name="mine")
    first, last = (keep for keep, _ in table.points[-1].thresholds)
    assert first / last == pytest.approx(0.35)
