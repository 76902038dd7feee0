"""`iret serve` as it is typed: what it starts, and what it refuses before it starts anything."""

import json
import sys

import pytest

from iret.cli import main
from iret.serve import server
from iret.serve.guard import KEY


@pytest.fixture
def started(monkeypatch):
    """What `run` was called with, instead of a server; and no bundle is needed."""
    calls = []

    class Whole:
        def verify(self, folder):
            pass

    monkeypatch.setattr("iret.runtime.bundle.Bundle.read", lambda folder: Whole())
    monkeypatch.setattr(server, "run", lambda start, options, say: calls.append((start, options)) or 0)
    return calls


def test_options_become_limits_workers_and_supply(started):
    words = (
        "serve bundle --port 81 --workers 3 --threads 2 --max-batch 8 --batch-wait-ms 5 --queue 9 --max-body-mb 0.5 "
        "--max-pixels 1000 --timeout-s 3 --api-key secret --battery-wh 12 --rate 2"
    )
    assert main(words.split()) == 0
    [(start, options)] = started
    limits = options.limits
    assert (options.port, options.workers, options.max_batch, options.batch_wait_s) == (81, 3, 8, 0.005)
    assert (limits.queue, limits.body_bytes, limits.max_pixels, limits.timeout_s) == (9, 500_000, 1000, 3.0)
    assert options.api_key == "secret"
    make = start.args[0]
    assert make.args[1:] == (None, 2)
    assert (make.keywords["supply"].battery_wh, make.keywords["supply"].images_per_second) == (12, 2)


def test_workers_share_the_cores_unless_they_are_counted(started, monkeypatch):
    monkeypatch.setattr(server, "count_cores", lambda: 6)
    for words in ([], ["--threads", "4"], ["--threads", "8"]):
        main(["serve", "bundle", *words])
    assert [options.workers for _, options in started] == [6, 1, 1]


def test_a_key_can_come_from_the_environment(started, monkeypatch, capsys):
    monkeypatch.setenv(KEY, "hidden")
    assert main(["serve", "bundle", "--api-key", "env"]) == 0
    assert started[0][1].api_key == "hidden"
    monkeypatch.delenv(KEY)
    assert main(["serve", "bundle", "--api-key", "env"]) == 2
    assert "set it in IRET_API_KEY" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--queue 0", "--queue 0 must be above 0 and finite"),
        ("--timeout-s inf", "--timeout-s inf must be above 0 and finite"),
        ("--threads 0", "--threads 0 must be above 0"),
        ("--rate -1", "--rate -1 must be above 0"),
        ("--workers 0", "--workers 0 must be 1 or more"),
        ("--port 99999", "--port 99999 must be from"),
        ("--max-body-mb nan", "--max-body-mb nan"),
    ],
)
def test_what_is_out_of_range_is_named_before_anything_starts(started, capsys, words, sentence):
    assert main(["serve", "bundle", *words.split()]) == 2
    assert sentence in capsys.readouterr().err
    assert started == []


def test_images_left_unanswered_are_told_to_the_shell(started, monkeypatch):
    monkeypatch.setattr(server, "run", lambda start, options, say: 3)
    assert main(["serve", "bundle"]) == 1


def test_a_folder_that_is_no_bundle_is_one_sentence(tmp_path, capsys):
    assert main(["serve", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "iret export" in error and error.count("\n") == 1


def test_a_bundle_of_another_format_is_one_sentence(tmp_path, capsys):
    (tmp_path / "bundle.json").write_text(json.dumps({"format": 99}))
    assert main(["serve", str(tmp_path)]) == 2
    assert "format 99" in capsys.readouterr().err


def test_a_missing_library_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "iret.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "bundle"]) == 2
    assert "this needs uvicorn, which is not installed; pip install 'iret[serve]'" in capsys.readouterr().err


def test_measuring_keeps_this_machine_s_clock_in_the_bundle(started, monkeypatch):
    done = []

    class Session:
        def __init__(self, folder, engine, *, threads):
            done.append((str(folder), engine, threads))

        def measure(self):
            done.append("measured")

        def save(self):
            done.append("saved")

    monkeypatch.setattr("iret.runtime.session.Session", Session)
    assert main(["serve", "bundle", "--measure", "--engine", "openvino"]) == 0
    assert done == [("bundle", "openvino", 1), "measured", "saved"]
    assert len(started) == 1
