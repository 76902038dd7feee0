"""The real server with a shipped model, for long: load, kills, schemathesis, hostile bodies, Ray. Only `make soak` runs it."""

import http.client
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import iret

sys.path.insert(0, str(Path(__file__).parent))
from test_server import Running

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parents[2]
NUM_FUZZ = 5000
LOAD_S = 120
GROWTH = 0.05  # of resident memory, from the first thousand hostile bodies to the last
PATIENCE_S = 5.0  # for one answer


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(iret.__file__).parents[1]), "GOMP_SPINCOUNT": "0"}


def keep(tmp_path: Path, name: str) -> Path:
    """Where raw samples go: the folder that `make soak` keeps."""
    return Path(os.environ.get("IRET_SOAK_OUT", tmp_path)) / name


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("soak") / "iret_pico-cifar10"
    command = [sys.executable, "-m", "iret.cli", "export", "iret_pico-cifar10", "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True, env=environment())
    return folder


class Server:
    """`iret serve` of a bundle, on a port of its own."""

    def __init__(self, bundle: Path, *words: str) -> None:
        command = [sys.executable, "-m", "iret.cli", "serve", str(bundle), "--port", "0", "--workers", "1", *words]
        self.log = (bundle.parent / "serve.log").open("w+")
        self.process = subprocess.Popen(command, stderr=self.log, env=environment())
        deadline = time.monotonic() + 120
        while not (found := re.search(r":(\d+)  ", Path(self.log.name).read_text())) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert found, Path(self.log.name).read_text()
        self.port = int(found[1])

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def resident(self) -> int:
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children()]
        return sum(each.memory_info().rss for each in family)

    def restarts(self) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith("iret_worker_restarts_total")))


def test_two_minutes_of_load_lose_nothing(bundle, tmp_path):
    """What must hold, and what was seen, stands in the folder that the benchmark writes."""
    out = keep(tmp_path, "serve_load")
    command = [sys.executable, str(ROOT / "benchmarks" / "serve_load.py"), "--bundle", str(bundle)]
    ended = subprocess.run(
        [*command, "--seconds", str(LOAD_S), "--out", str(out)], env=environment(), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_schemathesis_finds_nothing_against_the_server_s_own_document(bundle, tmp_path):
    """All checks but one: a schema cannot say that bytes are a photo, or that only one dial may be turned, so what fits the
    schema may be refused all the same (positive_data_acceptance)."""
    out = keep(tmp_path, "schemathesis.log")
    with Server(bundle) as server:
        url = f"http://127.0.0.1:{server.port}/openapi.json"
        command = [
            str(Path(sys.executable).parent / "schemathesis"),
            "run",
            url,
            "--max-examples",
            "100",
            "--seed",
            "0",
        ]
        ended = subprocess.run(
            [
                *command,
                "--exclude-checks",
                "positive_data_acceptance",
                "--no-color",
                "--request-timeout",
                str(PATIENCE_S),
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"COLUMNS": "120"},
        )
        out.write_text(ended.stdout.replace(f":{server.port}", ":8000"))
        assert ended.returncode == 0, ended.stdout[-4000:]
        assert "Traceback" not in Path(server.log.name).read_text()


def damage(photo: bytes, draw: random.Random) -> bytes:
    """A photo with bytes changed, cut short, or none at all."""
    if draw.random() < 0.1:
        return draw.randbytes(draw.randrange(1, 4000))
    content = bytearray(photo)
    for _ in range(draw.randrange(1, 40)):
        content[draw.randrange(min(len(content), draw.choice((64, len(content)))))] = draw.randrange(256)
    return bytes(content[: draw.randrange(1, len(content) + 1)] if draw.random() < 0.5 else content)


def photos() -> list[bytes]:
    """One small photo in each format that is read."""
    import io

    from PIL import Image

    from iret.serve.computer import FORMATS

    whole = Image.open(Path(iret.__file__).parent / "photos" / "chelsea.jpg").resize((90, 60))
    files = []
    for kind in FORMATS:
        file = io.BytesIO()
        whole.save(file, kind)
        files.append(file.getvalue())
    return files


def requests(name: str, draw: random.Random) -> Iterator[tuple[str, bytes, str]]:
    """Path, body and Content-Type, in turn: damaged photos, damaged forms round a photo, damaged tensors."""
    whole = photos()
    form = b'--B\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n%s\r\n--B--\r\n'
    values: list[object] = [0.5, -3e38, 3e38, 10**400, "x" * 1000, None, True, [], {}, "\ud800", float("nan")]
    while True:
        yield "/v1/predict?top=1", damage(draw.choice(whole), draw), "image/jpeg"
        body = form % draw.choice(whole)
        yield (
            "/v1/predict?top=1",
            damage(body, draw) if draw.random() < 0.9 else body,
            "multipart/form-data; boundary=B",
        )
        data: list[object] = [0.5] * (3 * 32 * 32)
        for _ in range(draw.randrange(3)):
            data[draw.randrange(len(data))] = draw.choice(values)
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, 3, 32, 32], "data": data}
        asked = {"id": "x", "parameters": {"budget": 0.5}, "inputs": [tensor], "outputs": []}
        for where in draw.sample([tensor, asked], draw.randrange(2)):
            where[draw.choice(list(where))] = draw.choice(values)
        content = json.dumps(asked).encode()
        yield f"/v2/models/{name}/infer", damage(content, draw) if draw.random() < 0.3 else content, "application/json"


def test_thousands_of_hostile_bodies_are_answered_or_refused_and_leave_nothing_behind(bundle, tmp_path):
    draw = random.Random(0)
    rows = ["place,kind,status,ms,resident"]
    statuses: Counter[int] = Counter()
    residents = []
    with Server(bundle, "--max-pixels", "1000000") as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
        connection.request("GET", "/v1/model")
        name = json.loads(connection.getresponse().read())["name"]
        for place, (path, body, kind) in zip(range(NUM_FUZZ), requests(name, draw), strict=False):
            began = time.monotonic()
            connection.request("POST", path, body, {"Content-Type": kind})
            answer = connection.getresponse()
            told = json.loads(answer.read())
            statuses[answer.status] += 1
            assert ("error" in told) == (answer.status != 200)
            assert not re.search(r"/\w+/|\.py|Traceback", told.get("error", ""))
            if place % 100 == 99:
                residents.append(server.resident())
            took_ms, resident = 1e3 * (time.monotonic() - began), residents[-1] if residents else ""
            rows.append(f"{place},{kind.split(';')[0]},{answer.status},{took_ms:.3f},{resident}")
        restarts, log = server.restarts(), Path(server.log.name).read_text()
    keep(tmp_path, "serve_fuzz.csv").write_text("\n".join(rows) + "\n")
    assert set(statuses) <= {200, 400, 413, 422}
    assert statuses[200] > 100 and statuses[400] > 1000
    assert restarts == 0
    assert "Traceback" not in log
    # Medians: what a large photo takes for a while is given back, and is no growth.
    assert statistics.median(residents[-10:]) <= (1 + GROWTH) * statistics.median(residents[:10])


def test_an_image_that_ends_every_worker_is_refused_and_the_server_goes_on():
    deadly = {"name": "image", "datatype": "FP32", "shape": [1, 3, 16, 16], "data": [-1000.0] * 768}
    body = json.dumps({"inputs": [deadly]}).encode()
    with Running() as running:
        status, told = running.ask("POST", "/v2/models/pretend/infer", body, "application/json")
        assert (status, "ended 3 workers" in json.loads(told)["error"]) == (500, True)
        assert running.ask("GET", "/health/live")[0] == 200
        deadline = time.monotonic() + 30
        while running.ask("GET", "/health/ready")[0] != 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert running.ask("GET", "/v2/models/pretend/ready")[0] == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(10) == 0


RAY = """
import sys
import httpx, ray
from ray import serve
from iret.serve.ray import app
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"port": int(sys.argv[2])})
serve.run(app(sys.argv[1], replicas=(1, 2)))
with httpx.Client(base_url=f"http://127.0.0.1:{sys.argv[2]}", timeout=60) as client:
    photo = {"content": open(sys.argv[3], "rb").read(), "headers": {"Content-Type": "image/jpeg"}}
    assert client.get("/health/ready").status_code == 200
    for budget in (1.0, 0.5):
        answer = client.post(f"/v1/predict?budget={budget}", **photo)
        assert (answer.status_code, answer.json()["budget"]) == (200, budget), answer.text
    assert client.post("/v1/predict?budget=2", **photo).status_code == 422
    assert client.post("/v1/predict", content=b"x", headers=photo["headers"]).status_code == 400
    assert "iret_images_total" in client.get("/metrics").text
serve.shutdown()
ray.shutdown()
print("served by ray", ray.__version__)
"""


def test_a_local_ray_serves_the_same_routes(bundle, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'iret[ray]'")
    photo = Path(iret.__file__).parent / "photos" / "chelsea.jpg"
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ended = subprocess.run(
        [sys.executable, "-c", RAY, str(bundle), str(port), str(photo)],
        env=environment() | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "served by ray" in ended.stdout, ended.stdout + ended.stderr
