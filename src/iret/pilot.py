"""The controller at work on this machine: sensors in, the budget of the next image out.

Read first: `runtime.controller`, which decides; `measure`, whose sensors are read here.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from iret.measure.battery import Battery, read_battery
from iret.measure.energy import EnergyError, EnergyMeter
from iret.measure.sysfs import read_temperature
from iret.runtime.controller import Controller, Decision, Goal, Menu, Reading

T = TypeVar("T")

# Of the idle energy in a window of the meter, before images are read off it: a wobble of the idle power by 1 % moves what is
# read by 5 %, up as well as down.
WORK_SHARE = 0.2
WINDOW_S = 60.0  # after which a window is given up, with what was idle in it


class Pilot:
    """Asks for a decision an image, or a batch; `close` it in the end.

    Sensors can be replaced, as tests do; one that fails is named in `Decision.doubts`. `meter`: the one that the menu's joules
    were measured with, net of `idle_watts`. Where no gauge says what is left, and images add enough to the idle power, what
    they take is read off it as they come; a gauge sees all of the device, which a meter may not.
    """

    def __init__(
        self,
        menu: Menu,
        goal: Goal,
        *,
        battery: Callable[[], Battery | None] = read_battery,
        thermometer: Callable[[], float | None] = read_temperature,
        clock: Callable[[], float] = time.monotonic,
        meter: EnergyMeter | None = None,
        idle_watts: float = 0.0,
    ) -> None:
        self._controller, self._goal, self._menu = Controller(menu, goal), goal, menu
        self._battery, self._thermometer, self._clock = battery, thermometer, clock
        self._meter = None if meter is None or goal.hours is None else _LiveMeter(meter, idle_watts, clock)
        self._answered, self._time_s = 0, 0.0
        self._each = 0.0  # joules that the menu puts at an image of the last decision

    def next(self, images: int = 1) -> Decision:
        """For the next images, from what the sensors say now and what was noted since the last call."""
        failed: list[str] = []
        battery = _ask(self._battery, failed) if self._goal.hours is not None else None
        metered = None
        if self._meter is not None and battery is None:
            metered = self._meter.read(self._answered * self._each, failed)
        elif self._meter is not None:
            self._meter.close()  # a window with images that were not counted would be too dear
        decision = self._controller.decide(
            Reading(
                time_s=self._clock(),
                images=self._answered,
                battery_joules=None if battery is None else battery.joules,
                battery_share=None if battery is None or battery.percent is None else battery.percent / 100,
                joules=metered,
                ms=1e3 * self._time_s / self._answered if self._answered else None,
                celsius=_ask(self._thermometer, failed) if self._goal.max_celsius is not None else None,
            ),
            images,
        )
        self._answered, self._time_s = 0, 0.0
        if self._meter is not None:
            self._each = self._menu.read("joules", decision.budget)
        return replace(decision, doubts=(*failed, *decision.doubts))

    def note(self, time_s: float, images: int = 1) -> None:
        """So many images were answered, in so many seconds all together."""
        self._answered, self._time_s = self._answered + images, self._time_s + time_s

    def close(self) -> None:
        """Let go of the meter."""
        if self._meter is not None:
            self._meter.close()


class _LiveMeter:
    """What images take, read off a meter of the whole device while they are answered.

    A window stays open over as many images as it takes for their work to stand out of the idle power, and is shared among them
    as the menu has it. Images that come too rarely end none.
    """

    def __init__(self, meter: EnergyMeter, idle_watts: float, clock: Callable[[], float]) -> None:
        self._meter, self._idle_watts, self._clock = meter, idle_watts, clock
        self._is_open, self._opened_s = False, 0.0
        self._predicted = 0.0  # joules, in this window

    def read(self, predicted: float, failed: list[str]) -> float | None:
        """Joules of images that the menu puts at `predicted`, answered since the last call, if a window ends with them."""
        self._predicted += predicted
        passed_s, share = self._clock() - self._opened_s, None
        if self._is_open and passed_s > self._meter.resolution_s:
            if self._predicted > WORK_SHARE * self._idle_watts * passed_s:
                share = self._end(failed)
            elif passed_s > WINDOW_S:
                self.close()
        if not self._is_open:
            self._begin(failed)
        return None if share is None or not predicted else share * predicted

    def close(self) -> None:
        self._is_open = False
        with suppress(EnergyError, OSError):  # what was open is not needed any more
            self._meter.cancel()

    def _begin(self, failed: list[str]) -> None:
        try:
            self._meter.start()
        except (EnergyError, OSError) as error:
            failed.append(str(error))
            return
        self._is_open, self._opened_s, self._predicted = True, self._clock(), 0.0

    def _end(self, failed: list[str]) -> float | None:
        """Joules over what the menu says; None, and a sentence in `failed`, if they cannot be had."""
        self._is_open = False
        try:
            return self._meter.stop().minus_idle(self._idle_watts).joules / self._predicted
        except (EnergyError, OSError) as error:  # also if the device took less than it does idle
            failed.append(str(error))
            return None


def _ask(sensor: Callable[[], T | None], failed: list[str]) -> T | None:
    """What it says; None and its sentence in `failed` if it is gone or broken."""
    try:
        return sensor()
    except (EnergyError, OSError) as error:
        failed.append(str(error))
        return None
