"""How long stages take, learned while they run: what a deadline is kept by.

Time of a stage as a line over its MACs, fitted to the calls so far, the latest of which weigh most. It is counted in units of
the first stage's seconds a MAC in the same run: a slow moment of the whole machine is not taken for the stage's.
"""

from threading import Lock

FORGETTING = 0.9  # of what earlier calls took
PATIENCE = 50  # refusals in a row before a stage is begun all the same, which may make that one answer late
SURPRISE = 0.75  # of what was expected: a stage so much faster when it is tried was not known


class Paces:
    """What every stage of one session has taken. Threads may share it."""

    def __init__(self, num_stages: int) -> None:
        self._sums: list[tuple[float, ...]] = [(0.0,) * 5] * num_stages  # of 1, macs, time, macs^2, macs * time
        self._refused = [0] * num_stages  # runs since the stage was last begun
        self._lock = Lock()  # a fit is replaced whole, so reading one needs no lock
        self.speed = 1.0  # seconds a MAC of the latest first stage: the unit of time

    @property
    def are_known(self) -> bool:
        """Whether every stage has run."""
        return all(sums[0] > 0 for sums in self._sums)

    @property
    def are_settled(self) -> bool:
        """Whether every stage has run three times or more: the first calls of a graph are slow."""
        return all(sums[0] > 1 + FORGETTING for sums in self._sums)

    def learn(self, stage: int, macs: float, time: float) -> None:
        """A call took so long."""
        with self._lock:
            earlier = self._sums[stage]
            is_try = self._refused[stage] >= PATIENCE
            if is_try and time < SURPRISE * _at(earlier, macs):
                earlier = (0.0,) * 5
            count, sum_macs, sum_time, squares, products = (FORGETTING * each for each in earlier)
            self._sums[stage] = (
                count + 1.0,
                sum_macs + macs,
                sum_time + time,
                squares + macs * macs,
                products + macs * time,
            )
            self._refused[stage] = 0

    def refuse(self, stage: int) -> None:
        """It was not begun for want of time. Now and then it is tried, or one slow call would bar it for good."""
        with self._lock:
            self._refused[stage] += 1

    def predict(self, stage: int, macs: float) -> float:
        """Time, 0 or more; 0 while nothing is known, and when the stage is to be tried."""
        return 0.0 if self._refused[stage] >= PATIENCE else _at(self._sums[stage], macs)


def _at(fit: tuple[float, ...], macs: float) -> float:
    """Where the line through these sums stands at `macs`; 0 without any call."""
    count, *sums = fit
    if not count:
        return 0.0
    mean_macs, mean_time, mean_square, mean_product = (each / count for each in sums)
    spread = mean_square - mean_macs**2
    through_zero = mean_time / mean_macs
    if spread < 1e-6 * mean_square:  # all calls were alike
        return through_zero * macs
    slope = min(max(0.0, (mean_product - mean_macs * mean_time) / spread), through_zero)
    return mean_time + slope * (macs - mean_macs)
