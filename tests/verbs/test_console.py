"""What verbs check before any work is lost."""

import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from iret.doctor import count_usable
from iret.measure import sources
from iret.verbs.console import announce_hub, check_above_zero, check_folder, check_idle_watts, choose_meter, set_threads


def test_the_watt_hours_of_a_battery_reach_its_meter(monkeypatch):
    asked = []
    monkeypatch.setattr(sources, "open_meter", lambda name, capacity_wh=None: asked.append((name, capacity_wh)))
    choose_meter(Namespace(meter="battery:BAT0", battery_wh=50.0, device="cpu"))
    choose_meter(Namespace(meter="rapl", battery_wh=None, device="cpu"))
    assert asked == [("battery:BAT0", 50.0), ("rapl", None)]


@pytest.mark.parametrize("capacity_wh", [0.0, -1.0, float("nan")])
def test_a_capacity_that_is_none_is_refused(capacity_wh):
    with pytest.raises(ValueError, match="give watt-hours above 0"):
        choose_meter(Namespace(meter="battery", battery_wh=capacity_wh, device="cpu"))


# ---- folders


def test_a_folder_that_is_there_or_can_be_made_is_taken(tmp_path):
    for path in (tmp_path, tmp_path / "new", tmp_path / "new" / "deeper", Path("new")):
        check_folder(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_a_file_stands_in_the_way_of_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        ValueError, match=r"file.* cannot be a folder, because .*file is a file; name another with --out"
    ):
        check_folder(tmp_path / name)


def test_a_folder_that_is_closed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match=r"new cannot be written: .* is closed to this user; name another with --out"):
        check_folder(tmp_path / "new")


# ---- numbers


@pytest.mark.parametrize("count", [0, -1, 10**6])
def test_threads_are_one_to_the_processors_there_are(count):
    before = torch.get_num_threads()
    with pytest.raises(
        ValueError, match=f"--threads {count} must be 1 or more, and at most {count_usable()}, the proc"
    ):
        set_threads(count)
    set_threads(None)
    assert torch.get_num_threads() == before
    try:
        set_threads(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_number_that_is_not_above_zero_is_refused_by_the_name_of_its_option(value):
    check_above_zero(Namespace(rate=1e-9, battery_wh=None), "rate", "battery_wh")
    with pytest.raises(ValueError, match=f"--battery-wh {value:g} must be above 0"):
        check_above_zero(Namespace(rate=1.0, battery_wh=value), "rate", "battery_wh")


@pytest.mark.parametrize("watts", [-1.0, float("nan"), float("inf")])
def test_idle_watts_are_zero_or_more(watts):
    check_idle_watts(None)
    check_idle_watts(0.0)
    with pytest.raises(ValueError, match=f"--idle-watts {watts:g} must be 0 or more"):
        check_idle_watts(watts)


def test_only_what_is_not_here_is_looked_for_on_the_hub(tmp_path, capsys):
    for other in ("cluttered-digits", str(tmp_path), str(tmp_path / "no" / "such" / "path")):
        announce_hub(other)
    assert capsys.readouterr().err == ""
    for name in ("owner/name", "hf:owner/name"):
        announce_hub(name)
        assert capsys.readouterr().err == f"{name} is no file or folder here; asking the Hugging Face hub\n"
