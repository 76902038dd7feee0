"""The line: who goes with whom, and who goes first."""

import asyncio

import numpy as np
import pytest

from iret.serve.asks import Ask
from iret.serve.batcher import Batcher, Waiting
from iret.serve.computer import Job

IMAGE = np.zeros((3, 4, 4), np.float32)


def waiting(due_s: float, *, deadline: bool = False, arrived_s: float = 0.0, tries: int = 0) -> Waiting:
    due_s = float(due_s)
    return Waiting(Job(IMAGE, Ask(), due_s if deadline else None), due_s, arrived_s, tries=tries)


def drain(*images, max_batch=4, wait_s=0.0) -> list[list[float]]:
    """The batches that come out, each image as its `due_s`."""

    async def run():
        batcher = Batcher(max_batch, wait_s, clock=lambda: 0.0)
        for each in images:
            batcher.put(each())
        batches = []
        while len(batcher):
            batches.append([image.due_s for image in await batcher.take()])
        return batches

    return asyncio.run(run())


def test_a_batch_takes_those_who_must_be_answered_first():
    assert drain(*(lambda before=before: waiting(before) for before in (5, 1, 4, 2, 3))) == [[1, 2, 3, 4], [5]]


def test_an_image_with_a_deadline_goes_alone_and_overtakes_those_who_can_wait():
    images = [
        lambda: waiting(10), lambda: waiting(3, deadline=True), lambda: waiting(11), lambda: waiting(12, deadline=True),
        lambda: waiting(13)
    ]  # fmt: skip
    assert drain(*images) == [[3], [10, 11, 13], [12]]


def test_an_image_whose_worker_died_goes_alone():
    assert drain(lambda: waiting(1, tries=1), lambda: waiting(2), lambda: waiting(3)) == [[1], [2, 3]]


def test_a_batch_that_is_not_full_waits_for_others_and_no_longer():
    async def run():
        now = 0.0
        batcher = Batcher(3, 5.0, clock=lambda: now)
        batcher.put(waiting(10, arrived_s=0.0))
        take = asyncio.ensure_future(batcher.take())
        await asyncio.sleep(0)
        assert not take.done()
        batcher.put(waiting(11, arrived_s=1.0))
        for _ in range(9):
            await asyncio.sleep(0)
        assert not take.done()
        batcher.put(waiting(12, arrived_s=2.0))  # full
        assert len(await take) == 3
        now = 6.0
        batcher.put(waiting(13, arrived_s=0.5))  # has waited long enough
        assert len(await batcher.take()) == 1

    asyncio.run(run())


def test_those_whom_nobody_waits_for_are_passed_over():
    async def run():
        batcher = Batcher(4, 0.0, clock=lambda: 0.0)
        images = [waiting(place) for place in range(4)]
        for each in images:
            batcher.put(each)
        images[0].done.cancel()
        images[2].done.cancel()
        assert await batcher.take() == [images[1], images[3]]

    asyncio.run(run())


def test_those_who_gave_up_do_not_pile_up_while_nobody_takes():
    async def run():
        batcher = Batcher(4, 0.0, clock=lambda: 0.0)
        stays = waiting(99)
        batcher.put(stays)
        for place in range(200):
            batcher.put(gone := waiting(place))
            gone.done.cancel()
            assert len(batcher) <= 8
        assert await batcher.take() == [stays]

    asyncio.run(run())


def test_deadlines_without_end_do_not_keep_an_image_waiting_that_is_due():
    async def run():
        now = 0.0
        batcher = Batcher(4, 0.0, clock=lambda: now)
        batcher.put(ordinary := waiting(2.5))
        for turn in range(1000):  # a new deadline each time that one was computed
            now = 0.02 * turn
            batcher.put(waiting(now + 0.01, deadline=True, arrived_s=now))
            if ordinary in await batcher.take():
                return now

    assert asyncio.run(run()) == pytest.approx(2.5, abs=0.02)


def test_batches_can_be_held_smaller_and_never_made_larger():
    async def run():
        batcher, sizes = Batcher(3, 0.0, clock=lambda: 0.0), []
        for place in range(12):
            batcher.put(waiting(place))
        for most in (2, 9, 0):
            batcher.hold_to(most)
            sizes.append(len(await batcher.take()))
        return sizes

    assert asyncio.run(run()) == [2, 3, 1]


def test_a_cancelled_taker_has_taken_nothing():
    async def run():
        batcher = Batcher(2, 9.0, clock=lambda: 0.0)
        takers = [asyncio.ensure_future(batcher.take()) for _ in range(2)]
        await asyncio.sleep(0)
        batcher.put(waiting(1))
        await asyncio.sleep(0)
        takers[0].cancel()
        batcher.put(waiting(2))
        assert [image.due_s for image in await takers[1]] == [1, 2]

    asyncio.run(run())
