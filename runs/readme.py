"""Bring README.md and docs/ up to date: the tables of the shipped models' cards and of the latest timings, and the pictures.

Run it after `runs/ship.sh` and `make demo`.
"""

import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURES = {"tradeoff.png": "tradeoff.png", "digits.png": "focus.png"}  # in demo/ -> in docs/
TIMINGS = {
    "README.md": ("speed", "engines", "precision", "channels", "batch", "block", "bundle"),
    "docs/export.md": ("load", "deadline"),
    "docs/serve.md": ("serve",),
    "docs/gpu.md": ("gpu", "fixed-counts"),
}


def tables(card: str) -> list[str]:
    """All Markdown tables of a card, in order."""
    return re.findall(r"(?:^\|.*\|\n)+", card, flags=re.MULTILINE)


def between(name: str, new: str, text: str) -> str:
    """`text` with `new` between the markers of that name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    return re.sub(re.escape(begin) + r".*?" + re.escape(end), lambda _: begin + new + end, text, flags=re.S)


def latest(kind: str) -> Path:
    """By date, and of one day the one committed last, or not yet."""

    def committed(folder: Path) -> tuple[str, float]:
        said = subprocess.run(
            ["git", "log", "-1", "--format=%ct", "--", folder], cwd=ROOT, capture_output=True, text=True
        )
        return folder.name[:10], float(said.stdout or "inf")

    return max((ROOT / "results").glob(f"*_{kind}_*"), key=committed)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for folder in sorted((ROOT / "src/iret/checkpoints").iterdir()):
        card = (folder / "README.md").read_text()
        accuracy, control = tables(card)
        text = between(f"{folder.name} accuracy", accuracy, text)
        text = between(f"{folder.name} control", control, text)
        if beside := re.search(r"## Beside a model without a dial\n\n(.*\n)", card):
            text = between(f"{folder.name} static", beside[1], text)
    readme.write_text(text)
    for page, kinds in TIMINGS.items():
        text = (ROOT / page).read_text()
        for kind in kinds:
            said = (latest(kind) / "README.md").read_text().rstrip()
            text = between(kind, f"{said}\n\nRaw samples: `{latest(kind).relative_to(ROOT)}/`.\n", text)
        (ROOT / page).write_text(text)
    for picture, name in PICTURES.items():
        shutil.copy(ROOT / "demo" / picture, ROOT / "docs" / name)
    shutil.copy(latest("deadline") / "deadline.png", ROOT / "docs")


if __name__ == "__main__":
    main()
