"""The estimate against numbers worked out by hand."""

import numpy as np
import pytest

from iret.measure.energy import EnergyError
from iret.measure.estimate import DRAM_HIGH_J, DRAM_LOW_J, HOROWITZ, Constants, EstimateMeter, estimate_joules


def test_a_billion_macs_at_each_precision():
    """1e9 * (3.7 + 0.9) pJ = 4.6 mJ; fp16: 1.5 mJ; int8: 0.23 mJ."""
    found = {name: estimate_joules(10**9, 0, constants=constants) for name, constants in HOROWITZ.items()}
    assert found == pytest.approx({"fp32": 4.6e-3, "fp16": 1.5e-3, "int8": 0.23e-3})


def test_a_megabyte_from_dram_is_the_middle_of_the_published_range():
    """1.95 nJ for 8 bytes: 243.75 pJ a byte."""
    assert estimate_joules(0, 10**6) == pytest.approx(243.75e-6)
    assert 10**6 * DRAM_LOW_J == pytest.approx(162.5e-6)
    assert 10**6 * DRAM_HIGH_J == pytest.approx(325e-6)


def test_macs_and_bytes_add_up_with_other_constants_too():
    constants = Constants(name="made up", mac_j=2.0, byte_j=10.0)
    assert estimate_joules(3, 5, constants=constants) == 56.0
    assert estimate_joules(np.int64(3), np.float32(5), constants=constants) == 56.0  # as `cost` counts


@pytest.mark.parametrize(("macs", "bytes_moved"), [(-1, 0), (0, -1), (float("nan"), 0)])
def test_negative_counts_are_refused(macs, bytes_moved):
    with pytest.raises(ValueError, match=f"macs={macs} and bytes_moved={bytes_moved} are counts"):
        estimate_joules(macs, bytes_moved)


def test_an_estimate_says_that_it_is_one_and_opens_no_window():
    meter = EstimateMeter(HOROWITZ["int8"])
    assert (meter.source, meter.kind) == ("estimate:int8", "estimated")
    assert "45 nm" in meter.scope
    with pytest.raises(EnergyError, match="estimate:int8 reads no sensor; .* call estimate_joules"), meter.window():
        pass
