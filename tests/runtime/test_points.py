"""The table of operating points: what a budget buys, what it refuses, and its file."""

import json

import pytest

from iret.runtime.points import FILE_NAME, OperatingPoints, Point, check_budget


def point(macs: float, accuracy: float, *thresholds: tuple[float, float]) -> Point:
    return Point(thresholds=thresholds, accuracy=accuracy, macs_mean=macs, macs_p95=macs + 5, kept_mean=(64.0, 30.5))


def table() -> OperatingPoints:
    """Of a model of 1000 MACs with one transition: all of it, a half at threshold 1, a quarter at 2 (refine at 3)."""
    points = (point(1000.0, 0.9, (0.0, 0.0)), point(500.0, 0.8, (1.0, 1.0)), point(250.0, 0.6, (2.0, 3.0)))
    return OperatingPoints(data="made up", num_images=8, full_macs=1000, points=points)


# ---- what a budget buys


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1.0, (0.0, 0.0)),
        (0.75, (0.5, 0.5)),
        (0.5, (1.0, 1.0)),
        (0.375, (1.5, 2.0)),
        (0.25, (2.0, 3.0)),
    ],
)
def test_thresholds_lie_between_those_of_the_neighbouring_points(budget, expected):
    assert table().thresholds(budget) == (expected,)


def test_every_transition_has_its_own_thresholds():
    points = (point(800.0, 0.9, (0.0, 0.0), (0.5, 0.5)), point(400.0, 0.7, (1.0, 1.0), (1.5, 2.5)))
    found = OperatingPoints(data="made up", num_images=8, full_macs=1000, points=points).thresholds(0.6)
    assert found == (pytest.approx((0.5, 0.5)), pytest.approx((1.0, 1.5)))


def test_a_budget_above_the_dearest_point_takes_that_point():
    points = (point(800.0, 0.9, (0.5, 0.75)), point(400.0, 0.7, (1.0, 1.0)))
    assert OperatingPoints(data="", num_images=1, full_macs=1000, points=points).thresholds(0.9) == ((0.5, 0.75),)


def test_the_full_budget_keeps_everything_even_if_no_point_does():
    points = (point(800.0, 0.9, (0.5, 0.75), (1.0, 1.0)),)
    found = OperatingPoints(data="", num_images=1, full_macs=1000, points=points).thresholds(1.0)
    assert found == ((0.0, 0.0), (0.0, 0.0))


def test_a_budget_below_the_cheapest_point_names_it():
    assert table().cheapest_budget == 0.25
    with pytest.raises(
        ValueError, match=r"budget=0.2 is below the cheapest .* 0.250 of its MACs; ask for .*\(2.0, 3.0\)"
    ):
        table().thresholds(0.2)


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_a_budget_outside_zero_to_one_is_refused(budget):
    with pytest.raises(ValueError, match=r"is outside \(0, 1\]; it is a share of the full model's MACs"):
        check_budget(budget)
    with pytest.raises(ValueError, match=r"is outside \(0, 1\]"):
        table().thresholds(budget)


# ---- the table


def test_points_out_of_order_are_refused():
    with pytest.raises(ValueError, match="ordered from the dearest to the cheapest"):
        OperatingPoints(
            data="", num_images=1, full_macs=10, points=(point(1.0, 0.1, (1.0, 1.0)), point(2.0, 0.2, (0.0, 0.0)))
        )


def test_an_empty_table_is_refused():
    with pytest.raises(ValueError, match="needs at least one point"):
        OperatingPoints(data="", num_images=1, full_macs=10, points=())


def test_at_a_cliff_between_points_the_cheaper_one_is_taken():
    ladder = ((100.0, 0.0), (95.0, 0.69), (20.0, 0.7), (10.0, 2.0))
    points = tuple(point(macs, 0.5, (rung, rung)) for macs, rung in ladder)
    table = OperatingPoints(data="made up", num_images=1, full_macs=100, points=points)
    assert table.thresholds(0.5) == points[2].thresholds
    assert table.thresholds(0.95) == points[1].thresholds
    assert table.thresholds(0.15)[0][0] == pytest.approx(1.35)


# ---- the file


def test_a_table_survives_its_file(tmp_path):
    (tmp_path / FILE_NAME).write_text(table().to_json())
    assert OperatingPoints.read(tmp_path) == table()


def test_no_file_is_no_table(tmp_path):
    assert OperatingPoints.read(tmp_path) is None


def change(**fields) -> str:
    return json.dumps({**json.loads(table().to_json()), **fields})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        table().to_json()[:-20],
        change(format=2),
        change(points=[]),
        change(points=[{}]),
        change(points=3),
        change(unknown=1),
        change(points=[{**json.loads(table().to_json())["points"][0], "thresholds": [[1.0]]}]),
        table().to_json().replace('"num_images"', '"images"'),
    ],
)
def test_a_damaged_file_is_named_with_the_command_that_makes_a_new_one(tmp_path, text):
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match=f"{FILE_NAME} is not a table of operating points .* run `iret calibrate`"):
        OperatingPoints.read(tmp_path)


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=f"{FILE_NAME} is not a table of operating points"):
        OperatingPoints.read(tmp_path)
