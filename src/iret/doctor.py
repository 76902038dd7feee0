"""What this machine has and lacks for iret: `iret doctor`.

Works on a base install. Nothing heavy is imported before `report()` runs, and a library that breaks on import becomes
one sentence of the report instead of a traceback. Which extra brings what is read from the installed metadata, so
it cannot drift from `pyproject.toml`; only what each extra is *for* stands here.
"""

import os
import platform
import re
import warnings
from collections.abc import Set
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import iret

PURPOSES = {
    "torch": "models, prediction, training",
    "data": "training and evaluation on any Hugging Face data set",
    "energy": "joules measured: NVIDIA GPUs, batteries",
    "timm": "timm's weights, and the methods that run on them",
    "onnx": "bundles on ONNX Runtime, without torch",
    "openvino": "bundles on OpenVINO, without torch",
    "executorch": "bundles for ExecuTorch, written and run",
    "export": "writing bundles for ONNX Runtime, and with iret[openvino] for OpenVINO",
    "openvino-int8": "writing int8 bundles for OpenVINO",
    "serve": "bundles over HTTP, without torch; with iret[onnx] or another engine",
    "ray": "the same service on many machines",
    "all": "everything above",
}
SPIN_ADVICE = (
    "GOMP_SPINCOUNT is not set: beside another busy process, torch on several threads can run 10 to 30 times slower. "
    "Run: export GOMP_SPINCOUNT=0"
)
CPUINFO = Path("/proc/cpuinfo")
_REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:\[([\w.,\s-]+)\])?.*?;.*\bextra\s*==\s*['\"]([\w.-]+)['\"]")


def report() -> dict[str, Any]:
    """Versions, devices, threads, extras, energy meters and notes: JSON-ready, and free of paths and host names.

    Imports torch, torchvision and timm where they are installed, which takes seconds.
    """
    from iret.measure.sources import explain_meters  # with NumPy, which the doctor itself does without

    problems = {"torch": torch_problem(), "timm": timm_problem()}
    notes = [problem for problem in problems.values() if problem]
    extras = extras_report({name for name, problem in problems.items() if problem})
    if not extras:
        notes.append("iret runs from a source tree that is not installed; run `pip install -e .` to see its extras.")
    devices, device_notes = devices_report()
    threads = threads_report()
    if platform.system() == "Linux" and threads["num_torch_threads"] and threads["GOMP_SPINCOUNT"] is None:
        notes.append(SPIN_ADVICE)
    return {
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "devices": devices,
        "threads": threads,
        "extras": extras,
        "meters": explain_meters(),
        "notes": notes + device_notes,
    }


def describe(found: dict[str, Any]) -> str:
    """The report as text, one fact a line, a blank line between its parts."""
    facts = [("system", found["system"]), *found["devices"].items(), *found["threads"].items()]
    extras = []
    for name, extra in found["extras"].items():
        first, more = ", ".join(extra["missing"][:3]), len(extra["missing"]) - 3
        missing = f"{first} and {more} more" if more > 0 else first
        state = f"missing {missing}; {extra['install']}" if extra["missing"] else "ready"
        if extra["broken"] and not extra["missing"]:
            state = f"installed, but {' and '.join(extra['broken'])} cannot be imported, see below"
        extras.append((f"iret[{name}]", f"{extra['for']}: {state}"))
    tables = [
        [f"{name:18} {'not set' if value is None else value}" for name, value in table]
        for table in (found["versions"].items(), facts, extras, found["meters"].items())
    ]
    return "\n\n".join("\n".join(lines) for lines in [*tables, found["notes"]] if lines)


# ---- what is installed


def versions() -> dict[str, str]:
    """Python, iret, and each library that it or one of its extras asks for, where installed; none is imported."""
    wanted = {"numpy", "pillow", "torchvision"}.union(*extras_needed().values())
    found = {name: version for name in sorted(wanted) if (version := _version(name))}
    return {"python": platform.python_version(), "iret": iret.__version__, **found}


def extras_report(broken: Set[str] = frozenset()) -> dict[str, dict[str, Any]]:
    """For each extra: what it is for, which of its libraries are missing, which `broken`, and the command that brings them."""
    return {
        name: {
            "for": PURPOSES.get(name, name),
            "missing": [library for library in sorted(libraries) if _version(library) is None],
            "broken": sorted(libraries & broken),
            "install": f"pip install 'iret[{name}]'",
        }
        for name, libraries in extras_needed().items()
    }


def extras_needed() -> dict[str, set[str]]:
    """Extra -> the libraries it brings, those of the extras it includes among them; empty if iret is not installed."""
    try:
        requirements = metadata.requires("iret") or []
    except metadata.PackageNotFoundError:
        return {}
    needed: dict[str, set[str]] = {name: set() for name in PURPOSES}
    included: dict[str, set[str]] = {name: set() for name in PURPOSES}
    for requirement in requirements:
        if match := _REQUIREMENT.match(requirement):
            library, inner, extra = match.groups()
            if library == "iret":
                included.setdefault(extra, set()).update(name.strip() for name in inner.split(","))
            else:
                needed.setdefault(extra, set()).add(library)
    for _ in included:  # an extra may include one that includes another
        for extra, names in included.items():
            needed.setdefault(extra, set()).update(*(needed.get(name, set()) for name in names))
    return needed


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# ---- what is broken


def torch_problem() -> str | None:
    """One sentence when torch is installed and cannot be imported, else None."""
    problem = import_problem("torch")
    return problem and f"{problem}: run pip install --force-reinstall torch."


def timm_problem() -> str | None:
    """One sentence when timm, or the torchvision it imports, is installed and cannot be imported, else None.

    A torchvision built for another torch is the usual cause: the registry's Linux build beside a CPU torch fails.
    """
    problem = import_problem("torchvision")
    if problem:
        return (
            f"{problem}, so timm cannot be either: install it from the index that torch {_version('torch')} came from "
            "(iret's own models need neither)."
        )
    problem = import_problem("timm")
    return problem and f"{problem}: run pip install --force-reinstall timm (iret's own models do not need it)."


def import_problem(name: str) -> str | None:
    """Why an installed module cannot be imported, on one line; None where it can be, or is not installed."""
    if find_spec(name) is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(name)
    except Exception as error:  # whatever a broken library raises is the finding
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        return f"{name} {_version(name) or '(no version)'} cannot be imported ({type(error).__name__}: {reason})"
    return None


# ---- what it runs on


def devices_report() -> tuple[dict[str, str], list[str]]:
    """The devices a model can be put on, each with its name; and what CUDA complains of while being asked."""
    devices = {"cpu": processor_name()}
    if import_problem("torch") or find_spec("torch") is None:
        return devices, []
    torch = import_module("torch")
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                properties = torch.cuda.get_device_properties(index)
                devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        if torch.backends.mps.is_available():
            devices["mps"] = "Apple GPU"
    return devices, [str(complaint.message).partition("\n")[0] for complaint in complaints]


def threads_report() -> dict[str, int | str | None]:
    """Processors of the machine and of this process, torch's threads, the variables that rule them; None: not set."""
    num_torch_threads = None
    if find_spec("torch") is not None and import_problem("torch") is None:
        num_torch_threads = import_module("torch").get_num_threads()
    return {
        "num_processors": os.cpu_count(),
        "num_usable": count_usable(),
        "num_torch_threads": num_torch_threads,
        **{name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")},
    }


def count_usable() -> int:
    """Logical processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_device(device: Any, precision: str) -> str:
    """What a clock holds for: the processor, its threads where torch decides them, and the number format.

    `device` is a `torch.device`.
    """
    torch = import_module("torch")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {precision}"
    if device.type == "mps":
        return f"{processor_name()} GPU, {precision}"
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}, {precision}"


def processor_name() -> str:
    """The processor as the system calls it; the architecture where it has no better name.

    A name without a number, as virtual machines have it (AMD EPYC, Xeon CPU @ 2.20GHz), is that of a series: family and model
    tell its members apart.
    """
    try:
        first = CPUINFO.read_text("utf-8", errors="replace").partition("\n\n")[0]  # of several alike
    except OSError:
        first = ""  # not Linux
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = found.get("model name") or platform.processor() or platform.machine()
    if not re.search(r"\d", re.sub(r"@.*|version .*", "", name)) and {"cpu family", "model"} <= found.keys():
        return f"{name} family {found['cpu family']} model {found['model']}"
    return name
