"""Finding, explaining and opening meters by name."""

import sys
from pathlib import Path

import pytest

from iret.measure import pmic, sources
from iret.measure.energy import EnergyError
from iret.measure.sources import AUTO, explain_meters, open_meter


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """/sys of a machine without a sensor, a library or a firmware tool, whatever this one has."""
    for library in ("pynvml", "zeus.monitor"):
        monkeypatch.setitem(sys.modules, library, None)

    def missing(*arguments, **options):
        raise FileNotFoundError(2, "No such file")

    monkeypatch.setattr(pmic.subprocess, "run", missing)
    (tmp_path / "class/power_supply").mkdir(parents=True)
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


def add_rapl(root: Path) -> None:
    write(root / "class/powercap/intel-rapl:0", name="package-0", energy_uj=0, max_energy_range_uj=10**12)


def add_rails(root: Path) -> None:
    write(
        root / "class/hwmon/hwmon0",
        name="ina3221",
        in1_label="VDD_IN",
        in1_input=5000,
        curr1_input=900,
        in2_label="VDD_SOC",
        in2_input=5000,
        curr2_input=100,
    )


def add_battery(root: Path) -> None:
    write(root / "class/power_supply/BAT0", type="Battery", status="Discharging", capacity=50, energy_now=10**7)


def test_a_machine_without_sensors_has_the_estimate(machine):
    assert (open_meter(root=machine).source, open_meter(root=machine).kind) == ("estimate:fp32", "estimated")


def test_every_source_says_why_it_is_not_usable(machine):
    found = explain_meters(root=machine)
    assert list(found) == ["hwmon", "pi-pmic", "rapl", "nvml", "battery", "zeus", "estimate"]
    for name, part in {
        "hwmon": "no power rails",
        "pi-pmic": "Raspberry Pi 5",
        "rapl": "no RAPL counters",
        "nvml": "pip install 'iret[energy]'",
        "battery": "no battery",
        "zeus": "pip install zeus",
        "estimate": "ready: arithmetic and DRAM of a 45 nm chip (no control, caches or idle) (estimated)",
    }.items():
        assert part in found[name]
        assert "\n" not in found[name]


def test_what_is_usable_is_found_and_said(machine):
    add_rapl(machine)
    add_rails(machine)
    add_battery(machine)
    found = explain_meters(root=machine)
    assert [name for name, line in found.items() if line.startswith("ready: ")] == [
        "hwmon",
        "rapl",
        "battery",
        "estimate",
    ]
    assert found["hwmon"] == "ready: whole module (rail VDD_IN), rail VDD_SOC alone (measured)"
    assert found["rapl"] == "ready: CPU package 0 (measured)"


def test_auto_takes_what_covers_most_and_never_the_slow_battery(machine):
    add_battery(machine)
    assert open_meter(root=machine).source == "estimate:fp32"
    add_rapl(machine)
    assert open_meter(root=machine).source == "rapl:package-0"
    add_rails(machine)
    assert open_meter(root=machine).source == "hwmon:ina3221/VDD_IN"
    assert set(AUTO) <= set(sources._sources(machine, None))


def test_a_meter_is_opened_by_its_source_or_its_own_name(machine):
    add_rails(machine)
    assert open_meter("hwmon", root=machine).source == "hwmon:ina3221/VDD_IN"
    assert open_meter("hwmon:ina3221/VDD_SOC", root=machine).scope == "rail VDD_SOC alone"
    assert open_meter("estimate:int8", root=machine).source == "estimate:int8"


def test_an_unknown_name_lists_the_known_ones(machine):
    add_rails(machine)
    with pytest.raises(EnergyError, match="no energy meter 'wall'; choose from auto, hwmon, pi-pmic, rapl, nvml"):
        open_meter("wall", root=machine)
    with pytest.raises(EnergyError, match="'hwmon:GPU' here; hwmon has hwmon:ina3221/VDD_IN, hwmon:ina3221/VDD_SOC"):
        open_meter("hwmon:GPU", root=machine)


def test_an_unusable_meter_asked_for_by_name_says_why(machine):
    with pytest.raises(EnergyError, match="no RAPL counters"):
        open_meter("rapl", root=machine)


def test_the_capacity_of_a_battery_is_passed_on(machine):
    write(machine / "class/power_supply/gauge", type="Battery", status="Discharging", capacity=50)
    with pytest.raises(EnergyError, match="give its capacity"):
        open_meter("battery", root=machine)
    assert open_meter("battery", root=machine, capacity_wh=20.0).source == "battery:gauge"


def test_this_machine_explains_itself():
    assert explain_meters()["estimate"].startswith("ready: ")
