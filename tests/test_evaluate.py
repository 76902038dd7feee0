"""Scores by hand: a model whose every answer and price is typed in, told by the grey value of the image."""

import numpy as np
import pytest
import torch
from PIL import Image

from iret.evaluate import check_classes, evaluate
from iret.model import Iret
from iret.output import Output, Trace
from iret.runtime.cost import Shape, full_macs
from iret.runtime.points import Setting
from iret.train.data import ImageData

NAN = float("nan")
SHAPE = Shape(img_size=(8, 8), patch_size=4, in_chans=3, num_classes=2, embed_dims=(16, 16), depths=(1, 1), head_dim=16)

# Image i is of grey value i. Images 0 and 2 leave after the first stage when asked for a confidence.
LABELS = (0, 1, 1, 0)
FIRST = (0, 1, 0, 0)
SECOND = (1, 1, 0, 0)
LEAVES = (True, False, True, False)
MACS = (100, 200, 100, 400)
SECOND_KEPT = (4, 2, 3, 1)


class Typed(Iret):
    """A model of two stages that says what the tables above say."""

    def run(self, images, thresholds=0.0, exit_confidence=None, **options) -> Output:
        index = ((images[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().long()
        goes_on = torch.tensor([exit_confidence is None or not LEAVES[i] for i in index])
        logits = torch.nn.functional.one_hot(torch.tensor([FIRST, SECOND])[:, index], 2).float()
        logits[1, ~goes_on] = NAN
        kept = torch.zeros(2, len(index), 4, dtype=torch.bool)
        kept[0] = True
        kept[1] = (torch.arange(4) < torch.tensor(SECOND_KEPT)[index, None]) & goes_on[:, None]
        kept = kept.unflatten(2, (2, 2))
        stages = goes_on.long()
        trace = Trace(logits, stages, kept, torch.zeros_like(kept), torch.zeros(1, *kept.shape[1:]))
        return Output(logits[stages, torch.arange(len(index))], torch.tensor(MACS)[index], trace)


def make_data(labels=LABELS, corrupt: tuple[int, ...] = (), names: tuple[str, ...] = ("a", "b")) -> ImageData:
    """One image a label, grey value counting up; those at the places in `corrupt` come on top and cannot be read."""
    rows = [(np.full((8, 8, 3), value, np.uint8), label) for value, label in enumerate(labels)]
    for place in corrupt:
        rows.insert(place, (b"milk, eggs", 0))
    return ImageData(range(len(rows)), rows.__getitem__, names, Iret(SHAPE).preprocessing, "skip")


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_accuracies_and_costs_are_means_over_images_whatever_the_batches(batch_size):
    (score,) = evaluate(Typed(SHAPE), make_data(), [Setting()], batch_size=batch_size)
    assert (score.num_images, score.num_skipped) == (4, 0)
    assert score.accuracy == 0.5  # images 1 and 3
    assert score.stage_accuracy == (0.75, 0.5)
    assert score.macs_mean == 200
    assert score.macs_p95 == pytest.approx(370)  # 0.85 of the way from 200 to 400
    assert score.kept_mean == (4.0, 2.5)


def test_a_stage_answers_for_the_images_that_reached_it():
    (score,) = evaluate(Typed(SHAPE), make_data(), [Setting(exit_confidence=0.9)], batch_size=3)
    assert score.accuracy == 0.75  # all but image 2
    assert score.stage_accuracy == (0.75, 1.0)  # 1 and 3 reached the second
    assert score.kept_mean == (4.0, 0.75)


def test_corrupt_images_are_counted_and_nothing_else():
    expected, score = (
        evaluate(Typed(SHAPE), data, [Setting()], batch_size=2)[0]
        for data in (make_data(), make_data(corrupt=(0, 2, 3, 5)))
    )
    assert (score.num_images, score.num_skipped) == (4, 4)
    assert (score.accuracy, score.macs_mean) == (expected.accuracy, expected.macs_mean)


@pytest.mark.parametrize(("most", "num_images", "accuracy"), [(1, 1, 0.0), (2, 2, 0.5), (3, 3, 1 / 3), (9, 4, 0.5)])
@pytest.mark.parametrize("batch_size", [2, 100])
def test_no_more_images_than_asked_for_are_scored(most, num_images, accuracy, batch_size):
    data = make_data(corrupt=(1,))
    (score,) = evaluate(Typed(SHAPE), data, [Setting()], batch_size=batch_size, max_images=most)
    assert score.num_images == num_images
    assert score.accuracy == pytest.approx(accuracy)


def test_settings_share_one_pass_over_the_data_and_come_back_in_order():
    data, read = make_data(), []
    read_row = data.read
    data.read = lambda row: read.append(row) or read_row(row)
    settings = [Setting(exit_confidence=0.9), Setting(), Setting(thresholds=(1.0,), rule="topk", control="inverse")]
    scores = evaluate(Typed(SHAPE), data, settings)
    assert [score.setting for score in scores] == settings
    assert [score.accuracy for score in scores] == [0.75, 0.5, 0.5]
    assert read == [0, 1, 2, 3]


def test_every_part_of_a_setting_reaches_the_model(monkeypatch):
    model, asked = Typed(SHAPE), []
    run = model.run
    monkeypatch.setattr(model, "run", lambda *args, **options: asked.append((*args[1:], options)) or run(*args))
    evaluate(model, make_data(), [Setting(thresholds=(0.3,), exit_confidence=0.7, rule="mass", control="random")])
    assert asked == [((0.3,), 0.7, dict(rule="mass", control="random"))]


def test_a_real_model_costs_its_closed_form_and_answers_as_it_is_called():
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    model = Iret(SHAPE, drop_path_rate=0.5).train()  # in eval mode nothing is left to chance
    rows = [(Image.fromarray(draw.integers(0, 256, (8, 8, 3)).astype(np.uint8)), index % 2) for index in range(12)]
    data = ImageData(range(12), rows.__getitem__, ("a", "b"), model.preprocessing, "skip")
    (score,) = evaluate(model, data, [Setting()], batch_size=5)
    assert not model.training
    assert score.macs_mean == score.macs_p95 == full_macs(SHAPE) + 16 * 2  # the other head
    assert score.kept_mean == (4.0, 4.0)
    with torch.no_grad():
        right = [model(model.preprocess(image)).argmax().item() == label for image, label in rows]
    assert 0 < sum(right) < 12
    assert score.accuracy == pytest.approx(sum(right) / 12)
    assert score.stage_accuracy[1] == score.accuracy


# ---- refusals


def test_classes_that_mean_something_else_are_refused():
    model = Typed(SHAPE)
    model.labels = ("cat", "dog")
    message = r"data has 2 classes \(a, b, \.\.\.\), the model was trained on 2 \(cat, dog, .*iret train --init"
    with pytest.raises(ValueError, match=message):
        evaluate(model, make_data(), [Setting()])
    check_classes(model, make_data(names=("cat", "dog")))


def test_another_number_of_classes_is_refused_of_a_model_without_labels():
    with pytest.raises(ValueError, match="the data has 3 classes, the model 2"):
        evaluate(Typed(SHAPE), make_data(names=("a", "b", "c")), [Setting()])


def test_data_without_one_readable_image_is_refused():
    with pytest.raises(ValueError, match=r"none of the images could be read \(2 skipped as corrupt\)"):
        evaluate(Typed(SHAPE), make_data(labels=(), corrupt=(0, 0)), [Setting()])


@pytest.mark.parametrize("numbers", [dict(batch_size=0), dict(max_images=0), dict(max_images=-5)])
def test_no_images_at_all_are_refused(numbers):
    with pytest.raises(ValueError, match="must be 1 or more"):
        evaluate(Typed(SHAPE), make_data(), [Setting()], **numbers)
