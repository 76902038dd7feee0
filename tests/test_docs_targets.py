"""The pages of docs/targets: their commands are commands, their Python is Python, and each says what was run and what was not."""

import re
import shlex
from pathlib import Path

import pytest

from iret.arguments import build_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "targets").glob("*.md"))
TARGETS = {"onnxruntime", "openvino", "executorch", "browser", "raspberry-pi", "jetson"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_every_target_has_a_page_and_export_md_leads_there():
    assert {page.stem for page in PAGES} == TARGETS
    overview = (ROOT / "docs" / "export.md").read_text()
    assert all(f"targets/{name}.md" in overview for name in TARGETS)


@each_page
def test_its_iret_commands_are_understood(page):
    text = page.read_text()
    shown = [line for block in blocks(page, "sh") for line in block.splitlines()]
    lines = [*shown, *re.findall(r"`(iret [^`]+)`", text)]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("iret ")]
    assert commands
    for command in commands:
        build_parser().parse_args(command[1:])  # exits where a word is none of its own


@each_page
def test_its_python_is_python_and_opens_what_was_exported(page):
    exported = re.findall(r"--out ([\w-]+)", page.read_text())
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
        assert all(name in exported for name in re.findall(r'Session\("([\w-]+)"', block))


@each_page
def test_it_says_what_was_run_and_what_was_not(page):
    text = page.read_text()
    assert "**Nothing was run on a" in text or ("## What was run" in text and "Not run:" in text)


@each_page
def test_its_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
