"""Workers that die, hang and come back, played by threads: nobody's image is lost, and a deadly one is found out."""

import asyncio
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from iret.serve.asks import Ask
from iret.serve.batcher import Batcher, Waiting
from iret.serve.computer import Job, Result
from iret.serve.crew import TRIES, Crew
from iret.serve.metrics import Metrics
from iret.serve.refusal import Refusal
from iret.serve.service import Limits, Service
from iret.serve.worker import WorkerDied


def answer(job: Job) -> Result:
    return Result(job.image.ravel(), 1.0, 1, 0, (1,), 0.0, 0.0, 0.0, 1)


class ThreadWorker:
    """Answers with the image itself; `mood(jobs)` may raise WorkerDied or wait."""

    def __init__(self, mood: Callable[[list[Job]], object]) -> None:
        self.mood, self.ended, self.calls = mood, threading.Event(), []

    def hello(self) -> dict:
        return {"name": "thread"}

    def call(self, jobs) -> list:
        self.calls.append(len(jobs))
        try:
            self.mood(jobs)
        except WorkerDied:
            self.ended.set()
            raise
        return [answer(job) for job in jobs]

    def join(self) -> None:
        self.ended.wait()

    def kill(self) -> None:
        self.ended.set()

    def stop(self) -> None:
        self.ended.set()


def play(scene, mood=lambda jobs: None, *, workers: int = 1, max_batch: int = 4, timeout_s: float = 5.0, start=None):
    """`await scene(crew, ask, started)` with a crew of such workers; `ask(value)` submits an image of that value."""
    started: list[ThreadWorker] = []

    def start_one() -> ThreadWorker:
        worker = start(len(started)) if start else ThreadWorker(mood)
        started.append(worker)
        return worker

    async def run():
        metrics = Metrics()
        crew = Crew(start_one, workers, Batcher(max_batch, 0.0), metrics, timeout_s=timeout_s)
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


def refuse_once(error: Exception):
    """Starts workers, but the second try raises."""
    tries = iter([None, error])

    def start(place: int) -> ThreadWorker:
        if fault := next(tries, None):
            raise fault
        return ThreadWorker(lambda jobs: None)

    return start


def test_a_start_that_fails_is_tried_again_and_meanwhile_the_crew_is_stuck(caplog, monkeypatch):
    monkeypatch.setattr("iret.serve.crew.PAUSES_S", (0.01, 0.01))

    async def scene(crew, ask, started):
        started[0].ended.set()
        while not crew.is_stuck:
            await asyncio.sleep(0)
        answer = await ask(7)
        return answer, crew.is_ready, crew.is_stuck

    found, _ = play(scene, start=refuse_once(OSError(24, "Too many open files")))
    assert found == (7, True, False)
    assert "a worker did not come up: [Errno 24] Too many open files" in caplog.text


def test_a_worker_that_comes_back_with_another_model_is_not_used(caplog, monkeypatch):
    monkeypatch.setattr("iret.serve.crew.PAUSES_S", (0.01, 0.01))

    class Other(ThreadWorker):
        def hello(self) -> dict:
            return super().hello() | {"labels": ["other"]}

    async def scene(crew, ask, started):
        started[0].ended.set()
        while crew.is_ready:
            await asyncio.sleep(0)
        return await ask(7)

    answer, started = play(scene, start=lambda place: (Other if place == 1 else ThreadWorker)(lambda jobs: None))
    assert answer == 7
    assert started[1].calls == [] and started[1].ended.is_set()
    assert "the bundle holds another model now" in caplog.text


def test_a_worker_that_hangs_is_killed_and_its_image_answered_by_the_next(caplog):
    class Hangs(ThreadWorker):
        def call(self, jobs) -> list:
            self.ended.wait(5)  # until it is killed
            raise WorkerDied

    async def scene(crew, ask, started):
        return await ask(7)

    answer, _ = play(scene, timeout_s=0.05, start=lambda place: (ThreadWorker if place else Hangs)(lambda jobs: None))
    assert answer == 7
    assert "did not answer in 0.05 s and is killed" in caplog.text


def test_a_drain_waits_for_the_worker_that_is_still_loading():
    gate = threading.Event()

    class Slow(ThreadWorker):
        def hello(self) -> dict:
            gate.wait(5)
            return super().hello()

    async def scene(crew, ask, started):
        service = Service(crew.submit, {}, Limits(), Metrics())
        started[0].ended.set()
        while crew.is_ready:
            await asyncio.sleep(0)

        async def request() -> float:
            with service.admit():
                job = np.full((1, 1, 1), 7, np.float32), Ask()
                [(result, _)] = await service.answer([job], time.monotonic())
                return float(result.logits[0])

        inside = asyncio.ensure_future(request())
        while not service.num_open:
            await asyncio.sleep(0)
        drain = asyncio.ensure_future(service.drain())
        await asyncio.sleep(0)
        assert not drain.done()
        gate.set()
        await drain
        return await inside

    answer, _ = play(scene, start=lambda place: (Slow if place else ThreadWorker)(lambda jobs: None))
    assert answer == 7


@pytest.mark.parametrize("sentence", ["no such class to unpickle", "0 answers to 1 images"])
def test_an_answer_that_is_none_ends_the_worker_and_not_the_crew(sentence, caplog):
    class Mad(ThreadWorker):
        def call(self, jobs) -> list:
            if "unpickle" in sentence:
                raise ModuleNotFoundError(sentence)
            return []

    async def scene(crew, ask, started):
        return await ask(7)

    answer, _ = play(scene, start=lambda place: (ThreadWorker if place else Mad)(lambda jobs: None))
    assert answer == 7
    assert sentence in caplog.text


def test_a_bug_in_the_line_costs_no_place_in_the_crew(caplog, monkeypatch):
    async def scene(crew, ask, started):
        faults = iter([RuntimeError("a bug")])
        hold_to = crew._batcher.hold_to

        def fail_once(images: int) -> None:
            for fault in faults:
                raise fault
            hold_to(images)

        crew._batcher.hold_to = fail_once
        lost = asyncio.ensure_future(ask(1))
        while len(started) < 2 or not crew.is_ready:
            await asyncio.sleep(0)
        lost.cancel()
        return await ask(7)

    assert play(scene)[0] == 7
    assert "a bug" in caplog.text


def test_what_is_slow_is_computed_fewer_together():
    """A quarter of the time-out for a batch: of images that take 0.6 s each, 4 in 2.5 s."""

    async def run():
        batcher, sizes = Batcher(16, 0.0), []
        crew = Crew(lambda: ThreadWorker(lambda jobs: None), 1, batcher, Metrics(), timeout_s=10.0)
        for _ in range(60):
            now = time.monotonic()
            batcher.put(Waiting(Job(np.zeros((1, 1, 1), np.float32), Ask()), now, now))
        for _ in range(8):
            sizes.append(len(await batcher.take()))
            crew._learn(0.6 * sizes[-1], sizes[-1])
        return sizes

    sizes = asyncio.run(run())
    assert (sizes[0], sizes[1], sizes[-1]) == (16, 8, 4)


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
