"""Power of a Raspberry Pi 5 from its power chip (PMIC), through the firmware's `vcgencmd pmic_read_adc`.

    VDD_CORE_A current(7)=1.11625000A        a rail has a line for its current
    VDD_CORE_V volt(15)=0.74944980V          and one for its voltage; EXT5V_V and BATT_V have no current

The sum of V * A over rails misses what the 5 V input feeds directly (USB, HATs, fan) and the losses of the converters, so it
is less than a meter in the cable shows. Tested on recorded output, not yet on a board.
"""

import re
import subprocess
import time
from collections.abc import Callable

from iret.measure.energy import Clock, EnergyError, PowerMeter

COMMAND = ("vcgencmd", "pmic_read_adc")
PERIOD_S, RESOLUTION_S = 0.1, 2.0  # each sample starts a process, so a shorter period would meter itself
TIMEOUT_S = 2.0
SCOPE = "Raspberry Pi 5 rails (without 5 V USB and HAT loads and converter losses)"
_LINE = re.compile(r"\s*(\w+)_([AV])\s+(?:current|volt)\(\d+\)=([0-9.eE+-]+)[AV]\s*")


def run_vcgencmd() -> str:
    """What the firmware answers. Raises EnergyError where it cannot be asked."""
    try:
        return subprocess.run(COMMAND, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
    except FileNotFoundError as error:
        raise EnergyError("there is no vcgencmd here; the PMIC is read on a Raspberry Pi 5 with its own OS.") from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or error.stdout or "").strip().partition("\n")[0] or f"exit status {error.returncode}"
        raise EnergyError(
            f"vcgencmd failed ({reason}); if /dev/vcio is closed to this user: sudo usermod -aG video $USER"
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnergyError(f"vcgencmd gave no answer ({error}); see whether it does in a shell.") from error


def rail_powers(answer: str) -> dict[str, float]:
    """Rail -> W, for every rail with both a current and a voltage.

    Raises:
        EnergyError: there is none, as on boards before the Pi 5, or a number is broken.
    """
    found: dict[str, dict[str, float]] = {"A": {}, "V": {}}
    for line in answer.splitlines():
        if match := _LINE.fullmatch(line):
            rail, unit, number = match.groups()
            try:
                found[unit][rail] = float(number)
            except ValueError as error:
                raise EnergyError(f"vcgencmd wrote {line.strip()!r}, in which there is no number.") from error
    powers = {rail: amperes * found["V"][rail] for rail, amperes in found["A"].items() if rail in found["V"]}
    if not powers:
        said = answer.strip().partition("\n")[0][:60]
        raise EnergyError(f"vcgencmd names no rail with current and voltage ({said!r}); that takes a Raspberry Pi 5.")
    return powers


def pmic_meter(
    run: Callable[[], str] = run_vcgencmd, *, clock: Clock = time.perf_counter, is_threaded: bool = True
) -> PowerMeter:
    """The sum of the rails there are now. Raises EnergyError where `run` does or names none."""
    rails = rail_powers(run()).keys()

    def read_w() -> float:
        powers = rail_powers(run())
        if missing := sorted(rails - powers.keys()):
            raise EnergyError(f"the PMIC no longer names {missing[0]}, so the sum would be too small; measure again.")
        return sum(powers[rail] for rail in rails)

    return PowerMeter(
        "pi-pmic", SCOPE, read_w, period_s=PERIOD_S, resolution_s=RESOLUTION_S, clock=clock, is_threaded=is_threaded
    )
