"""What raises the ceiling at batch 1? `iret_small`, one thread, the same work on each engine, interleaved, raw samples kept.

plain           weights as torch keeps them, eager
laid out        weights input by input in memory (`iret.vit.lay_out`), eager: what `iret.load` gives
compiled        the same through `model.compile()` (inductor)
bfloat16        laid out, under autocast (`iret.precision.prepare`), eager
float32-onednn  linear layers by oneDNN, bias and GELU included (`iret.precision.to_onednn`), eager
int8            int8 linear layers (`iret.precision.to_int8`), eager
onnxruntime     a bundle through `iret.Session`
int8 is also held against the full float run, because it makes every point faster, the full one too.

python benchmarks/engines.py --out results/...     takes some minutes, most of them compiling; run it alone on the machine
"""

import argparse
import csv
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from torch import Tensor

import iret
from iret import doctor
from iret.bench import make_point
from iret.export.bundle import export
from iret.measure.latency import measure_latency, pin_threads, ratio
from iret.precision import PRECISIONS, prepare
from iret.runtime.cost import full_macs
from iret.runtime.points import Point
from iret.runtime.timing import replay
from iret.vit import lay_out

RATIOS = (1.0, 1.5, 1.74, 2.5, 2.7, 4.0, 5.3, 6.0)
ENGINES = ("plain", "laid out", "compiled", "bfloat16", "float32-onednn", "int8", "onnxruntime")


def make_engine(name: str, images: Tensor, points: dict[float, Point]) -> dict[float, Callable[[], object]]:
    """A run at each point; the same weights on every engine."""
    torch.manual_seed(0)
    model = iret.create_model("iret_small").eval()
    if name == "onnxruntime":
        with tempfile.TemporaryDirectory() as folder:
            export(model, Path(folder) / "bundle", "onnx")
            session = iret.Session(Path(folder) / "bundle", name, threads=1)
        options = {asked: replay(model.shape, point, point.plans[0]) for asked, point in points.items() if asked > 1}
        return {asked: partial(session, images.numpy(), **options.get(asked, {})) for asked in points}
    context: AbstractContextManager = nullcontext()
    if name in PRECISIONS:
        model, context = prepare(model, name)
    elif name != "plain":
        lay_out(model)
    if name == "compiled":
        model.compile()

    def inside(call: Callable[..., object], *arguments: object) -> object:
        with context:
            return call(*arguments)

    runs = {asked: partial(inside, model.replay, images, list(point.plans), point) for asked, point in points.items()}
    return runs | {1.0: partial(inside, model, images)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.randn(1, 3, 224, 224)
    model = iret.create_model("iret_small")
    points = {asked: make_point(model, 1 / asked) for asked in RATIOS}
    real = {asked: 1.0 if asked == 1 else full_macs(model.shape) / point.macs_mean for asked, point in points.items()}
    work = {}
    for name in args.engines:
        for asked, run in make_engine(name, images, points).items():
            work[name, asked] = run
            run()  # compiles
    with pin_threads(1):
        samples = measure_latency(work, rounds=args.rounds, warm_up=3, lead=1)
    rows = []
    for (name, asked), latency in samples.items():
        share = ratio(samples[name, 1.0], latency).median / real[asked]
        row = {"engine": name, "mac_ratio": real[asked], "ms": latency.p50_ms, "share": share}
        row["over_plain_full"] = ratio(samples[args.engines[0], 1.0], latency).median
        rows.append(row)
    args.out.mkdir(parents=True, exist_ok=True)
    found = {"command": " ".join(sys.argv), "rows": rows, "env": doctor.report()}
    (args.out / "engines.json").write_text(json.dumps(found, indent=1) + "\n")
    with (args.out / "samples.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("engine", "mac_ratio", "round", "seconds"))
        for (name, asked), latency in samples.items():
            writer.writerows(
                (name, f"{real[asked]:.4f}", place, f"{s:.9f}") for place, s in enumerate(latency.samples_s)
            )
    ratios = [real[asked] for asked in RATIOS]
    lines = [
        f"`python benchmarks/engines.py --rounds {args.rounds}`: `iret_small`, batch 1, one thread, {doctor.processor_name()}; "
        "milliseconds (median), and the share of the saving in MACs against the engine's own full run.",
        "",
        "| engine | " + " | ".join(f"MAC ratio {each:.2f}" for each in ratios) + " |",
        "|---|" + "---|" * len(ratios),
    ]
    for name in args.engines:
        cells = [f"{row['ms']:.1f} ({row['share']:.2f})" for row in rows if row["engine"] == name]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    (args.out / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
