"""Does dropping save time in a batch of mixed counts? `iret_small`, batch 16, one thread, interleaved, raw samples kept.

The counts are those of real images: what held-out images did at the operating points of a calibrated model (`--counts`), as
shares of its grid. Three things run in turn: the whole model, the packed run (`Iret.replay`, choosing included), and the same run
with every image padded to the longest of the batch. Beside them a static ViT of DeiT-S shape, and peak memory by budget.

    python benchmarks/batch.py --out results/...     takes some minutes; run it alone on the machine
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from torch.nn import functional as F

import iret
from iret import doctor
from iret.measure.latency import measure_latency, pin_threads, ratio
from iret.precision import prepare
from iret.runtime.cost import full_macs, plan_macs
from iret.runtime.points import OperatingPoints, Plan, Point
from iret.tokens import Tokens
from iret.vit import VisionTransformer
from iret.zoo import load

RATIOS = (1.5, 2.5, 4.0)


def vit_macs(tokens: int = 197, dim: int = 384, depth: int = 12, classes: int = 1000, patch: int = 16) -> int:
    """MACs of a plain ViT, the embedding and head included."""
    return (tokens - 1) * 3 * patch**2 * dim + depth * (12 * tokens * dim**2 + 2 * tokens**2 * dim) + dim * classes


def counts_of(points: OperatingPoints, grid: int, cells: int, point: Point) -> list[Plan]:
    """The plans of a point as if its grid of `grid` cells had `cells`; images that left early count as staying."""
    plans = []
    for plan in point.plans:
        kept = [*plan.kept, *[plan.kept[-1]] * (len(point.thresholds) + 1 - len(plan.kept))]
        scaled = [max(8, min(cells, round(count / grid * cells))) for count in kept]
        plans.append(Plan(tuple(scaled), (0, *scaled[1:])))
    return plans


def choose_plans(model: iret.Iret, source: iret.Iret, ratio_: float) -> list[Plan]:
    """Those of the operating point whose scaled counts come closest to the MAC ratio."""
    full, grid, cells = full_macs(model.shape), source.shape.num_patches, model.shape.num_patches
    candidates = [counts_of(source.points, grid, cells, point) for point in source.points.points if point.plans]

    def cost(plans: list[Plan]) -> float:
        return float(np.mean([plan_macs(model.shape, plan.kept, plan.refined, scored=True) for plan in plans]))

    return min(candidates, key=lambda plans: abs(full / cost(plans) - ratio_))


@torch.inference_mode()
def padded(model: iret.Iret, images: torch.Tensor, plans: list[Plan]) -> torch.Tensor:
    """The run at given counts with every image padded to the longest: dense blocks under a key mask, nothing chosen."""
    tokens, patches = model._embed(images)
    batch, cells = len(images), model.shape.num_patches
    for index, stage in enumerate(model.stages):
        if index:
            counts = torch.tensor([plan.kept[index] for plan in plans])
            width = int(counts.max())
            x = tokens.x_TD.unflatten(0, (batch, -1))[:, : width + 1].flatten(0, 1)
            live = torch.arange(width + 1) <= counts[:, None]
            starts = torch.arange(0, batch * (width + 1) + 1, width + 1)
            cell = torch.arange(-1, width).repeat(batch)
            tokens = Tokens(x, cell, starts, is_even=True, size_T=live.flatten().float())
            rows = (F.pad(torch.ones(batch, width, dtype=torch.bool), (1, 0))).flatten().nonzero().squeeze(1)
            level = model.shape.detail_level(index)
            details = model.lifting.details(patches.unflatten(0, (batch, cells))[:, :width].flatten(0, 1), level)
            tokens = model.transitions[index - 1](tokens, details, rows)
        tokens, _ = stage(tokens, is_scored=False)
    return model.stages[-1].answer(tokens)


def time_all(args: argparse.Namespace) -> tuple[list[dict], dict]:
    torch.manual_seed(0)
    source = load(args.counts)
    model, context = prepare(iret.create_model("iret_small").eval(), args.precision)
    images, draw = torch.randn(args.batch, 3, 224, 224), random.Random(0)
    static = VisionTransformer().eval()
    work = {"full": lambda: model(images), "deit_s": lambda: static(images)}
    ratios, spread = {"full": 1.0, "deit_s": full_macs(model.shape) / vit_macs()}, {}
    point = Point(thresholds=((1.0, 1.0),) * 2, accuracy=0.0, macs_mean=1.0, macs_p95=1.0, kept_mean=())
    for wanted in RATIOS:
        plans = draw.choices(choose_plans(model, source, wanted), k=args.batch)
        macs = np.mean([plan_macs(model.shape, plan.kept, plan.refined, scored=True) for plan in plans])
        work[f"packed {wanted:g}"] = lambda plans=plans: model.replay(images, plans, point)
        work[f"padded {wanted:g}"] = lambda plans=plans: padded(model, images, plans)
        ratios[f"packed {wanted:g}"] = ratios[f"padded {wanted:g}"] = full_macs(model.shape) / macs
        spread[f"packed {wanted:g}"] = [sorted(plan.kept[stage] for plan in plans) for stage in (1, 2)]
    with context, torch.inference_mode(), pin_threads(1):
        samples = measure_latency(work, rounds=args.rounds, warm_up=2, lead=1)
    rows = []
    for name, latency in samples.items():
        speedup = ratio(samples["full"], latency)
        row = {"what": name, "mac_ratio": float(ratios[name]), "ms": latency.p50_ms, "speedup": speedup.median}
        row |= {"share": speedup.median / row["mac_ratio"], "counts": spread.get(name)}
        if name.startswith("packed"):
            row["padded_over_packed"] = ratio(samples[name.replace("packed", "padded")], latency).median
        rows.append(row)
    return rows, samples


def peak_mib(budget: float, batch: int) -> float:
    """Peak memory of a process that runs `iret_small` at one budget, over that of one that only loads it."""
    code = (
        "import resource, sys, torch, iret; from iret.bench import make_point; torch.manual_seed(0); torch.set_num_threads(1)\n"
        f"m = iret.create_model('iret_small').eval(); x = torch.randn({batch}, 3, 224, 224)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with torch.inference_mode():\n"
        f"    p = make_point(m, {budget}); m(x) if {budget} == 1 else m.replay(x, list(p.plans) * {batch}, p)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout) / (1024 if sys.platform != "darwin" else 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", default="iret_pico-cifar10", help="calibrated model whose images' counts are used")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    rows, samples = time_all(args)
    memory = {budget: peak_mib(budget, 64) for budget in (1.0, 0.6, 0.4, 0.25)}
    found = {"command": " ".join(sys.argv), "rows": rows, "peak_mib_batch_64": memory, "env": doctor.report()}
    (args.out / "batch.json").write_text(json.dumps(found, indent=1) + "\n")
    with (args.out / "samples.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("what", "round", "seconds"))
        writer.writerows((name, i, f"{s:.9f}") for name, each in samples.items() for i, s in enumerate(each.samples_s))
    lines = [
        f"`python benchmarks/batch.py --precision {args.precision}`: `iret_small`, batch {args.batch}, one thread, "
        f"{doctor.processor_name()}, counts of `{args.counts}`; medians of {args.rounds} interleaved rounds.",
        "",
        "| what | MAC ratio | ms | times faster than full | share | padded / packed |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['what']} | {row['mac_ratio']:.2f} | {row['ms']:.1f} | {row['speedup']:.2f} | {row['share']:.2f} | "
            + (f"{row['padded_over_packed']:.2f} |" if "padded_over_packed" in row else "|")
            for row in rows
        ),
        "",
        "Peak memory over the loaded model, batch 64: "
        + ", ".join(f"budget {budget:g}: {mib:.0f} MiB" for budget, mib in memory.items()),
    ]
    (args.out / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
