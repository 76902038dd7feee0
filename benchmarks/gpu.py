"""Does dropping save time on a GPU? `iret_small` in bf16 at batch 1, 64 and 256, raw samples kept.

`threshold`, eager: every image does what a held-out image did at one operating point of a calibrated model (`--counts`, scaled to
this grid), choosing included (`Iret.replay`), at the point that comes closest to the MAC ratio. `graph`: the same model at
fixed counts (`FixedCounts`), those that the points of `--counts` keep in the mean at that share of the MACs, as one CUDA graph
(`capture_graph`); `compiled graph`: compiled first. In turn with them run the full model in the same mode, a static ViT of
DeiT-S shape, and for graphs the *ceiling*, the same layers at the same counts, nothing scored or chosen, no token gathered.
Peak memory is that of one run, outside a graph, beyond weights and images. Joules (`--joules MODE`) are NVML's of the board,
net of its idle power, in windows of six seconds a row.

    python benchmarks/gpu.py --joules "compiled graph" --out results/...        some minutes, most of them compiling
    python benchmarks/gpu.py --device cpu --rounds 5 --out results/...          rehearses it
"""

import argparse
import csv
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from batch import mean_macs, vit_macs
from speed import without_last_mlp
from torch import Tensor, nn

import iret
from iret import doctor
from iret.clock import measure_joules, synchronizer
from iret.fixed import FixedCounts, capture_graph, counts_at
from iret.measure.energy import EnergyError, EnergyMeter
from iret.measure.latency import Latency, measure_latency, ratio
from iret.measure.sources import open_meter
from iret.runtime.cost import full_macs
from iret.runtime.points import Plan, Point
from iret.tokens import pack
from iret.vit import VisionTransformer
from iret.zoo import load

RATIOS = (1.5, 2.5, 4.0)
MODES = ("threshold", "graph", "compiled graph")
WARM_UP = 5  # rounds; the first of a compiled model takes long
Calls = dict[str, Callable[[], object]]


class Ceiling(nn.Module):
    """The layers of `fixed` at its counts, cut where it cuts: the first patches, nothing scored or chosen, no token gathered."""

    def __init__(self, fixed: FixedCounts) -> None:
        super().__init__()
        self.fixed = fixed

    def forward(self, images: Tensor) -> Tensor:
        stages = self.fixed.model.stages
        tokens, patches = self.fixed.embed(images)
        for index, (kept, refined) in enumerate(zip(self.fixed.kept, self.fixed.refined, strict=True)):
            stage, x_BND = stages[index], tokens.x_TD.unflatten(0, (len(images), -1))
            if min(kept, refined) < tokens.width - 1:
                x_BND = stage.blocks[-1].mlp_half(without_last_mlp(stage, x_BND)[:, : 1 + kept], None)
            else:
                tokens, _ = stage(tokens, is_scored=False)
                x_BND = tokens.x_TD.unflatten(0, (len(images), -1))
            tokens = self.fixed.transit(index, pack(x_BND), patches)
        tokens, _ = stages[-1](tokens, is_scored=False)
        return stages[-1].answer(tokens)


def plans_by_point(counts: str, model: iret.Iret) -> list[list[Plan]]:
    """What held-out images did at each operating point of `counts`, scaled to the grid of `model`."""
    source, cells, least = load(counts), model.shape.num_patches, model.shape.min_keep
    rows = []
    for point in source.points.points:
        rows.append([])
        for plan in point.plans:
            kept = [int(np.clip(round(n / source.shape.num_patches * cells), least, cells)) for n in plan.kept]
            rows[-1].append(Plan(tuple(kept), (0, *kept[1:])))
    return rows


def closest(model: iret.Iret, rows: list[list[Plan]], wanted: float, batch: int) -> list[Plan]:
    """A batch of plans of one point whose mean MACs come closest to 1 / `wanted` of the full model."""
    batches = [list(islice(cycle(plans), first, first + batch)) for plans in rows for first in range(len(plans))]
    return min(batches, key=lambda plans: abs(full_macs(model.shape) / mean_macs(model, plans) - wanted))


def peak_mib(call: Callable[[], object]) -> float:
    """Memory that a call takes beyond what is there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def candidates(mode: str, batch: int, counts: str, device: str) -> tuple[Calls, dict[str, float], Calls]:
    """Calls to time, how many times fewer MACs than the full model each spends, and calls whose peak memory is theirs."""
    torch.manual_seed(0)
    model = iret.create_model("iret_small").eval().requires_grad_(False).to(device, torch.bfloat16)
    static = VisionTransformer().eval().requires_grad_(False).to(device, torch.bfloat16)
    images = torch.randn(batch, 3, 224, 224, device=device, dtype=torch.bfloat16)
    full, ratios = full_macs(model.shape), {"full": 1.0, "DeiT-S shape": full_macs(model.shape) / vit_macs()}
    if mode == "threshold":
        calls: Calls = {"full": lambda: model(images), "DeiT-S shape": lambda: static(images)}
        rows = plans_by_point(counts, model)
        point = Point(
            thresholds=((1.0, 1.0),) * 2, accuracy=0.0, macs_mean=1.0, macs_p95=1.0, kept_mean=(), exit_confidence=1.0
        )
        for wanted in RATIOS:
            plans = closest(model, rows, wanted, batch)
            calls[f"{wanted:g}"] = lambda plans=plans: model.replay(images, plans, point)
            ratios[f"{wanted:g}"] = full / mean_macs(model, plans)
        return calls, ratios, calls
    everything = FixedCounts.at(model, 1.0)
    modules: dict[str, nn.Module] = {"full": everything, "DeiT-S shape": static}
    ratios["DeiT-S shape"] = everything.macs / vit_macs()
    for wanted in RATIOS:
        fixed = FixedCounts(model, counts_at(load(counts).points, model.shape, 1 / wanted))
        modules[f"{wanted:g}"] = fixed
        ratios[f"{wanted:g}"] = ratios[f"{wanted:g} ceiling"] = everything.macs / fixed.macs
        if mode == "graph":
            modules[f"{wanted:g} ceiling"] = Ceiling(fixed)
    if mode == "compiled graph":
        for module in modules.values():
            module.compile(fullgraph=True, dynamic=False)
    captured = {name: capture_graph(module, images) if device == "cuda" else module for name, module in modules.items()}
    return _bind(captured, images), ratios, _bind(modules, images)


def _bind(calls: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor) -> Calls:
    return {name: lambda call=call: call(images) for name, call in calls.items()}


@torch.no_grad()
def measure(args: argparse.Namespace, meter: EnergyMeter | None) -> Iterator[list[tuple[dict, Latency]]]:
    """Rows and raw samples, mode by mode and batch by batch; `meter` reads those of `args.joules`."""
    wait = synchronizer(torch.device(args.device))
    for mode in args.modes:
        for batch in args.batch:
            calls, ratios, peaks = candidates(mode, batch, args.counts, args.device)
            samples = measure_latency(calls, rounds=args.rounds, warm_up=WARM_UP, lead=1, synchronize=wait)
            read = None
            if meter is not None and mode in args.joules:
                read = measure_joules([([call], batch) for call in calls.values()], meter, wait, print)
            found = []
            for at, (name, latency) in enumerate(samples.items()):
                speedup = ratio(samples["full"], latency).median
                row = {"mode": mode, "batch": batch, "what": name, "mac_ratio": float(ratios[name])}
                row |= {"ms": latency.p50_ms, "images_per_s": batch / latency.p50_ms * 1e3, "speedup": speedup}
                row |= {"share": speedup / ratios[name]}
                row["peak_mib"] = peak_mib(peaks[name]) if args.device == "cuda" else None
                row |= {
                    "joules": read and read.joules[at],
                    "idle_watts": read and read.idle_w,
                }  # an image's, net of idle
                found.append((row, latency))
            yield found


def _or_blank(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def write(out: Path, command: str, device: str, rounds: int, measured: list[tuple[dict, Latency]]) -> None:
    """The table, its rows and the raw samples, as far as they are there."""
    rows = [row for row, _ in measured]
    report = {"command": command, "rows": rows, "env": doctor.report()}
    (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    with (out / "samples.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("what", "round", "seconds"))
        for row, latency in measured:
            name = f"{row['mode']}; batch {row['batch']}; {row['what']}"
            writer.writerows((name, i, f"{s:.9f}") for i, s in enumerate(latency.samples_s))
    lines = [
        f"`{command}`: `iret_small`, bf16, {doctor.describe_device(torch.device(device), 'bfloat16')}, torch "
        f"{torch.__version__}; medians of {rounds} interleaved rounds.",
        "",
        "| mode | batch | what | MAC ratio | ms | images/s | times faster than full | share | peak MiB | mJ/image |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['mode']} | {row['batch']} | {row['what']} | {row['mac_ratio']:.2f} | {row['ms']:.2f} | "
            f"{row['images_per_s']:.0f} | {row['speedup']:.2f} | {row['share']:.2f} | "
            f"{_or_blank(row['peak_mib'], '.0f')} | {_or_blank(row['joules'] and 1e3 * row['joules'], '.2f')} |"
            for row in rows
        ),
    ]
    (out / "README.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", default="iret_pico-cifar10", help="calibrated model that keeps the counts")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--joules", nargs="+", choices=MODES, default=(), help="modes whose joules NVML reads, too")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.joules and (args.device != "cuda" or not set(args.joules) <= set(args.modes)):
        parser.error("--joules are a GPU's, of --modes that run; give --device cuda and these modes.")
    try:
        meter = open_meter("nvml") if args.joules else None
    except EnergyError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    words = {"counts": [Path(args.counts).name], "batch": args.batch, "modes": args.modes, "rounds": [args.rounds]}
    words |= {"device": [args.device]} | ({"joules": args.joules} if args.joules else {})
    command = " ".join(f"--{name} {shlex.join(map(str, values))}" for name, values in words.items())
    command = f"python benchmarks/gpu.py {command}"
    measured: list[tuple[dict, Latency]] = []
    for found in measure(args, meter):
        measured += found
        write(args.out, command, args.device, args.rounds, measured)  # what is measured is kept if the rest is cut off
    print((args.out / "README.md").read_text())


if __name__ == "__main__":
    main()
