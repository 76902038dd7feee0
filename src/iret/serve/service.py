"""The service between HTTP and the crew: who may come in, how long they may take, what is known of the model.

Every image that is in the house (being read, waiting, being computed) holds one of `Limits.queue` places; the next one is
sent away with 429. While the service drains, nobody new comes in, and everybody inside is answered.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from iret.serve.asks import Ask
from iret.serve.computer import Job, Result
from iret.serve.metrics import Metrics
from iret.serve.refusal import Refusal

Submit = Callable[[Job, float, float], Awaitable[Result]]
TICK_S = 0.02
PATIENCE = 0.25  # of the time-out: an image that has waited so long is as urgent as a deadline that is due
SHUTTING_DOWN = "the server is shutting down; ask another one."
NO_WORKER = "no worker is ready; one is being started."


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client, and all of them together, may ask for."""

    queue: int = 64  # images in the house
    body_bytes: int = 10_000_000
    max_pixels: int = 25_000_000  # of a photo, by its header
    timeout_s: float = 10.0  # from the request to its answer

    def __post_init__(self) -> None:
        for name in ("queue", "body_bytes", "max_pixels", "timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and finite.")


class Places:
    """Of the house, held by one request."""

    def __init__(self, service: "Service") -> None:
        self._service, self._held = service, 0

    def take(self, count: int) -> None:
        """Hold so many in all; raises `Refusal` where there are none left."""
        limit, service = self._service.limits.queue, self._service
        if count > limit:
            raise Refusal(422, f"{count} images in one request are more than the limit of {limit}; send fewer at once.")
        if service.num_open + count - self._held > limit:
            seconds = service.seconds_until_free()
            raise Refusal(429, f"{limit} images are waiting already; try again in {seconds} s.", seconds)
        service.open(count - self._held)
        self._held = count

    def leave(self) -> None:
        self._service.open(-self._held)
        self._held = 0


class Service:
    """`submit` computes one image: a `Crew`'s, or a Ray replica's."""

    def __init__(self, submit: Submit, model: dict[str, Any], limits: Limits, metrics: Metrics) -> None:
        self._submit, self.model, self.limits, self.metrics = submit, model, limits, metrics
        self.is_draining = False
        self.is_ready: Callable[[], bool] = lambda: True
        self.is_stuck: Callable[[], bool] = lambda: False  # no worker is ready, nor likely to be soon
        self.num_open = 0
        self._pace_s = 0.0  # between two answers of a busy house
        self._answered_s: float | None = None

    @contextmanager
    def admit(self) -> Iterator[Places]:
        """A place for one image, more by `Places.take`; given back at the end.

        Raises:
            Refusal: 503 while draining or stuck, 429 if the house is full.
        """
        if self.is_draining:
            raise Refusal(503, SHUTTING_DOWN, 1)
        if self.is_stuck():
            raise Refusal(503, NO_WORKER, 1)
        places = Places(self)
        places.take(1)
        try:
            yield places
        finally:
            places.leave()

    def check_ready(self) -> None:
        """Raises `Refusal`, 503, where requests should go elsewhere."""
        if self.is_draining:
            raise Refusal(503, SHUTTING_DOWN, 1)
        if not self.is_ready():
            raise Refusal(503, NO_WORKER, 1)

    async def answer(
        self, images: Sequence[tuple[bytes | np.ndarray, Ask]], arrived_s: float
    ) -> list[tuple[Result, float]]:
        """Each image's result and the seconds it waited for a worker, in order; all or nothing.

        Raises:
            Refusal: what is wrong with the first image that has something wrong, or 504 if it took too long.
        """
        before_s = arrived_s + self.limits.timeout_s
        jobs = [Job(image, ask, _deadline(ask, arrived_s)) for image, ask in images]
        tasks = [asyncio.ensure_future(self._one(job, arrived_s)) for job in jobs]
        try:
            async with asyncio.timeout(before_s - time.monotonic()):
                return list(await asyncio.gather(*tasks))
        except TimeoutError as error:
            raise Refusal(
                504, f"no answer within {self.limits.timeout_s:g} s; try a smaller budget, or later."
            ) from error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, job: Job, arrived_s: float) -> tuple[Result, float]:
        began = time.monotonic()
        due_s = min(job.deadline_s or math.inf, arrived_s + PATIENCE * self.limits.timeout_s)
        result = await self._submit(job, arrived_s, due_s)
        ended = time.monotonic()
        queue_s = max(0.0, ended - began - result.busy_s)
        self.metrics.note(result, queue_s)
        self._learn(ended)
        return result, queue_s

    def _learn(self, now: float) -> None:
        if self._answered_s is not None and self.num_open > 1:
            self._pace_s += 0.05 * (min(now - self._answered_s, 1.0) - self._pace_s)
        self._answered_s = now

    def open(self, change: int) -> None:
        self.num_open += change
        self.metrics.open.set(self.num_open)

    def seconds_until_free(self) -> int:
        """1 or more: until those inside should be answered, at the pace of late."""
        return max(1, math.ceil(self.num_open * self._pace_s))

    async def drain(self) -> None:
        """Let nobody in, and wait until everybody inside has been answered."""
        self.is_draining = True
        while self.num_open:
            await asyncio.sleep(TICK_S)


def _deadline(ask: Ask, arrived_s: float) -> float | None:
    return None if ask.deadline_ms is None else arrived_s + ask.deadline_ms / 1e3
