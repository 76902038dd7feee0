"""Sensors that Linux shows as files: RAPL counters, power rails (hwmon) and temperatures.

    /sys/class/powercap/intel-rapl:0/energy_uj                        CPU package, microjoules, wraps around
    /sys/class/hwmon/hwmon3/{name,in1_label,in1_input,curr1_input}    INA3221 on a Jetson: mV times mA
    /sys/class/hwmon/hwmon4/power1_input                              INA219, INA226 and the like: microwatts
    /sys/class/thermal/thermal_zone0/{type,temp}                      millidegrees

`root` stands for /sys everywhere. Tested on made-up trees laid out as the kernel's documents say (admin-guide/pm/powercap,
hwmon/ina3221, ABI/testing/sysfs-class-hwmon), not yet on such hardware.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

from iret.measure.energy import Clock, Counter, CounterMeter, EnergyError, EnergyMeter, PowerMeter

SYS = Path("/sys")

RAPL_RESOLUTION_S = 0.1  # the counters move about once a millisecond, so both ends together blur 2 % at most
RAIL_PERIOD_S, RAIL_RESOLUTION_S = 0.05, 1.0
# Chips that do nothing but meter rails. Others with a power file are left out: a battery's shows its charging, a GPU's is
# the GPU.
RAIL_DRIVERS = ("ina", "rpi")
INPUT_RAILS = ("VDD_IN", "POM_5V_IN")  # the whole module's supply on Jetsons; the other rails are parts of it
INA3221_CHANNELS = (1, 2, 3)  # further in* files of this chip are shunt voltages, and curr4 is a sum

CPU_ZONES = ("x86_pkg_temp", "coretemp", "k10temp", "cpu", "soc", "tj", "mcu")
SANE_C = (-40.0, 150.0)  # silicon runs nowhere else; dead sensors read -274 or 2e6


def read_text(path: Path) -> str:
    """Raises EnergyError that says what to do if the file is gone, closed to this user, or fails."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError as error:
        raise EnergyError(f"{path} is gone; its sensor was unplugged or its driver unloaded.") from error
    except PermissionError as error:
        raise EnergyError(f"{path} is closed to this user; run as root, or: sudo chmod a+r {path}") from error
    except OSError as error:
        raise EnergyError(f"{path} cannot be read ({error.strerror}); its sensor is off or was unplugged.") from error


def read_number(path: Path) -> float:
    """Raises EnergyError as `read_text` does, and for anything but a finite number."""
    text = read_text(path)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise EnergyError(f"{path} holds {text[:40]!r} instead of a number; its sensor is off or broken.")
    return number


# ---- RAPL


def rapl_meters(root: Path = SYS, *, clock: Clock = time.perf_counter) -> list[EnergyMeter]:
    """The CPU packages together, with their DRAM where each has a counter for it; then the platform (psys), if any.

    The platform's counter holds the packages, so the two are never added. Intel, and AMD through the same driver.

    Raises:
        EnergyError: there are no counters, or they are closed to this user (they are for root since CVE-2020-8694).
    """
    zones = sorted((root / "class/powercap").glob("intel-rapl:*"))  # not intel-rapl-mmio:*, the same packages again
    names = {zone: read_text(zone / "name") for zone in zones}
    packages = [zone for zone in zones if names[zone].startswith("package") and zone.name.count(":") == 1]
    drams = [zone for zone in zones if names[zone] == "dram"]
    owners = {zone.name.rpartition(":")[0] for zone in drams}
    has_dram = bool(packages) and owners == {package.name for package in packages}
    found: list[tuple[str, str, list[Path]]] = []
    if packages:
        numbers = ", ".join(names[zone].removeprefix("package-") for zone in packages)
        scope = f"CPU package {numbers}" + (" with its DRAM" if has_dram else "")
        source = "+".join(["rapl:" + ",".join(names[zone] for zone in packages)] + ["dram"] * has_dram)
        found.append((source, scope, packages + drams * has_dram))
    platforms = [zone for zone in zones if names[zone] == "psys"]
    if platforms:
        found.append(("rapl:psys", "platform as its maker wired it (psys)", platforms))
    if not found:
        raise EnergyError(
            f"no RAPL counters in {root / 'class/powercap'}; this is a virtual machine or container, no Intel or AMD "
            "processor, or Linux runs without intel_rapl_msr."
        )
    return [
        CounterMeter(source, scope, [_rapl_counter(zone) for zone in used], resolution_s=RAPL_RESOLUTION_S, clock=clock)
        for source, scope, used in found
    ]


def _rapl_counter(zone: Path) -> Counter:
    """Reads it once, so that a counter closed to this user is found out now."""

    def read_j() -> float:
        return read_number(zone / "energy_uj") * 1e-6

    read_j()
    return Counter(read_j=read_j, range_j=read_number(zone / "max_energy_range_uj") * 1e-6)


# ---- power rails


def hwmon_meters(root: Path = SYS, *, clock: Clock = time.perf_counter, is_threaded: bool = True) -> list[EnergyMeter]:
    """One meter for each rail of an INA chip or of the Pi's driver, the rail that feeds the whole module first.

    Rails are not added up: on a Jetson some contain others. Older Jetsons (JetPack 4) show theirs under iio, not read here.

    Raises:
        EnergyError: there is none, or it is closed to this user.
    """
    meters: list[EnergyMeter] = []
    for chip in sorted((root / "class/hwmon").glob("hwmon*")):
        if not (chip / "name").exists() or not (driver := read_text(chip / "name")).startswith(RAIL_DRIVERS):
            continue
        for rail, read_w in _rails(chip, driver):
            source = f"hwmon:{driver}/{rail}"
            if any(meter.source == source for meter in meters):
                source += f"@{chip.name}"
            scope = f"whole module (rail {rail})" if rail in INPUT_RAILS else f"rail {rail} alone"
            read_w()  # a closed or broken sensor is found out now
            meters.append(
                PowerMeter(
                    source,
                    scope,
                    read_w,
                    period_s=RAIL_PERIOD_S,
                    resolution_s=RAIL_RESOLUTION_S,
                    clock=clock,
                    is_threaded=is_threaded,
                )
            )
    if not meters:
        raise EnergyError(f"no power rails in {root / 'class/hwmon'}; it needs an INA219, INA226, INA3221 or the like.")
    return sorted(meters, key=lambda meter: not meter.scope.startswith("whole"))  # stable: the rest keeps its order


def _rails(chip: Path, driver: str) -> list[tuple[str, Callable[[], float]]]:
    """(rail, reader of its watts) of a chip; channels that are switched off are left out."""

    def label(name: str) -> str:
        file = chip / f"{name}_label"
        return read_text(file) if file.exists() else name

    def power(file: Path) -> Callable[[], float]:
        return lambda: read_number(file) * 1e-6

    def product(channel: int) -> Callable[[], float]:
        volts, amperes = chip / f"in{channel}_input", chip / f"curr{channel}_input"
        return lambda: read_number(volts) * 1e-3 * read_number(amperes) * 1e-3

    files = sorted(chip.glob("power*_input"))
    if files or driver != "ina3221":
        return [(label(file.name.removesuffix("_input")), power(file)) for file in files]
    return [
        (label(f"in{channel}"), product(channel))
        for channel in INA3221_CHANNELS
        if (chip / f"curr{channel}_input").exists() and not _is_off(chip / f"in{channel}_enable")
    ]


def _is_off(switch: Path) -> bool:
    return switch.exists() and read_text(switch) == "0"


# ---- temperature


def read_temperature(root: Path = SYS) -> float | None:
    """Degrees C of the hottest zone of the processor, or of any zone where none says it is; None if nothing sane is read.

    Zones that fail or read what silicon never has are passed over: laptops and boards have dead ones.
    """
    zones: list[tuple[bool, float]] = []
    for zone in (root / "class/thermal").glob("thermal_zone*"):
        try:
            kind, temperature_c = read_text(zone / "type").lower(), read_number(zone / "temp") * 1e-3
        except EnergyError:
            continue
        if SANE_C[0] < temperature_c < SANE_C[1]:
            zones.append((kind.startswith(CPU_ZONES), temperature_c))
    return max(zones)[1] if zones else None
