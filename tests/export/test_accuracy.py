"""What int8 costs is measured on images that calibration has not seen, and the sums are right."""

import numpy as np
import pytest
import torch

from iret.export import accuracy
from iret.export.accuracy import HeldOut, judge, settings_judged, split
from iret.model import Iret
from iret.runtime.cost import Shape, full_macs
from iret.runtime.points import OperatingPoints, Point
from iret.runtime.record import Output as SessionOutput, Trace
from iret.runtime.session import Session
from iret.train.data import ImageData


def make_model() -> Iret:
    """12 patches, two stages, 3 classes."""
    shape = Shape(
        img_size=(24, 32), patch_size=8, in_chans=3, num_classes=3, embed_dims=(16, 32), depths=(1, 1), head_dim=16
    )
    torch.manual_seed(0)
    return Iret(shape).eval()


def make_data(model: Iret, count: int, class_names=("a", "b", "c")) -> ImageData:
    """Image i is of one grey, and its label is i mod 3."""

    def read(row: int):
        return np.full((24, 32, 3), row, np.uint8), row % 3

    return ImageData(range(count), read, class_names, model.preprocessing, "stop", "val")


@pytest.mark.parametrize(("count", "seen", "held_out"), [(100, 10, 20), (25, 10, 15), (15, 7, 8), (2, 1, 1)])
def test_no_image_is_calibrated_on_and_judged_on(count, seen, held_out):
    data = make_data(make_model(), count)
    first, second = split(data, 10, 20)
    assert (len(first), len(second)) == (seen, held_out)
    rows = [*first.rows, *second.rows]
    assert len(set(rows)) == len(rows) and set(rows) <= set(range(count))
    assert first[0] is not None and first.class_names == data.class_names
    assert sorted(first.rows) != sorted(split(data, 10, 20, seed=1)[0].rows) or count < 15  # drawn, not the first ones


def test_without_judging_all_images_are_checked_on():
    first, second = split(make_data(make_model(), 15), 10, 0)
    assert (len(first), len(second)) == (10, 0)


class Replay(Session):
    """The model as a session, but for the images in `changed`: another answer, and one patch less in the last stage."""

    points = None

    def __init__(self, model: Iret, changed: set[int], rows: list[int]) -> None:
        self.model, self.changed, self.rows = model, changed, iter(rows)

    def __call__(self, images, thresholds, exit_confidence):
        out = self.model.run(torch.from_numpy(images), thresholds, exit_confidence)
        logits, kept = out.logits.numpy().copy(), out.trace.kept.numpy().copy()
        for place in range(len(images)):
            if next(self.rows) in self.changed:
                logits[place] = np.roll(logits[place], 1)
                kept[-1, place, 0, 0] = False
        trace = Trace(out.trace.stage_logits.numpy(), out.trace.exit_stage.numpy(), kept, kept, np.zeros(0))
        return SessionOutput(logits, out.macs.numpy, lambda: trace, 0.0, 0.0)


def test_top_1_agreement_and_the_paired_interval_are_those_of_the_images(monkeypatch):
    model = make_model()
    monkeypatch.setattr(accuracy, "LOWER_THRESHOLDS", ())
    data, changed = make_data(model, 20), {1, 5, 18}
    with torch.no_grad():
        pixels = torch.stack([data[row][0] for row in range(20)])
        answers = model(model.normalise(pixels.float() / 255)).argmax(1).numpy()
    labels = np.arange(20) % 3
    found = np.array([(each + 1) % 3 if row in changed else each for row, each in enumerate(answers)])
    (row,) = judge(model, Replay(model, changed, list(range(20))), HeldOut(data, "grey"))
    gain = (found == labels).astype(float) - (answers == labels)
    assert (row.setting, row.images) == ("thresholds 0", 20)
    assert (row.model, row.bundle) == ((answers == labels).mean(), (found == labels).mean())
    assert row.interval == pytest.approx(1.96 * gain.std() / 20**0.5)
    assert row.same_answer == pytest.approx(17 / 20)
    assert row.same_cells == pytest.approx((20 * 12 - 3) / (20 * 12))


def test_labels_of_other_classes_count_for_nothing_and_agreement_is_still_told():
    model = make_model()
    model.labels = ("cat", "dog", "emu")
    rows = judge(model, Replay(model, set(), [0, 1] * 3), HeldOut(make_data(model, 2), "grey"))
    assert [row.setting for row in rows] == ["thresholds 0", "thresholds 0.8", "thresholds 1"]
    assert all((row.model, row.bundle, row.interval) == (None, None, None) for row in rows)
    assert all((row.same_answer, row.same_cells) == (1, 1) for row in rows)


def test_images_that_cannot_be_read_give_no_rows():
    model = make_model()
    data = ImageData([0], lambda row: (b"", 0), ("a", "b", "c"), model.preprocessing, "skip", "val")
    assert judge(model, Replay(model, set(), []), HeldOut(data, "broken")) == ()


def test_the_full_budget_and_two_below_are_judged_down_to_the_cheapest_point():
    full = full_macs(make_model().shape)

    def table(*shares: float) -> OperatingPoints:
        points = [
            Point(
                thresholds=((1 - s, 1 - s),), accuracy=0.5, macs_mean=s * full, macs_p95=s * full, kept_mean=(12.0, 6.0)
            )
            for s in shares
        ]
        return OperatingPoints(data="made up", num_images=9, full_macs=full, points=tuple(points))

    assert [*settings_judged(table(1.0, 0.6, 0.2), 1)] == ["budget 1.00", "budget 0.50", "budget 0.25"]
    assert [*settings_judged(table(1.0, 0.4), 1)] == ["budget 1.00", "budget 0.50", "budget 0.40"]
    assert [*settings_judged(table(1.0, 0.9), 1)] == ["budget 1.00", "budget 0.90"]
