"""Workers that die, hang and come back, played by threads: nobody's image is lost, and a deadly one is found out."""

import asyncio
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from iret.serve.asks import Ask
from iret.serve.batcher import Batcher
from iret.serve.computer import Job, Result
from iret.serve.crew import TRIES, Crew
from iret.serve.metrics import Metrics
from iret.serve.refusal import Refusal
from iret.serve.worker import WorkerDied


def answer(job: Job) -> Result:
    return Result(job.image.ravel(), 1.0, 1, 0, (1,), 0.0, 0.0, 0.0, 1)


class ThreadWorker:
    """Answers with the image itself; `mood(jobs)` may raise WorkerDied or wait."""

    def __init__(self, mood: Callable[[list[Job]], object]) -> None:
        self.mood, self.ended, self.calls = mood, threading.Event(), []

    def hello(self) -> dict:
        return {"name": "thread"}

    def call(self, jobs, seconds: float) -> list:
        self.calls.append(len(jobs))
        try:
            self.mood(jobs)
        except WorkerDied:
            self.ended.set()
            raise
        return [answer(job) for job in jobs]

    def join(self) -> None:
        self.ended.wait()

    def stop(self) -> None:
        self.ended.set()


def play(scene, mood=lambda jobs: None, *, workers: int = 1, max_batch: int = 4):
    """`await scene(crew, ask, started)` with a crew of such workers; `ask(value)` submits an image of that value."""
    started: list[ThreadWorker] = []

    def start() -> ThreadWorker:
        started.append(ThreadWorker(mood))
        return started[-1]

    async def run():
        metrics = Metrics()
        crew = Crew(start, workers, Batcher(max_batch, 0.0), metrics, timeout_s=5.0)
        assert await crew.start() == {"name": "thread"}
        assert crew.is_ready

        async def ask(value: float) -> float:
            now = time.monotonic()
            job = Job(np.full((1, 1, 1), value, np.float32), Ask())
            return float((await crew.submit(job, now, now + 5.0)).logits[0])

        try:
            return await asyncio.wait_for(scene(crew, ask, started), 10)
        finally:
            await crew.stop()
            assert all(worker.ended.is_set() for worker in started)
            started.append(metrics)  # type: ignore[arg-type]

    return asyncio.run(run()), started


def test_each_gets_its_own_answer():
    async def scene(crew, ask, started):
        return await asyncio.gather(*(ask(value) for value in range(20)))

    answers, _ = play(scene, workers=2)
    assert answers == list(range(20))


def test_images_that_wait_while_a_worker_is_busy_are_computed_together():
    gate = threading.Event()

    async def scene(crew, ask, started):
        asks = [asyncio.ensure_future(ask(0))]
        while not started[0].calls:
            await asyncio.sleep(0)
        asks += [asyncio.ensure_future(ask(value)) for value in range(1, 7)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*asks)
        return started[0].calls

    calls, _ = play(scene, lambda jobs: gate.wait(5))
    assert calls == [1, 4, 2]


def test_what_a_dying_worker_had_in_hand_is_answered_by_the_next():
    deaths = iter([True])

    def mood(jobs):
        if next(deaths, False):
            raise WorkerDied

    async def scene(crew, ask, started):
        return await asyncio.gather(*(ask(value) for value in range(3)))

    answers, started = play(scene, mood)
    assert answers == [0, 1, 2]
    assert [worker.calls for worker in started[:2]] == [[3], [1, 1, 1]]
    assert b"iret_worker_restarts_total 1.0" in started[-1].text()


def test_an_image_that_ends_every_worker_is_refused_and_its_mates_are_answered(caplog):
    def mood(jobs):
        if any(job.image[0, 0, 0] == 13 for job in jobs):
            raise WorkerDied

    async def scene(crew, ask, started):
        return await asyncio.gather(*(ask(value) for value in (1, 13, 2)), return_exceptions=True)

    (first, deadly, last), started = play(scene, mood)
    assert (first, last) == (1, 2)
    assert isinstance(deadly, Refusal)
    assert (deadly.status, str(TRIES) in str(deadly)) == (500, True)
    assert len(started) == 1 + TRIES + 1  # the first, its successors, and the metrics


def test_a_worker_that_dies_while_it_has_nothing_to_do_is_replaced():
    async def scene(crew, ask, started):
        started[0].ended.set()
        while len(started) < 2 or not crew.is_ready:
            await asyncio.sleep(0)
        return await ask(7)

    answer, started = play(scene)
    assert answer == 7
    assert started[0].calls == []


def test_workers_that_cannot_load_end_the_start_with_their_sentence():
    class Broken(ThreadWorker):
        def hello(self) -> dict:
            raise ValueError("the bundle is damaged.")

    started: list[Broken] = []

    def start() -> Broken:
        started.append(Broken(lambda jobs: None))
        return started[-1]

    async def run():
        await Crew(start, 2, Batcher(1, 0.0), Metrics(), timeout_s=1.0).start()

    with pytest.raises(ValueError, match="the bundle is damaged"):
        asyncio.run(run())
    assert [worker.ended.is_set() for worker in started] == [True, True]
