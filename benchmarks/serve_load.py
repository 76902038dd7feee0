"""`iret serve` under load, on one machine: throughput by budget, what is refused, memory, killed workers, a clean end.

    python benchmarks/serve_load.py --bundle BUNDLE --seconds 120 --out results/...      run it alone on the machine

Clients are connections of this process that send one request after another (a closed loop), so client and server share the
cores: throughput is a lower bound of the server's. Each request is one of 64 small PNGs, made-up blobs.

steady    for each budget and for all of them mixed: images a second, latency, images computed together; nothing but 200
overload  four times as many clients as there are places: nothing but 200 and 429
kills     mixed budgets, while a worker is killed again and again: nothing but 200, and each is replaced
end       SIGTERM under load: every request sent before it is answered, with 200 but for those of the last moment, which the
          server may not have read yet and may refuse with 503; the exit status is 0
memory    resident bytes of all processes while load is steady, before overload and after it: the median of the last third is no
          more than 5 % above that of the first, and the line through all of them (Theil-Sen) climbs by no more than 512
          bytes an answered image, which takes 20,000 images to tell from buffers still growing

The client is our own, not wrk or locust: it tells requests sent before SIGTERM from later ones, and reads every answer.
"""

import argparse
import asyncio
import csv
import io
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from iret import doctor

BUDGETS = (1.0, 0.75, 0.5, 0.35)
CLIENTS = 16
GROWTH = 0.05
LEAK_BYTES = 512.0  # an answered image
NUM_PHOTOS = 64
ENOUGH = 20_000  # images, to judge a leak by: buffers of batches that had not come before take some 10 MB in all
REST_S = 0.02  # of a client that was sent away
READ_S = 0.05  # after which a request that was sent has been read, and so accepted


@dataclass(frozen=True)
class Sample:
    """One request."""

    phase: str
    budget: float
    sent_s: float
    latency_s: float
    status: int  # 0: no answer, -1: no connection
    batch: int  # images computed together; 0: not computed

    @property
    def row(self) -> tuple:
        return (
            self.phase, self.budget, f"{self.sent_s:.6f}", f"{self.latency_s:.6f}", self.status, self.batch
        )  # fmt: skip


class Client:
    """One connection after another to the server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None

    async def ask(self, phase: str, budget: float, photo: bytes) -> Sample:
        began = time.monotonic()
        status, batch = -1, 0
        try:
            if self._reader is None:
                self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
            status = 0
            head = f"POST /v1/predict?budget={budget:g}&top=1 HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            self._writer.write(f"{head}Content-Length: {len(photo)}\r\n\r\n".encode() + photo)
            answer = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            body = await self._reader.readexactly(int(answer.split("content-length: ")[1].split("\r\n")[0]))
            status = int(answer.split()[1])
            batch = json.loads(body).get("batch", 0)
            if "connection: close" in answer:
                self.close()
        except (OSError, asyncio.IncompleteReadError):
            self.close()
        return Sample(phase, budget, began, time.monotonic() - began, status, batch)

    def close(self) -> None:
        if self._reader is not None:
            self._writer.close()
        self._reader = None


class Load:
    """The server, and what was seen of it."""

    def __init__(self, bundle: Path, words: list[str]) -> None:
        command = [sys.executable, "-m", "iret.cli", "serve", str(bundle), "--port", "0", *words]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        found = re.search(r"http://[^ ]+:(\d+)", line)
        if not found:
            sys.exit(f"the server did not start: {line}{self.process.stderr.read()}")
        # Read on, or the pipe fills, and the server waits.
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        self.port, self.device = int(found[1]), line.split("  ")[1].strip()
        self.samples: list[Sample] = []
        self.memory: list[tuple[str, float, int]] = []

    def resident(self) -> int:
        """Bytes of the server and its workers."""
        family = [psutil.Process(self.process.pid), *self.workers()]
        total = 0
        for each in family:
            try:
                total += each.memory_info().rss
            except psutil.NoSuchProcess:
                pass
        return total

    def workers(self) -> list[psutil.Process]:
        """The processes that compute: of the children, all but multiprocessing's own tracker."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            try:
                if "spawn_main" in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.Error:
                pass
        return found

    async def run(
        self, phase: str, budgets: tuple[float, ...], seconds: float, clients: int, photos: Sequence[bytes]
    ) -> None:
        """`clients` ask one after another for so long; every request is noted."""
        until, draw = time.monotonic() + seconds, random.Random(phase)

        async def ask_on() -> None:
            client = Client(self.port)
            while time.monotonic() < until:
                sample = await client.ask(phase, draw.choice(budgets), draw.choice(photos))
                self.samples.append(sample)
                if sample.status != 200:
                    await asyncio.sleep(REST_S)
            client.close()

        async def watch() -> None:
            while time.monotonic() < until:
                self.memory.append((phase, time.monotonic(), self.resident()))
                await asyncio.sleep(min(1.0, seconds / 20))

        await asyncio.gather(watch(), *(ask_on() for _ in range(clients)))

    async def kill_on(self, seconds: float, pause: float) -> int:
        """Kill a worker, again and again; how many."""
        until, kills = time.monotonic() + seconds, 0
        while time.monotonic() + 2 * pause < until:
            await asyncio.sleep(pause)
            victims = self.workers()
            if victims:
                victims[kills % len(victims)].kill()
                kills += 1
        return kills

    async def end(self, photos: Sequence[bytes]) -> tuple[float, int]:
        """SIGTERM while clients ask; when it was sent, and the exit status."""
        load = asyncio.create_task(self.run("end", BUDGETS, 3.0, CLIENTS, photos))
        await asyncio.sleep(1.0)
        told = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        await load
        return told, await asyncio.to_thread(self.process.wait, 30)

    def metric(self, name: str) -> float:
        from urllib.request import urlopen

        with urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(name)))


def make_photos(port: int) -> list[bytes]:
    """PNGs of blobs of all sizes and colours: like photos, and unlike one noise, they do not all keep as many patches."""
    from urllib.request import urlopen

    with urlopen(f"http://127.0.0.1:{port}/v1/model") as answer:
        rows, columns = json.load(answer)["img_size"]
    draw, photos = np.random.default_rng(0), []
    for _ in range(NUM_PHOTOS):
        cells = draw.integers(0, 256, (*draw.integers(2, 1 + min(rows, columns) // 2, 2), 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(cells).resize((columns, rows), Image.Resampling.BICUBIC).save(file, "PNG")
        photos.append(file.getvalue())
    return photos


async def drive(load: Load, seconds: float, queue: int, workers: int) -> dict:
    """All phases in `seconds`; what must hold, and whether it did."""
    photos = await asyncio.to_thread(make_photos, load.port)
    await load.run("warm-up", BUDGETS, seconds / 12, CLIENTS, photos)
    for budget in BUDGETS:
        await load.run(f"budget {budget:g}", (budget,), seconds / 10, CLIENTS, photos)
    await load.run("mixed", BUDGETS, seconds * 0.3, CLIENTS, photos)
    await load.run("overload", BUDGETS, seconds / 10, 4 * queue, photos)
    await load.run("mixed, after overload", BUDGETS, seconds / 10, CLIENTS, photos)
    spell = seconds / 10
    killed, _ = await asyncio.gather(
        load.kill_on(spell, max(0.5, spell / 8)), load.run("kills", BUDGETS, spell, CLIENTS, photos)
    )
    for _ in range(100):  # the last of them may still be loading
        if load.metric("iret_worker_restarts_total") >= killed and load.metric("iret_workers ") == workers:
            break
        await asyncio.sleep(0.1)
    restarts = load.metric("iret_worker_restarts_total")
    told, code = await load.end(photos)
    by_phase = {name: Counter(s.status for s in group) for name, group in grouped(load.samples)}
    before = [sample for sample in load.samples if sample.phase == "end" and sample.sent_s < told]
    accepted = [sample for sample in before if sample.sent_s < told - READ_S]
    memory = judge_memory(load.memory, load.samples)
    steady = [name for name in by_phase if name not in ("warm-up", "overload", "end")]
    return {
        "statuses": {name: {str(status): n for status, n in counts.items()} for name, counts in by_phase.items()},
        "kills": killed,
        "restarts": restarts,
        "memory": memory,
        "holds": {
            "nothing but 200 below the limit": all(set(by_phase[name]) == {200} for name in steady),
            "nothing but 200 and 429 above it": set(by_phase["overload"]) == {200, 429},
            "every killed worker was replaced": killed > 0 and restarts == killed,
            "SIGTERM lost no request": {sample.status for sample in accepted} == {200}
            and {sample.status for sample in before} <= {200, 503},
            "the exit status was 0": code == 0,
            "memory did not grow": memory["growth"] <= GROWTH
            and (memory["images"] < ENOUGH or memory["bytes_an_image"] <= LEAK_BYTES),
        },
    }


def judge_memory(memory: list[tuple[str, float, int]], samples: list[Sample]) -> dict[str, float]:
    """Of (phase, time, resident bytes): growth of the median, last third over first; slope (Theil-Sen) by images answered."""
    steady = [(time_s, resident) for phase, time_s, resident in memory if phase.startswith(("budget", "mixed"))]
    times_s, resident = np.array(steady, dtype=np.float64).T
    ended_s = np.sort([sample.sent_s + sample.latency_s for sample in samples if sample.status == 200])
    images = np.searchsorted(ended_s, times_s)
    third = max(len(resident) // 3, 1)
    one, other = np.triu_indices(len(resident), 1)
    steps = images[other] - images[one]
    slopes = (resident[other] - resident[one])[steps > 0] / steps[steps > 0]
    return {
        "growth": float(np.median(resident[-third:]) / np.median(resident[:third]) - 1),
        "bytes_an_image": float(np.median(slopes)) if len(slopes) else 0.0,
        "images": int(images[-1] - images[0]),
    }


def grouped(samples: list[Sample]) -> list[tuple[str, list[Sample]]]:
    return [(name, list(group)) for name, group in itertools.groupby(samples, key=lambda sample: sample.phase)]


def write(out: Path, load: Load, found: dict, command: str) -> str:
    """The results folder; its README."""
    out.mkdir(parents=True, exist_ok=True)
    env = doctor.report() | {"server": load.device, "clients": CLIENTS, "cores": os.cpu_count()}
    (out / "env.json").write_text(json.dumps(env, indent=1) + "\n")
    (out / "serve_load.json").write_text(json.dumps({"command": command, **found}, indent=1) + "\n")
    for name, head, rows in (
        ("samples", ("phase", "budget", "sent_s", "latency_s", "status", "batch"), (s.row for s in load.samples)),
        ("memory", ("phase", "time_s", "resident_bytes"), load.memory),
    ):
        with (out / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([head, *rows])
    lines = [
        f"`{command}`: {load.device}; {CLIENTS} clients on the same machine ({env['cores']} cores). {__doc__.splitlines()[0]}",
        "",
        "| phase | images/s | ms, median | ms, p99 | images a batch | statuses |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in grouped(load.samples):
        good = [sample for sample in group if sample.status == 200]
        if name == "warm-up" or not good:
            continue
        span = max(s.sent_s + s.latency_s for s in group) - min(s.sent_s for s in group)
        latencies = np.array([sample.latency_s for sample in good]) * 1e3
        statuses = ", ".join(f"{n} x {status}" for status, n in sorted(Counter(s.status for s in group).items()))
        cells = (f"{len(good) / span:.0f}", f"{np.median(latencies):.1f}", f"{np.percentile(latencies, 99):.1f}")
        batch = statistics.mean(sample.batch for sample in good)
        lines.append(f"| {name} | {' | '.join(cells)} | {batch:.1f} | {statuses} |")
    memory = found["memory"]
    lines += [
        "",
        f"Workers killed: {found['kills']}, replaced: {found['restarts']:.0f}. Resident memory: {memory['growth']:+.1%}, "
        f"{memory['bytes_an_image']:+.0f} bytes an image over {memory['images']} images"
        f"{'' if memory['images'] >= ENOUGH else ', too few to judge a leak by'}.",
        "Client and server share the cores, and the client is Python: images/s are a lower bound.",
        "",
    ]
    lines += [f"- {claim}: {'yes' if holds else 'NO'}" for claim, holds in found["holds"].items()]
    text = "\n".join(lines) + "\n"
    (out / "README.md").write_text(text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120.0, help="of load in all (default %(default)s)")
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    load = Load(args.bundle, ["--queue", str(args.queue), "--workers", str(args.workers), "--batch-wait-ms", "2"])
    try:
        found = asyncio.run(drive(load, args.seconds, args.queue, args.workers))
    finally:
        load.process.kill()
    words = [f"--seconds {args.seconds:g}", f"--queue {args.queue}", f"--workers {args.workers}"]
    print(
        write(args.out, load, found, f"python benchmarks/serve_load.py --bundle {args.bundle.name} {' '.join(words)}")
    )
    return 0 if all(found["holds"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
