"""What all verbs share: how they speak, and what they check before any work is lost.

Tables go to stderr; with `--json` one JSON object goes to stdout and nothing else.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def fail(sentence: str, status: int = 2) -> int:
    print(f"iret: {' '.join(sentence.split())}", file=sys.stderr)
    return status


def say(text: str = "") -> None:
    print(text, file=sys.stderr)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain aligned table on stderr; the first column is left-aligned."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say("  ".join(cells).rstrip())


def check_device(name: str) -> str:
    """Raises ValueError for a device that models do not run on here; torch itself has several ways to fail."""
    import torch

    try:
        is_known = torch.device(name).type in ("cpu", "cuda", "mps")
        torch.empty(0, device=name if is_known else "cpu")
    except (RuntimeError, AssertionError):
        is_known = False
    if not is_known:
        raise ValueError(f"device {name!r} cannot be used here; `iret doctor` lists those that can.")
    return name


def check_picture(path: str | None) -> None:
    """Raises ValueError for a picture that could not be written, or that is somebody else's, before any work is lost."""
    from iret.picture import check_picture

    if path is not None:
        check_picture(Path(path))


def check_folder(path: Path, option: str = "--out") -> None:
    """Raises ValueError for a folder that could not be made or written into, before any work is lost."""
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"{path} cannot be a folder, because {there} is a file; name another with {option}.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {there} is closed to this user; name another with {option}.")


def check_unused(folder: Path) -> None:
    """Raises ValueError for a folder that holds anything, or could not be made or written into."""
    check_folder(folder)
    if there := sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []:
        raise ValueError(f"{folder} holds a {there[0]} already; name a new folder with --out.")


def check_above_zero(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for an option that was given and is no finite number above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value:g} must be above 0 and finite.")


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for a count that was given and is below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be 1 or more.")


def check_idle_watts(watts: float | None) -> None:
    """Raises ValueError unless it was left out, or is finite and 0 or more."""
    if watts is not None and not 0 <= watts < math.inf:
        raise ValueError(f"--idle-watts {watts:g} must be 0 or more.")


def open_data(args: argparse.Namespace, split: str, model):
    from iret.train.data import open_data

    announce_hub(args.data)
    return open_data(args.data, split, model.preprocessing, on_corrupt=args.on_corrupt, label_column=args.label_column)


def announce_hub(data: str) -> None:
    """Say that data is looked for elsewhere, which takes half a minute where there is no network."""
    from iret.train.data import EMBEDDED, may_be_hub_id

    if may_be_hub_id(data) and data != EMBEDDED and not Path(data).exists():
        say(f"{data} is no file or folder here; asking the Hugging Face hub")


def explain_rate(rate: float, device: str, ms: Sequence[float] | None) -> list[str]:
    """A sentence where not every point, by its `ms` an image on `device`, keeps up with `rate` images a second."""
    if ms is None or rate * max(ms) <= 1000:
        return []
    return [
        f"--rate {rate:g}: one after the other {device} answers {1000 / max(ms):.3g} images a second at its slowest point and "
        f"{1000 / min(ms):.3g} at its fastest; only energy is reckoned with"
    ]


def explain_idle(battery_wh: float | None, hours: float | None, idle_watts: float) -> list[str]:
    """A sentence where a battery that was given is all used up by the idle device."""
    if battery_wh is None or hours is None or battery_wh > hours * idle_watts:
        return []
    taken = f"({idle_watts:g} W) takes {hours * idle_watts:g} Wh"
    return [f"--battery-wh {battery_wh:g} cannot last {hours:g} hours: the idle device alone {taken}"]


def explain_joules(found) -> str:
    """What the joules of a DeviceTable or of a Row of `bench` are."""
    idle = f", above {found.idle_watts:.3g} W idle" if found.energy_kind == "measured" else ""
    return f"joules {found.energy_kind} by {found.energy_source}: {found.energy_scope}{idle}"


def set_threads(count: int | None) -> None:
    """Raises ValueError unless `count` is None (torch decides) or 1 to the processors that this process may use."""
    import torch

    from iret.doctor import count_usable

    if count is None:
        return
    if not 1 <= count <= count_usable():
        raise ValueError(
            f"--threads {count} must be 1 or more, and at most {count_usable()}, the processors that this process may use."
        )
    torch.set_num_threads(count)


def choose_meter(args: argparse.Namespace):
    """The meter of --meter, with the --battery-wh of a battery; "auto" on a GPU is the GPU's own, where there is one.

    Raises:
        EnergyError: no such meter, or it cannot be used here.
        ValueError: a capacity that is none, or of another meter than the battery.
    """
    from iret.measure.energy import EnergyError
    from iret.measure.sources import open_meter

    if args.battery_wh is not None and not (args.meter.startswith("battery") and args.battery_wh > 0):
        raise ValueError(
            f"--battery-wh {args.battery_wh:g} with --meter {args.meter}: give watt-hours above 0, with --meter battery."
        )
    if args.meter == "auto" and args.device.startswith("cuda"):
        try:
            return open_meter("nvml")
        except EnergyError as error:
            say(f"energy is estimated: {error}")
            return open_meter("estimate")
    return open_meter(args.meter, capacity_wh=args.battery_wh)


def measure_bundle(folder: Path, engine: str | None, threads: int | None):
    """Times the operating points of a bundle here and keeps the clock in it; the session and its table."""
    from iret.runtime.session import Session

    session = Session(folder, engine, threads=threads)
    say("measuring the clock of this machine")
    table = session.measure()
    session.save()
    return session, table
