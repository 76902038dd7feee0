"""The line of images that wait, and how they become micro-batches.

Ordered by what must be answered first: an image's deadline or, without one, its time-out. So nobody starves, and a deadline
overtakes those who can wait. An image with a deadline goes alone (mates would make it late), and so does one whose worker
died, in case it was the reason; all others share batches, whatever their budgets.
"""

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from iret.serve.computer import Job, Result


@dataclass(eq=False)
class Waiting:
    """One image in the line."""

    job: Job
    before_s: float  # when it must be answered
    arrived_s: float
    done: asyncio.Future[Result] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    tries: int = 0
    begun_s: float = 0.0

    @property
    def is_alone(self) -> bool:
        return self.job.deadline_s is not None or self.tries > 0


class Batcher:
    """Images in, micro-batches out, for any number of takers. Lives on one event loop."""

    def __init__(self, max_batch: int, wait_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """At most `max_batch` images together; a batch that is not full waits `wait_s` from its first image's arrival on."""
        self._max_batch, self._wait_s, self._clock = max_batch, wait_s, clock
        self._heap: list[tuple[float, int, Waiting]] = []
        self._turn = itertools.count()
        self._arrival = asyncio.Event()

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, image: Waiting) -> None:
        heapq.heappush(self._heap, (image.before_s, next(self._turn), image))
        self._arrival.set()

    async def take(self) -> list[Waiting]:
        """The next batch, 1 image or more, none of which anybody has given up on. Cancelled, it has taken nothing."""
        while True:
            self._arrival.clear()  # before the look at the line, so that what comes after it is not missed
            self._forget()
            if not self._heap:
                await self._arrival.wait()
                continue
            first = self._heap[0][2]
            left = first.arrived_s + self._wait_s - self._clock()
            if first.is_alone or len(self._heap) >= self._max_batch or left <= 0:
                return self._pop()
            try:
                async with asyncio.timeout(left):  # not wait_for, which can swallow a cancellation
                    await self._arrival.wait()
            except TimeoutError:
                pass

    def _forget(self) -> None:
        """Drop those in front whom nobody waits for any more."""
        while self._heap and self._heap[0][2].done.done():
            heapq.heappop(self._heap)

    def _pop(self) -> list[Waiting]:
        batch: list[Waiting] = []
        passed = []
        while self._heap and len(batch) < self._max_batch:
            entry = heapq.heappop(self._heap)
            image = entry[2]
            if image.done.done():
                continue
            if batch and image.is_alone:
                passed.append(entry)
                continue
            batch.append(image)
            if image.is_alone:
                break
        for entry in passed:
            heapq.heappush(self._heap, entry)
        if self._heap:
            self._arrival.set()  # for another taker
        return batch
