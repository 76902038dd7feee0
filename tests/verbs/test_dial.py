"""Words of `calibrate`, `bench` and `simulate` that would be lost without a sentence, and what a day says of itself."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest

import iret
from iret import cli
from iret.presets import CHECKPOINTS
from iret.runtime.bundle import FILE_NAME, Bundle
from iret.runtime.cost import full_macs
from iret.runtime.points import OperatingPoints, Plan, Point
from iret.runtime.session import Session
from models import make_model, write_bundle

NANO = "iret_nano-cluttered-digits"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--device-only --data d", "--device-only measures the clock alone; leave out --data"),
        ("--device-only --trials 2", "leave out --trials"),
        ("--device-only --max-images 9", "leave out --max-images"),
        ("--data cluttered-digits --precision int8", "searched in float32 .* a clock in int8, .* add --device-only"),
        ("--device-only --battery-wh 50", "--battery-wh 50 with --meter auto: .* with --meter battery"),
        (
            "--device-only --battery-wh 0 --meter battery",
            "--battery-wh 0 with --meter battery: give watt-hours above 0",
        ),
    ],
)
def test_calibrate_refuses_what_it_would_not_use_in_one_sentence(tmp_path, capsys, line, message):
    assert cli.main(["calibrate", NANO, "--out", str(tmp_path / "copy"), *line.split()]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.startswith("iret: ") and said.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("line", ["calibrate {model} --device-only --out {out}", "bench {model} --out {out}"])
def test_a_file_in_the_place_of_a_folder_is_said_before_anything_is_measured(tmp_path, capsys, monkeypatch, line):
    monkeypatch.setattr("iret.clock.measure_device", lambda *args: pytest.fail("it was measured"))
    monkeypatch.setattr("iret.bench.bench", lambda *args, **kinds: pytest.fail("it was measured"))
    out = tmp_path / "mine.txt"
    out.write_text("mine")
    assert cli.main(line.format(model=NANO, out=out).split()) == 2
    assert re.fullmatch(r"iret: .*mine\.txt cannot be a folder, because .* is a file; .*\n", capsys.readouterr().err)
    assert out.read_text() == "mine"


def test_a_bench_takes_no_folder_that_holds_anything(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("iret.bench.bench", lambda *args, **kinds: pytest.fail("it was measured"))
    (tmp_path / "config.json").write_text("mine")
    assert cli.main(["bench", NANO, "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} holds a config.json already; name a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# ---- a bundle's clock


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A folder of one that has a point and no clock, on torch in an engine's place."""
    model = make_model()
    plan = Plan((12, 12, 12), (0, 12, 12))
    full = float(full_macs(model.shape))
    point = Point(
        thresholds=((0.0, 0.0),) * 2, accuracy=0.5, macs_mean=full, macs_p95=full, kept_mean=(12.0,) * 3, plans=(plan,)
    )
    model.points = OperatingPoints(data="d", num_images=1, full_macs=round(full), points=(point,))
    load = write_bundle(model, tmp_path / "bundle")
    monkeypatch.setattr("iret.runtime.session.Session", partial(Session, load=load))
    monkeypatch.setattr("iret.runtime.timing.fit", lambda calls, *_: (calls, 3, 0.0))  # no 20 seconds
    return tmp_path / "bundle"


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_bundle_keeps_its_clock_on_an_engine(bundle, capsys, engine):
    words = ["calibrate", str(bundle), "--device-only", "--engine", engine, "--threads", "1"]
    assert cli.main(words) == 0
    (table,) = Bundle.read(bundle).points.devices
    said = capsys.readouterr().err
    assert table.device in said and f"{table.ms_mean[0]:.2f}" in said
    assert table.device.endswith(f", {engine}, 1 thread, float32")


def test_a_bundle_is_timed_without_torch(bundle):
    """As far as its empty graphs, which no engine loads."""
    code = "import sys; from iret.cli import main; status = main(sys.argv[1:]); print(status, 'torch' in sys.modules)"
    words = ["calibrate", str(bundle), "--device-only"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    assert "cannot load" in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--device-only --workers 2", "a bundle is timed as it is; leave out --workers"),
        ("--data d", "whose points are its model's; --device-only measures its clock here"),
        ("--device-only --data d", "a bundle is timed as it is; leave out --data"),
        ("--device-only --trials 2", "leave out --trials"),
        ("--device-only --max-images 2", "leave out --max-images"),
        ("--device-only --show a.png", "leave out --show"),
        ("--device-only --out elsewhere", "leave out --out"),
        ("--device-only --device cuda", "leave out --device"),
        ("--device-only --precision int8", "leave out --precision"),
        ("--device-only --meter rapl", "leave out --meter"),
        ("--device-only --battery-wh 3", "leave out --battery-wh"),
        ("--device-only --engine tflite", "engine='tflite' does not run a bundle of kind 'onnx'"),
        ("--device-only --threads 0", "threads"),
    ],
)
def test_a_bundle_is_timed_as_it_is(bundle, capsys, line, message):
    before = (bundle / FILE_NAME).read_bytes()
    assert cli.main(["calibrate", str(bundle), *line.split()]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert message in said and said.startswith("iret: ")
    assert (bundle / FILE_NAME).read_bytes() == before


def test_an_engine_is_of_a_bundle(capsys):
    assert cli.main(["calibrate", NANO, "--device-only", "--engine", "onnxruntime", "--out", "x"]) == 2
    assert f"--engine is of a bundle, and {NANO} is none" in capsys.readouterr().err


# ---- simulate


def clock_of(name: str) -> str:
    return OperatingPoints.read(CHECKPOINTS / name).devices[0].device


def said(capsys) -> str:
    return capsys.readouterr().err


def day(capsys, *words: str) -> str:
    assert cli.main(["simulate", NANO, "--hours", "1", "--rate", "0.1", "--clock", clock_of(NANO), *words]) == 0
    return capsys.readouterr().err


def test_a_day_says_whose_battery_it_is_what_idles_away_and_what_comes(capsys):
    said = day(capsys, "--idle-watts", "1")
    assert re.search(
        r"a battery of 1 Wh, chosen halfway between .* \(--battery-wh\); the idle device takes 1 Wh \(1 W\)", said
    )
    assert "office arrivals: 324 images come, of 360 stated (--arrivals, --busy)" in said
    rows = [row.split() for row in said.splitlines() if row.startswith(("policy", "controller", "fixed"))]
    assert rows[0][:3] == ["policy", "hours", "lasts"]
    assert (rows[1][2], rows[-1][3]) == ("yes", "no")  # the full budget dies seconds before the end
    said = day(capsys, "--battery-wh", "0.5", "--arrivals", "steady")
    assert "a battery of 0.5 Wh\n" in said and "steady arrivals" in said
    assert "no clock of" not in said  # the clock was named


def test_on_the_shipped_photo_model_s_day_the_controller_lasts_and_no_point_that_does_is_right_more_often(capsys):
    """The day of the README."""
    name = "iret_pico-cifar10"
    assert cli.main(["simulate", name, "--clock", clock_of(name), "--json"]) == 0
    controller, *fixed = json.loads(capsys.readouterr().out)["outcomes"]
    assert controller["lasts"] and not fixed[-1]["lasts"]
    assert controller["correct"] >= max(outcome["correct"] for outcome in fixed if outcome["lasts"])


def test_of_several_clocks_none_of_them_this_one_s_one_is_to_be_named(tmp_path, capsys):
    model = iret.load(NANO)
    (clock,) = model.points.devices
    clocks = tuple(replace(clock, device=name) for name in ("one board", "another"))
    model.points = replace(model.points, devices=clocks)
    model.save_pretrained(tmp_path)
    assert cli.main(["simulate", str(tmp_path)]) == 2
    assert re.search(
        r"has several clocks, and none of .*; name one with --clock: .*'one board'; 'another'", said(capsys)
    )
    assert cli.main(["simulate", str(tmp_path), "--clock", "another", "--hours", "1", "--rate", "0.1"]) == 0
    assert "costs of another;" in said(capsys)


def test_a_day_ends_with_who_did_best_of_all_that_keep_the_goal(capsys):
    rows = [row.split() for row in day(capsys, "--idle-watts", "0").splitlines()]
    right = {row[1]: float(row[5]) for row in rows if row[:1] == ["fixed"] and row[3] == "yes"}
    controller = next(row[4] for row in rows if row[:1] == ["controller"])
    said = (
        f"the controller lasts, {controller} right; of the fixed budgets that keep the goal, ([0-9.]+) has the most, "
    )
    found = re.fullmatch(said + "([0-9]+)", " ".join(rows[-1]))
    assert right[found[1]] == int(found[2]) == max(right.values())
    said = day(capsys, "--idle-watts", "1", "--battery-wh", "0.5")
    assert re.search(r"the controller dies after 0\.\d h, \d+ right; no fixed budget keeps the goal\n$", said)
    assert "--battery-wh 0.5 cannot last 1 hours: the idle device alone (1 W) takes 1 Wh\n" in said


def test_a_day_at_the_costs_of_another_machine_says_so(capsys, monkeypatch):
    words = ["simulate", NANO, "--hours", "1", "--rate", "0.1"]
    monkeypatch.setattr("iret.verbs.dial._here", lambda: "a Pi")
    monkeypatch.setattr(OperatingPoints, "table_of", lambda self, _: self.devices[0])
    assert cli.main(words) == 0
    said = f"there is no clock of a Pi; `iret calibrate {NANO} --device-only --out FOLDER` measures it\n"
    assert said in capsys.readouterr().err


def test_a_cap_is_a_goal_too(capsys):
    """Of budgets that last, those that get too hot keep no goal; and a controller that cannot stay cool is not praised."""
    words = ["--battery-wh", "12.5", "--arrivals", "steady", "--rate", "10", "--kelvin-per-watt"]
    warm = day(capsys, *words, "400", "--max-celsius", "30").splitlines()[-1]
    assert re.search(r"the controller lasts, \d+ right; of the fixed budgets that keep the goal, 0\.\d+ has", warm)
    hot = day(capsys, *words, "36000", "--max-celsius", "26").splitlines()[-1]
    assert re.search(r"the controller lasts, \d+ right, \d+ of its images above the cap; no fixed budget keeps", hot)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--hours 0", "--hours 0 must be above 0"),
        ("--rate nan", "--rate nan must be above 0"),
        ("--battery-wh -1", "--battery-wh -1 must be above 0"),
        ("--kelvin-per-watt 0", "--kelvin-per-watt 0 must be above 0"),
        ("--max-celsius -4", "--max-celsius -4 must be above 0"),
        ("--busy 2", "--busy 2 is above 1"),
        ("--idle-watts -1", "--idle-watts -1 must be 0 or more"),
        ("--seed -1", "--seed -1 must be 0 or more"),
    ],
)
def test_a_day_that_cannot_be_is_refused_in_the_words_that_were_typed(capsys, words, message):
    assert cli.main(["simulate", NANO, "--clock", clock_of(NANO), *words.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
