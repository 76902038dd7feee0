"""What holds of every table of operating points, whatever was tried to find it.

The labels are the model's own answers with everything kept, so dropping costs accuracy as it does on a trained model.
"""

import contextlib
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from iret import calibrate as calibrate_module
from iret.calibrate import (
    FIRST_TRIALS,
    LEAST_CONFIDENCE,
    NUM_PLANS,
    Course,
    Memory,
    calibrate,
    explain_noise,
    fingerprint,
    keep_clocks,
    read_memory,
)
from iret.evaluate import evaluate
from iret.model import Iret
from iret.precision import prepare
from iret.runtime.cost import Shape, full_macs, plan_macs
from iret.runtime.points import DeviceTable, OperatingPoints, Plan, Point, Setting
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


@pytest.fixture(scope="module")
def table() -> OperatingPoints:
    """Of the model and its images; many a property is one of every table."""
    model = make_model()
    return calibrate(model, make_data(model), data_name="mine", trials=1)


def shares(table: OperatingPoints) -> list[float]:
    return [point.macs_mean / table.full_macs for point in table.points]


def test_points_go_from_the_whole_model_down(table):
    assert len(table.points) > 4
    assert shares(table) == sorted(shares(table), reverse=True)
    assert len(set(shares(table))) == len(table.points)
    whole = table.points[0]
    assert whole.thresholds == ((0.0, 0.0), (0.0, 0.0))
    assert whole.kept_mean == (24.0, 24.0, 24.0)
    assert whole.accuracy == 1.0
    assert whole.macs_mean == whole.macs_p95 == full_macs(make_model().shape) + 5 * (16 + 32)  # all heads answer


def test_neighbouring_points_lie_close(table):
    dearer, cheaper = np.array(shares(table)[:-1]), np.array(shares(table)[1:])
    thresholds = np.diff([point.thresholds[-1][0] for point in table.points])
    assert np.all(((dearer - cheaper <= 0.05) & (dearer <= 1.12 * cheaper)) | (thresholds <= 0.01))


def test_the_table_says_what_it_was_measured_on_and_survives_its_file():
    model = make_model()
    table = calibrate(model, make_data(model), data_name="mine", max_images=10)
    assert (table.data, table.num_images, table.full_macs) == ("mine", 10, full_macs(model.shape))
    assert OperatingPoints.from_json(table.to_json()) == table


def test_a_measured_point_is_served_exactly_on_the_same_images(table):
    model = make_model()
    data = make_data(model)
    measured = table.points[1:]  # the first is the budget of 1
    settings = [table.setting(share) for share in shares(table)[1:]]
    for point, score in zip(measured, evaluate(model, data, settings), strict=True):
        for part in ("accuracy", "macs_mean", "macs_p95", "kept_mean"):
            assert asdict(score)[part] == asdict(point)[part], part


def test_budgets_between_points_are_met_on_the_same_images(table):
    model = make_model()
    data = make_data(model)
    budgets = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    assert table.cheapest_budget < min(budgets)
    scores = evaluate(model, data, [table.setting(budget) for budget in budgets])
    served = [score.macs_mean / table.full_macs for score in scores]
    assert served == pytest.approx(budgets, rel=0.03)  # cost is not linear in the threshold


def test_a_budget_is_not_overspent_where_a_hair_of_threshold_drops_nearly_everything():
    model = make_model()
    for stage in model.stages:
        for block in stage.blocks:
            block.attn.qkv.weight.data *= 1e-3  # attention so even that no threshold drops half
    data = make_data(model)
    table = calibrate(model, data, data_name="mine", trials=1)
    assert table.cheapest_budget < 0.5
    (score,) = evaluate(model, data, [table.setting(0.5)])
    assert score.macs_mean / table.full_macs < 0.55


# ---- the course


def test_thresholds_rise_geometrically_and_refine_follows_keep():
    course = Course(ratio=0.25, refine=2.0)
    assert course.thresholds(2.0, 3) == (
        pytest.approx((0.5, 1.0)),
        pytest.approx((1.0, 2.0)),
        pytest.approx((2.0, 4.0)),
    )
    assert course.thresholds(2.0, 1) == (pytest.approx((0.5, 1.0)),)
    assert course.thresholds(0.0, 2) == ((0.0, 0.0), (0.0, 0.0))


def test_the_exit_confidence_falls_from_one_to_its_floor():
    course = Course(ratio=1.0, refine=1.0, slope=0.2)
    assert course.exit_confidence(0.0) is None
    assert course.exit_confidence(1.5) == pytest.approx(0.7)
    assert course.exit_confidence(50.0) == LEAST_CONFIDENCE
    assert Course(ratio=1.0, refine=1.0).exit_confidence(2.0) is None


def test_the_search_keeps_the_course_that_is_worth_most(monkeypatch):
    """Worth made up: the ratio of a ladder's thresholds near 0.35 is best, and an exit confidence costs."""

    def worth(self, points):
        (first, _), (last, _) = points[1].thresholds
        return 0.9 - 0.5 * abs(first / last - 0.35) - 0.3 * (points[1].exit_confidence is not None)

    monkeypatch.setattr(calibrate_module._Meter, "worth", worth)
    model = make_model()
    table = calibrate(model, make_data(model), data_name="mine", max_images=8, trials=8)
    cheapest = table.points[-1]
    assert cheapest.thresholds[0][0] / cheapest.thresholds[1][0] == pytest.approx(0.35)
    assert cheapest.exit_confidence is None


def test_of_courses_that_differ_by_noise_the_first_is_kept(monkeypatch):
    """Worth made up: later courses and earlier exits are a little better, on so few images that it means nothing."""
    seen = []

    def worth(self, points):
        seen.append(points)
        return min(0.8 + 1e-4 * len(seen), 0.9)

    monkeypatch.setattr(calibrate_module._Meter, "worth", worth)
    model = make_model()
    cheapest = calibrate(model, make_data(model), data_name="mine", max_images=8, trials=4).points[-1]
    assert cheapest.thresholds[0][0] == pytest.approx(cheapest.thresholds[1][0])  # ratio 1 was tried first
    assert cheapest.exit_confidence is None


def test_trials_after_the_first_are_drawn_and_the_same_every_time():
    model = make_model()
    said: list[list[str]] = [[], []]
    for lines in said:
        calibrate(model, make_data(model), data_name="", max_images=8, trials=6, say=lines.append)
    assert said[0] == said[1]
    ratios = [line.split("ratio ")[1].split(",")[0] for line in said[0] if line.startswith("trial")]
    assert len(ratios) == 6
    assert len(set(ratios)) > len(FIRST_TRIALS)


@pytest.mark.parametrize("wrong", [{"trials": 0}, {"max_images": 0}])
def test_counts_below_one_are_refused(wrong):
    model = make_model()
    with pytest.raises(ValueError, match="must be 1 or more"):
        calibrate(model, make_data(model), data_name="", **wrong)


# ---- exits, from runs without them


@pytest.mark.parametrize("confidence", [0.45, 0.6, 0.9, None])
def test_what_an_exit_would_have_given_is_what_it_gives(confidence):
    model = make_model()
    data = make_data(model)
    meter = calibrate_module._Meter(model, data, NUM_IMAGES, 0)
    slope = 0.0 if confidence is None else 1 - confidence
    (point,) = meter.points(Memory(), Course(1.0, 1.5), 1.0, (slope,), NUM_IMAGES)
    assert point.exit_confidence == (None if confidence is None else pytest.approx(confidence))
    setting = Setting(thresholds=point.thresholds, exit_confidence=point.exit_confidence)
    (score,) = evaluate(model, data, [setting])
    for part in ("accuracy", "macs_mean", "macs_p95", "kept_mean"):
        assert asdict(score)[part] == asdict(point)[part], part


def test_plans_are_what_a_spread_of_the_images_did(table):
    model = make_model()
    for point in table.points:
        assert len(point.plans) == NUM_PLANS
        costs = [plan_macs(model.shape, p.kept, p.refined, scored=bool(np.any(point.thresholds))) for p in point.plans]
        assert costs == sorted(costs)
        assert np.mean(costs) == pytest.approx(point.macs_mean, rel=0.05)  # 12 of 48 images


def test_a_replay_does_the_work_of_its_plan(table, monkeypatch):
    model = make_model()
    image = torch.randn(1, 3, 32, 48)
    asked: list[tuple[tuple, dict]] = []
    note = lambda *args, **kinds: asked.append((args, kinds)) or SimpleNamespace(logits=None)  # noqa: E731
    for point in table.points:
        scored = bool(np.any(point.thresholds))
        for plan in point.plans[::3]:
            asked.clear()
            with monkeypatch.context() as patched:
                patched.setattr(model, "look", note)
                patched.setattr(model, "run", note)
                with contextlib.suppress(TypeError):  # jaxtyping: nothing comes back from `note`
                    model.replay(image, [plan], point)
            ((args, kinds),) = asked
            out = model.run(*args, **kinds)
            assert tuple(out.trace.kept.sum((1, 2, 3)).tolist())[: plan.stages_run] == plan.kept
            assert int(out.trace.exit_stage) == plan.stages_run - 1
            assert int(out.macs) == plan_macs(model.shape, plan.kept, plan.refined, scored=scored)


# ---- memory


def test_a_search_that_goes_on_runs_nothing_twice(tmp_path, monkeypatch):
    model, file = make_model(), tmp_path / "search.jsonl"
    data = make_data(model)
    table = calibrate(model, data, data_name="mine", memory_path=file)
    whole = file.read_text()
    monkeypatch.setattr(calibrate_module._Meter, "_run", lambda *args: pytest.fail("an image was run again"))
    said: list[str] = []
    assert calibrate(model, data, data_name="mine", memory_path=file, say=said.append) == table
    num_runs = len(whole.splitlines()) - 1
    assert said[0] == f"{file} knows runs of this model on these images ({num_runs}), which are not made again"
    assert file.read_text() == whole


def test_a_search_whose_file_was_cut_off_anywhere_ends_at_the_same_table(tmp_path):
    model, file = make_model(), tmp_path / "search.jsonl"
    data = make_data(model)
    table = calibrate(model, data, data_name="mine", trials=2, memory_path=file)
    whole = file.read_bytes()
    for cut in (0.1, 0.5, 0.9, 0.999):
        file.write_bytes(whole[: int(cut * len(whole))])
        assert calibrate(model, data, data_name="mine", trials=2, memory_path=file) == table
        assert file.read_bytes() == whole


def fingerprint_of(model: Iret, data: ImageData, num_images: int = 8) -> str:
    return fingerprint(model, calibrate_module._Meter(model, data, num_images, 0).batches)


def relabelled(data: ImageData) -> ImageData:
    """The same images, the first with another label."""
    read = lambda row: (data.read(row)[0], (data.read(row)[1] + (row == 0)) % 5)  # noqa: E731
    return ImageData(data.rows, read, data.class_names, data.preprocess, "skip")


def test_everything_that_decides_what_an_evaluation_gives_is_in_the_fingerprint(monkeypatch):
    model, other, normalised, scored = (make_model() for _ in range(4))
    data = make_data(model)
    other.patch_embed.weight.data[0, 0] += 0.3
    normalised.preprocessing = replace(model.preprocessing, mean=(0.4, 0.5, 0.5))
    scored.shape = replace(model.shape, importance="column")
    found = {
        fingerprint_of(model, data),
        fingerprint_of(model, data, 9),
        fingerprint_of(model, relabelled(data)),
        fingerprint_of(other, data),
        fingerprint_of(normalised, data),
        fingerprint_of(scored, data),
    }
    assert len(found) == 6
    assert fingerprint_of(make_model(), make_data(model)) == fingerprint_of(model, data)
    monkeypatch.setattr(calibrate_module, "coefficients", lambda *_, **__: "as another version counts")
    assert fingerprint_of(model, data) not in found


def test_data_of_the_same_name_with_one_label_changed_is_searched_anew(tmp_path):
    model, file = make_model(), tmp_path / "search.jsonl"
    data = make_data(model)
    kinds = dict(data_name="mine", max_images=8, trials=1)
    before = calibrate(model, data, memory_path=file, **kinds)
    after = calibrate(model, relabelled(data), memory_path=file, **kinds)
    assert after == calibrate(model, relabelled(data), **kinds)
    assert after.points[0].accuracy == before.points[0].accuracy - 1 / 8


def test_the_memory_of_another_model_is_not_believed(tmp_path):
    model, file = make_model(), tmp_path / "search.jsonl"
    data = make_data(model)
    calibrate(model, data, data_name="mine", max_images=8, trials=1, memory_path=file)
    other = make_model()
    other.patch_embed.weight.data += 0.3
    found = calibrate(other, data, data_name="mine", max_images=8, trials=1, memory_path=file)
    assert found == calibrate(other, data, data_name="mine", max_images=8, trials=1)


def test_a_search_file_is_read_up_to_the_line_that_a_kill_cut_off(tmp_path):
    file = tmp_path / "search.jsonl"
    assert read_memory(file) == ("", {})
    file.write_text('mark\n{"key": "a", "points": []}\n{"key": "b", "poi')
    assert read_memory(file) == ("mark", {"a": []})


# ---- clocks that were measured before


def test_the_noise_is_that_of_means_over_so_many_images():
    """A half of 396 answers: 1.96 sqrt(1/4 / 400)."""
    model = make_model()
    shape, full = model.shape, full_macs(model.shape)
    deep = (shape.num_patches,) * len(shape.depths)
    plans = (Plan(deep, deep), Plan((shape.num_patches,), (shape.num_patches,)))
    costs = np.array([plan_macs(shape, plan.kept, plan.refined, scored=True) for plan in plans])
    all_of_it = Point(
        thresholds=((0.0, 0.0),) * 2,
        accuracy=0.9,
        macs_mean=float(full),
        macs_p95=float(full),
        kept_mean=tuple(map(float, deep)),
    )
    half = replace(all_of_it, thresholds=((1.0, 1.0),) * 2, accuracy=0.5, macs_mean=full / 2, plans=plans)
    said = explain_noise(OperatingPoints(data="d", num_images=396, full_macs=full, points=(all_of_it, half)), shape)
    assert said == (
        "2 operating points on 396 held-out images, which tell accuracy to 4.9 points or better and "
        f"MACs to {196 * costs.std() / costs.mean() / 396**0.5:.1f} %"
    )


def make_table(accuracy: float, *devices: str) -> OperatingPoints:
    point = Point(thresholds=((0.0, 0.0),), accuracy=accuracy, macs_mean=9.0, macs_p95=9.0, kept_mean=(4.0, 4.0))
    one = (1.0,)
    kinds = dict(ms_mean=one, ms_p50=one, ms_p95=one, joules=one, rounds=3)
    kinds |= dict(energy_source="estimate:fp32", energy_scope="", energy_kind="estimated")
    tables = tuple(DeviceTable(device=device, **kinds) for device in devices)
    return OperatingPoints(data="mine", num_images=4, full_macs=9, points=(point,), devices=tables)


def test_the_same_points_keep_the_clocks_of_other_machines():
    said = []
    before = make_table(0.5, "a Pi", "a Xeon")
    assert keep_clocks(make_table(0.5), before, "a Xeon", said.append) == before
    assert keep_clocks(make_table(0.5), None, "a Xeon", said.append) == make_table(0.5)
    assert not said


def test_new_points_drop_the_clocks_of_other_machines_and_name_them():
    said = []
    assert keep_clocks(make_table(0.6), make_table(0.5, "a Pi", "a Xeon"), "a Xeon", said.append).devices == ()
    assert said == ["the points are new, so their clocks elsewhere are dropped; measure again with --device-only: a Pi"]
    keep_clocks(make_table(0.6), make_table(0.5, "a Xeon"), "a Xeon", said.append)
    assert len(said) == 1  # that one is measured next


@pytest.mark.parametrize("precision", ["float32-onednn", "bfloat16", "int8"])
def test_points_are_searched_in_float32_alone(precision):
    model, context = prepare(make_model(), precision)
    with (
        context,
        pytest.raises(ValueError, match=f"searched in float32 .* a clock in {precision}, .* add --device-only"),
    ):
        calibrate(model, make_data(make_model()), data_name="mine")
