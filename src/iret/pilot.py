"""The controller at work on this machine: sensors in, the budget of the next image out.

Read first: `runtime.controller`, which decides; `measure`, whose sensors are read here.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from iret.measure.battery import Battery, read_battery
from iret.measure.energy import EnergyError, EnergyMeter
from iret.measure.sysfs import read_temperature
from iret.runtime.controller import Controller, Decision, Goal, Menu, Reading

T = TypeVar("T")


class Pilot:
    """Asks for a decision an image, or a batch.

    Sensors can be replaced, as tests do; one that fails is named in `Decision.doubts`. A `meter`, in whose windows everything
    happens from one decision to the next, corrects the table's joules in place of the gauge; the menu's idle power is taken off.
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
    ) -> None:
        self._controller, self._goal = Controller(menu, goal), goal
        self._battery, self._thermometer, self._clock = battery, thermometer, clock
        self._answered, self._time_s = 0, 0.0
        self._meter, self._idle_watts = meter if goal.hours is not None else None, menu.idle_watts
        self._opened_s, self._metered = -math.inf, 0  # the meter's window, and the images answered in it

    def next(self, images: int = 1) -> Decision:
        """For the next images, from what the sensors say now and what was noted since the last call."""
        failed: list[str] = []
        joules = None if self._meter is None else self._read_meter(self._meter, failed)
        battery = _ask(self._battery, failed) if self._goal.hours is not None else None
        decision = self._controller.decide(
            Reading(
                time_s=self._clock(),
                images=self._answered,
                battery_joules=None if battery is None else battery.joules,
                battery_share=None if battery is None or battery.percent is None else battery.percent / 100,
                joules=joules,
                ms=1e3 * self._time_s / self._answered if self._answered else None,
                celsius=_ask(self._thermometer, failed) if self._goal.max_celsius is not None else None,
            ),
            images,
        )
        self._answered, self._time_s = 0, 0.0
        return replace(decision, doubts=(*failed, *decision.doubts))

    def note(self, time_s: float, images: int = 1) -> None:
        """So many images were answered, in so many seconds all together."""
        self._answered, self._time_s = self._answered + images, self._time_s + time_s

    def close(self) -> None:
        """Close the meter's window."""
        if self._meter is not None:
            self._meter.cancel()

    def _read_meter(self, meter: EnergyMeter, failed: list[str]) -> float | None:
        """Joules above idle of the images answered since the last decision; None while its window is too short to trust.

        A window that held images of earlier decisions as well gives these their share, as many as they are.
        """
        self._metered += self._answered
        now, joules = self._clock(), None
        if now - self._opened_s < meter.resolution_s:
            return None
        try:
            if self._opened_s > -math.inf and self._metered:
                reading = meter.stop().minus_idle(self._idle_watts)
                joules = reading.joules * self._answered / self._metered
            meter.cancel()
            meter.start()
            self._opened_s = now
        except EnergyError as error:
            failed.append(str(error))
            self._opened_s = -math.inf
        self._metered = 0
        return joules


def _ask(sensor: Callable[[], T | None], failed: list[str]) -> T | None:
    """What it says; None and its sentence in `failed` if it is gone or broken."""
    try:
        return sensor()
    except (EnergyError, OSError) as error:
        failed.append(str(error))
        return None
