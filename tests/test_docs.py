"""What the documents show runs: README's Python, every recipe, every script, every path in README's tree."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import iret
from iret.cli import main
from iret.presets import PRESETS
from iret.train.recipe import RECIPES, find_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_of_the_readme_runs(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = [block for block in PYTHON_BLOCKS if "Session" not in block]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_python_of_the_gpu_page_runs_on_a_cpu_up_to_the_graph() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/gpu.md").read_text(), flags=re.DOTALL)
    found: dict = {}
    with torch.no_grad():
        exec(compile(block.replace('"cuda"', '"cpu"').split("fast.compile()")[0], "docs/gpu.md", "exec"), found)
        with pytest.raises(ValueError, match="are on cpu"):
            exec(compile("run = iret.capture_graph(fast, images)", "docs/gpu.md", "exec"), found)
    assert "run = iret.capture_graph(fast, images)" in block


@pytest.mark.graph
def test_the_readme_s_bundle_is_written_and_its_python_runs(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    command = next(line for line in README.splitlines() if line.startswith("iret export"))
    assert main(command.split("#")[0].split()[1:]) == 0
    shutil.copy(ROOT / "src/iret/photos/chelsea.jpg", "photo.jpg")
    (block,) = (block for block in PYTHON_BLOCKS if "Session" in block)
    found: dict = {}
    exec(compile(block, "README.md", "exec"), found)
    # what the model itself says of the photo
    model = iret.load("iret_pico-cifar10")
    setting = model.setting(0.5)
    with torch.no_grad():
        expected = model.run(model.preprocess("photo.jpg"), setting.thresholds, setting.exit_confidence)
    assert (found["out"].trace.kept == expected.trace.kept.numpy()).all()
    assert abs(found["out"].logits - expected.logits.numpy()).max() < 1e-4
    weights = (ROOT / "src/iret/checkpoints/iret_pico-cifar10/model.safetensors").stat().st_size
    graphs = sum(path.stat().st_size for path in Path("pico-onnx").iterdir() if path.suffix in (".onnx", ".bin"))
    assert graphs < 1.05 * weights


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_names_a_preset(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.name == name and recipe.model in PRESETS
    assert 0 <= recipe.full_until <= recipe.sampled_until <= 1
    assert len(recipe.stage_weights) == PRESETS[recipe.model]().levels


@pytest.mark.parametrize("script", sorted((ROOT / "runs").glob("*.sh")), ids=lambda path: path.name)
def test_every_run_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_every_benchmark_says_how_to_use_it(script: Path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(script), run_name="__main__")
    assert left.value.code == 0
    assert "--out" in capsys.readouterr().out


def test_the_tree_of_the_readme_names_files_that_exist() -> None:
    tree = re.search(r"## What is where\n\n```\n(.*?)```", README, flags=re.DOTALL)
    assert tree is not None
    named = re.findall(r"(?:^  |;  |  )(\w+\.py|\w+/)", tree.group(1), flags=re.MULTILINE)
    assert len(named) > 15
    for name in named:
        own = name.rstrip("/")
        assert (ROOT / own).exists() or list(ROOT.glob(f"src/iret/**/{own}")), f"{name} is in the tree but nowhere else"


def test_tables_of_the_readme_are_those_of_the_cards() -> None:
    for folder in sorted((ROOT / "src/iret/checkpoints").iterdir()):
        for table in re.findall(r"(?:^\|.*\|\n)+", (folder / "README.md").read_text(), flags=re.MULTILINE):
            assert table in README, f"run runs/readme.py: a table of {folder.name} is not in README.md"
