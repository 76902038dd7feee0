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
START_S = 120.0  # for a large bundle on a slow card
BATCH_SHARE = 0.25  # of the time-out, that a batch of several should take at most
SAME = ("name", "labels", "grid", "img_size", "channels", "classes", "stages")  # what clients were told of the model

log = logging.getLogger("iret.serve")


@runtime_checkable
class AnyWorker(Protocol):
    """`iret.serve.worker.Worker`, or what behaves like one."""

    def hello(self) -> dict[str, Any]: ...
    def call(self, jobs: Sequence[Job]) -> list[Result | Refusal]: ...
    def join(self) -> None: ...
    def kill(self) -> None: ...
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
        self._did_fail = False  # the last start of a successor
        self._told: dict[str, Any] = {}  # of the model
        self._pace_s = 0.0  # an image, of late

    @property
    def is_ready(self) -> bool:
        return self._at_work > 0

    @property
    def is_stuck(self) -> bool:
        """No worker is up, and the last that was started did not come up."""
        return self._did_fail and not self._at_work

    async def start(self) -> dict[str, Any]:
        """Starts the workers; what they serve.

        Raises:
            ValueError: they cannot be started, or cannot load the bundle.
        """
        workers: list[AnyWorker] = []
        try:
            for _ in range(self._num_workers):
                workers.append(await self._in_thread(self._start_worker))
            for worker in workers:
                self._told = await self._within(START_S, worker, worker.hello)
        except BaseException as error:
            for worker in workers:
                await self._in_thread(worker.stop)
            if isinstance(error, WorkerDied):
                raise ValueError("a worker ended while it loaded the bundle; what it wrote above says why.") from error
            if isinstance(error, OSError):
                raise ValueError(f"a worker cannot be started ({error}); give fewer --workers.") from error
            raise
        self._note(len(workers))
        self._tasks = [asyncio.create_task(self._keep_at_work(worker)) for worker in workers]
        return self._told

    async def stop(self) -> None:
        """Ends the workers; what still waits is left unanswered, so drain first."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.shutdown(wait=False)

    async def submit(self, job: Job, arrived_s: float, due_s: float) -> Result:
        """Raises `Refusal`."""
        image = Waiting(job, due_s, arrived_s)
        self._batcher.put(image)
        return await image.done

    # ---- one worker after another

    async def _keep_at_work(self, worker: AnyWorker) -> None:
        while True:
            try:
                await self._feed(worker)
            except Exception:  # a bug of ours; the place must not stay empty for it
                log.exception("a worker is given up")
            finally:
                self._note(-1)
                await self._end(worker)
            worker = await self._replace()
            self._note(+1)

    async def _replace(self) -> AnyWorker:
        pause, most = PAUSES_S
        log.warning("a worker ended; another is started")
        while True:
            self._metrics.restarts.inc()
            worker: AnyWorker | None = None
            try:
                worker = await self._in_thread(self._start_worker)
                told = await self._within(START_S, worker, worker.hello)
                if any(told.get(name) != self._told.get(name) for name in SAME):
                    raise ValueError("the bundle holds another model now; start the service anew to serve it.")
                self._did_fail = False
                return worker
            except Exception as error:  # whatever it is, the place must not stay empty
                log.error("a worker did not come up: %s", str(error) or "it ended")
                self._did_fail = True
                if worker is not None:
                    await self._end(worker)
            except asyncio.CancelledError:
                if worker is not None:
                    await self._end(worker)
                raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, most)

    async def _end(self, worker: AnyWorker) -> None:
        """To its end, even where our own task is cancelled."""
        await asyncio.shield(self._in_thread(worker.stop))

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
        began = time.monotonic()
        self._metrics.batch.observe(len(batch))
        try:
            results = await self._within(self._timeout_s, worker, worker.call, [image.job for image in batch])
            if len(results) != len(batch):
                raise ValueError(f"{len(results)} answers to {len(batch)} images")
        except asyncio.CancelledError:
            self._put_back(batch)
            raise
        except Exception as error:
            if not isinstance(error, WorkerDied):
                log.exception("what a worker sent is no answer, and it is ended")
            self._learn(time.monotonic() - began, len(batch))
            for image in batch:
                image.tries += 1
            self._put_back(batch)
            return False
        self._learn(time.monotonic() - began, len(batch))
        for image, result in zip(batch, results, strict=True):
            if image.done.done():
                continue  # it timed out
            if isinstance(result, Refusal):
                image.done.set_exception(result)
            else:
                image.done.set_result(result)
        return True

    def _learn(self, seconds: float, images: int) -> None:
        """Bounds the batches, so that what is slow here is not killed, batch after batch, for being many."""
        self._pace_s += 0.5 * (seconds / images - self._pace_s)
        if self._pace_s:
            self._batcher.hold_to(int(BATCH_SHARE * self._timeout_s / self._pace_s))

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

    async def _within(self, seconds: float, worker: AnyWorker, call: Callable[..., Any], *args: Any) -> Any:
        """`call` of `worker`, which is killed if it takes longer: `call` then raises WorkerDied."""

        def kill() -> None:
            log.error("a worker did not answer in %g s and is killed", seconds)
            worker.kill()

        killer = asyncio.get_running_loop().call_later(seconds, kill)
        try:
            return await self._in_thread(call, *args)
        finally:
            killer.cancel()

    async def _in_thread(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)
