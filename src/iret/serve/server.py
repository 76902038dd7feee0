"""`iret serve`: the app under uvicorn in this process, the sessions in processes of their own; and how it all ends.

The first SIGTERM or SIGINT drains: new requests get 503 and `/health/ready` says no, while everything accepted is answered;
then the socket closes and the workers end. A second signal ends it at once. Before the workers are up nothing was accepted,
and any signal is the end.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from iret.serve.app import build_app
from iret.serve.batcher import Batcher
from iret.serve.connection import Connection
from iret.serve.crew import AnyWorker, Crew
from iret.serve.metrics import Metrics
from iret.serve.service import Limits, Service

BACKLOG = 512  # connections that wait to be accepted
FILES = 64  # open at a time that are no connections, at most: pipes of workers, and what is being served of the page


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the service runs; what it serves is what its workers load."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    workers: int = 1
    max_batch: int = 16
    batch_wait_s: float = 0.002
    limits: Limits = field(default_factory=Limits)
    api_key: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port {self.port} must be from 0 to 65535.")
        if self.workers < 1:
            raise ValueError(f"--workers {self.workers} must be 1 or more.")
        if not 1 <= self.max_batch:
            raise ValueError(f"--max-batch {self.max_batch} must be 1 or more.")
        if not 0 <= self.batch_wait_s < self.limits.timeout_s:
            raise ValueError(f"--batch-wait-ms {1e3 * self.batch_wait_s:g} must be from 0 to the time-out.")


def count_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(start_worker: Callable[[], AnyWorker], options: Options, say: Callable[[str], None]) -> int:
    """Serve until a signal says to end; how many accepted images were left unanswered.

    Raises:
        ValueError: the address cannot be used, or the workers cannot load the bundle.
    """
    listener = _listen(options.host, options.port)
    try:
        return asyncio.run(_serve(start_worker, options, listener, say))
    finally:
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ValueError(
            f"{host} port {port} cannot be listened on ({error.strerror}); choose another --host or --port."
        ) from error


async def _serve(
    start_worker: Callable[[], AnyWorker], options: Options, listener: socket.socket, say: Callable[[str], None]
) -> int:
    metrics = Metrics()
    batcher = Batcher(options.max_batch, options.batch_wait_s)
    metrics.queue.set_function(lambda: len(batcher))
    crew = Crew(start_worker, options.workers, batcher, metrics, timeout_s=options.limits.timeout_s)
    model = await crew.start()
    try:
        service = Service(crew.submit, model, options.limits, metrics)
        service.is_ready, service.is_stuck = lambda: crew.is_ready, lambda: crew.is_stuck
        address, port = listener.getsockname()[:2]
        say(
            f"{model['name']} on http://{f'[{address}]' if ':' in address else address}:{port}  {model['device']}, "
            f"workers: {options.workers}"
        )
        await _Server(service, build_app(service, options.api_key)).serve([listener])
    finally:
        await crew.stop()
    say("every accepted request was answered" if not service.num_open else f"{service.num_open} images left unanswered")
    return service.num_open


def _count_connections(queue: int) -> int:
    """That may be open at a time: some for each image of the house, and fewer than files may be."""
    wanted = 4 * queue + 64
    try:
        import resource
    except ModuleNotFoundError:  # Windows has neither this nor such a limit
        return wanted
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if files == resource.RLIM_INFINITY else max(1, min(wanted, files - FILES))


class _Server(uvicorn.Server):
    """uvicorn, but the first signal drains before anything is closed."""

    def __init__(self, service: Service, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                # A class, says its signature; what it does is call it.
                http=partial(  # type: ignore[arg-type]
                    Connection, patience_s=service.limits.timeout_s, most=_count_connections(service.limits.queue)
                ),
                lifespan="off",
                loop="asyncio",
                ws="none",
                access_log=False,
                log_level="warning",
                server_header=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=5,
            )
        )
        self._service, self._was_told = service, False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._was_told:
            self._was_told = True
            self._loop.call_soon_threadsafe(self._drain)
        else:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # or each lost request is a traceback
            self.should_exit = self.force_exit = True

    def _drain(self) -> None:
        self._task = asyncio.ensure_future(self._service.drain())
        self._task.add_done_callback(self._end)

    def _end(self, task: object) -> None:
        self.should_exit = True
