"""What table a bundle gets: a single graph, which nobody can leave early, gets one without exits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from iret.export.accuracy import HeldOut
from iret.export.points import points_of
from iret.model import Iret
from iret.runtime.cost import Shape, full_macs
from iret.runtime.points import DeviceTable, OperatingPoints, Point
from iret.train.data import ImageData


def make_model(*exits: float | None) -> Iret:
    """12 patches, two stages, 3 classes; a point for each exit confidence, at rising thresholds."""
    shape = Shape(
        img_size=(24, 32), patch_size=8, in_chans=3, num_classes=3, embed_dims=(16, 32), depths=(1, 1), head_dim=16
    )
    torch.manual_seed(0)
    model = Iret(shape).eval()
    torch.nn.init.normal_(model.stages[0].blocks[0].attn.qkv.weight, std=0.3)
    full = full_macs(shape)
    points = []
    for place, confidence in enumerate(exits):
        keep, macs = 0.5 * place, full * (1 - 0.1 * place)
        points.append(
            Point(
                thresholds=((keep, keep),),
                exit_confidence=confidence,
                accuracy=0.4,
                macs_mean=macs,
                macs_p95=macs,
                kept_mean=(12.0, 12.0 - place),
            )
        )
    columns = dict.fromkeys(("ms_mean", "ms_p50", "ms_p95", "joules"), (1.0,) * len(exits))
    device = DeviceTable(
        device="this", **columns, energy_source="none", energy_scope="none", energy_kind="estimated", rounds=1
    )
    model.points = OperatingPoints(
        data="made up", num_images=9, full_macs=full, points=tuple(points), devices=(device,)
    )
    return model


def make_held_out(model: Iret, class_names=("a", "b", "c")) -> HeldOut:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 255, (6, 24, 32, 3), np.uint8)
    data = ImageData(range(6), lambda row: (pixels[row], row % 3), class_names, model.preprocessing, "stop", "val")
    return HeldOut(data, "noise")


@pytest.mark.parametrize("is_single", [False, True])
def test_points_without_exits_and_those_of_stages_stay_as_they_are(is_single):
    model = make_model(None, None, None)
    assert points_of(model, is_single, None, print) is model.points
    staged = make_model(None, 0.9, 0.8)
    assert points_of(staged, False, make_held_out(staged), print) is staged.points
    staged.points = None
    assert points_of(staged, is_single, None, print) is None


def test_a_single_graph_s_thresholds_are_measured_without_exits_where_there_are_images():
    model, said = make_model(None, 0.0, 0.0, 0.0), []
    held_out = make_held_out(model)
    found = points_of(model, True, held_out, said.append)
    assert (found.data, found.num_images, found.full_macs) == ("noise", 6, model.points.full_macs)
    assert found.devices == ()  # those clocks were of runs with exits
    assert all(point.exit_confidence is None for point in found.points)
    assert found.points[0].keeps_all and found.shares[-1] == 1
    assert len(found.points) > 2
    pixels = torch.stack([held_out.data[row][0] for row in range(6)])
    with torch.no_grad():
        out = model.run(model.normalise(pixels.float() / 255), found.points[-1].thresholds)
    assert found.points[-1].macs_mean == out.macs.double().mean()
    assert found.points[-1].kept_mean == tuple(out.trace.kept.sum((2, 3)).double().mean(1).tolist())
    assert found.points[-1].accuracy == (out.logits.argmax(1) == torch.arange(6) % 3).double().mean()
    assert "measuring 4 without exits" in said[0]
    assert model.points.points[-1].exit_confidence == 0  # the model's own stay


@pytest.mark.parametrize("names", [None, ("cat", "dog", "emu"), ("a", "b")], ids=["no images", "other", "fewer"])
def test_without_images_of_its_classes_the_points_without_exits_are_kept(names):
    model, said = make_model(None, None, 0.9, None), []
    model.labels = ("a", "b", "c")
    held_out = None if names is None else make_held_out(model, names)
    found = points_of(model, True, held_out, said.append)
    assert found.points == tuple(model.points.points[place] for place in (0, 1, 3))
    assert found.devices == ()
    assert "1 operating points leave early" in said[0]
    model.points = replace(model.points, points=model.points.points[:3], devices=())
    model.points = replace(model.points, points=(model.points.points[0], model.points.points[2]))
    assert points_of(model, True, held_out, said.append) is None
    assert "takes thresholds; with --data" in said[1]
