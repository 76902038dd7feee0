"""Does dropping save time in a batch of mixed counts? `iret_small`, batch 16, one thread, interleaved, raw samples kept.

The counts are those of test images: what a calibrated model (`--counts`) keeps of them (`--data`) at the thresholds of its
operating points, as shares of its grid, and the stage after which they leave: all images at one point, chosen for a MAC ratio,
or every image at its own ("mixed"), drawn evenly, as when the requests of a server bring their budgets. These run in turn: the
whole model; the packed run (`Iret.replay`, choosing included); its *ceiling*, the same blocks, whole, at the same counts with
nothing scored, chosen or gathered; the same run with all of the batch padded to its longest image, those that left as well,
scored and cut as the packed run is; the blocks of the later stages alone, where counts differ, packed and padded likewise; and
the packed run after `model.compile()`, against its own full run. What padding costs hangs on a batch's longest image, so the
same ratio of MACs stands there for a hundred other batches drawn alike, too: mean, least and most; and some other mixed batches
are timed, packed and padded in turn. Beside them a static ViT of DeiT-S shape, and peak memory by budget.

    python benchmarks/batch.py --out results/...     takes some minutes; run it alone on the machine
"""

import argparse
import copy
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from speed import Stopwatch
from torch.nn import functional as F

import iret
from iret import doctor
from iret.measure.latency import Latency, measure_latency, pin_threads, ratio
from iret.precision import prepare
from iret.runtime.cost import block_macs, full_macs, plan_macs
from iret.runtime.points import Plan, Point
from iret.tokens import Tokens
from iret.train.data import name_of, open_data
from iret.vit import VisionTransformer
from iret.zoo import load

RATIOS = (1.5, 2.5, 4.0)
PEAKS = 5  # processes: what the allocator keeps differs by tens of MiB
OTHER_ROUNDS = 5  # of each of the further batches
WANTED = 1.8  # times faster than padding
DRAWS = 100  # other batches, to see what padding costs them: it hangs on a batch's longest image


def vit_macs(tokens: int = 197, dim: int = 384, depth: int = 12, classes: int = 1000, patch: int = 16) -> int:
    """MACs of a plain ViT, the embedding and head included."""
    return (tokens - 1) * 3 * patch**2 * dim + depth * (12 * tokens * dim**2 + 2 * tokens**2 * dim) + dim * classes


@torch.inference_mode()
def plans_of(name: str, data_name: str, num_images: int, model: iret.Iret) -> tuple[list[list[Plan]], np.ndarray]:
    """What `model` would do with real images, by point and image: what a calibrated model keeps of them, as shares of its grid,
    and the stage after which they leave. And the points' budgets."""
    source = load(name)
    data = open_data(data_name, "test", source.preprocessing)
    pixels = torch.stack([data[index][0] for index in range(num_images)])
    images = source.normalise(pixels.float() / 255)
    cells, least = model.shape.num_patches, model.shape.min_keep
    rows = []
    for point in source.points.points:
        trace = source.run(images, point.thresholds, point.exit_confidence).trace
        shares = trace.kept.sum((2, 3)).numpy() / source.shape.num_patches
        kept = np.clip(np.round(shares * cells), least, cells).astype(int).T.tolist()
        ran = (trace.exit_stage + 1).tolist()
        rows.append([Plan(tuple(each[:end]), (0, *each[1:end])) for each, end in zip(kept, ran, strict=True)])
    return rows, source.points.shares[::-1]


def mean_macs(model: iret.Iret, plans: list[Plan]) -> float:
    return float(np.mean([plan_macs(model.shape, plan.kept, plan.refined, scored=True) for plan in plans]))


def choose_plans(
    model: iret.Iret, rows: list[list[Plan]], ratio_: float, draw: random.Random, batch: int
) -> list[Plan]:
    """A batch of images at the point whose mean MACs come closest to the ratio."""
    candidates = [draw.sample(row, batch) for row in rows]
    return min(candidates, key=lambda plans: abs(full_macs(model.shape) / mean_macs(model, plans) - ratio_))


def mix_plans(rows: list[list[Plan]], budgets: np.ndarray, draw: random.Random, batch: int) -> list[Plan]:
    """A batch as a server makes it: every image at a budget of its own, drawn evenly from all that the table has."""
    asked = [draw.uniform(budgets.min(), 1) for _ in range(batch)]
    points = [int(np.abs(budgets - budget).argmin()) for budget in asked]
    return [rows[point][image] for point, image in zip(points, draw.sample(range(len(rows[0])), batch), strict=True)]


def longest(plans: list[Plan]) -> Plan:
    """What every image of a padded batch costs."""
    stages = max(len(plan.kept) for plan in plans)
    kept = [max(plan.kept[stage] for plan in plans if stage < len(plan.kept)) for stage in range(stages)]
    return Plan(tuple(kept), (0, *kept[1:]))


def padding(model: iret.Iret, plans: list[Plan]) -> float:
    """MACs of a padded batch over those of a packed one."""
    return float(mean_macs(model, [longest(plans)]) / mean_macs(model, plans))


def packed_tokens(counts: Sequence[int], dim: int) -> Tokens:
    """Noise in the place of the tokens of images that keep so many patches each, those with none left out."""
    there = torch.tensor([count for count in counts if count])
    cell = torch.cat([torch.arange(-1, count) for count in there.tolist()])
    starts, is_even = F.pad((there + 1).cumsum(0), (1, 0)), bool((there == there[0]).all())
    return Tokens(torch.randn(len(cell), dim), cell, starts, is_even, most=int(there.max()) + 1)


def padded_tokens(x_TD: torch.Tensor, counts: Sequence[int]) -> Tokens:
    """Dense tokens, as many an image as the longest has, under the mask of these counts."""
    width = max(counts) + 1
    live = torch.arange(width) <= torch.tensor(counts)[:, None]
    starts = torch.arange(0, len(counts) * width + 1, width)
    cell = torch.arange(-1, width - 1).repeat(len(counts))
    return Tokens(x_TD, cell, starts, is_even=True, size_T=live.flatten().float())


def counts_of(plans: list[Plan], stage: int) -> list[int]:
    """Patches of each image in a stage, 0 of those that left before."""
    return [plan.kept[stage] if stage < len(plan.kept) else 0 for plan in plans]


@torch.inference_mode()
def padded(model: iret.Iret, images: torch.Tensor, plans: list[Plan]) -> torch.Tensor:
    """The run at given counts with every image padded to the longest: dense blocks under a key mask, scored, nothing chosen."""
    tokens, patches = model._embed(images)
    batch, cells = len(images), model.shape.num_patches
    for index, stage in enumerate(model.stages):
        if index:
            counts = counts_of(plans, index)
            width, before = max(counts), model.stages[index - 1]
            x = tokens.x_TD.unflatten(0, (batch, -1))[:, : width + 1].flatten(0, 1)
            tokens, _ = before(padded_tokens(x, counts), is_scored=True, is_rest=True)
            rows = (F.pad(torch.ones(batch, width, dtype=torch.bool), (1, 0))).flatten().nonzero().squeeze(1)
            level = model.shape.detail_level(index)
            details = model.lifting.details(patches.unflatten(0, (batch, cells))[:, :width].flatten(0, 1), level)
            tokens = model.transitions[index - 1](tokens, details, rows)
        tokens, _ = stage(tokens, is_scored=index < len(model.stages) - 1)
    return model.stages[-1].answer(tokens)


def later_stages(model: iret.Iret, plans: list[Plan], *, is_padded: bool) -> Callable[[], object]:
    """The blocks of all stages but the first, on noise in the place of their tokens."""
    made = []
    for index, dim in enumerate(model.shape.embed_dims[1:], start=1):
        counts = counts_of(plans, index)
        noise = torch.randn(len(counts) * (max(counts) + 1), dim)
        made.append(padded_tokens(noise, counts) if is_padded else packed_tokens(counts, dim))
    return lambda: [stage(tokens, is_scored=False) for stage, tokens in zip(model.stages[1:], made, strict=True)]


def later_macs(model: iret.Iret, plans: list[Plan], *, is_padded: bool) -> int:
    total = 0
    for index, depth in enumerate(model.shape.depths[1:], start=1):
        counts = counts_of(plans, index)
        counts = [max(counts)] * len(counts) if is_padded else [count for count in counts if count]
        total += depth * sum(block_macs(model.shape, index, count + 1) for count in counts)
    return total


def make_ceiling(model: iret.Iret, plans: list[Plan]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The packed run at given counts without any choice: every stage is handed tokens of these counts that were made before."""
    made = []
    for index in range(1, len(model.stages)):
        tokens = packed_tokens(counts_of(plans, index), model.shape.embed_dims[index - 1])
        rows, side = (tokens.cell_T >= 0).nonzero().squeeze(1), model.shape.patch_size
        made.append((tokens, rows, torch.randn(len(rows), 3, side, side)))

    @torch.inference_mode()
    def run(images: torch.Tensor) -> torch.Tensor:
        tokens, _ = model._embed(images)
        for index, stage in enumerate(model.stages):
            if index:
                tokens, rows, patches = made[index - 1]
                details = model.lifting.details(patches, model.shape.detail_level(index))
                tokens = model.transitions[index - 1](tokens, details, rows)
            tokens, _ = stage(tokens, is_scored=False)
            answer = stage.answer(tokens)
        return answer

    return run


def choosing_share(call: Callable[[], object], stopwatch: Stopwatch) -> float:
    """Of the time of one run, in the median of five."""
    shares = []
    for _ in range(5):
        stopwatch.take()
        started = time.perf_counter()
        call()
        spent = time.perf_counter() - started
        shares.append(stopwatch.take() / spent)
    return statistics.median(shares)


def time_others(
    model: iret.Iret, images: torch.Tensor, batches: list[list[Plan]], point: Point
) -> tuple[list[tuple[float, float, float]], dict[str, Latency]]:
    """Of further batches, what padding costs on the clock, in MACs and on the clock of later stages, and the samples."""
    found, samples = [], {}
    for number, plans in enumerate(batches):
        work = {"packed": lambda plans=plans: model.replay(images, plans, point)}
        work["padded"] = lambda plans=plans: padded(model, images, plans)
        for kind in ("packed", "padded"):
            work[f"later stages, {kind}"] = later_stages(model, plans, is_padded=kind == "padded")
        timed = measure_latency(work, rounds=OTHER_ROUNDS, warm_up=1, lead=1)
        times = [ratio(timed[f"{part}padded"], timed[f"{part}packed"]).median for part in ("", "later stages, ")]
        found.append((times[0], padding(model, plans), times[1]))
        samples |= {f"other mixed batch {number}, {name}": latency for name, latency in timed.items()}
    return found, samples


def time_all(args: argparse.Namespace) -> tuple[list[dict], list[tuple[float, float, float]], dict[str, Latency]]:
    torch.manual_seed(0)
    model, context = prepare(iret.create_model("iret_small").eval(), args.precision)
    rows, budgets = plans_of(args.counts, args.data, 8 * args.batch, model)
    images, draw = torch.randn(args.batch, 3, 224, 224), random.Random(0)
    work, ratios, spread = {"full": lambda: model(images)}, {"full": 1.0, "compiled full": 1.0}, {}
    if not model.own_precision:  # the plain ViT is not converted, and would be another library's
        static = VisionTransformer().eval()
        work["deit_s"], ratios["deit_s"] = lambda: static(images), full_macs(model.shape) / vit_macs()
    if can_compile := args.precision != "float32-onednn":
        compiled = copy.deepcopy(model)
        compiled.compile()
        work["compiled full"] = lambda: compiled(images)
    point = Point(
        thresholds=((1.0, 1.0),) * 2, accuracy=0.0, macs_mean=1.0, macs_p95=1.0, kept_mean=(), exit_confidence=1.0
    )
    makers: dict[str, Callable[[], list[Plan]]] = {
        f"{wanted:g}": partial(choose_plans, model, rows, wanted, draw, args.batch) for wanted in RATIOS
    }
    makers["mixed"] = partial(mix_plans, rows, budgets, draw, args.batch)
    batches = {name: make() for name, make in makers.items()}
    others = {name: [padding(model, make()) for _ in range(DRAWS)] for name, make in makers.items()}
    other_batches = [makers["mixed"]() for _ in range(args.others)]
    for name, plans in batches.items():
        macs = mean_macs(model, plans)
        work[f"packed {name}"] = lambda plans=plans: model.replay(images, plans, point)
        work[f"padded {name}"] = lambda plans=plans: padded(model, images, plans)
        work[f"ceiling {name}"] = partial(make_ceiling(model, plans), images)
        for kind in ("packed", "padded"):
            work[f"later stages, {kind} {name}"] = later_stages(model, plans, is_padded=kind == "padded")
        if can_compile:
            work[f"compiled {name}"] = lambda plans=plans: compiled.replay(images, plans, point)
        ratios |= dict.fromkeys([f"{kind} {name}" for kind in ("packed", "compiled")], full_macs(model.shape) / macs)
        whole = [plan_macs(model.shape, plan.kept, plan.refined, scored=False) for plan in plans]
        ratios[f"ceiling {name}"] = full_macs(model.shape) / float(np.mean(whole))
        ratios[f"padded {name}"] = full_macs(model.shape) / mean_macs(model, [longest(plans)])
        counts = [sorted(plan.kept[stage] for plan in plans if stage < len(plan.kept)) for stage in (1, 2)]
        spread[f"packed {name}"] = counts
    with context, torch.inference_mode(), pin_threads(1):
        samples = measure_latency(work, rounds=args.rounds, warm_up=2, lead=1)
        timed_others, samples_of_others = time_others(model, images, other_batches, point)
        stopwatch = Stopwatch()  # only now: it takes time itself
        stopwatch.include_scores()
        choosing = {name: choosing_share(call, stopwatch) for name, call in work.items() if name.startswith("packed")}
    found = []
    for name, latency in samples.items():
        if name.startswith("later"):
            continue
        speedup = ratio(samples["compiled full" if name.startswith("compiled") else "full"], latency)
        row = {"what": name, "mac_ratio": float(ratios[name]), "ms": latency.p50_ms, "speedup": speedup.median}
        row |= {"share": speedup.median / row["mac_ratio"], "counts": spread.get(name)}
        if name.startswith("packed"):
            row["choosing"] = choosing[name]
            other = name.replace("packed", "padded")
            row["ceiling_over_packed"] = ratio(samples[name.replace("packed", "ceiling")], latency).median
            row["padded_over_packed"] = ratio(samples[other], latency).median
            row["macs_over_packed"] = float(ratios[name] / ratios[other])
            later = [samples[f"later stages, {kind}"] for kind in (other, name)]
            row["padded_over_packed_later"] = ratio(*later).median
            plans = batches[name.removeprefix("packed ")]
            row["macs_over_packed_later"] = later_macs(model, plans, is_padded=True) / later_macs(
                model, plans, is_padded=False
            )
            drawn = others[name.removeprefix("packed ")]
            row["macs_of_others"] = [statistics.mean(drawn), min(drawn), max(drawn)]
        found.append(row)
    return found, timed_others, samples | samples_of_others


def peak_mib(budget: float, batch: int) -> float:
    """Memory that one run of `iret_small` takes at its peak beyond the loaded model and its images; Linux."""
    code = f"""
import re, torch, iret
from pathlib import Path
from iret.bench import make_point

def read(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
model, images = iret.create_model("iret_small").eval(), torch.randn({batch}, 3, 224, 224)
point = make_point(model, {budget})
run = (lambda x: model(x)) if {budget} == 1 else (lambda x: model.replay(x, list(point.plans) * len(x), point))
with torch.inference_mode():
    run(images[:1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = read("VmRSS")
    run(images)
    print(read("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def command_of(args: argparse.Namespace, script: str = "batch") -> str:
    """What was typed, defaults included, without the paths of this machine."""
    words = vars(args) | {"counts": Path(args.counts).name, "data": name_of(args.data)}
    words["out"] = f"results/{args.out.name}"
    return " ".join([f"python benchmarks/{script}.py", *(f"--{name} {value}" for name, value in words.items())])


def say_others(others: list[tuple[float, float, float]]) -> str:
    times, macs, later = zip(*others, strict=True)
    return (
        f"{len(others)} other mixed batches, timed: padded / packed {_spread(times)}, in MACs {_spread(macs)}, later stages "
        f"{_spread(later)}; {WANTED} or more in {sum(each >= WANTED for each in times)}, of later stages in "
        f"{sum(each >= WANTED for each in later)}."
    )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", default="iret_nano-cluttered-digits", help="calibrated model that keeps the counts")
    parser.add_argument("--data", default="cluttered-digits", help="whose test images it looks at")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--others", type=int, default=24, help="further mixed batches to time, packed and padded")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    rows, others, samples = time_all(args)
    memory = {budget: [peak_mib(budget, 64) for _ in range(PEAKS)] for budget in (1.0, 0.6, 0.4, 0.25)}
    found = {
        "command": command_of(args),
        "rows": rows,
        "padded_over_packed_of_others": others,
        "peak_mib_batch_64": memory,
        "env": doctor.report(),
    }
    (args.out / "batch.json").write_text(json.dumps(found, indent=1) + "\n")
    with (args.out / "samples.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("what", "round", "seconds"))
        writer.writerows((name, i, f"{s:.9f}") for name, each in samples.items() for i, s in enumerate(each.samples_s))
    lines = [
        f"`{command_of(args)}`: `iret_small`, batch {args.batch}, one thread, {doctor.processor_name()}; medians of "
        f"{args.rounds} interleaved rounds.",
        "",
        "| what | MAC ratio | ms | times faster than full | share | ceiling / packed | padded / packed | in MACs "
        "| of other batches | padded / packed, later stages | in MACs | choosing |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['what']} | {row['mac_ratio']:.2f} | {row['ms']:.1f} | {row['speedup']:.2f} | {row['share']:.2f} | "
            + (
                f"{row['ceiling_over_packed']:.2f} | {row['padded_over_packed']:.2f} | {row['macs_over_packed']:.2f} | "
                f"{row['macs_of_others'][0]:.2f} ({row['macs_of_others'][1]:.2f} to {row['macs_of_others'][2]:.2f}) | "
                f"{row['padded_over_packed_later']:.2f} | {row['macs_over_packed_later']:.2f} | "
                f"{row['choosing']:.1%} |"
                if "choosing" in row
                else "| | | | | | |"
            )
            for row in rows
        ),
        "",
        *([say_others(others), ""] if others else []),
        f"Peak memory over the loaded model, batch 64, median of {PEAKS} processes: "
        + ", ".join(
            f"budget {budget:g}: {statistics.median(mib):.0f} MiB ({min(mib):.0f} to {max(mib):.0f})"
            for budget, mib in memory.items()
        ),
    ]
    (args.out / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
