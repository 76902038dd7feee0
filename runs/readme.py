"""Bring README.md up to date: the tables of the shipped models' cards between its markers, the pictures of `make demo`.

Run it after `runs/ship.sh` and `make demo`.
"""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURES = {"tradeoff.png": "tradeoff.png", "digits.png": "focus.png"}  # in demo/ -> in docs/


def tables(card: str) -> list[str]:
    """All Markdown tables of a card, in order."""
    return re.findall(r"(?:^\|.*\|\n)+", card, flags=re.MULTILINE)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for folder in sorted((ROOT / "src/iret/checkpoints").iterdir()):
        accuracy, control = tables((folder / "README.md").read_text())
        for kind, table in (("accuracy", accuracy), ("control", control)):
            begin, end = f"<!-- {folder.name} {kind} -->\n", f"<!-- end {folder.name} {kind} -->"
            text = re.sub(
                re.escape(begin) + r".*?" + re.escape(end), lambda _, new=begin + table + end: new, text, flags=re.S
            )
    readme.write_text(text)
    for picture, name in PICTURES.items():
        shutil.copy(ROOT / "demo" / picture, ROOT / "docs" / name)


if __name__ == "__main__":
    main()
