"""The controller at work on this machine: sensors in, the budget of the next image out.

Read first: `runtime.controller`, which decides; `measure`, whose sensors are read here.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from iret.measure.battery import Battery, read_battery
from iret.measure.energy import EnergyError
from iret.measure.sysfs import read_temperature
from iret.runtime.controller import Controller, Decision, Goal, Menu, Reading

T = TypeVar("T")


class Pilot:
    """Asks for a decision an image, or a batch.

    Sensors can be replaced, as tests do; one that fails is named in `Decision.doubts`.
    """

    def __init__(
        self,
        menu: Menu,
        goal: Goal,
        *,
        battery: Callable[[], Battery | None] = read_battery,
        thermometer: Callable[[], float | None] = read_temperature,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._controller, self._goal = Controller(menu, goal), goal
        self._battery, self._thermometer, self._clock = battery, thermometer, clock
        self._answered, self._time_s = 0, 0.0

    def next(self, images: int = 1) -> Decision:
        """For the next images, from what the sensors say now and what was noted since the last call."""
        failed: list[str] = []
        battery = _ask(self._battery, failed) if self._goal.hours is not None else None
        decision = self._controller.decide(
            Reading(
                time_s=self._clock(),
                images=self._answered,
                battery_joules=None if battery is None else battery.joules,
                battery_share=None if battery is None or battery.percent is None else battery.percent / 100,
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


def _ask(sensor: Callable[[], T | None], failed: list[str]) -> T | None:
    """What it says; None and its sentence in `failed` if it is gone or broken."""
    try:
        return sensor()
    except (EnergyError, OSError) as error:
        failed.append(str(error))
        return None
