"""Does dropping tokens save time? `iret_small`, eager, batch 1, one thread, interleaved, raw samples kept.

For each MAC ratio three things run in turn on the same image: `model.run` with thresholds that give that ratio; the
*ceiling*, the same model at the same token counts with nothing scored, selected or gathered (fixed slices); and the *plain
blocks*, the ceiling without embedding, transitions and heads. Choosing is timed on its own: scoring, rules and gathering
are what `run` does and the ceiling does not.

    python benchmarks/speed.py --out results/...     takes about two minutes; run it alone on the machine
"""

import argparse
import csv
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from torch import Tensor

import iret
from iret.runtime.cost import full_macs

RATIOS = (1.0, 1.5, 2.5, 4.0, 6.0)


def static_forward(model: iret.Iret, images: Tensor, counts: list[int]) -> Tensor:
    """The model at fixed patch counts per stage, taking the first patches: the ceiling."""
    tokens, patches = model._embed(images)
    x = tokens.x_TD[None]
    for index, (stage, count) in enumerate(zip(model.stages, counts, strict=True)):
        if index:
            transition, level = model.transitions[index - 1], model.shape.detail_level(index)
            x = x[:, : count + 1]
            details = model.lifting.details(patches[:count], level)
            x = transition.widen(transition.norm(x)) + transition.pos_embed[:, : count + 1]
            x[:, 1:] += transition.detail_embed(transition.detail_norm(details.flatten(1)))
        for block in stage.blocks:
            x, _ = block(x)
    return model.stages[-1].head(model.stages[-1].norm(x[:, 0]))


def plain_blocks(model: iret.Iret, inputs: list[Tensor]) -> Tensor:
    for stage, x in zip(model.stages, inputs, strict=True):
        for block in stage.blocks:
            x, _ = block(x)
    return x


def thresholds_for(model: iret.Iret, images: Tensor, ratio: float) -> tuple[float, float] | float:
    """Thresholds at which this image costs 1 / ratio of the full model, by bisection; the same at both transitions."""
    if ratio == 1:
        return 0.0
    low, high = 0.0, 4.0
    for _ in range(30):
        middle = (low + high) / 2
        spent = int(model.run(images, middle).macs)
        low, high = (middle, high) if spent > full_macs(model.shape) / ratio else (low, middle)
    return high


def interleave(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call; each round calls all, so that drift hits all alike."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 3):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if round_ >= 3:  # warm-up
                samples[name].append(time.perf_counter() - started)
    return samples


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = iret.create_model("iret_small").eval()
    images = torch.randn(1, 3, 224, 224)

    functions: dict[str, Callable[[], object]] = {"forward full": lambda: model(images)}
    counts_of, macs_of = {}, {}
    for ratio in RATIOS:
        thresholds = thresholds_for(model, images, ratio)
        out = model.run(images, thresholds)
        counts = out.trace.kept.sum((1, 2, 3)).tolist()
        inputs = [torch.randn(1, n + 1, d) for n, d in zip(counts, model.shape.embed_dims, strict=True)]
        counts_of[ratio], macs_of[ratio] = counts, int(out.macs)
        functions[f"run {ratio}"] = lambda thresholds=thresholds: model.run(images, thresholds)
        functions[f"ceiling {ratio}"] = lambda counts=counts: static_forward(model, images, counts)
        functions[f"blocks {ratio}"] = lambda inputs=inputs: plain_blocks(model, inputs)
    samples = interleave(functions, args.rounds)

    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "samples.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "trial", "time_s"])
        writer.writerows([name, trial, t] for name, times in samples.items() for trial, t in enumerate(times))
    env = {"torch": torch.__version__, "threads": 1, "batch": 1, "machine": platform.processor() or platform.machine()}
    (args.out / "env.json").write_text(json.dumps(env, indent=1) + "\n")
    (args.out / "recipe.json").write_text(json.dumps({"rounds": args.rounds, "ratios": RATIOS}, indent=1) + "\n")
    table = report(samples, counts_of, macs_of)
    (args.out / "README.md").write_text(
        "\n".join([f"`python benchmarks/speed.py --rounds {args.rounds}`", "", *table, ""])
    )
    print("\n".join(table))


def report(samples: dict[str, list[float]], counts_of: dict, macs_of: dict) -> list[str]:
    """Markdown: medians, the share of the ceiling, and what choosing adds."""
    median = {name: statistics.median(times) for name, times in samples.items()}
    lines = [
        "| MAC ratio | patches | run (ms) | ceiling (ms) | ceiling / run | blocks / run | choosing of run | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ratio, counts in counts_of.items():
        run, ceiling, blocks = (median[f"{what} {ratio}"] for what in ("run", "ceiling", "blocks"))
        real = macs_of[1.0] / macs_of[ratio]
        share = (median["run 1.0"] / run) / real
        lines.append(
            f"| {real:.2f} | {'/'.join(map(str, counts))} | {run * 1e3:.2f} | {ceiling * 1e3:.2f} | {ceiling / run:.3f} "
            f"| {blocks / run:.3f} | {(run - ceiling) / run:.1%} | {share:.2f} |"
        )
    full = median["forward full"]
    lines += ["", f"Full: model(images) {full * 1e3:.2f} ms; ceiling / it = {median['ceiling 1.0'] / full:.3f}, "]
    lines[-1] += f"plain blocks / it = {median['blocks 1.0'] / full:.3f}."
    return lines


if __name__ == "__main__":
    main()
