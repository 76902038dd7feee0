"""The battery: how full it is now, and the energy a window took out of it, for the whole machine.

    /sys/class/power_supply/BAT0/{type,status,capacity,energy_now}    microwatt-hours
    /sys/class/power_supply/BAT0/{charge_now,voltage_now}             where there is no energy_now: microampere-hours, microvolts
    /sys/class/power_supply/AC/{type,online}

Elsewhere psutil gives a percentage. Batteries report in steps of minutes, so windows last minutes. Tested on made-up trees laid
out as the kernel's ABI/testing/sysfs-class-power says, and with a stand-in for psutil.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from iret.measure.energy import Clock, EnergyError, EnergyMeter
from iret.measure.sysfs import SYS, read_number, read_text

COUNTER_RESOLUTION_S = 300.0  # a step is some 10 mWh, up to 10 s apart at a few watts
PERCENT_RESOLUTION_S = 1800.0  # one percent of a laptop's battery lasts minutes
PER_MICRO_HOUR = 3600e-6  # microwatt-hours -> J, microampere-hours -> C
SCOPE = "whole machine (battery)"

Store = tuple[float, float]  # (coulombs, volts), or (joules, 1)


@dataclass(frozen=True, kw_only=True)
class Battery:
    """What is left: percent in [0, 100], and joules where the battery says (else None)."""

    percent: float
    joules: float | None
    is_plugged: bool
    source: str


def read_battery(root: Path = SYS, *, psutil: Any = None) -> Battery | None:
    """The machine's batteries now, added up; None if it has none. `psutil` is used, and imported, only outside Linux.

    Raises:
        EnergyError: a battery is there and cannot be read, or psutil is needed and missing.
    """
    if not _has_supplies(root):
        return _ask_psutil(psutil)
    cells = _cells(root)
    if not cells:
        return None
    stores = [_store(cell) for cell in cells]
    energies_j = [amount * volts for amount, volts in filter(None, stores)]
    full = [read_number(cell / "energy_full") if (cell / "energy_full").exists() else 0.0 for cell in cells]
    return Battery(
        percent=float(np.average([_percent(cell) for cell in cells], weights=full if all(full) else None)),
        joules=sum(energies_j) if None not in stores else None,
        is_plugged=_is_plugged(root),
        source="battery:" + "+".join(cell.name for cell in cells),
    )


def battery_meter(
    root: Path = SYS, *, capacity_wh: float | None = None, psutil: Any = None, clock: Clock = time.perf_counter
) -> "BatteryMeter":
    """A meter over the batteries' own counters or, where they only give a percentage, over that times `capacity_wh`.

    Raises:
        EnergyError: there is no battery, it is being charged, or the capacity is needed and was not given.
    """
    battery = read_battery(root, psutil=psutil)
    if battery is None:
        raise EnergyError("this machine has no battery.")
    if battery.joules is None and capacity_wh is None:
        raise EnergyError(
            f"{battery.source} says only a percentage; give its capacity in watt-hours (--battery-wh, capacity_wh)."
        )

    def read_percent() -> list[Store]:
        left = read_battery(root, psutil=psutil)
        if left is None:
            raise EnergyError("the battery is gone; it was taken out.")
        return [(left.percent / 100 * (capacity_wh or 0.0) * 3600, 1.0)]

    def read_counters() -> list[Store]:
        stores = [_store(cell) for cell in cells]
        if None in stores:
            raise EnergyError(f"{battery.source} no longer says its energy; it was taken out.")
        return [store for store in stores if store is not None]

    def is_plugged() -> bool:
        left = read_battery(root, psutil=psutil)
        return left is not None and left.is_plugged

    cells = _cells(root) if _has_supplies(root) else []
    is_counted = battery.joules is not None
    meter = BatteryMeter(
        battery.source,
        read_counters if is_counted else read_percent,
        is_plugged,
        resolution_s=COUNTER_RESOLUTION_S if is_counted else PERCENT_RESOLUTION_S,
        clock=clock,
    )
    meter.refuse_if_plugged()
    return meter


class BatteryMeter(EnergyMeter):
    """What a window took out of the batteries. Charging is looked for at both ends, not in between.

    Charge is turned into energy at the mean of the voltages at both ends: a battery's voltage sags under load, and the level
    `charge * voltage` would count the sag as energy spent.
    """

    def __init__(
        self,
        source: str,
        read_stores: Callable[[], list[Store]],
        is_plugged: Callable[[], bool],
        *,
        resolution_s: float,
        clock: Clock = time.perf_counter,
    ) -> None:
        super().__init__(source, SCOPE, resolution_s=resolution_s)
        self._read_stores = read_stores
        self._is_plugged = is_plugged
        self._clock = clock
        self._starts: list[Store] = []
        self._started_s = 0.0

    def refuse_if_plugged(self) -> None:
        if self._is_plugged():
            raise EnergyError(f"{self.source} is being charged, which hides what the machine takes; unplug it.")

    def _begin(self) -> None:
        self.refuse_if_plugged()
        self._starts, self._started_s = self._read_stores(), self._clock()

    def _end(self) -> tuple[float, float]:
        time_s = self._clock() - self._started_s
        ends = self._read_stores()
        self.refuse_if_plugged()
        pairs = zip(self._starts, ends, strict=True)
        return sum((before[0] - after[0]) * (before[1] + after[1]) / 2 for before, after in pairs), time_s


# ---- the files


def _has_supplies(root: Path) -> bool:
    return (root / "class/power_supply").is_dir()


def _cells(root: Path) -> list[Path]:
    """Folders of the batteries that feed the machine; a mouse's or a headset's says that it belongs to a device."""
    return [
        folder
        for folder in sorted((root / "class/power_supply").iterdir())
        if (folder / "type").exists()
        and read_text(folder / "type") == "Battery"
        and not ((folder / "scope").exists() and read_text(folder / "scope") == "Device")
    ]


def _store(cell: Path) -> Store | None:
    """What is in a battery; None if it gives only a percentage."""
    if (cell / "energy_now").exists():
        return read_number(cell / "energy_now") * PER_MICRO_HOUR, 1.0
    if (cell / "charge_now").exists() and (cell / "voltage_now").exists():
        return read_number(cell / "charge_now") * PER_MICRO_HOUR, read_number(cell / "voltage_now") * 1e-6
    return None


def _percent(cell: Path) -> float:
    if (cell / "capacity").exists():
        return _checked_percent(read_number(cell / "capacity"), cell.name)
    for quantity in ("energy", "charge"):
        if (cell / f"{quantity}_now").exists() and (full := read_number(cell / f"{quantity}_full")) > 0:
            return _checked_percent(100 * read_number(cell / f"{quantity}_now") / full, cell.name)
    raise EnergyError(f"battery {cell.name} says neither its percentage nor its energy.")


def _checked_percent(percent: float, name: str) -> float:
    """Worn batteries read a little over 100."""
    if not 0 <= percent < 200:
        raise EnergyError(f"battery {name} says it is {percent:g} % full; its gauge is broken.")
    return min(percent, 100.0)


def _is_plugged(root: Path) -> bool:
    """Whether some supply is on line or a battery is being charged.

    Where no supply says so, batteries of which none discharges count as plugged in. (One of two may rest meanwhile.)
    """
    folders = list((root / "class/power_supply").iterdir())
    lines = [
        read_number(folder / "online")
        for folder in folders
        if (folder / "online").exists() and read_text(folder / "type") != "Battery"  # a mouse's is on line, too
    ]
    states = [read_text(cell / "status") for cell in _cells(root) if (cell / "status").exists()]
    return any(lines) or "Charging" in states or (not lines and "Discharging" not in states)


# ---- psutil


def _ask_psutil(psutil: Any) -> Battery | None:
    if psutil is None:
        try:
            psutil = import_module("psutil")
        except ImportError as error:
            raise EnergyError("the battery is read with psutil here; install it: pip install 'iret[energy]'") from error
    found = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if found is None:
        return None
    # power_plugged is None where psutil cannot tell; taking that for plugged refuses a window instead of spoiling one.
    return Battery(
        percent=_checked_percent(float(found.percent), "psutil"),
        joules=None,
        is_plugged=found.power_plugged is not False,
        source="battery:psutil",
    )
