"""Accuracy against deadline, and how late answers are: a bundle on ONNX Runtime, one thread, one image a call.

    python benchmarks/deadline.py MODEL_OR_BUNDLE --data DATA --out results/...        alone on the machine

Twice: on the idle machine, and beside `--busy` processes that do nothing but multiply arrays of 32 MiB (by default one a
processor), in turn, block after block. Nothing is pinned. In a block every image is answered once at every deadline, in an order
drawn anew; deadlines go from less than the first stage takes to more than everything does. Images are arrays already: reading
photos is not in it. A deadline is kept by not beginning a stage that should end too late, so an answer may be late by what the
last stage took; how often it was later still (the system gave the processor to another between two stages) is counted.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from iret import doctor
from iret.export.bundle import export
from iret.runtime.bundle import FILE_NAME
from iret.runtime.engines import Graph, load_graph
from iret.runtime.session import Session
from iret.train.data import name_of, open_data
from iret.zoo import load

STEPS = 12  # deadlines, from FIRST times the first stage to LAST times everything, evenly in the logarithm
FIRST, LAST = 0.7, 1.6
WARM_UP = 100  # calls before each block: the pace of the machine as it is now
COLUMNS = (
    "load",
    "block",
    "image",
    "deadline_ms",
    "took_ms",
    "last_stage_ms",
    "exit_stage",
    "macs",
    "budget",
    "is_right",
)
BUSY = "import numpy as np\na = np.ones(2**22)\nwhile True:\n    np.multiply(a, 1.0, out=a)\n"


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Beside so many processes that are always running."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        if started:
            time.sleep(2.0)  # until they have imported what they need
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


class Stopwatch:
    """Makes graphs that say how long their latest call took."""

    def __init__(self) -> None:
        self.spent_s: dict[str, float] = {}  # of the stages of one call

    def load(self, engine: str, path: Path, threads: int | None) -> Graph:
        graph = load_graph(engine, path, threads)

        def run(inputs):
            began = time.perf_counter()
            outputs = graph(inputs)
            self.spent_s[path.name] = time.perf_counter() - began
            return outputs

        return run


def run_block(session: Session, watch: Stopwatch, data: list, deadlines: list[float], seed: int) -> list[tuple]:
    """A row of `COLUMNS` for every image at every deadline, without the first two."""
    draw, rows = random.Random(seed), []
    calls = [(place, deadline) for place in range(len(data)) for deadline in deadlines]
    draw.shuffle(calls)
    for place, _ in calls[:WARM_UP]:
        session(data[place][0])
    for place, deadline in calls:
        image, label = data[place]
        watch.spent_s.clear()
        began = time.perf_counter()
        out = session(image, deadline_ms=deadline)
        took = time.perf_counter() - began
        last_s = list(watch.spent_s.values())[-1]
        stage, is_right = int(out.trace.exit_stage[0]), int(out.logits[0].argmax() == label)
        found = (f"{1e3 * took:.4f}", f"{1e3 * last_s:.4f}", stage, int(out.macs[0]), f"{out.budget[0]:.4f}", is_right)
        rows.append((place, f"{deadline:.4f}", *found))
    return rows


def choose_deadlines(session: Session, watch: Stopwatch, data: list) -> list[float]:
    """Milliseconds, by what the idle machine takes."""
    first, whole = [], []
    for place in range(WARM_UP):
        began = time.perf_counter()
        session(data[place % len(data)][0])
        whole.append(time.perf_counter() - began)
        first.append(next(iter(watch.spent_s.values())))
    return (1e3 * np.geomspace(FIRST * np.median(first), LAST * np.median(whole), STEPS)).tolist()


def summarise(rows: list[tuple]) -> list[dict]:
    """A row for every load and deadline."""
    columns = {name: np.array(column) for name, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)}
    numbers = {name: columns[name].astype(float) for name in COLUMNS[1:]}
    found = []
    for load_ in dict.fromkeys(columns["load"].tolist()):
        for deadline in sorted(set(numbers["deadline_ms"].tolist())):
            here = (columns["load"] == load_) & (numbers["deadline_ms"] == deadline)
            late = numbers["took_ms"][here] - deadline
            over = late[late > 0]
            p50, p95, worst = np.percentile(over, (50, 95, 100)) if len(over) else (0.0, 0.0, 0.0)
            right = numbers["is_right"][here]
            found.append(
                {
                    "load": load_,
                    "deadline_ms": deadline,
                    "calls": int(here.sum()),
                    "top1": float(right.mean()),
                    "late": float((late > 0).mean()),
                    "late_p50_ms": float(p50),
                    "late_p95_ms": float(p95),
                    "late_max_ms": float(worst),
                    "beyond_a_stage": float((late > numbers["last_stage_ms"][here]).mean()),
                    "took_p50_ms": float(np.median(numbers["took_ms"][here])),
                    "stages": float(numbers["exit_stage"][here].mean() + 1),
                }
            )
    return found


def draw_plot(found: list[dict], path: Path, title: str) -> None:
    """Accuracy against deadline above, the share of late answers below."""
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(7, 6), height_ratios=(2, 1), layout="constrained"
    )
    for load_, mark in zip(dict.fromkeys(row["load"] for row in found), ("o-", "s--"), strict=False):
        own = [row for row in found if row["load"] == load_]
        deadlines = [row["deadline_ms"] for row in own]
        above.plot(deadlines, [100 * row["top1"] for row in own], mark, label=load_)
        below.plot(deadlines, [100 * row["late"] for row in own], mark, label=load_)
    above.set(ylabel="top-1 (%)", title=title)
    below.set(xlabel="deadline (ms)", ylabel="late answers (%)", xscale="log")
    below.set_xticks(deadlines[1::2], [f"{deadline:.2g}" for deadline in deadlines[1::2]])
    below.set_xticks([], minor=True)
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def report(found: list[dict], command: str, num_images: int) -> str:
    lines = [
        f"`{command}`: ONNX Runtime, one thread, {doctor.processor_name()}, {os.cpu_count()} processors; {num_images} test "
        "images, one a call.",
        "",
        "| machine | deadline (ms) | top-1 | stages | took (ms) | late | by p50 / p95 / max (ms) | by more than the last stage |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['load']} | {row['deadline_ms']:.2f} | {row['top1']:.2%} | {row['stages']:.2f} | {row['took_p50_ms']:.2f} "
            f"| {row['late']:.1%} | {row['late_p50_ms']:.2f} / {row['late_p95_ms']:.2f} / {row['late_max_ms']:.2f} "
            f"| {row['beyond_a_stage']:.2%} |"
            for row in found
        ),
        "",
        "*Took* is the median of all answers; *by* counts the late ones alone; the last stage's time is the engine's. The first "
        "stage always runs, so a deadline shorter than that is always missed.",
        "",
        "![accuracy against deadline](deadline.png)",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a bundle for ONNX Runtime, or a model to export")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--blocks", type=int, default=2, help="of each, idle and loaded in turn")
    parser.add_argument("--busy", type=int, default=os.cpu_count(), help="processes that load the machine")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if min(args.images, args.blocks, args.busy) < 1:
        parser.error("--images, --blocks and --busy must be 1 or more.")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    watch, name = Stopwatch(), Path(args.model).name
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.model)
        if not (folder / FILE_NAME).is_file():
            folder = Path(scratch) / "bundle"
            export(load(args.model), folder)
        session = Session(folder, "onnxruntime", threads=1, load=watch.load)
    images = open_data(args.data, "test", session.bundle.preprocess)
    if len(images.class_names) != session.shape.num_classes or session.labels not in (None, tuple(images.class_names)):
        parser.error(f"the classes of --data {args.data} are not those of {name}, so nothing would be right.")
    chosen = random.Random(0).sample(range(len(images)), min(args.images, len(images)))
    own = session.bundle.preprocess
    mean, std = (np.array(each, np.float32)[:, None, None] for each in (own.mean, own.std))
    data = [
        ((image.numpy()[None] / np.float32(255) - mean) / std, label)
        for image, label in map(images.__getitem__, chosen)
    ]
    deadlines = choose_deadlines(session, watch, data)
    machines = {"idle": 0, f"{args.busy} busy process{'es' if args.busy > 1 else ''}": args.busy}
    rows: list[tuple] = []
    for block in range(args.blocks):
        for machine, processes in machines.items():
            with busy(processes):
                print(f"block {block + 1} of {args.blocks}: {machine}", file=sys.stderr)
                rows += [(machine, block, *row) for row in run_block(session, watch, data, deadlines, seed=block)]
    with (args.out / "samples.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    found = summarise(rows)
    command = (
        f"python benchmarks/deadline.py {name} --data {name_of(args.data)} --images {args.images} --blocks {args.blocks} "
        f"--busy {args.busy}"
    )
    (args.out / "deadline.json").write_text(json.dumps({"command": command, "rows": found}, indent=1) + "\n")
    (args.out / "env.json").write_text(json.dumps(doctor.report(), indent=1) + "\n")
    draw_plot(found, args.out / "deadline.png", f"{name}, {name_of(args.data)}, one thread")
    text = report(found, command, len(data))
    (args.out / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
