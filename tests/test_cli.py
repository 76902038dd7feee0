"""Every verb as it is typed: tables on stderr, JSON alone on stdout, and one sentence for every mistake."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import iret
from iret import calibrate, cli, clock
from iret.doctor import describe_device
from iret.model import Iret
from iret.pilot import Pilot
from iret.runtime.cost import full_macs
from iret.runtime.points import FILE_NAME as POINTS_NAME, OperatingPoints, Point
from iret.train import recipe as recipes
from iret.verbs import console
from models import made_up_clock

VERBS = [
    "predict",
    "train",
    "eval",
    "calibrate",
    "narrow",
    "bench",
    "simulate",
    "export",
    "serve",
    "page",
    "card",
    "demo",
    "list",
    "doctor",
]


def make_model(folder: Path, has_points: bool = True) -> Iret:
    """A model of 64 patches in three stages for the classes ant and bee, saved in `folder`."""
    torch.manual_seed(0)
    model = iret.create_model("iret_pico", num_classes=2, embed_dims=(32, 32, 32), depths=(1, 1, 1))
    for stage in model.stages:
        for block in stage.blocks:
            torch.nn.init.normal_(block.attn.qkv.weight, std=0.3)  # far from uniform, so that thresholds cut
    model.labels = ("ant", "bee")
    if has_points:
        full = full_macs(model.shape)
        points = tuple(
            Point(
                thresholds=((keep, keep), (keep, keep)),
                accuracy=share,
                macs_mean=share * full,
                macs_p95=share * full,
                kept_mean=(64.0, 32.0, 16.0),
            )
            for share, keep in ((1.0, 0.0), (0.5, 1.0), (0.25, 1.5))
        )
        model.points = OperatingPoints(data="made up", num_images=1, full_macs=full, points=points)
    model.save_pretrained(folder)
    return model.eval()


def make_photo(path: Path, value: int = 0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def make_data(folder: Path, per_class: int = 4) -> str:
    for index in range(3 * 2 * per_class):
        split, name = ("train", "val", "test")[index % 3], ("ant", "bee")[index // 3 % 2]
        make_photo(folder / split / name / f"{index}.png", index)
    return str(folder)


def asked_of_the_model(monkeypatch) -> list[tuple]:
    """(thresholds, exit confidence) of every run from now on."""
    asked, run = [], Iret.run

    def spy(model, images, thresholds=0.0, exit_confidence=None, **options):
        asked.append((thresholds, exit_confidence))
        return run(model, images, thresholds, exit_confidence, **options)

    monkeypatch.setattr(Iret, "run", spy)
    return asked


def the_object(capsys) -> dict:
    """What was said on stdout, which is one JSON object on one line."""
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.endswith("\n")
    return json.loads(said)


# ---- help


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS)])
def test_help_exits_with_zero(verb, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([*verb, "--help"])
    assert left.value.code == 0
    assert " ".join(["usage: iret", *verb]) in capsys.readouterr().out


def test_these_are_all_the_verbs(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["frobnicate"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith("; `iret --help` says what it takes.\n")
    assert re.findall(r"\w+", said.split("choose from")[1].split(";")[0]) == VERBS


# ---- predict


def test_predict_prints_a_row_for_every_photo_and_nothing_on_stdout(tmp_path, capsys):
    make_model(tmp_path / "m")
    photos = [make_photo(tmp_path / f"{index}.png", index) for index in range(3)]
    assert cli.main(["predict", *photos, "--model", str(tmp_path / "m")]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    head, *rows = said.err.splitlines()
    assert head.split()[:3] == ["image", "label", "confidence"]
    assert [row.split()[0] for row in rows] == photos
    assert all(row.split()[1] in ("ant", "bee") and "64/64/64" in row for row in rows)


def test_predict_says_in_json_what_the_model_answers(tmp_path, capsys):
    model, photo = make_model(tmp_path / "m"), make_photo(tmp_path / "p.png")
    assert cli.main(["predict", photo, photo, "--model", str(tmp_path / "m"), "--threshold", "1.0", "--json"]) == 0
    found = the_object(capsys)
    assert found["model"] == str(tmp_path / "m")
    assert len(found["predictions"]) == 2
    with torch.no_grad():
        out = model.run(model.preprocess(photo), 1.0)
    for answer in found["predictions"]:
        assert answer["image"] == photo
        assert answer["label"] == model.labels[out.logits.argmax()]
        assert answer["kept"] == out.trace.kept.sum((1, 2, 3)).tolist()
        assert answer["macs"] == out.macs.item()


@pytest.mark.parametrize(
    ("typed", "thresholds", "confidence"),
    [
        ("", ((0.0, 0.0), (0.0, 0.0)), None),
        ("--threshold 1.0", 1.0, None),
        ("--threshold 1.0 1.2:1.5", (1.0, (1.2, 1.5)), None),
        ("--budget 1", ((0.0, 0.0), (0.0, 0.0)), None),
        ("--budget 0.5", ((1.0, 1.0), (1.0, 1.0)), None),
        ("--threshold 0.5 --exit-confidence 0.9", 0.5, 0.9),
    ],
)
def test_the_dials_reach_the_model(tmp_path, monkeypatch, typed, thresholds, confidence):
    make_model(tmp_path / "m")
    monkeypatch.setattr("iret.predict.warm_up", lambda model, setting: None)
    photo, asked = make_photo(tmp_path / "p.png"), asked_of_the_model(monkeypatch)
    assert cli.main(["predict", photo, "--model", str(tmp_path / "m"), *typed.split()]) == 0
    assert set(asked) == {(thresholds, confidence)}


def test_one_bad_photo_does_not_cost_the_others_their_answers(tmp_path, capsys):
    make_model(tmp_path / "m")
    (tmp_path / "notes.jpg").write_text("milk, eggs")
    photos = [str(tmp_path / "notes.jpg"), make_photo(tmp_path / "p.png")]
    assert cli.main(["predict", *photos, "--model", str(tmp_path / "m"), "--json"]) == 2
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [each["image"] for each in found["predictions"]] == photos[1:]
    assert [(each["image"], "is not an image" in each["error"]) for each in found["errors"]] == [(photos[0], True)]
    assert re.fullmatch(r"iret: .*notes\.jpg is not an image .*\n", said.err)


def test_show_draws_a_picture_that_opens(tmp_path, capsys):
    make_model(tmp_path / "m")
    photos = [make_photo(tmp_path / f"{index}.png", index) for index in range(2)]
    heights = []
    for images in (photos[:1], photos):
        drawn = tmp_path / "focus.png"
        assert cli.main(["predict", *images, "--model", str(tmp_path / "m"), "--show", str(drawn), "--json"]) == 0
        assert len(the_object(capsys)["predictions"]) == len(images)
        with Image.open(drawn) as picture:
            picture.load()
            heights.append(picture.height)
    assert heights[1] == 2 * heights[0] > 200


def test_no_photo_is_drawn_over(tmp_path, capsys):
    make_model(tmp_path / "m")
    photo, other = make_photo(tmp_path / "p.png"), make_photo(tmp_path / "other.png", 1)
    before = {path: Path(path).read_bytes() for path in (photo, other)}
    for mine in before:
        assert cli.main(["predict", photo, "--model", str(tmp_path / "m"), "--show", mine]) == 2
        assert re.fullmatch(rf"iret: {mine} is there already, and was not drawn by iret; .*\n", capsys.readouterr().err)
    assert {path: Path(path).read_bytes() for path in before} == before


# ---- the verbs that need data


def test_eval_prints_a_row_for_every_budget(tmp_path, capsys):
    make_model(tmp_path / "m")
    data = make_data(tmp_path / "d")
    assert cli.main(["eval", str(tmp_path / "m"), "--data", data, "--budgets", "1", "0.5"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    title, head, *rows = said.err.splitlines()
    assert "8 images, 0 skipped" in title
    assert head.split()[:2] == ["setting", "top-1"]
    assert [row.split("  ")[0] for row in rows] == ["budget 1", "budget 0.5"]


def test_eval_in_json_holds_the_scores_of_the_settings(tmp_path, capsys):
    model, data = make_model(tmp_path / "m"), make_data(tmp_path / "d")
    (tmp_path / "d" / "test" / "bee" / "broken.jpg").write_text("milk, eggs")
    line = ["eval", str(tmp_path / "m"), "--data", data, "--threshold", "0.5", "--rule", "topk", "--control", "random"]
    assert cli.main([*line, "--json"]) == 0
    found = the_object(capsys)
    (score,) = found["scores"]
    assert (found["data"], found["split"]) == (data, "test")
    assert (score["num_images"], score["num_skipped"]) == (8, 1)
    assert score["setting"] == dict(thresholds=0.5, exit_confidence=None, rule="topk", control="random")
    assert score["kept_mean"] == [64.0, 32.0, 16.0]
    assert score["macs_mean"] < full_macs(model.shape)


@pytest.fixture
def quick(monkeypatch):
    """Few evaluations, few points, and the fewest rounds that a clock takes."""
    monkeypatch.setattr(calibrate, "SEARCH_RUNGS", (0.0, 1.0))
    monkeypatch.setattr(calibrate, "FIRST_RUNGS", (0.0, 1.0))
    monkeypatch.setattr(calibrate, "LARGEST_GAP", 0.4)
    monkeypatch.setattr(calibrate, "LARGEST_STEP", 100.0)
    monkeypatch.setattr(clock, "TIME_LIMIT_S", 0.0)


def test_calibrate_writes_the_points_that_it_says(tmp_path, capsys, quick):
    make_model(tmp_path / "m", has_points=False)
    data = make_data(tmp_path / "d")
    line = ["calibrate", str(tmp_path / "m"), "--data", data, "--max-images", "5", "--trials", "2"]
    assert cli.main([*line, "--json"]) == 0
    found = the_object(capsys)
    assert (found["data"], found["num_images"]) == ("d", 5)
    points = Iret.from_folder(tmp_path / "m").points
    assert [point.macs_mean for point in points.points] == [point["macs_mean"] for point in found["points"]]
    assert [table.device for table in points.devices] == [describe_device(torch.device("cpu"), "float32")]
    assert cli.main([*line, "--out", str(tmp_path / "elsewhere"), "--show", str(tmp_path / "search.png")]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    rows = [
        row for row in said.err.splitlines() if row.startswith(("0 0 ", "0.")) or re.match(r"[\d.:]+ [\d.:]+  ", row)
    ]
    assert len(rows) == len(points.points)
    assert "joules estimated" in said.err and "are not made again" not in said.err  # another folder, another search
    assert f"drawn: {tmp_path / 'search.png'}" in said.err
    assert "less sure" not in said.err
    assert cli.main([*line[:-3], "4", "--trials", "1", "--out", str(tmp_path / "fewer")]) == 0
    assert "are of 5 images; this search looks at 4, so its accuracies are less sure" in capsys.readouterr().err
    copy = Iret.from_folder(tmp_path / "elsewhere")  # a whole model: the first was not touched
    assert copy.points.points == points.points
    assert (tmp_path / "search.png").stat().st_size > 1000
    assert cli.main([*line[:-3], "4", "--trials", "1"]) == 0
    said = capsys.readouterr().err
    assert "so its accuracies are less sure; its points take the place of those (--out NEW keeps them)" in said


@pytest.mark.parametrize(("words", "pinned"), [([], []), (["--threads", "1"], [1])])
def test_a_clock_is_measured_on_as_many_processors_as_there_are_threads(tmp_path, monkeypatch, quick, words, pinned):
    make_model(tmp_path / "m", has_points=False)
    data, seen = ["--data", make_data(tmp_path / "d"), "--max-images", "5", "--trials", "1"], []
    monkeypatch.setattr("iret.measure.latency.pin_threads", lambda count: seen.append(count) or nullcontext())
    assert cli.main(["calibrate", str(tmp_path / "m"), *data, *words]) == 0
    assert seen == pinned


def test_the_clock_of_another_device_is_measured_without_data(tmp_path, capsys, monkeypatch, quick):
    make_model(tmp_path / "m", has_points=False)
    line = ["calibrate", str(tmp_path / "m")]
    assert cli.main([*line, "--data", make_data(tmp_path / "d"), "--max-images", "5", "--trials", "1"]) == 0
    before = OperatingPoints.read(tmp_path / "m")
    assert "top-1 is that of float32" not in capsys.readouterr().err
    for precision in ("bfloat16", "float32-onednn"):
        assert cli.main([*line, "--device-only", "--precision", precision]) == 0
        assert "top-1 is that of float32, in which the points were searched" in capsys.readouterr().err
    after = OperatingPoints.read(tmp_path / "m")
    assert after.points == before.points
    assert [table.device.rpartition(", ")[2] for table in after.devices] == ["float32", "bfloat16", "float32-onednn"]
    photo, asked = make_photo(tmp_path / "p.png"), asked_of_the_model(monkeypatch)
    assert cli.main(["predict", photo, "--model", str(tmp_path / "m"), "--ms", "1000"]) == 0
    most = max(
        point.accuracy for point in after.points
    )  # there is time for any; of the best, the clock says which is cheapest
    assert any(np.allclose(asked[-1][0], each.thresholds) for each in after.points if each.accuracy == most)
    capsys.readouterr()
    assert cli.main(["predict", photo, "--model", str(tmp_path / "m"), "--precision", "int8", "--ms", "1000"]) == 2
    assert "no clock was measured on this device" in capsys.readouterr().err


def test_a_clock_joins_those_that_its_folder_has_already(tmp_path, quick):
    """A shipped model is measured into a folder of one's own, in one precision after another."""
    shipped, own = str(tmp_path / "shipped"), str(tmp_path / "own")
    make_model(tmp_path / "shipped", has_points=False)
    data = make_data(tmp_path / "d")
    assert cli.main(["calibrate", shipped, "--data", data, "--max-images", "5", "--trials", "1"]) == 0
    for precision in ("bfloat16", "int8"):
        assert cli.main(["calibrate", shipped, "--device-only", "--precision", precision, "--out", own]) == 0
    devices = OperatingPoints.read(tmp_path / "own").devices
    assert sorted(table.device.rpartition(", ")[2] for table in devices) == ["bfloat16", "float32", "int8"]
    assert len(OperatingPoints.read(tmp_path / "shipped").devices) == 1


def test_a_clock_is_put_into_no_folder_but_a_copy_of_the_model(tmp_path, capsys, monkeypatch, quick):
    monkeypatch.setattr("iret.clock.measure_device", lambda *_: pytest.fail("it was measured"))
    model, other = make_model(tmp_path / "m"), tmp_path / "other"
    torch.nn.init.normal_(model.pos_embed)
    model.save_pretrained(other)
    photos, own = tmp_path / "photos", tmp_path / "own"
    make_photo(photos / "p.png")
    model = make_model(own)
    model.points = replace(model.points, num_images=7, points=model.points.points[:2])
    model.save_pretrained(own)
    for folder, sentence in (
        (other, f"{other} holds something that is no copy of"),
        (photos, f"{photos} holds something that is no copy of"),
        (
            own,
            f"{own} has operating points of its own; their clock is measured by `iret calibrate {own} --device-only`",
        ),
    ):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        assert cli.main(["calibrate", str(tmp_path / "m"), "--device-only", "--out", str(folder)]) == 2
        assert sentence in capsys.readouterr().err
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_copy_that_is_searched_anew_to_the_same_points_has_the_model_s_clocks_too(tmp_path, quick):
    own, line = tmp_path / "own", ["calibrate", str(tmp_path / "m")]
    words = ["--data", make_data(tmp_path / "d"), "--max-images", "5", "--trials", "1"]
    make_model(tmp_path / "m", has_points=False)
    assert cli.main([*line, *words]) == 0
    model = Iret.from_folder(tmp_path / "m")
    model.points = model.points.with_device(replace(made_up_clock(), **columns_of(model, "a board")))
    model.save_pretrained(tmp_path / "m")
    assert cli.main([*line, *words, "--out", str(own)]) == 0
    (own / POINTS_NAME).write_text(replace(OperatingPoints.read(own), devices=()).to_json())
    assert cli.main([*line, *words, "--out", str(own)]) == 0
    assert {table.device for table in OperatingPoints.read(own).devices} >= {"a board"}


def columns_of(model: Iret, device: str) -> dict:
    """A clock's columns for as many points as the model has."""
    column = tuple(float(count) for count in range(len(model.points.points), 0, -1))
    return dict(device=device, ms_mean=column, ms_p50=column, ms_p95=column, joules=column)


def test_a_copy_of_the_model_gets_a_clock_and_keeps_what_else_is_its_own(tmp_path, quick):
    """Its labels were translated; a save that was killed left a scratch file beside it."""
    shipped, own = str(tmp_path / "shipped"), tmp_path / "own"
    make_model(tmp_path / "shipped", has_points=False)
    assert (
        cli.main(["calibrate", shipped, "--data", make_data(tmp_path / "d"), "--max-images", "5", "--trials", "1"]) == 0
    )
    own.mkdir()
    (own / ".model.safetensors.x1").touch()
    line = ["calibrate", shipped, "--device-only", "--out", str(own)]
    assert cli.main(line) == 0
    config = (own / "config.json").read_text().replace("ant", "Ameise")
    (own / "config.json").write_text(config)
    assert cli.main([*line, "--precision", "int8"]) == 0
    assert (own / "config.json").read_text() == config and "Ameise" in config
    assert len(OperatingPoints.read(own).devices) == 2


def test_a_shipped_name_is_no_folder_even_where_there_is_one_of_that_name(tmp_path, capsys, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    name = "iret_nano-cluttered-digits"
    make_model(tmp_path / name)
    before = {path: path.read_bytes() for path in (tmp_path / name).iterdir()}
    for words, sentence in ((["--out", name], "holds something that is no copy"), ([], "is no folder of yours")):
        assert cli.main(["calibrate", name, "--device-only", *words]) == 2
        assert sentence in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / name).iterdir()} == before


def test_a_damaged_table_in_the_folder_of_a_clock_is_named_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    make_model(tmp_path / "m")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "points.json").write_text("{")
    monkeypatch.setattr("iret.clock.measure_device", None)
    assert cli.main(["calibrate", str(tmp_path / "m"), "--device-only", "--out", str(tmp_path / "own")]) == 2
    assert str(tmp_path / "own" / "points.json") in capsys.readouterr().err
    assert (tmp_path / "own" / "points.json").read_text() == "{"


def with_clock(folder: Path) -> Iret:
    """The model of `make_model` with made-up columns of this device."""
    model = make_model(folder)
    model.points = model.points.with_device(made_up_clock())
    model.save_pretrained(folder)
    return model


def test_simulate_plays_a_day_on_the_clock_of_the_model(tmp_path, capsys):
    with_clock(tmp_path / "m")
    line = ["simulate", str(tmp_path / "m"), "--hours", "1", "--rate", "0.5", "--arrivals", "steady"]
    assert cli.main([*line, "--json"]) == 0
    found = the_object(capsys)
    assert found["battery_j"] == pytest.approx(1800 * (0.02 + 0.08) / 2)
    assert [outcome["policy"] for outcome in found["outcomes"]] == ["controller", "fixed 0.25", "fixed 0.5", "fixed 1"]
    controller, *fixed = found["outcomes"]
    assert controller["answered"] == controller["images"]
    assert fixed[-1]["answered"] < fixed[-1]["images"]  # full budget dies
    assert cli.main([*line, "--show", str(tmp_path / "day.png"), "--battery-wh", "0.1"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert len([row for row in said.err.splitlines() if row.startswith(("controller", "fixed"))]) == 4
    assert f"drawn: {tmp_path / 'day.png'}" in said.err and "only energy is reckoned with" not in said.err
    assert (tmp_path / "day.png").stat().st_size > 1000
    assert cli.main([*line[:2], "--hours", "0.01", "--rate", "300", "--json"]) == 0
    found = the_object(capsys)
    assert re.search(r"--rate 300: .* images a second", found["notes"][0])
    assert (found["energy_source"], found["energy_kind"], found["idle_watts"]) == ("made up", "estimated", 0.0)
    assert cli.main([*line[:2], "--hours", "0.01", "--rate", "300"]) == 0
    assert re.search(r"--rate 300: .* \d+ images a second at its slowest point and \d+ at", capsys.readouterr().err)


def test_a_goal_lets_the_controller_choose_and_says_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("iret.pilot.Pilot", partial(Pilot, battery=lambda: None, thermometer=lambda: None))
    with_clock(tmp_path / "m")
    photos = [make_photo(tmp_path / f"{index}.png", index) for index in range(3)]
    line = ["predict", *photos, "--model", str(tmp_path / "m")]
    assert cli.main([*line, "--deadline", "4"]) == 0
    said = capsys.readouterr().err
    assert "images, deadline: 4 ms, for 95 of 100 images" in said  # whatever it doubts
    assert re.search(r"^[0-3] of 3 images took longer than --deadline 4$", said, re.M)
    assert cli.main([*line, "--battery", "1", "--rate", "1", "--battery-wh", "1", "--json"]) == 0
    assert all(each["macs_share"] > 0.99 for each in the_object(capsys)["predictions"])  # a watt-hour is plenty
    assert cli.main([*line, "--battery", "1", "--rate", "1", "--battery-wh", "0.02", "--json"]) == 0
    assert all(each["macs_share"] < 0.5 for each in the_object(capsys)["predictions"])  # 0.02 J an image
    assert cli.main([*line, "--battery", "0.01", "--rate", "400", "--battery-wh", "9", "--json"]) == 0
    assert any("125 images a second at its slowest point and 500 at" in note for note in the_object(capsys)["notes"])
    idle = ["--battery-wh", "0.04", "--idle-watts", "0.02"]  # leaves as much
    assert cli.main([*line, "--battery", "1", "--rate", "1", *idle, "--json"]) == 0
    assert all(each["macs_share"] < 0.5 for each in the_object(capsys)["predictions"])
    assert cli.main([*line, "--battery", "1", "--rate", "1", "--battery-wh", "1"]) == 0
    assert "the table's joules are estimates, and no gauge has confirmed them yet" in capsys.readouterr().err


def test_leaving_early_goes_with_a_goal(tmp_path, monkeypatch):
    with_clock(tmp_path / "m")
    monkeypatch.setattr("iret.predict.warm_up", lambda model, setting: None)
    asked, line = asked_of_the_model(monkeypatch), ["predict", make_photo(tmp_path / "p.png"), "--deadline", "6.25"]
    assert cli.main([*line, "--model", str(tmp_path / "m"), "--exit-confidence", "0.7"]) == 0
    assert asked == [(((1.0, 1.0), (1.0, 1.0)), 0.7)]


def test_bench_times_every_model_batch_and_budget(tmp_path, capsys):
    make_model(tmp_path / "m", has_points=False)
    line = ["bench", str(tmp_path / "m"), "--budgets", "0.5", "0.4", "--batch", "1", "3", "--rounds", "5"]
    assert cli.main([*line, "--out", str(tmp_path / "kept"), "--json"]) == 0
    rows = the_object(capsys)["rows"]
    assert [(row["batch"], row["budget"]) for row in rows] == [(b, s) for b in (1, 3) for s in (1.0, 0.5, 0.4)]
    kept = json.loads((tmp_path / "kept" / "bench.json").read_text())
    assert kept["rows"] == rows
    assert kept["command"].startswith("iret bench")
    assert len((tmp_path / "kept" / "samples.csv").read_text().splitlines()) == 1 + 5 * len(rows)
    assert cli.main(line) == 0
    assert "joules estimated" in capsys.readouterr().err


def test_card_writes_the_card_beside_the_weights(tmp_path, capsys):
    make_model(tmp_path / "m")
    line = ["card", str(tmp_path / "m"), "--data", make_data(tmp_path / "d"), "--max-images", "5"]
    assert cli.main([*line, "--json"]) == 0
    assert the_object(capsys) == {"card": str(tmp_path / "m" / "README.md")}
    assert "# m\n" in (tmp_path / "m" / "README.md").read_text()
    assert cli.main([*line, "--name", "Ants and bees"]) == 0
    text = (tmp_path / "m" / "README.md").read_text()
    assert "# Ants and bees\n" in text
    assert "2 classes of d:" in text
    (tmp_path / "m" / "README.md").write_text("# My ants\n")
    assert cli.main(line) == 2
    assert "README.md is there already, and was not written by `iret card`; move it away" in capsys.readouterr().err
    assert (tmp_path / "m" / "README.md").read_text() == "# My ants\n"


def test_train_leaves_a_model_and_says_how_it_ended(tmp_path, capsys, monkeypatch, quick):
    small = recipes.Recipe(name="small", model="iret_pico", epochs=1.0, batch_size=4, lr=1e-3, precision="32-true")
    monkeypatch.setitem(recipes.RECIPES, "small", lambda: small)
    out = tmp_path / "out"
    line = ["train", "--recipe", "small", "--data", make_data(tmp_path / "d"), "--out", str(out), "--device", "cpu"]
    assert cli.main([*line, "--steps", "2", "--stop-after", "0", "--json"]) == 0
    found = the_object(capsys)
    assert (found["is_finished"], found["step"], found["num_steps"]) == (False, 1, 2)
    assert cli.main([*line, "--steps", "2", "--resume", "--json"]) == 0
    found = the_object(capsys)
    assert (found["is_finished"], found["step"], found["out"]) == (True, 2, str(out))
    assert Iret.from_folder(out).labels == ("ant", "bee")


# ---- the verbs that need nothing


def test_list_names_checkpoints_and_presets(capsys):
    assert cli.main(["list", "--json"]) == 0
    found = the_object(capsys)
    assert found["presets"] == iret.list_models()
    assert cli.main(["list"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert all(name in said.err for name in (*found["presets"], *found["checkpoints"]))


def test_doctor_reports(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    assert the_object(capsys)["versions"]["iret"] == iret.__version__
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert iret.__version__ in said.err


def test_demo_draws_where_it_is_told(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr("iret.demo.run_demo", lambda *args: called.append(args) or 0)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 0
    assert called == [(tmp_path, console.say, console.print_table)]


def test_a_table_is_aligned(capsys):
    console.print_table(("name", "x"), [("a", "100"), ("longer", "2")])
    assert capsys.readouterr().err.splitlines() == ["name      x", "a       100", "longer    2"]


# ---- mistakes


def mistake(tmp_path: Path, capsys, line: str) -> str:
    """The sentence that a line in `tmp_path` gives, with m and bare (models), p.png, notes.jpg, cut.jpg, d and flat (data)."""
    make_model(tmp_path / "m")
    make_model(tmp_path / "bare", has_points=False)
    make_photo(tmp_path / "p.png")
    make_photo(tmp_path / "flat" / "p.png")
    (tmp_path / "notes.jpg").write_text("milk, eggs, bread")
    whole = Path(make_photo(tmp_path / "cut.jpg"))
    whole.write_bytes(whole.read_bytes()[:-400])
    make_data(tmp_path / "d", per_class=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert cli.main(line.split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("iret: ")
    assert said.err.count("\n") == 1 and said.err.endswith("\n")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    return said.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nowhere.jpg", "nowhere.jpg does not exist or is not a file"),
        ("m", "m does not exist or is not a file"),
        ("notes.jpg", "notes.jpg is not an image that Pillow can read"),
        ("cut.jpg", r"cut.jpg is damaged or cut short \(.*\); get the file again"),
        ("p.png --threshold -1", "threshold -1 is not allowed"),
        ("p.png --threshold nan", "threshold nan is not allowed"),
        ("p.png --threshold 1 1 1", "3 thresholds were given, but the model has 2 transitions"),
        ("p.png --threshold 1.0:0.5 1", "refine threshold 0.5 is below keep threshold 1"),
        ("p.png --threshold high", "threshold 'high' is not a number or keep:refine"),
        ("p.png --budget 0", r"budget=0 is outside \(0, 1\]"),
        ("p.png --budget 1.5", r"budget=1.5 is outside \(0, 1\]"),
        ("p.png --budget 0.1", "budget=0.1 is below the cheapest operating point of this model, 0.250"),
        ("p.png --budget 0.5 --model bare", "budget=0.5 needs operating points, .* `iret calibrate MODEL --data DATA`"),
        ("p.png --deadline 5", "no clock was measured on this device"),
        ("p.png --deadline 5 --model bare", "bare has no operating points to choose from; run `iret calibrate` first"),
        ("p.png --deadline 5 --budget 0.5", "goals let a controller turn the dial; leave out --budget"),
        ("p.png --battery 8", "--battery 8 needs --rate"),
        ("p.png --battery-wh 20", "--battery-wh tells of the battery; say with --battery how long it must last"),
        ("p.png --rate 1 --deadline 5", "--rate tells of the battery; say with --battery how long"),
        ("p.png --idle-watts 1 --budget 0.5", "--idle-watts tells of the battery"),
        ("p.png --ms 5", "no clock was measured on this device"),
        ("p.png --ms 5 --model bare", "ms=5 needs operating points, .* `iret calibrate MODEL --data DATA`"),
        ("p.png --exit-confidence nan", "confidence.*nan"),
        ("p.png --model nowhere", "model 'nowhere' is neither a shipped checkpoint"),
        ("p.png --model flat", "flat/config.json does not exist; a model folder holds"),
        ("p.png --device frob", "device 'frob' cannot be used here; `iret doctor` lists"),
        ("p.png --device hpu", "device 'hpu' cannot be used here"),
        ("p.png --device meta", "device 'meta' cannot be used here"),
        ("p.png --show nowhere/focus.png", "nowhere/focus.png"),
        ("p.png --show focus.docs", r"focus\.docs is no picture that iret writes; end its name in \.png"),
    ],
)
def test_a_mistake_in_predict_is_one_sentence(tmp_path, capsys, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    line = f"predict {line}" if "--model" in line else f"predict {line} --model m"
    assert re.search(message, mistake(tmp_path, capsys, line))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("eval m --data flat", "flat holds no images in class folders; expected flat/CLASS/IMAGE"),
        ("eval m --data d --threshold 1 --rule best", "rule='best' is unknown; choose from threshold, mass, topk"),
        ("eval m --data d --threshold 1 --control best", "control='best' is unknown; choose from attention, random"),
        ("eval m --data d --budgets 1 --control best", "control='best' is unknown; choose from attention, random"),
        ("eval m --data d --budgets 1 2", r"budget=2 is outside \(0, 1\]"),
        ("eval m --data d --batch-size 0", "--batch-size 0 must be 1 or more"),
        ("eval m --data d --max-images 0", "--max-images 0 must be 1 or more"),
        ("calibrate nowhere --data d", "model 'nowhere' is neither"),
        ("calibrate m", "operating points are found on held-out images; give --data, or --device-only"),
        ("calibrate bare --device-only", "bare has no operating points to measure; run `iret calibrate` with --data"),
        ("calibrate m --device-only", "hold no plans to replay; run `iret calibrate MODEL --data DATA` once"),
        (
            "calibrate iret_pico-cifar10 --device-only",
            "is no folder of yours to write points.json into; name a new one",
        ),
        ("calibrate m --data d --trials 0", "--trials 0 must be 1 or more"),
        ("calibrate m --data d --max-images -1", "--max-images -1 must be 1 or more"),
        ("calibrate m --device-only --threads 0", "--threads 0 must be 1 or more"),
        ("calibrate m --device-only --meter wall", "there is no energy meter 'wall'; choose from auto, hwmon"),
        ("simulate m", "m has no clock; measure it with `iret calibrate m --device-only`"),
        ("simulate bare", "bare has no operating points; find them with `iret calibrate bare --data DATA`"),
        ("bench m --rounds 0", "--rounds 0 must be 1 or more"),
        ("bench m --batch 4 0", "--batch 0 must be 1 or more"),
        ("simulate iret_pico-cifar10 --busy 2", "--busy 2 is above 1; it is the share of the stated images that come"),
        ("bench m --budgets 0.5", "hold no plans to replay"),
        ("bench iret_pico --budgets 0.01", "budget=0.01 is below what this model can do"),
        ("card nowhere --data d", "nowhere is not a model folder to write a card into"),
        ("train --data d --recipe best", "recipe 'best' is unknown; choose from images_tiny, fine_tune"),
        ("train --data d --init nowhere", "model 'nowhere' is neither"),
        ("train --data d --recipe fine_tune --device frob", "device 'frob' cannot be used here"),
        ("train --data d --recipe one --init m --out o --steps 0", "steps.* 0|steps=0"),
        ("train --data d --recipe one --init m --out o --steps -3", "steps.* -3|steps=-3"),
    ],
)
def test_a_mistake_in_a_verb_with_data_is_one_sentence(tmp_path, capsys, monkeypatch, line, message):
    one = recipes.Recipe(name="one", model="iret_pico", epochs=1.0, batch_size=2, lr=1e-3, precision="32-true")
    monkeypatch.setitem(recipes.RECIPES, "one", lambda: one)
    monkeypatch.chdir(tmp_path)
    assert re.search(message, mistake(tmp_path, capsys, line))


def test_data_of_other_classes_is_one_sentence(tmp_path, capsys):
    make_model(tmp_path / "m")
    for name in ("cat", "dog"):
        make_photo(tmp_path / "d" / "test" / name / "0.png")
        make_photo(tmp_path / "d" / "train" / name / "0.png")
    assert cli.main(["eval", str(tmp_path / "m"), "--data", str(tmp_path / "d")]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"iret: the data has 2 classes \(cat, dog, .*iret train --init MODEL`\.\n", said)


def test_two_dials_at_once_are_refused(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["predict", "p.png", "--budget", "0.5", "--threshold", "1"])
    assert left.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_missing_library_is_named_with_what_brings_it(capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("iret.doctor.report", lambda: missing("kornia"))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "iret: this needs kornia, which is not installed; pip install 'iret[torch]'.\n"
    monkeypatch.setattr("iret.doctor.report", lambda: missing("iret.nothing"))  # ours: a bug, not a mistake
    with pytest.raises(ModuleNotFoundError):
        cli.main(["doctor"])


def test_ctrl_c_is_one_sentence(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("iret.doctor.report", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "iret: stopped.\n"


@pytest.mark.parametrize(
    ("words", "kept"),
    [([], "what was searched is kept, and the same command goes on"), (["--device-only"], "nothing was changed")],
)
def test_ctrl_c_in_the_clock_of_a_calibration_says_what_is_kept(tmp_path, capsys, monkeypatch, quick, words, kept):
    def interrupted(*_):
        raise KeyboardInterrupt

    make_model(tmp_path / "m")
    before = (tmp_path / "m" / POINTS_NAME).read_bytes()
    monkeypatch.setattr(clock, "measure_device", interrupted)
    data = [] if words else ["--data", make_data(tmp_path / "d"), "--max-images", "5", "--trials", "1"]
    assert cli.main(["calibrate", str(tmp_path / "m"), *words, *data]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"iret: stopped; {kept}."
    assert (tmp_path / "m" / POINTS_NAME).read_bytes() == before


def test_a_command_that_is_told_to_end_clears_away_what_it_began(tmp_path):
    """SIGTERM, as of `timeout` or a service manager; kill -9 is another matter."""
    code = f"""
import sys, time
from pathlib import Path
from iret import cli

def wait(args):
    scratch = Path({str(tmp_path)!r}, "scratch")
    try:
        scratch.touch()
        time.sleep(60)
    finally:
        scratch.unlink()

cli.VERBS["list"] = wait
sys.exit(cli.main(["list"]))
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        while not (tmp_path / "scratch").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert not (tmp_path / "scratch").exists()
