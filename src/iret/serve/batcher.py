"""The line of images that wait, and how they become micro-batches.

Ordered by when an image is due: its deadline or, without one, some time after it came. So a deadline overtakes those who
can wait, but not for ever: who has waited that long goes before those who came later. An image with a deadline goes alone
(mates would make it late), and so does one whose worker died, in case it was the reason; all others share batches,
whatever their budgets.
"""

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from iret.serve.computer import Job, Result

SWEEP = 8  # images in the line, from which on it is looked through


@dataclass(eq=False)
class Waiting:
    """One image in the line."""

    job: Job
    due_s: float  # its place in the line
    arrived_s: float
    done: asyncio.Future[Result] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    tries: int = 0

    @property
    def is_alone(self) -> bool:
        return self.job.deadline_s is not None or self.tries > 0


class Batcher:
    """Images in, micro-batches out, for any number of takers. Lives on one event loop."""

    def __init__(self, max_batch: int, wait_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """At most `max_batch` images together; a batch that is not full waits `wait_s` from its first image's arrival on."""
        self._max_batch = self._most = max_batch
        self._wait_s, self._clock = wait_s, clock
        self._heap: list[tuple[float, int, Waiting]] = []
        self._sweep_at = SWEEP
        self._turn = itertools.count()
        self._arrival = asyncio.Event()

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, image: Waiting) -> None:
        if len(self._heap) >= self._sweep_at:
            self._sweep()
        heapq.heappush(self._heap, (image.due_s, next(self._turn), image))
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
            if first.is_alone or len(self._heap) >= self._most or left <= 0:
                return self._pop()
            try:
                async with asyncio.timeout(left):  # not wait_for, which can swallow a cancellation
                    await self._arrival.wait()
            except TimeoutError:
                pass

    def hold_to(self, images: int) -> None:
        """From now on, take at most so many together, at least 1, and never more than `max_batch`."""
        self._most = max(1, min(images, self._max_batch))

    def _sweep(self) -> None:
        """Drop all whom nobody waits for any more, who would pile up while nobody takes. Next when the line has doubled."""
        self._heap = [entry for entry in self._heap if not entry[2].done.done()]
        heapq.heapify(self._heap)
        self._sweep_at = max(SWEEP, 2 * len(self._heap))

    def _forget(self) -> None:
        """Drop those in front whom nobody waits for any more."""
        while self._heap and self._heap[0][2].done.done():
            heapq.heappop(self._heap)

    def _pop(self) -> list[Waiting]:
        batch: list[Waiting] = []
        passed = []
        while self._heap and len(batch) < self._most:
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
