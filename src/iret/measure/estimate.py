"""An estimate of energy from counted work, for machines that have no sensor: J = a * MACs + b * bytes.

The constants are those of one published chip process, so they order methods and never stand for a measurement: 45 nm
arithmetic and DRAM alone, without control, caches, leakage or anything else that a computer is. Read ratios, not joules.

Source: M. Horowitz, "1.1 Computing's energy problem (and what we can do about it)", ISSCC 2014, pp. 10-14,
doi 10.1109/ISSCC.2014.6757323: energies at 45 nm and 0.9 V. We did not have the paper itself: its numbers are taken from
public tables that cite it, at least two for each, which agree (such as table 3 of PMC8934428 for fp32).
"""

from dataclasses import dataclass
from typing import SupportsFloat

from iret.measure.energy import EnergyError, EnergyMeter

SCOPE = "arithmetic and DRAM of a 45 nm chip (no control, caches or idle)"
DRAM_LOW_J, DRAM_HIGH_J = 1.3e-9 / 8, 2.6e-9 / 8  # a byte, from 1.3 to 2.6 nJ for 64 bits


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Joules of one multiply-accumulate, and of one byte to or from DRAM."""

    name: str
    mac_j: float
    byte_j: float = (DRAM_LOW_J + DRAM_HIGH_J) / 2  # a third more or less at the ends of the published range


# One multiply and one add of the same width, as papers that cite the table count a MAC. Adding int8 products up in 32
# bits, which hardware does, would make 0.30 pJ of the 0.23.
HOROWITZ = {
    "fp32": Constants(name="fp32", mac_j=3.7e-12 + 0.9e-12),
    "fp16": Constants(name="fp16", mac_j=1.1e-12 + 0.4e-12),
    "int8": Constants(name="int8", mac_j=0.2e-12 + 0.03e-12),
}


def estimate_joules(
    macs: SupportsFloat, bytes_moved: SupportsFloat, *, constants: Constants = HOROWITZ["fp32"]
) -> float:
    """J for so many multiply-accumulates and bytes to and from DRAM (weights, and activations that leave the chip).

    Raises:
        ValueError: a negative count.
    """
    num_macs, num_bytes = float(macs), float(bytes_moved)
    if not (num_macs >= 0 and num_bytes >= 0):
        raise ValueError(f"macs={num_macs:g} and bytes_moved={num_bytes:g} are counts; give 0 or more.")
    return constants.mac_j * num_macs + constants.byte_j * num_bytes


class EstimateMeter(EnergyMeter):
    """Stands where a meter is asked for and there is none: it names source, scope and kind, and opens no window."""

    def __init__(self, constants: Constants = HOROWITZ["fp32"]) -> None:
        super().__init__(f"estimate:{constants.name}", SCOPE, resolution_s=0.0, kind="estimated")
        self.constants = constants

    def _begin(self) -> None:
        raise EnergyError(f"{self.source} reads no sensor; count the work and call estimate_joules(macs, bytes_moved).")

    def _end(self) -> tuple[float, float]:
        raise AssertionError("no window of it ever opens")
