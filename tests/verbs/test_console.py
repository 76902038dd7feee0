"""What verbs check before any work is lost."""

from argparse import Namespace

import pytest

from iret.measure import sources
from iret.verbs.console import choose_meter


def test_the_watt_hours_of_a_battery_reach_its_meter(monkeypatch):
    asked = []
    monkeypatch.setattr(sources, "open_meter", lambda name, capacity_wh=None: asked.append((name, capacity_wh)))
    choose_meter(Namespace(meter="battery:BAT0", battery_wh=50.0, device="cpu"))
    choose_meter(Namespace(meter="rapl", battery_wh=None, device="cpu"))
    assert asked == [("battery:BAT0", 50.0), ("rapl", None)]


@pytest.mark.parametrize("capacity_wh", [0.0, -1.0, float("nan")])
def test_a_capacity_that_is_none_is_refused(capacity_wh):
    with pytest.raises(ValueError, match="give watt-hours above 0"):
        choose_meter(Namespace(meter="battery", battery_wh=capacity_wh, device="cpu"))
