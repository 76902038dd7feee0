"""Says which energy meters this machine has and why others are not usable, and opens one by name.

open_meter()                           the best measured one, else the estimate
open_meter("rapl")                     the first meter of a source
open_meter("hwmon:ina3221/VDD_IN")     one meter by its own name; a wrong one lists those that there are
"""

from collections.abc import Callable
from pathlib import Path

from iret.measure.battery import battery_meter
from iret.measure.energy import EnergyError, EnergyMeter
from iret.measure.estimate import HOROWITZ, EstimateMeter
from iret.measure.gpu import nvml_meters, zeus_meter
from iret.measure.pmic import pmic_meter
from iret.measure.sysfs import SYS, hwmon_meters, rapl_meters

# What covers more of the machine comes first. Not the battery, whose windows last minutes, nor Zeus, which reads the counters of
# `rapl` and `nvml` and imports much: both only by name. A run on a GPU should name `nvml`, as the CPU comes before it here.
AUTO = ("hwmon", "pi-pmic", "rapl", "nvml", "estimate")


def _sources(root: Path, capacity_wh: float | None) -> dict[str, Callable[[], list[EnergyMeter]]]:
    return {
        "hwmon": lambda: hwmon_meters(root),
        "pi-pmic": lambda: [pmic_meter()],
        "rapl": lambda: rapl_meters(root),
        "nvml": lambda: nvml_meters(),
        "battery": lambda: [battery_meter(root, capacity_wh=capacity_wh)],
        "zeus": lambda: [zeus_meter()],
        "estimate": lambda: [EstimateMeter(constants) for constants in HOROWITZ.values()],
    }


def explain_meters(*, root: Path = SYS, capacity_wh: float | None = None) -> dict[str, str]:
    """Source -> `ready: ` and what its meters cover, or the sentence that says why it is not usable.

    What meters cover overlaps; never add them.
    """
    lines = {}
    for name, source in _sources(root, capacity_wh).items():
        try:
            meters = source()
            scopes = dict.fromkeys(meter.scope for meter in meters)
            lines[name] = f"ready: {', '.join(scopes)} ({meters[0].kind})"
        except EnergyError as error:
            lines[name] = str(error)
    return lines


def open_meter(name: str = "auto", *, root: Path = SYS, capacity_wh: float | None = None) -> EnergyMeter:
    """The meter of that name: a source, a meter's own `source`, or `auto` for the first of `AUTO` that is usable.

    `capacity_wh`: of the full battery, for `battery` where its gauge says only a percentage.

    Raises:
        EnergyError: no such name, or the one asked for is not usable here, and why.
    """
    sources = _sources(root, capacity_wh)
    if name == "auto":
        for choice in AUTO:
            try:
                return sources[choice]()[0]
            except EnergyError:
                continue
    family = name.partition(":")[0]
    if family not in sources:
        raise EnergyError(f"there is no energy meter {name!r}; choose from auto, {', '.join(sources)}.")
    meters = sources[family]()
    for meter in meters:
        if name in (family, meter.source):
            return meter
    raise EnergyError(f"there is no energy meter {name!r} here; {family} has {', '.join(m.source for m in meters)}.")
