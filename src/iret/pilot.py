"""The controller at work on this machine: sensors in, the budget of the next image out.

Read first: `runtime.controller`, which decides; `measure`, whose sensors are read here.
"""

import time
from collections.abc import Callable

from iret.measure.battery import Battery, read_battery
from iret.measure.sysfs import read_temperature
from iret.runtime.controller import Controller, Decision, Goal, Menu, Reading


class Pilot:
    """Asks for a decision an image. Sensors can be replaced, as tests do."""

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
        self._ms: float | None = None
        self._answered = 0

    def next(self) -> Decision:
        """For the next image, from what the sensors say now and what was noted since the last call."""
        battery = self._battery() if self._goal.hours is not None else None
        decision = self._controller.decide(
            Reading(
                time_s=self._clock(),
                images=self._answered,
                battery_joules=None if battery is None else battery.joules,
                battery_share=None if battery is None or battery.percent is None else battery.percent / 100,
                ms=self._ms,
                celsius=self._thermometer() if self._goal.max_celsius is not None else None,
            )
        )
        self._answered, self._ms = 0, None
        return decision

    def note(self, time_s: float) -> None:
        """One image was answered in so many seconds."""
        self._answered, self._ms = self._answered + 1, 1e3 * time_s
