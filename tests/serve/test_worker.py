"""A real worker process that hangs: what is sent to it and what is awaited from it ends when it is killed."""

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from pretend import make_computer

from iret.serve.asks import Ask
from iret.serve.computer import Job
from iret.serve.worker import Worker, WorkerDied


@pytest.mark.parametrize("size", [1000, 5_000_000])
def test_a_hung_worker_is_let_go_when_it_is_killed(size):
    """A small job lies in the pipe, a large one does not fit in."""
    worker = Worker(make_computer)
    try:
        worker.hello()
        [process] = multiprocessing.active_children()
        os.kill(process.pid, signal.SIGSTOP)
        killer = threading.Timer(0.1, worker.kill)
        killer.start()
        with pytest.raises(WorkerDied):
            worker.call([Job(bytes(size), Ask())])
        killer.join()
    finally:
        worker.kill()
        worker.stop()
