"""One photo, one answer and its price; thresholds as they are typed."""

import numpy as np
import pytest
import torch
from PIL import Image

from iret import predict as predict_module
from iret.model import Iret
from iret.predict import predict, warm_up
from iret.runtime.cost import Shape, full_macs
from iret.runtime.points import Setting
from iret.runtime.preprocess import open_image


def make_model(seed: int = 0) -> Iret:
    """24 patches of 8 x 8, three stages; attention far from uniform, so that thresholds cut."""
    torch.manual_seed(seed)
    shape = Shape(
        img_size=(32, 48),
        patch_size=8,
        in_chans=3,
        num_classes=3,
        embed_dims=(16, 16, 16),
        depths=(1, 1, 1),
        head_dim=16,
    )
    model = Iret(shape).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.weight") or "head" in name:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def make_photo(rows: int = 32, columns: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (rows, columns, 3)).astype(np.uint8))


@pytest.mark.parametrize(("thresholds", "confidence"), [(0.0, None), (1.0, None), ((0.9, (1.0, 1.4)), 0.5)])
def test_the_answer_is_that_of_a_run_on_the_photo(thresholds, confidence):
    model, photo = make_model(), make_photo(50, 70)
    model.labels = ("ant", "bee", "cat")
    answer, trace = predict(model, photo, setting=Setting(thresholds=thresholds, exit_confidence=confidence))
    with torch.no_grad():
        out = model.run(model.preprocess(photo), thresholds, confidence)
    assert answer.label == model.labels[out.logits.argmax()]
    assert answer.confidence == out.logits.softmax(1).max().item()
    assert answer.kept == tuple(out.trace.kept.sum((1, 2, 3)).tolist())
    assert answer.refined == tuple(out.trace.refined.sum((1, 2, 3)).tolist())
    assert answer.macs == out.macs.item()
    assert torch.equal(trace.kept, out.trace.kept)


def test_the_share_is_of_the_full_model_so_its_other_heads_come_on_top():
    model = make_model()
    answer, _ = predict(model, make_photo())
    assert answer.kept == (24, 24, 24)
    assert answer.refined == (0, 24, 24)
    assert answer.macs_share == 1 + 2 * 16 * 3 / full_macs(model.shape)


def test_the_stage_that_answered_is_numbered_as_in_a_trace_and_those_not_reached_hold_no_patch():
    answer, trace = predict(make_model(), make_photo(), setting=Setting(exit_confidence=0.0))
    assert answer.exit_stage == 0
    assert answer.kept == (24, 0, 0)
    assert trace.stage_logits[1:].isnan().all()
    assert predict(make_model(), make_photo())[0].exit_stage == 2


def test_a_path_and_the_opened_photo_give_the_same_and_a_name_of_their_own(tmp_path):
    model, path = make_model(), tmp_path / "photo.png"
    make_photo(40, 40).save(path)
    from_path, _ = predict(model, str(path))
    opened, _ = predict(model, open_image(path), name="mine")
    assert from_path.image == str(path)
    assert opened.image == "mine"
    assert opened.confidence == from_path.confidence


def test_without_labels_the_class_is_its_number():
    model = make_model()
    answer, _ = predict(model, make_photo())
    with torch.no_grad():
        assert answer.label == str(model(model.preprocess(make_photo())).argmax().item())


def test_the_time_is_that_of_the_model_alone(monkeypatch):
    model, events, clock = make_model(), [], iter([10.0, 10.25])
    run = model.run
    monkeypatch.setattr(model, "run", lambda *args, **kinds: events.append("run") or run(*args, **kinds))
    monkeypatch.setattr(predict_module.time, "perf_counter", lambda: events.append("clock") or next(clock))
    answer, _ = predict(model, make_photo())
    assert events == ["clock", "run", "clock"]
    assert answer.time_s == 0.25


@pytest.mark.parametrize("setting", [Setting(), Setting(thresholds=0.5, exit_confidence=0.1)])
def test_warming_up_ends_with_one_image_at_the_setting_through_all_stages(monkeypatch, setting):
    model, ran, run = make_model(), [], Iret.run
    monkeypatch.setattr(
        model, "run", lambda *args, **kinds: ran.append((args, run(model, *args, **kinds))) or ran[-1][1]
    )
    warm_up(model, setting)
    assert all(images.shape == (1, model.shape.in_chans, *model.shape.img_size) for (images, _), _ in ran)
    assert all(out.trace.exit_stage == 2 for _, out in ran)
    assert ran[-1][0][1] == setting.thresholds
    assert any(out.trace.kept[1].sum() < 24 for _, out in ran)  # what drops is warm as well


def test_what_is_no_photo_is_refused(tmp_path):
    (tmp_path / "notes.jpg").write_text("milk, eggs")
    with pytest.raises(ValueError, match=r"notes\.jpg is not an image"):
        predict(make_model(), str(tmp_path / "notes.jpg"))
