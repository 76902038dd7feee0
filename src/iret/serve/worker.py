"""A session in a process of its own: what runs there, and the handle that the service holds.

A hostile photo that takes a decoder down takes a worker down, and no more. Worker and service talk over a pipe; when the
service is gone, the pipe ends, and so does the worker.
"""

import logging
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from iret.serve.computer import Computer, Job, Result, Supply
from iret.serve.refusal import Refusal

START_S = 120.0  # a large bundle on a slow card
STOP_S = 2.0

log = logging.getLogger("iret.serve")


class WorkerDied(Exception):
    """The process is gone, or hung and was killed."""


def open_computer(
    bundle: Path, engine: str | None, threads: int | None, *, max_pixels: int, supply: Supply
) -> Computer:
    """Raises ValueError or ImportError as `Session` does."""
    from iret.runtime.session import Session

    return Computer(Session(bundle, engine, threads=threads), max_pixels=max_pixels, supply=supply)


def work(pipe: Connection, make: Callable[[], Computer]) -> None:
    """The life of a worker: says what it has loaded, then answers batches until the pipe ends."""
    for each in (signal.SIGINT, signal.SIGTERM):  # meant for the service, which lets us finish what was accepted
        signal.signal(each, signal.SIG_IGN)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        computer = make()
        pipe.send(computer.describe())
    except (ValueError, ImportError, OSError) as error:
        pipe.send(str(error))
        return
    try:
        while True:
            pipe.send(computer(pipe.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


class Worker:
    """The process and our end of its pipe. Methods block; each but `join` and `stop` from one thread at a time."""

    def __init__(self, make: Callable[[], Computer]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, make), name="iret-worker", daemon=True)
        self._process.start()
        theirs.close()  # or its end would not be seen

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def hello(self) -> dict[str, Any]:
        """Waits until it is ready; what it serves.

        Raises:
            ValueError: it cannot load the bundle, in its own sentence.
            WorkerDied: it ended, or was not ready in time.
        """
        found = self._receive(START_S)
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def call(self, jobs: Sequence[Job], seconds: float) -> list[Result | Refusal]:
        """Raises WorkerDied when it does before it has answered, or has not in so many seconds."""
        try:
            self._pipe.send(list(jobs))
        except OSError as error:
            raise WorkerDied from error
        return self._receive(seconds)

    def _receive(self, seconds: float) -> Any:
        try:
            if not self._pipe.poll(seconds):
                log.error("a worker did not answer in %.0f s and is killed", seconds)
                self._process.kill()
                raise WorkerDied
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied from error

    def join(self) -> None:
        """Waits until it has ended."""
        wait([self._process.sentinel])  # leaves the reaping to `stop`

    def stop(self) -> None:
        """Ends it: by the end of the pipe, or by force."""
        self._pipe.close()
        self._process.join(STOP_S)
        self._process.kill()
        self._process.join()


def starter(
    bundle: Path, engine: str | None, threads: int | None, *, max_pixels: int, supply: Supply
) -> Callable[[], Worker]:
    """What `Crew` starts its workers with."""
    return partial(
        Worker, partial(open_computer, bundle, engine, threads, max_pixels=max_pixels, supply=supply)
    )  # fmt: skip
