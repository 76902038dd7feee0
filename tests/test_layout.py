"""Holds the plan of the house: which room may import which, and a few rules a reader could check by eye.

The rooms and their order are those of the design; a module of `src/iret` that has no room here fails, so a new one is
placed on purpose. The checks are functions over a folder: the tests at the end run them on a bad tree, which
shows that each of them can fail.
"""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "iret"

# From the floor up. A room imports rooms of its own level (never in a circle) and of the levels below.
LEVELS = (
    {"runtime", "measure", "doctor"},
    {"attention", "lifting", "tokens", "weights", "picture", "compiled"},
    {"vit", "selection", "classifier"},
    {"model", "output", "systems", "policies", "presets"},
    {"zoo", "precision", "narrow"},
    {
        "train",
        "export",
        "fixed",
        "calibrate",
        "clock",
        "bench",
        "card",
        "evaluate",
        "predict",
        "draw",
        "simulate",
        "pilot",
    },
    {"arguments", "cli", "verbs", "demo", "serve", "sweep"},
)
# What `pip install iret` alone can load: at import time the standard library, the base dependencies and each other.
BASE_ROOMS = {"__init__", "runtime", "measure", "arguments", "doctor", "cli", "verbs"}
BASE_LIBRARIES = {"numpy", "PIL"}
TORCH_FREE_ROOMS = {"runtime", "measure"}  # not even inside a function

VAGUE_NAMES = re.compile(r"(utils?|helpers?|misc|common|.*_?v\d+)$")
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# "file.py" or "file.py:function" -> why it is longer. An entry that is no longer needed fails too.
LONGER: dict[str, str] = {}


# ---- reading the tree


def module_files(package: Path) -> dict[str, Path]:
    """Dotted module name -> file."""
    names = {}
    for file in sorted(package.rglob("*.py")):
        parts = (package.name, *file.relative_to(package).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def room_of(module: str) -> str:
    """`iret.train.loop` is in the room `train`; the package itself is the room `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(node: ast.AST, *, inside_functions: bool) -> Iterator[ast.AST]:
    """Every node that runs: not the blocks for type checkers and, unless asked for, not the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt) and is_type_checking(child):
            continue
        if not inside_functions and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield child
        yield from walk(child, inside_functions=inside_functions)


def imports(module: str, file: Path, *, inside_functions: bool) -> Iterator[tuple[str, str | None]]:
    """(module, name imported from it or None) for every import statement that runs."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in walk(ast.parse(file.read_text()), inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            yield from ((base, alias.name) for alias in node.names)


def own_imports(package: Path, *, inside_functions: bool) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports."""
    files = module_files(package)
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        found = set()
        for base, name in imports(module, file, inside_functions=inside_functions):
            if base.split(".")[0] == package.name:
                found.add(f"{base}.{name}" if f"{base}.{name}" in files else base)
        graph[module] = found - {module}
    return graph


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(qualified name, lines) of every function and method, docstring included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name, (node.end_lineno or node.lineno) - node.lineno + 1
        named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        yield from functions(node, f"{prefix}{node.name}." if named else prefix)


# ---- the rules: each returns what breaks it


def wrong_directions(package: Path) -> list[str]:
    level = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
    wrong = []
    for module, targets in own_imports(package, inside_functions=True).items():
        room = room_of(module)
        if room == "__init__":
            wrong += [f"{module} imports {target}; it has to stay lazy" for target in sorted(targets)]
            continue
        if room not in level:
            wrong.append(f"{module} has no room; give it one in LEVELS")
            continue
        for target in sorted(targets):
            other = room_of(target)
            if other not in ("__init__", room) and level.get(other, -1) > level[room]:
                wrong.append(f"{module} imports {target}, which stands above it")
    return wrong


def circles(package: Path) -> list[str]:
    try:
        tuple(TopologicalSorter(own_imports(package, inside_functions=True)).static_order())
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def heavy_imports(package: Path) -> list[str]:
    """What a base install could not import, reached from the rooms that it has to be able to load."""
    graph = own_imports(package, inside_functions=False)
    files = module_files(package)
    reached: set[str] = set()
    waiting = [module for module in files if room_of(module) in BASE_ROOMS]
    while waiting:
        module = waiting.pop()
        if module not in reached and module in files:
            reached.add(module)
            waiting += graph[module]
    allowed = BASE_LIBRARIES | set(sys.stdlib_module_names) | {package.name}
    heavy = []
    for module in sorted(reached):
        roots = {base.split(".")[0] for base, _ in imports(module, files[module], inside_functions=False)}
        heavy += [f"{module} imports {root} when it is imported" for root in sorted(roots - allowed)]
    return heavy


def torch_in_torch_free_rooms(package: Path) -> list[str]:
    return [
        f"{module} imports {base}"
        for module, file in module_files(package).items()
        if room_of(module) in TORCH_FREE_ROOMS
        for base, _ in imports(module, file, inside_functions=True)
        if base.split(".")[0] == "torch"
    ]


def forbidden_statements(package: Path) -> list[str]:
    found = []
    for module, file in module_files(package).items():
        for base, name in imports(module, file, inside_functions=True):
            if (base, name) == ("__future__", "annotations"):
                found.append(f"{module} postpones annotations, which hides the shapes from the jaxtyping hook")
            if base.split(".")[0] in UNSAFE_MODULES or (base, name) == ("torch", "load"):
                found.append(f"{module} imports {name or base}; nothing is unpickled")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.serialization.load"):
                found.append(f"{module} uses torch.load; nothing is unpickled")
    return found


def vague_names(package: Path) -> list[str]:
    return [module for module in module_files(package) if VAGUE_NAMES.fullmatch(module.rpartition(".")[2])]


def not_ascii(package: Path) -> list[str]:
    suffixes = {".py", ".html", ".js", ".css"}
    return [
        f"{file.relative_to(package)} line {number}"
        for file in sorted(package.rglob("*"))
        if file.suffix in suffixes
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if not line.isascii()
    ]


def too_long(package: Path, longer: dict[str, str]) -> list[str]:
    over = {}
    for file in module_files(package).values():
        name, text = file.relative_to(package).as_posix(), file.read_text()
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            over[name] = lines
        for function, lines in functions(ast.parse(text)):
            if lines > MAX_FUNCTION_LINES:
                over[f"{name}:{function}"] = lines
    unexcused = [f"{name} has {lines} lines" for name, lines in over.items() if name not in longer]
    return unexcused + [f"{name} is excused in LONGER for nothing" for name in longer if name not in over]


# ---- the house


def test_dependence_points_one_way():
    assert wrong_directions(PACKAGE) == []


def test_no_imports_in_a_circle():
    assert circles(PACKAGE) == []


def test_a_base_install_can_import_the_floor_and_the_command_line():
    assert heavy_imports(PACKAGE) == []


def test_the_device_side_never_imports_torch():
    assert torch_in_torch_free_rooms(PACKAGE) == []


def test_nothing_is_unpickled_and_annotations_are_real():
    assert forbidden_statements(PACKAGE) == []


def test_module_names_say_what_they_hold():
    assert vague_names(PACKAGE) == []


def test_sources_are_ascii():
    assert not_ascii(PACKAGE) == []


def test_files_and_functions_are_short():
    assert too_long(PACKAGE, LONGER) == []


# ---- the rules can fail


def build(folder: Path, **sources: str) -> Path:
    """A package `iret` in `folder`; `runtime__cost` stands for runtime/cost.py."""
    package = folder / "iret"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name, source in sources.items():
        file = package / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(source)
    return package


@pytest.mark.parametrize(
    "source", ["from iret.model import Iret", "import iret.model", "from iret import model", "from . import model"]
)
def test_an_import_from_above_is_seen_however_it_is_written(tmp_path, source):
    package = build(tmp_path, model="", tokens=f"def late():\n    {source}\n")
    assert wrong_directions(package) == ["iret.tokens imports iret.model, which stands above it"]


def test_a_relative_import_in_a_package_is_resolved(tmp_path):
    package = build(tmp_path, model="", runtime__cost="from ..model import Iret\nfrom .keep import x", runtime__keep="")
    assert wrong_directions(package) == ["iret.runtime.cost imports iret.model, which stands above it"]


def test_imports_from_below_and_beside_and_for_types_are_allowed(tmp_path):
    package = build(
        tmp_path,
        tokens="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from iret.model import Iret\n",
        attention="from iret.tokens import Tokens",
        model="from iret import __version__\nfrom iret.attention import attend",
    )
    assert wrong_directions(package) == circles(package) == []


def test_a_module_without_a_room_is_named(tmp_path):
    assert wrong_directions(build(tmp_path, cellar="")) == ["iret.cellar has no room; give it one in LEVELS"]


def test_an_eager_top_level_is_named(tmp_path):
    package = build(tmp_path, model="")
    (package / "__init__.py").write_text("from iret.model import Iret")
    assert wrong_directions(package) == ["iret imports iret.model; it has to stay lazy"]


def test_a_circle_is_named(tmp_path):
    package = build(tmp_path, tokens="import iret.lifting", lifting="import iret.tokens")
    assert len(circles(package)) == 1


def test_a_heavy_import_is_seen_through_another_module(tmp_path):
    package = build(
        tmp_path,
        cli="import iret.presets\ndef main():\n    import torch\n",
        presets="import numpy\nimport torch.nn",
        zoo="import torch",
    )
    assert heavy_imports(package) == ["iret.presets imports torch when it is imported"]


def test_torch_inside_a_function_of_the_floor_is_seen(tmp_path):
    late = "def late():\n    from torch import nn\n"
    package = build(tmp_path, runtime__session=late, doctor=late)
    assert torch_in_torch_free_rooms(package) == ["iret.runtime.session imports torch"]


@pytest.mark.parametrize(
    "source",
    [
        "from __future__ import annotations",
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
    ],
)
def test_unsafe_or_postponed_statements_are_seen(tmp_path, source):
    assert len(forbidden_statements(build(tmp_path, weights=source))) == 1


@pytest.mark.parametrize("name", ["utils", "helper", "train__misc", "model_v2"])
def test_vague_names_are_seen(tmp_path, name):
    assert vague_names(build(tmp_path, **{name: ""})) == ["iret." + name.replace("__", ".")]


def test_non_ascii_text_is_seen(tmp_path):
    package = build(tmp_path)
    (package / "zoo.py").write_bytes("# caf\N{LATIN SMALL LETTER E WITH ACUTE}\n".encode())
    assert not_ascii(package) == ["zoo.py line 1"]


def test_long_files_and_functions_and_idle_excuses_are_seen(tmp_path):
    method = "class A:\n    def f(self):\n" + "        x = 1\n" * MAX_FUNCTION_LINES
    package = build(tmp_path, zoo="x = 1\n" * (MAX_FILE_LINES + 1), model=method, tokens="")
    assert sorted(too_long(package, {})) == ["model.py:A.f has 61 lines", "zoo.py has 401 lines"]
    excuses = {"model.py:A.f": "one table", "zoo.py": "one idea", "tokens.py": "none"}
    assert too_long(package, excuses) == ["tokens.py is excused in LONGER for nothing"]
