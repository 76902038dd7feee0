"""The battery's level and what a window takes out of it, on made-up trees of files and a stand-in for psutil."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from iret.measure.battery import battery_meter, read_battery
from iret.measure.energy import EnergyError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")
    return folder


def supply(root: Path, name: str, **files: object) -> Path:
    return write(root / "class/power_supply" / name, **files)


def laptop(root: Path, **files: object) -> Path:
    """30 of 50 Wh left, on no cable."""
    supply(root, "AC", type="Mains", online=0)
    battery = {"type": "Battery", "status": "Discharging", "capacity": 60, "energy_now": 30_000_000}
    return supply(root, "BAT0", **{**battery, "energy_full": 50_000_000, **files})


def phone(root: Path) -> Path:
    """Counts charge: 2 Ah at 4 V."""
    return supply(
        root, "cell", type="Battery", status="Discharging", capacity=80, charge_now=2_000_000, voltage_now=4_000_000
    )


def fake_psutil(percent: float, power_plugged: bool | None) -> SimpleNamespace:
    found = SimpleNamespace(percent=percent, secsleft=-2, power_plugged=power_plugged)
    return SimpleNamespace(sensors_battery=lambda: found, found=found)


# ---- the level


def test_a_level_is_percent_and_joules(tmp_path):
    laptop(tmp_path)
    found = read_battery(tmp_path)
    assert (found.percent, found.joules) == (60.0, pytest.approx(30 * 3600))
    assert (found.is_plugged, found.source) == (False, "battery:BAT0")


def test_charge_becomes_joules_at_the_voltage_of_now(tmp_path):
    phone(tmp_path)
    assert read_battery(tmp_path).joules == pytest.approx(2 * 4 * 3600)


def test_a_battery_may_know_only_its_percentage(tmp_path):
    supply(tmp_path, "gauge", type="Battery", status="Discharging", capacity=42)
    assert read_battery(tmp_path).percent == 42.0
    assert read_battery(tmp_path).joules is None


def test_a_percentage_is_reckoned_where_none_is_given(tmp_path):
    (laptop(tmp_path) / "capacity").unlink()
    assert read_battery(tmp_path).percent == pytest.approx(60.0)


def test_two_batteries_count_by_their_size(tmp_path):
    laptop(tmp_path)  # 60 % of 50 Wh, and 20 % of 25 Wh: 35 of 75 Wh
    supply(
        tmp_path,
        "BAT1",
        type="Battery",
        status="Unknown",
        capacity=20,
        energy_now=5_000_000,
        energy_full=25_000_000,
    )
    found = read_battery(tmp_path)
    assert found.percent == pytest.approx(100 * 35 / 75)
    assert found.joules == pytest.approx(35 * 3600)
    assert not found.is_plugged  # BAT1 rests while BAT0 is used


def test_batteries_of_mice_are_none_of_the_machine(tmp_path):
    supply(tmp_path, "hidpp_battery_0", type="Battery", scope="Device", capacity=90, online=1, status="Discharging")
    assert read_battery(tmp_path) is None
    laptop(tmp_path)
    assert read_battery(tmp_path).percent == 60.0
    assert not read_battery(tmp_path).is_plugged


@pytest.mark.parametrize(
    ("online", "status", "is_plugged"),
    [
        (1, "Charging", True),
        (1, "Not charging", True),
        (0, "Charging", True),
        (0, "Discharging", False),
        (0, "Unknown", False),
        (None, "Discharging", False),
        (None, "Full", True),
    ],
)
def test_a_cable_is_seen(tmp_path, online, status, is_plugged):
    supply(tmp_path, "BAT0", type="Battery", status=status, capacity=60)
    if online is not None:
        supply(tmp_path, "AC", type="Mains", online=online)
    assert read_battery(tmp_path).is_plugged is is_plugged


def test_a_worn_battery_is_full_at_most_and_a_broken_gauge_is_refused(tmp_path):
    laptop(tmp_path, capacity=104)
    assert read_battery(tmp_path).percent == 100.0
    for broken in (-1, 65535):
        laptop(tmp_path, capacity=broken)
        with pytest.raises(EnergyError, match=f"battery BAT0 says it is {broken} % full"):
            read_battery(tmp_path)


def test_no_battery_is_none(tmp_path):
    (tmp_path / "class/power_supply").mkdir(parents=True)
    assert read_battery(tmp_path) is None
    assert read_battery(tmp_path / "no linux", psutil=SimpleNamespace(sensors_battery=lambda: None)) is None
    assert read_battery(tmp_path / "no linux", psutil=SimpleNamespace()) is None  # psutil on some systems


def test_psutil_is_asked_outside_linux_and_named_if_missing(tmp_path, monkeypatch):
    found = read_battery(tmp_path, psutil=fake_psutil(37.5, False))
    assert (found.percent, found.joules, found.is_plugged, found.source) == (37.5, None, False, "battery:psutil")
    assert read_battery(tmp_path, psutil=fake_psutil(37.5, None)).is_plugged
    monkeypatch.setitem(sys.modules, "psutil", None)  # as if it were not installed
    with pytest.raises(EnergyError, match=r"read with psutil here; install it: pip install 'iret\[energy\]'"):
        read_battery(tmp_path)


# ---- a window


def test_a_window_takes_the_difference_of_the_counter(tmp_path):
    cell, clock = laptop(tmp_path), Clock()
    meter = battery_meter(tmp_path, clock=clock)
    meter.start()
    clock.now = 600.0
    (cell / "energy_now").write_text("29000000")  # 1 Wh
    found = meter.stop()
    assert found.joules == pytest.approx(3600.0)
    assert (found.scope, found.kind) == ("whole machine (battery)", "measured")


def test_a_sagging_voltage_is_not_counted_as_energy(tmp_path):
    """0.1 Ah at 4 V, then 3.8 V: 0.39 Wh went; the levels differ by 0.78 Wh."""
    cell, clock = phone(tmp_path), Clock()
    meter = battery_meter(tmp_path, clock=clock)
    meter.start()
    clock.now = 600.0
    write(cell, charge_now=1_900_000, voltage_now=3_800_000)
    assert meter.stop().joules == pytest.approx(0.39 * 3600)


def test_a_percentage_needs_the_capacity_and_long_windows(tmp_path):
    clock, psutil = Clock(), fake_psutil(50.0, False)
    with pytest.raises(EnergyError, match="battery:psutil says only a percentage; give its capacity"):
        battery_meter(tmp_path, psutil=psutil)
    meter = battery_meter(tmp_path, psutil=psutil, capacity_wh=40.0, clock=clock)
    meter.start()
    clock.now, psutil.found.percent = 1800.0, 48.0
    assert meter.stop().joules == pytest.approx(0.02 * 40 * 3600)
    meter.start()
    clock.now, psutil.found.percent = 1800.0 + 600.0, 47.0
    with pytest.raises(EnergyError, match="600 s is too short for battery:psutil; .* lasts 1800 s"):
        meter.stop()


def test_a_charging_battery_is_refused_before_and_after(tmp_path):
    laptop(tmp_path)
    supply(tmp_path, "AC", online=1)
    with pytest.raises(EnergyError, match="BAT0 is being charged, which hides what the machine takes; unplug it"):
        battery_meter(tmp_path)
    supply(tmp_path, "AC", online=0)
    meter = battery_meter(tmp_path, clock=Clock())
    meter.start()
    supply(tmp_path, "AC", online=1)
    with pytest.raises(EnergyError, match="is being charged"):
        meter.stop()
    with pytest.raises(EnergyError, match="is being charged"):
        meter.start()


def test_a_battery_that_did_not_step_or_rose_gives_no_reading(tmp_path):
    cell, clock = laptop(tmp_path), Clock()
    meter = battery_meter(tmp_path, clock=clock)
    for energy_uwh in (30_000_000, 31_000_000):  # the same, and plugged in and out in between
        write(cell, energy_now=30_000_000)
        meter.start()
        clock.now += 400.0
        write(cell, energy_now=energy_uwh)
        with pytest.raises(EnergyError, match="J over 400 s, and running takes more than none"):
            meter.stop()


def test_a_battery_taken_out_in_the_window_is_an_error(tmp_path):
    cell, clock = laptop(tmp_path), Clock()
    meter = battery_meter(tmp_path, clock=clock)
    meter.start()
    clock.now = 600.0
    (cell / "energy_now").unlink()
    with pytest.raises(EnergyError, match="battery:BAT0 no longer says its energy"):
        meter.stop()


def test_a_machine_without_a_battery_has_no_such_meter(tmp_path):
    (tmp_path / "class/power_supply").mkdir(parents=True)
    with pytest.raises(EnergyError, match="this machine has no battery"):
        battery_meter(tmp_path)


def test_garbage_in_the_counter_is_named(tmp_path):
    laptop(tmp_path, energy_now="garbage")
    with pytest.raises(EnergyError, match="energy_now holds 'garbage' instead of a number"):
        read_battery(tmp_path)
