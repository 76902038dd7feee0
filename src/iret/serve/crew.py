"""The workers and what they do: each takes a batch from the line, computes it, takes the next; one that dies is replaced.

What a dead worker had in hand goes back into the line, image by image, so that a photo that kills workers is found out
and its mates are answered.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

from iret.serve.batcher import Batcher, Waiting
from iret.serve.computer import Job, Result
from iret.serve.metrics import Metrics
from iret.serve.refusal import Refusal
from iret.serve.worker import WorkerDied

TRIES = 3  # workers that may die over one image
PAUSES_S = 0.1, 10.0  # before a worker that did not come up is started again: at first, at most

log = logging.getLogger("iret.serve")


@runtime_checkable
class AnyWorker(Protocol):
    """`iret.serve.worker.Worker`, or what behaves like one."""

    def hello(self) -> dict[str, Any]: ...
    def call(self, jobs: Sequence[Job], seconds: float) -> list[Result | Refusal]: ...
    def join(self) -> None: ...
    def stop(self) -> None: ...


class Crew:
    """`await submit(job)` -> its `Result`; on one event loop, between `start` and `stop`."""

    def __init__(
        self,
        start_worker: Callable[[], AnyWorker],
        num_workers: int,
        batcher: Batcher,
        metrics: Metrics,
        *,
        timeout_s: float,
    ) -> None:
        self._start_worker, self._num_workers, self._timeout_s = start_worker, num_workers, timeout_s
        self._batcher, self._metrics = batcher, metrics
        self._threads = ThreadPoolExecutor(2 * num_workers + 1, thread_name_prefix="iret-crew")
        self._tasks: list[asyncio.Task[None]] = []
        self._at_work = 0

    @property
    def is_ready(self) -> bool:
        return self._at_work > 0

    async def start(self) -> dict[str, Any]:
        """Starts the workers; what they serve.

        Raises:
            ValueError: they cannot load the bundle.
        """
        workers = [await self._in_thread(self._start_worker) for _ in range(self._num_workers)]
        try:
            hellos = [await self._in_thread(worker.hello) for worker in workers]
        except BaseException as error:
            for worker in workers:
                await self._in_thread(worker.stop)
            if isinstance(error, WorkerDied):
                raise ValueError("a worker ended while it loaded the bundle; what it wrote above says why.") from error
            raise
        self._note(len(workers))
        self._tasks = [asyncio.create_task(self._keep_at_work(worker)) for worker in workers]
        return hellos[0]

    async def stop(self) -> None:
        """Ends the workers; what still waits is left unanswered, so drain first."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.shutdown(wait=False)

    async def submit(self, job: Job, arrived_s: float, before_s: float) -> Result:
        """Raises `Refusal`."""
        image = Waiting(job, before_s, arrived_s)
        self._batcher.put(image)
        return await image.done

    # ---- one worker after another

    async def _keep_at_work(self, worker: AnyWorker) -> None:
        while True:
            try:
                await self._feed(worker)
            finally:
                self._note(-1)
                await asyncio.shield(self._in_thread(worker.stop))
            worker = await self._replace()
            self._note(+1)

    async def _replace(self) -> AnyWorker:
        pause, most = PAUSES_S
        while True:
            log.warning("a worker ended; another is started")
            self._metrics.restarts.inc()
            worker = await self._in_thread(self._start_worker)
            try:
                await self._in_thread(worker.hello)
                return worker
            except (WorkerDied, ValueError) as error:
                log.error("a worker did not come up: %s", error or "it ended")
                await self._in_thread(worker.stop)
            except asyncio.CancelledError:
                await asyncio.shield(self._in_thread(worker.stop))
                raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, most)

    async def _feed(self, worker: AnyWorker) -> None:
        """Until it dies."""
        ended = asyncio.ensure_future(self._in_thread(worker.join))
        try:
            while True:
                take = asyncio.ensure_future(self._batcher.take())
                try:
                    await asyncio.wait({take, ended}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if ended.done() or not take.done():
                        take.cancel()
                        await asyncio.wait({take})
                if take.cancelled():
                    return
                if ended.done():
                    self._put_back(take.result())
                    return
                if not await self._compute(worker, take.result()):
                    return
        finally:
            ended.cancel()

    async def _compute(self, worker: AnyWorker, batch: list[Waiting]) -> bool:
        """Whether the worker lived to answer."""
        now = time.monotonic()
        for image in batch:
            image.begun_s = now
            self._metrics.queue_s.observe(max(0.0, now - image.arrived_s))
        self._metrics.batch.observe(len(batch))
        try:
            results = await self._in_thread(worker.call, [image.job for image in batch], self._timeout_s)
        except WorkerDied:
            for image in batch:
                image.tries += 1
            self._put_back(batch)
            return False
        except asyncio.CancelledError:
            self._put_back(batch)
            raise
        for image, result in zip(batch, results, strict=True):
            if image.done.done():
                continue  # it timed out
            if isinstance(result, Refusal):
                image.done.set_exception(result)
            else:
                image.done.set_result(result)
        return True

    def _put_back(self, batch: list[Waiting]) -> None:
        for image in batch:
            if image.done.done():
                continue
            if image.tries < TRIES:
                self._batcher.put(image)
            else:
                sentence = f"the image ended {TRIES} workers one after another and is not tried again."
                image.done.set_exception(Refusal(500, sentence))

    def _note(self, change: int) -> None:
        self._at_work += change
        self._metrics.workers.set(self._at_work)

    async def _in_thread(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)
