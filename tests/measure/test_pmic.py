"""The Raspberry Pi 5's power chip, from a recorded answer of its firmware."""

import subprocess

import pytest

from iret.measure import pmic
from iret.measure.energy import EnergyError
from iret.measure.pmic import pmic_meter, rail_powers, run_vcgencmd

ANSWER = """ 3V7_WL_SW_A current(0)=0.10000000A
   3V3_SYS_A current(1)=0.20000000A
  VDD_CORE_A current(7)=2.00000000A
 3V7_WL_SW_V volt(8)=3.70000000V
   3V3_SYS_V volt(9)=3.30000000V
  VDD_CORE_V volt(15)=0.75000000V
     EXT5V_V volt(24)=5.10000000V
      BATT_V volt(25)=0.00000000V
"""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_rail_counts_if_it_has_current_and_voltage():
    assert rail_powers(ANSWER) == pytest.approx({"3V7_WL_SW": 0.37, "3V3_SYS": 0.66, "VDD_CORE": 1.5})


def test_the_sum_of_the_rails_is_metered_and_says_what_it_misses():
    clock, answers = Clock(), [ANSWER]
    meter = pmic_meter(lambda: answers[-1], clock=clock, is_threaded=False)
    meter.start()
    for _ in range(4):
        clock.now += 0.5
        meter.sample()
    found = meter.stop()
    assert found.joules == pytest.approx(2 * 2.53)
    assert (found.source, found.kind) == ("pi-pmic", "measured")
    assert "without 5 V USB and HAT loads" in found.scope


def test_a_rail_that_disappears_does_not_shrink_the_sum():
    clock, answers = Clock(), [ANSWER]
    meter = pmic_meter(lambda: answers[-1], clock=clock, is_threaded=False)
    meter.start()
    clock.now += 0.5
    answers.append(ANSWER.replace("3V3_SYS_A", "3V3_OFF_A"))
    meter.sample()
    with pytest.raises(EnergyError, match="no longer names 3V3_SYS"):
        meter.stop()


@pytest.mark.parametrize("answer", ["", 'error=1 error_msg="Command not registered"', "EXT5V_V volt(24)=5.1V"])
def test_an_older_board_is_told_what_it_takes(answer):
    with pytest.raises(EnergyError, match="no rail with current and voltage .* takes a Raspberry Pi 5"):
        pmic_meter(lambda: answer)


def test_a_broken_number_is_shown():
    with pytest.raises(EnergyError, match="'VDD_CORE_A current.7.=2..0A', in which there is no number"):
        rail_powers(ANSWER.replace("2.00000000", "2..0"))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (FileNotFoundError(2, "No such file"), "there is no vcgencmd here; .* Raspberry Pi 5"),
        (
            subprocess.CalledProcessError(255, "vcgencmd", stderr="Can't open device file: /dev/vcio\nmore"),
            "vcgencmd failed .Can't open device file: /dev/vcio.; .*usermod -aG video",
        ),
        (subprocess.CalledProcessError(3, "vcgencmd"), "vcgencmd failed .exit status 3."),
        (subprocess.TimeoutExpired("vcgencmd", 2.0), "vcgencmd gave no answer .*timed out"),
    ],
)
def test_each_failure_of_the_command_is_one_sentence(monkeypatch, failure, message):
    def fail(*arguments, **options):
        raise failure

    monkeypatch.setattr(pmic.subprocess, "run", fail)
    with pytest.raises(EnergyError, match=message):
        run_vcgencmd()


def test_the_firmware_is_asked_with_a_time_limit(monkeypatch):
    asked = {}

    def run(command, **options):
        asked.update(options, command=command)
        return subprocess.CompletedProcess(command, 0, stdout=ANSWER)

    monkeypatch.setattr(pmic.subprocess, "run", run)
    assert run_vcgencmd() == ANSWER
    assert (asked["command"], asked["timeout"], asked["check"]) == (("vcgencmd", "pmic_read_adc"), 2.0, True)
