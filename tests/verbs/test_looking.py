"""`predict` with goals: what the controller decided is said in both forms, and mistakes in the words that were typed."""

import json
import re
import sys
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import iret
from iret import cli
from iret.measure.battery import Battery
from iret.measure.energy import Counter, CounterMeter
from iret.pilot import Pilot
from iret.predict import predict as predict_one
from iret.runtime.controller import Controller
from iret.runtime.cost import full_macs
from iret.runtime.points import OperatingPoints, Point
from models import made_up_clock


def with_sensors(monkeypatch, battery: Battery | None = None) -> None:
    """This gauge and no thermometer, whatever the machine has."""
    monkeypatch.setattr("iret.pilot.Pilot", partial(Pilot, battery=lambda: battery, thermometer=lambda: None))


@pytest.fixture
def photo(tmp_path, monkeypatch) -> str:
    """In a folder with m, a model of two classes and three points (8, 4 and 2 ms here); no sensors."""
    monkeypatch.chdir(tmp_path)
    with_sensors(monkeypatch)
    torch.manual_seed(0)
    model = iret.create_model("iret_pico", num_classes=2, embed_dims=(32, 32, 32), depths=(1, 1, 1))
    full = full_macs(model.shape)
    points = tuple(
        Point(
            thresholds=((keep, keep),) * 2,
            exit_confidence=confidence,
            accuracy=share,
            macs_mean=share * full,
            macs_p95=share * full,
            kept_mean=(64.0, 32.0, 16.0),
        )
        for share, keep, confidence in ((1.0, 0.0, None), (0.5, 1.0, 0.9), (0.25, 1.5, 0.8))
    )
    model.points = OperatingPoints(
        data="made up", num_images=1, full_macs=full, points=points, devices=(made_up_clock(),)
    )
    model.save_pretrained(Path("m"))
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save("p.png")
    return "p.png"


def predict(*words: str) -> int:
    return cli.main(["predict", *words, "--model", "m"])


def test_json_holds_what_the_controller_decided_for_each_image(photo, capsys):
    assert predict(photo, photo, "--deadline", "1", "--max-celsius", "60", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    first, second = (answer["decision"] for answer in found["predictions"])
    assert first["budget"] == second["budget"] == first["accuracy"] == 0.25
    assert first["reason"].startswith("temperature: no reading")
    assert first["broken"] == ["temperature", "deadline"]
    fastest = "95 of 100 images take up to 3 ms at the fastest that is left"
    assert first["doubts"] == ["no temperature sensor was found, so the cheapest point is served", fastest]
    assert predict(photo, "--budget", "0.5", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predictions"][0]["decision"] is None and found["notes"] == []


def test_images_that_missed_their_deadline_are_counted(photo, capsys, monkeypatch):
    times_s = iter((0.003, 0.004, 0.005))

    def timed(*args, **kwargs):
        answer, trace = predict_one(*args, **kwargs)
        return replace(answer, time_s=next(times_s)), trace

    monkeypatch.setattr("iret.predict.predict", timed)
    assert predict(photo, photo, photo, "--deadline", "4") == 0
    assert "\n1 of 3 images took longer than --deadline 4\n" in capsys.readouterr().err
    times_s = iter((0.005,))
    assert predict(photo, "--budget", "0.5") == 0
    assert "took longer" not in capsys.readouterr().err


def test_without_a_thermometer_one_sentence_says_what_happens(photo, capsys):
    assert predict(photo, "--max-celsius", "60") == 0
    said = capsys.readouterr().err
    assert "no temperature sensor was found, so the cheapest point is served" in said
    assert "None" not in said


def test_a_gauge_of_percent_alone_asks_for_the_watt_hours(photo, capsys, monkeypatch):
    with_sensors(monkeypatch, Battery(percent=50.0, joules=None, is_plugged=False, source="made up"))
    assert predict(photo, "--battery", "1", "--rate", "1") == 0
    said = capsys.readouterr().err
    assert "the battery's gauge says 50% and no energy; give the full one's (--battery-wh" in said
    assert "None" not in said


def test_without_a_gauge_the_option_that_stands_in_for_it_is_named(photo, capsys):
    assert predict(photo, "--battery", "1", "--rate", "1") == 0
    assert "battery: neither gauge nor --battery-wh" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "is_said"),
    [
        ("--deadline 5", True),
        ("--ms 5", True),
        ("--joules 0.05", True),
        ("--budget 0.5", True),
        ("--budget 1", False),
        ("--threshold 1", False),
        ("", False),
    ],
)
def test_an_exit_confidence_that_changes_the_operating_point_is_said(photo, capsys, words, is_said):
    sentence = "images leave at --exit-confidence 0.7 in place of the operating point's own"
    assert predict(photo, *words.split(), "--exit-confidence", "0.7") == 0
    assert (sentence in capsys.readouterr().err) == is_said
    assert predict(photo, *words.split(), "--exit-confidence", "0.7", "--json") == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert sum(sentence in note for note in notes) == is_said
    assert predict(photo, *words.split()) == 0
    assert sentence not in capsys.readouterr().err


@pytest.mark.parametrize(("words", "budget"), [("--ms 8", 1.0), ("--ms 4", 0.5), ("--joules 0.06", 0.75)])
def test_what_milliseconds_and_joules_buy_is_said(photo, capsys, words, budget):
    said = f"{words}: {budget:.0%} of the MACs, with which {budget:.1%} of held-out images are right; a mean of many images"
    assert predict(photo, *words.split()) == 0
    heard = capsys.readouterr().err
    assert said in heard
    assert ("--deadline" in heard) == ("--ms" in words)
    assert ("\njoules estimated by made up: all of it\n" in heard) == ("--joules" in words)
    assert predict(photo, *words.split(), "--json") == 0
    assert json.loads(capsys.readouterr().out)["notes"][0].startswith(said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--battery 8", "--battery 8 needs --rate, the images a second that it must last for"),
        ("--battery -1 --rate 1", "--battery -1 must be above 0"),
        ("--battery 8 --rate nan", "--rate nan must be above 0"),
        ("--battery 8 --rate 1 --battery-wh 0", "--battery-wh 0 must be above 0"),
        ("--battery 8 --rate 1 --idle-watts -1", "--idle-watts -1 must be 0 or more"),
        ("--deadline 0", "--deadline 0 must be above 0"),
        ("--max-celsius inf", "--max-celsius inf must be above 0"),
        ("--min-accuracy 0", "--min-accuracy 0 must be above 0"),
        ("--min-accuracy 60", "--min-accuracy 60 is above 1; it is a share of right answers"),
        ("--threads 100000", "--threads 100000 must be 1 or more, and at most"),
        (
            "--ms 1",
            r"ms=1 is below the cheapest operating point on this device, 2 ms at 0\.250 .* or for a budget of 0\.250",
        ),
    ],
)
def test_goals_that_cannot_be_are_refused_in_the_words_that_were_typed(photo, capsys, words, message):
    assert predict(photo, *words.split()) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1
    assert not re.search(
        r"hours|images_per_second|battery_joules|deadline_ms|max_celsius|min_accuracy|idle_watts", said
    )


def test_a_bundle_is_refused_with_what_runs_it(photo, capsys):
    Path("bundle").mkdir()
    Path("bundle/bundle.json").write_text("{}")
    assert cli.main(["predict", photo, "--model", "bundle"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"iret: bundle is an exported bundle, .*`iret serve bundle`, and time it with .*\.\n", said)


def metered(source: str, kind: str = "measured", idle_watts: float = 2.0) -> None:
    """The model in m has joules of that source."""
    model = iret.load("m")
    table = replace(model.points.devices[0], energy_source=source, energy_kind=kind, idle_watts=idle_watts)
    model.points = model.points.with_device(table)
    model.save_pretrained(Path("m"))


BATTERY = ("--battery", "1", "--rate", "1", "--battery-wh", "5")


def test_the_meter_of_the_table_is_read_while_images_come_and_let_go(photo, monkeypatch, capsys):
    """A counter that goes on by a joule each time it is read; at no idle power every window ends with its image."""
    readings = count()
    meter = CounterMeter("made up:0", "device", [Counter(read_j=lambda: float(next(readings)))], resolution_s=0.0)
    opened, seen = [], []
    monkeypatch.setattr("iret.measure.sources.open_meter", lambda name: opened.append(name) or meter)
    metered("made up:0", idle_watts=0.0)

    class Listening(Controller):
        def decide(self, reading, images=1):
            seen.append(reading.joules)
            return super().decide(reading, images)

    monkeypatch.setattr("iret.pilot.Controller", Listening)
    assert predict(*[photo] * 4, *BATTERY, "--json") == 0
    assert opened == ["made up:0"]
    assert seen == [None, *[pytest.approx(1.0)] * 3]
    meter.start()  # no window was left open
    meter.cancel()
    monkeypatch.setattr("iret.predict.predict", lambda *_, **__: sys.exit(7))
    with pytest.raises(SystemExit, match="7"):
        predict(photo, *BATTERY)
    meter.start()


def test_what_a_device_draws_idle_is_not_charged_to_images(photo, monkeypatch):
    given = []

    class Noting(Pilot):
        def __init__(self, menu, goal, **options):
            given.append((menu.idle_watts, options["idle_watts"]))
            super().__init__(menu, goal, battery=lambda: None, **options)

    monkeypatch.setattr("iret.pilot.Pilot", Noting)
    metered("rapl:package-77")
    assert predict(photo, *BATTERY, "--idle-watts", "9") == 0
    assert given == [(9.0, 2.0)]  # of the device, and of what the meter sees


@pytest.mark.parametrize(("watt_hours", "is_said"), [("0.04", True), ("0.05", True), ("0.06", False)])
@pytest.mark.parametrize("words", [("--idle-watts", "0.05"), ()])  # as given, and as the table has it
def test_a_battery_that_the_idle_device_empties_is_named(photo, capsys, watt_hours, is_said, words):
    metered("battery:BAT0", idle_watts=3.0 if words else 0.05)
    assert predict(photo, "--battery", "1", "--rate", "0.001", "--battery-wh", watt_hours, *words) == 0
    said = f"--battery-wh {watt_hours} cannot last 1 hours: the idle device alone (0.05 W) takes 0.05 Wh"
    assert (said in capsys.readouterr().err) == is_said


def test_a_meter_that_is_gone_is_said_and_the_answers_go_on(photo, capsys):
    metered("rapl:package-77")
    assert predict(photo, *BATTERY) == 0
    assert (
        "the table's joules were measured by rapl:package-77, which is not read here now: " in capsys.readouterr().err
    )


@pytest.mark.parametrize(("source", "kind"), [("rapl:package-0", "estimated"), ("battery:BAT0", "measured")])
def test_no_meter_is_read_beside_estimates_or_the_gauge_itself(photo, monkeypatch, source, kind):
    monkeypatch.setattr("iret.measure.sources.open_meter", lambda name: pytest.fail(f"{name} was opened"))
    metered(source, kind)
    assert predict(photo, *BATTERY) == 0


def test_only_a_battery_asks_for_the_meter(photo, monkeypatch):
    monkeypatch.setattr("iret.measure.sources.open_meter", lambda name: pytest.fail(f"{name} was opened"))
    metered("rapl:package-0")
    assert predict(photo, "--deadline", "100") == 0


def test_reasons_that_differ_only_by_what_is_affordable_are_one_sentence(photo, capsys):
    assert predict(*[photo] * 12, "--battery", "1", "--rate", "1", "--battery-wh", "0.02") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "J an image are affordable" in line]
    assert len(said) == 1
    assert re.match(r"1[12] of 12 images, battery: 0\.0\S+ to 0\.0\S+ J an image are affordable", said[0])
