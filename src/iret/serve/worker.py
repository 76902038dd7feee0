"""A session in a process of its own: what runs there, and the handle that the service holds.

A photo that takes a decoder down takes a worker down, and no more. It is no sandbox: worker and service talk over a pipe in
pickles, so a decoder that is taken over could reach the service. When the service is gone, the pipe ends, and so does the worker.
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

STOP_S = 2.0


class WorkerDied(Exception):
    """The process is gone."""


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
        try:
            computer = make()
            told = computer.describe()
        except (ValueError, ImportError, OSError) as error:
            pipe.send(str(error))
            return
        pipe.send(told)
        while True:
            pipe.send(computer(pipe.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


class Worker:
    """The process and our end of its pipe. `hello` and `call` block without a limit, until it answers, ends or is killed.

    They are for one thread at a time; `join`, `kill` and `stop` may be called beside them.
    """

    def __init__(self, make: Callable[[], Computer]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, make), name="iret-worker", daemon=True)
        self._process.start()
        theirs.close()  # or its end would not be seen

    def hello(self) -> dict[str, Any]:
        """Waits until it is ready; what it serves.

        Raises:
            ValueError: it cannot load the bundle, in its own sentence.
            WorkerDied: it ended.
        """
        found = self._receive()
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def call(self, jobs: Sequence[Job]) -> list[Result | Refusal]:
        """Raises WorkerDied when it does before it has answered."""
        try:
            self._pipe.send(list(jobs))
        except OSError as error:
            raise WorkerDied from error
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied from error

    def join(self) -> None:
        """Waits until it has ended."""
        wait([self._process.sentinel])  # leaves the reaping to `stop`

    def kill(self) -> None:
        """Ends it by force, and whatever is sent to it or awaited from it."""
        self._process.kill()

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
