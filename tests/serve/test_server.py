"""The whole service as a process of its own, sessions pretended: workers that are killed come back, and it ends cleanly."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from pretend import photo

import iret
from iret.serve import server
from iret.serve.server import Options

PATIENCE_S = 20.0


class Running:
    """The server in a process, and requests to it."""

    def __init__(self, workers: int = 1) -> None:
        environment = os.environ | {"PYTHONPATH": str(Path(iret.__file__).parents[1])}
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "pretend.py"), str(workers)],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        found = re.search(r":(\d+)  ", self.process.stdout.readline())
        assert found, "it did not start"
        self.port = int(found[1])

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.log.seek(0)
        log = self.log.read()
        self.log.close()
        if kind is None:
            assert "Traceback" not in log, log
        else:
            print(log)

    def until(self, claim: Callable[[], bool]) -> None:
        """Asks again and again."""
        limit = time.monotonic() + PATIENCE_S
        while not claim():
            assert time.monotonic() < limit, "it never came true"

    def ask(self, method: str, path: str, body: bytes | None = None, kind: str = "image/png") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, {"Content-Type": kind} if body else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        lines = self.ask("GET", "/metrics")[1].decode().splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(name)))

    def workers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def test_a_killed_worker_comes_back_and_sigterm_ends_it_all():
    with Running() as running:
        assert running.ask("POST", "/v1/predict?budget=0.5", photo())[0] == 200
        [worker] = running.workers()
        worker.kill()
        worker.wait(10)
        status, body = running.ask("POST", "/v1/predict?budget=0.5", photo())  # waits for the next worker
        assert (status, json.loads(body)["budget"]) == (200, 0.5)
        assert running.metric("iret_worker_restarts_total") == 1
        children = psutil.Process(running.process.pid).children(recursive=True)
        running.process.send_signal(signal.SIGTERM)
        assert "every accepted request was answered" in running.process.stdout.read()
        assert running.process.wait(10) == 0
        assert psutil.wait_procs(children, timeout=10)[1] == []


def test_sigterm_answers_what_was_accepted():
    """Requests whose body is not yet complete are accepted, too; a later one is sent away."""
    with Running() as running:
        content = photo()
        sockets = [socket.create_connection(("127.0.0.1", running.port), timeout=20) for _ in range(8)]
        head = (
            f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        for each in sockets:
            each.sendall(head.encode() + content[:10])
        running.until(lambda: running.metric("iret_open_images ") == len(sockets))
        running.process.send_signal(signal.SIGTERM)
        running.until(lambda: running.ask("GET", "/health/ready")[0] == 503)
        status, body = running.ask("POST", "/v1/predict", content)
        assert (status, "shutting down" in json.loads(body)["error"]) == (503, True)
        assert running.ask("GET", "/health/live")[0] == 200
        for each in sockets:
            each.sendall(content[10:])
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda each: each.recv(65536), sockets))
        assert [answer.split()[1] for answer in answers] == [b"200"] * 8
        for each in sockets:
            each.close()
        assert running.process.wait(10) == 0


def test_a_second_signal_ends_it_at_once_and_says_what_was_lost():
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 100\r\n\r\nabc"
    with Running() as running, socket.create_connection(("127.0.0.1", running.port), timeout=20) as client:
        client.sendall(head)
        running.until(lambda: running.metric("iret_open_images ") == 1)
        running.process.send_signal(signal.SIGTERM)
        running.until(lambda: running.ask("GET", "/health/ready")[0] == 503)
        running.process.send_signal(signal.SIGTERM)
        assert "1 images left unanswered" in running.process.stdout.read()
        assert running.process.wait(10) == 1


def test_there_are_fewer_connections_than_files_may_be_open(monkeypatch):
    resource = pytest.importorskip("resource", reason="this platform does not count open files")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    assert (server._count_connections(8), server._count_connections(64)) == (96, 192)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert server._count_connections(64) == 320


def test_a_body_beyond_the_limit_is_answered_though_it_never_ends():
    with Running() as running, socket.create_connection(("127.0.0.1", running.port), timeout=20) as client:
        client.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"%x\r\n%s\r\n" % (1_000_000, bytes(1_000_000))
        for _ in range(13):
            client.sendall(chunk)
        answer = client.recv(65536)
        assert answer.split()[1] == b"413"
        with socket.create_connection(("127.0.0.1", running.port), timeout=20) as other:
            other.sendall(b"nonsense\r\n\r\n")  # answered by `iret.serve.connection`, and not in uvicorn's words
            assert other.recv(65536).endswith(b'{"error": "this is no valid HTTP request."}')


def test_neither_the_service_nor_its_workers_load_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import iret.serve.server, iret.serve.worker, iret.runtime.session; "
        "import iret.serve.app; assert not {'ray', 'fastapi', 'pydantic'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(iret.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"port": 70_000}, "--port 70000"),
        ({"workers": 0}, "--workers 0"),
        ({"max_batch": 0}, "--max-batch 0"),
        ({"batch_wait_s": 60.0}, "--batch-wait-ms 60000"),
    ],
)
def test_options_out_of_range_are_named(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Options(**options)


def test_a_port_that_is_taken_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match="choose another --host or"):
        server._listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ValueError, match="no-such-host port 8000 cannot be listened on"):
        server._listen("no-such-host", 8000)
