"""The demo prints a row a budget and writes pictures that can be opened."""

from pathlib import Path

import pytest
from PIL import Image

from iret import demo


def test_the_demo_prints_its_tables_and_writes_its_pictures(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "NUM_DIGITS", 20)
    monkeypatch.setattr(demo, "NUM_DRAWN", 1)
    tables = []
    assert demo.run_demo(tmp_path, lambda text: None, lambda columns, rows: tables.append(list(rows))) == 0
    digits, photos = tables
    assert [row[0] for row in digits] == [f"{budget:g}" for budget in demo.BUDGETS]
    assert [(row[0], row[1]) for row in photos] == [
        (name, f"{budget:g}") for name in ("chelsea.jpg", "rocket.jpg") for budget in demo.BUDGETS
    ]
    pictures = {path.name for path in tmp_path.iterdir()}
    assert pictures == {"chelsea.png", "digits.png", "rocket.png", "tradeoff.png"}
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert min(picture.size) > 200


@pytest.mark.parametrize("name", ["chelsea.png", "digits.png", "rocket.png", "tradeoff.png"])
def test_the_demo_does_not_draw_over_another_s_picture(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is there already, and was not drawn by iret"):
        demo.run_demo(tmp_path, lambda text: pytest.fail(text), lambda columns, rows: pytest.fail("ran"))
    assert [path.name for path in tmp_path.iterdir()] == [name]
