"""RAPL, power rails and temperatures on made-up trees of files."""

from pathlib import Path

import pytest

from iret.measure.energy import EnergyError, EnergyMeter
from iret.measure.sysfs import hwmon_meters, rapl_meters, read_number, read_temperature


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")
    return folder


def zone(root: Path, number: str, name: str, energy_uj: int = 0, control: str = "intel-rapl") -> Path:
    return write(
        root / f"class/powercap/{control}:{number}", name=name, energy_uj=energy_uj, max_energy_range_uj=262_143_328_850
    )


def close(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As a file without permission is for everybody but root, who may run these tests."""
    read = Path.read_text

    def refuse(path: Path, *arguments, **options):
        if path.name in names:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)


def spend(meter: EnergyMeter, clock: Clock, files: dict[Path, int], time_s: float = 2.0):
    meter.start()
    clock.now += time_s
    for file, value in files.items():
        file.write_text(f"{value}\n")
    return meter.stop()


# ---- RAPL


def test_a_package_is_read_in_joules(tmp_path):
    package, clock = zone(tmp_path, "0", "package-0", 1_000_000), Clock()
    zone(tmp_path, "0:0", "core", 1)
    (meter,) = rapl_meters(tmp_path, clock=clock)
    found = spend(meter, clock, {package / "energy_uj": 31_000_000})
    assert (found.joules, found.source, found.scope, found.kind) == (
        30.0,
        "rapl:package-0",
        "CPU package 0",
        "measured",
    )


def test_packages_are_added_with_their_dram_and_nothing_is_counted_twice(tmp_path):
    """Cores are inside the package, mmio shows the package again, and psys holds everything: a meter of its own."""
    clock, files = Clock(), {}
    for number, name, spent in (
        ("0", "package-0", 1_000_000),
        ("0:0", "core", 20_000_000),
        ("0:1", "dram", 300_000),
        ("1", "package-1", 4_000_000),
        ("1:0", "dram", 50_000),
        ("2", "psys", 90_000_000),
    ):
        files[zone(tmp_path, number, name) / "energy_uj"] = spent
    files[zone(tmp_path, "0", "package-0", control="intel-rapl-mmio") / "energy_uj"] = 500_000_000
    cpu, platform = rapl_meters(tmp_path, clock=clock)
    assert spend(cpu, clock, files).joules == pytest.approx(5.35)
    assert (cpu.source, cpu.scope) == ("rapl:package-0,package-1+dram", "CPU package 0, 1 with its DRAM")
    for file in files:
        file.write_text("0\n")
    assert spend(platform, clock, files).joules == pytest.approx(90.0)
    assert (platform.source, platform.scope) == ("rapl:psys", "platform as its maker wired it (psys)")


def test_dram_that_only_some_packages_count_is_left_out(tmp_path):
    clock = Clock()
    files = {zone(tmp_path, "0", "package-0") / "energy_uj": 1_000_000}
    files[zone(tmp_path, "0:0", "dram") / "energy_uj"] = 500_000
    files[zone(tmp_path, "1", "package-1") / "energy_uj"] = 2_000_000
    (meter,) = rapl_meters(tmp_path, clock=clock)
    assert meter.scope == "CPU package 0, 1"
    assert spend(meter, clock, files).joules == pytest.approx(3.0)


def test_a_rapl_counter_wraps_at_the_range_of_its_file(tmp_path):
    package, clock = zone(tmp_path, "0", "package-0", 262_143_328_850 - 4_000_000), Clock()
    (meter,) = rapl_meters(tmp_path, clock=clock)
    assert spend(meter, clock, {package / "energy_uj": 6_000_000}).joules == pytest.approx(10.0)


def test_closed_counters_name_the_file_and_the_command(tmp_path, monkeypatch):
    zone(tmp_path, "0", "package-0")
    close(monkeypatch, "energy_uj")
    with pytest.raises(EnergyError, match=r"energy_uj is closed to this user; run as root, or: sudo chmod a\+r /.*uj"):
        rapl_meters(tmp_path)


def test_a_counter_that_vanishes_in_the_window_is_named(tmp_path):
    package, clock = zone(tmp_path, "0", "package-0"), Clock()
    (meter,) = rapl_meters(tmp_path, clock=clock)
    meter.start()
    (package / "energy_uj").unlink()
    with pytest.raises(EnergyError, match="energy_uj is gone; its sensor was unplugged or its driver unloaded"):
        meter.stop()


def test_a_machine_without_rapl_says_so(tmp_path):
    with pytest.raises(EnergyError, match="no RAPL counters in .*powercap; this is a virtual machine"):
        rapl_meters(tmp_path)


@pytest.mark.parametrize("text", ["", "nan", "inf", "N/A", "12 uJ"])
def test_a_file_without_a_finite_number_is_named(tmp_path, text):
    write(tmp_path, energy_uj=text)
    with pytest.raises(EnergyError, match=f"energy_uj holds '{text}' instead of a number"):
        read_number(tmp_path / "energy_uj")


def test_a_sensor_that_is_off_gives_the_reason_of_the_system(tmp_path, monkeypatch):
    def fail(path, **options):
        raise OSError(61, "No data available")

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(EnergyError, match="cannot be read .No data available"):
        read_number(tmp_path / "in1_input")


# ---- power rails


def jetson(root: Path) -> Path:
    """An Orin Nano: three rails, of which VDD_IN feeds the others, and what the chip shows besides."""
    return write(
        root / "class/hwmon/hwmon1",
        name="ina3221",
        in1_label="VDD_CPU_GPU_CV",
        in1_input=5000,
        curr1_input=400,
        in2_label="VDD_IN",
        in2_enable=1,
        in2_input=5000,
        curr2_input=1200,
        in3_label="VDD_SOC",
        in3_enable=0,
        in3_input=5000,
        curr3_input=100,
        in4_input=99,
        curr4_input=1700,
        in7_label="sum of shunt voltages",
        in7_input=123,
    )


def test_a_jetson_has_a_meter_for_each_live_rail_its_supply_first(tmp_path):
    jetson(tmp_path)
    meters = hwmon_meters(tmp_path)
    assert [(meter.source, meter.scope) for meter in meters] == [
        ("hwmon:ina3221/VDD_IN", "whole module (rail VDD_IN)"),
        ("hwmon:ina3221/VDD_CPU_GPU_CV", "rail VDD_CPU_GPU_CV alone"),
    ]


def test_a_rail_is_millivolts_times_milliamperes_over_time(tmp_path):
    chip, clock = jetson(tmp_path), Clock()
    meter = hwmon_meters(tmp_path, clock=clock, is_threaded=False)[0]
    meter.start()  # 6 W
    for step in range(1, 5):
        clock.now = step * 0.4
        (chip / "curr2_input").write_text("2000\n")  # 10 W
        meter.sample()
    found = meter.stop()
    assert found.joules == pytest.approx(0.4 * (6 + 10) / 2 + 1.2 * 10)
    assert found.time_s == pytest.approx(1.6)


def test_chips_that_give_power_are_read_in_microwatts_and_told_apart(tmp_path):
    clock = Clock()
    for number, power_uw in (("hwmon2", 2_500_000), ("hwmon3", 4_000_000)):
        write(tmp_path / f"class/hwmon/{number}", name="ina219", in1_input=5000, curr1_input=1, power1_input=power_uw)
    first, second = hwmon_meters(tmp_path, clock=clock, is_threaded=False)
    assert (first.source, second.source) == ("hwmon:ina219/power1", "hwmon:ina219/power1@hwmon3")
    watts = []
    for meter in (first, second):
        meter.start()
        for _ in range(4):
            clock.now += 0.4
            meter.sample()
        watts.append(meter.stop().power_w)
    assert watts == pytest.approx([2.5, 4.0])


def test_power_of_batteries_and_gpus_is_no_rail(tmp_path):
    write(tmp_path / "class/hwmon/hwmon0", name="BAT0", power1_input=9_000_000)
    write(tmp_path / "class/hwmon/hwmon1", name="amdgpu", power1_input=9_000_000)
    write(tmp_path / "class/hwmon/hwmon2", name="rpi_volt", in0_lcrit_alarm=0)
    write(tmp_path / "class/hwmon/hwmon3")
    with pytest.raises(EnergyError, match="no power rails in .*hwmon; it needs an INA219"):
        hwmon_meters(tmp_path)


@pytest.mark.parametrize("content", [None, "nan", "garbage"])
def test_a_rail_that_vanishes_or_breaks_in_the_window_spoils_it(tmp_path, content):
    chip, clock = jetson(tmp_path), Clock()
    meter = hwmon_meters(tmp_path, clock=clock, is_threaded=False)[0]
    meter.start()
    clock.now = 0.4
    if content is None:
        (chip / "curr2_input").unlink()
    else:
        (chip / "curr2_input").write_text(content)
    meter.sample()
    (chip / "curr2_input").write_text("1200")  # it is back, but what happened meanwhile is unknown
    with pytest.raises(EnergyError, match="curr2_input (is gone|holds)"):
        meter.stop()


def test_a_closed_rail_is_found_out_at_once(tmp_path, monkeypatch):
    jetson(tmp_path)
    close(monkeypatch, "curr2_input")
    with pytest.raises(EnergyError, match="curr2_input is closed to this user"):
        hwmon_meters(tmp_path)


# ---- temperature


def thermal(root: Path, *zones: tuple[str, object]) -> Path:
    for number, (kind, temp) in enumerate(zones):
        write(root / f"class/thermal/thermal_zone{number}", type=kind, temp=temp)
    return root


@pytest.mark.parametrize(
    ("zones", "expected"),
    [
        ((("acpitz", 90_000), ("x86_pkg_temp", 61_000)), 61.0),
        ((("CPU-therm", 48_500), ("GPU-therm", 70_000), ("SOC2-therm", 50_250)), 50.25),
        ((("cpu-thermal", -274_000), ("cpu-thermal", 45_000)), 45.0),
        ((("cpu-thermal", 2_000_000), ("acpitz", 27_800)), 27.8),
        ((("cpu-thermal", "nan"), ("soc-thermal", "")), None),
        ((), None),
    ],
)
def test_the_hottest_sane_zone_of_the_processor_counts(tmp_path, zones, expected):
    assert read_temperature(thermal(tmp_path, *zones)) == (None if expected is None else pytest.approx(expected))
