"""One bundle at several thresholds, or one static graph, alone in this process, as on a device: for `bundle.py`, which asks.

    python benchmarks/alone.py JOB --out answer.json

JOB is JSON, {"engine": ..., "images": "x.npy", "rounds": 8} with "bundle": FOLDER, "settings": {NAME: thresholds} or with
"graph": FILE. The answer: seconds of every timed call by name; for a bundle also MACs, and the shares of a run outside the
engine and between its calls.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np

from iret.measure.latency import measure_latency, pin_threads
from iret.runtime.engines import load_graph, loading
from iret.runtime.record import Output
from iret.runtime.session import Session

WARM_UP = 2
LEAD = 3  # calls before the one that is timed: after other work a small run settles in its third call (docs/LOG.md, 2026-11-26)
HOST_RUNS = 20


class Calls:
    """When calls of the engine began and ended; graphs are loaded through it."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def load(self, engine: str, path: Path, threads: int | None) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
        graph = load_graph(engine, path, threads)

        def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
            began = time.perf_counter()
            found = graph(inputs)
            self.times.append((began, time.perf_counter()))
            return found

        return run

    def host(self, work: Callable[[], Output]) -> tuple[float, float]:
        """Shares of one run: outside the engine, and outside it between two calls."""
        self.times.clear()
        out = work()
        gaps = sum(after - before for (_, before), (after, _) in pairwise(self.times))
        return 1 - out.engine_s / out.time_s, gaps / out.time_s


def measure(job: dict[str, Any]) -> dict[str, Any]:
    engine, images = job["engine"], np.load(job["images"])
    time_all = partial(measure_latency, rounds=job["rounds"], warm_up=WARM_UP, lead=LEAD)
    if "graph" in job:
        with loading(engine):
            graph = load_graph(engine, Path(job["graph"]), 1)
        return {"seconds": {"": time_all({"": partial(graph, [images])})[""].samples_s.tolist()}}
    session = Session(job["bundle"], engine, threads=1)
    work = {name: partial(session, images, thresholds=each) for name, each in job["settings"].items()}
    found = {name: latency.samples_s.tolist() for name, latency in time_all(work).items()}
    macs = {name: int(run().macs[0]) for name, run in work.items()}
    del session, work
    calls = Calls()
    watched = Session(job["bundle"], engine, threads=1, load=calls.load)
    host = {}
    for name, each in job["settings"].items():
        shares = [calls.host(partial(watched, images, thresholds=each)) for _ in range(HOST_RUNS)]
        host[name] = [median(column) for column in zip(*shares, strict=True)]
    return {"seconds": found, "macs": macs, "host": host}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=json.loads, help="JSON, see above in this file")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with pin_threads(1):
        answer = measure(args.job)
    args.out.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
