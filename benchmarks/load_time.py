"""How soon a bundle answers: import of `iret.Session` and load on ONNX Runtime, each time in a fresh process; and its size.

    python benchmarks/load_time.py [MODEL] --out results/...        run it alone on the machine

The clock starts when the interpreter is up, and stops when the session is there, every checksum compared (`ready_s`;
`ready_cpu_s` is the processor's part); then one image is answered (`answer_s`). The whole process, interpreter included, is timed
from outside (`process_s`). Files are in the page cache after the first process, which is not counted. Size: all files of the
bundle against the model's weights.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch

from iret import doctor
from iret.export.bundle import export
from iret.weights import to_safetensors
from iret.zoo import load

GOAL_S, GOAL_SHARE = 0.4, 0.05
PROGRAM = """
import time
began, began_cpu = time.perf_counter(), time.process_time()
from iret import Session
imported = time.perf_counter()
import sys
session = Session(sys.argv[1], "onnxruntime", threads=1)
ready, cpu = time.perf_counter(), time.process_time() - began_cpu
import numpy
session(numpy.zeros((1, session.shape.in_chans, *session.shape.img_size), numpy.float32))
print(imported - began, ready - began, cpu, time.perf_counter() - ready)
"""
COLUMNS = ("import_s", "ready_s", "ready_cpu_s", "answer_s", "process_s")


def time_process(bundle: Path) -> tuple[float, ...]:
    """Seconds, as `COLUMNS`, of one fresh process."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PROGRAM, bundle], check=True, capture_output=True, text=True)
    whole = time.perf_counter() - began
    return (*map(float, done.stdout.split()), whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="iret_pico-cifar10")
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.processes < 1:
        parser.error("--processes must be 1 or more.")
    torch.set_num_threads(1)
    model = load(args.model)
    weights = len(to_safetensors(model.state_dict()))
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        export(model, bundle)
        size = sum(path.stat().st_size for path in bundle.iterdir())
        samples = [time_process(bundle) for _ in range(1 + args.processes)][1:]
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "samples.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("process", *COLUMNS), *((place, *row) for place, row in enumerate(samples))])
    name = Path(args.model).name
    command = f"python benchmarks/load_time.py {name} --processes {args.processes}"
    found = {"command": command, "weights_bytes": weights, "bundle_bytes": size}
    (args.out / "load_time.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "env.json").write_text(json.dumps(doctor.report(), indent=1) + "\n")
    columns = dict(zip(COLUMNS, zip(*samples, strict=True), strict=True))
    ready, more = statistics.median(columns["ready_s"]), size / weights - 1
    lines = [
        f"`{command}`: ONNX Runtime, one thread, {doctor.processor_name()}, {args.processes} fresh processes.",
        "",
        "| what | median (s) | largest (s) |",
        "|---|---|---|",
        *(
            f"| {what} | {statistics.median(columns[column]):.3f} | {max(columns[column]):.3f} |"
            for what, column in (
                ("import of iret.Session", "import_s"),
                ("import and load", "ready_s"),
                ("processor seconds of that, all threads", "ready_cpu_s"),
                ("the first answer after that", "answer_s"),
                ("the whole process, interpreter included", "process_s"),
            )
        ),
        "",
        f"Import and load within {GOAL_S} s: {'yes' if ready < GOAL_S else 'NO'} (median). "
        f"Bundle {size:,} bytes, weights {weights:,}: {more:+.1%}, within {GOAL_SHARE:.0%}: "
        f"{'yes' if abs(more) <= GOAL_SHARE else 'NO'}.",
    ]
    (args.out / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
