"""Does dropping tokens save time? `iret_small`, eager, batch 1, one thread, interleaved, raw samples kept.

For each MAC ratio two things run in turn on the same image: `model(images, budget=)` at thresholds that give that ratio, and the
*ceiling*, the same layers at the same token counts on dense tensors, nothing scored, selected or gathered (fixed slices). At the
full count the ceiling is the *plain* model, against which `model(images)` is held; the blocks alone, without embedding,
transitions and head, are timed beside it. Choosing (scoring, rules, gathering) is also timed
inside. `model.run`, which also answers at every stage and keeps the trace, is timed beside it, and the same budget after
`model.compile()`, held against the same eager ceiling. What scoring takes in a compiled graph is the time of its stages with
it less that without.

    python benchmarks/speed.py --out results/...     takes about four minutes; run it alone on the machine
"""

import argparse
import copy
import csv
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from torch import Tensor

import iret.model
import iret.vit
from iret import doctor
from iret.precision import prepare
from iret.runtime.cost import full_macs
from iret.runtime.points import OperatingPoints, Point
from iret.tokens import Tokens, pack

RATIOS = (1.0, 1.5, 2.5, 4.0, 6.0)
WARMUP = 3  # rounds
ON_HOST = ("to_importance", "replace_importance", "choose", "select")


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


def blocks_alone(model: iret.Iret, inputs: list[Tensor]) -> Tensor:
    for stage, x in zip(model.stages, inputs, strict=True):
        for block in stage.blocks:
            x, _ = block(x)
    return x


def stages(model: iret.Iret, inputs: list[Tokens], is_scored: bool) -> None:
    """All stages that may be scored."""
    for stage, tokens in zip(model.stages[:-1], inputs, strict=False):
        stage(tokens, is_scored)


def table_of(model: iret.Iret, rungs: dict[float, int]) -> OperatingPoints:
    """Operating points as if calibrated on this image: MACs by threshold."""
    full = full_macs(model.shape)
    points = [
        Point(thresholds=((rung, rung),) * 2, accuracy=0.0, macs_mean=mean, macs_p95=mean, kept_mean=())
        for rung, mean in sorted({**rungs, 0.0: full}.items())
    ]
    return OperatingPoints(data="one image", num_images=1, full_macs=full, points=tuple(points))


class Stopwatch:
    """Adds up the time spent in the functions that choose, while they run inside the model."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        for name in ON_HOST:
            setattr(iret.model, name, self._timed(getattr(iret.model, name)))

    def include_scores(self) -> None:
        """What stages do, too; a compiled one would have to be compiled again at every call."""
        iret.model.receive = self._timed(iret.model.receive)
        iret.vit.LOGITS["cls"] = self._timed(iret.vit.LOGITS["cls"])

    def _timed(self, function: Callable) -> Callable:
        def timed(*args, **options):
            started = time.perf_counter()
            result = function(*args, **options)
            self.spent_s += time.perf_counter() - started
            return result

        return timed

    def take(self) -> float:
        spent, self.spent_s = self.spent_s, 0.0
        return spent


def thresholds_for(model: iret.Iret, images: Tensor, ratio: float) -> tuple[float, float] | float:
    """Thresholds at which this image costs 1 / ratio of the full model, by bisection; the same at both transitions.

    Not to the last bit, which would be the importance of one patch, and engines round that differently.
    """
    if ratio == 1:
        return 0.0
    low, high = 0.0, 4.0
    for _ in range(14):
        middle = (low + high) / 2
        spent = int(model.run(images, middle).macs)
        low, high = (middle, high) if spent > full_macs(model.shape) / ratio else (low, middle)
    return high


def interleave(
    functions: dict[str, Callable[[], object]], rounds: int, stopwatch: Stopwatch | None = None
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every call and of choosing in it; each round calls all, so that drift hits all alike, in an order of its own,
    each after an untimed call of the same, as in a stream of images."""
    draw = random.Random(0)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for round_ in range(rounds + WARMUP):
        for name in draw.sample(list(functions), len(functions)):
            functions[name]()
            if stopwatch:
                stopwatch.take()
            started = time.perf_counter()
            functions[name]()
            spent = time.perf_counter() - started
            choosing = stopwatch.take() if stopwatch else 0.0
            if round_ >= WARMUP:
                samples[name].append((spent, choosing))
    return samples


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, _ = prepare(iret.create_model("iret_small").eval(), "float32")
    compiled = copy.deepcopy(model)
    compiled.compile()
    images = torch.randn(1, 3, 224, 224)

    functions: dict[str, Callable[[], object]] = {}
    counts_of, macs_of, rungs = {}, {}, {}
    for ratio in RATIOS:
        thresholds = thresholds_for(model, images, ratio)
        out = model.run(images, thresholds)
        counts = out.trace.kept.sum((1, 2, 3)).tolist()
        counts_of[ratio], macs_of[ratio] = counts, int(out.macs)
        rungs[float(thresholds)] = macs_of[ratio]
        share = min(1.0, macs_of[ratio] / full_macs(model.shape))
        functions[f"budget {ratio}"] = lambda share=share: model(images, budget=share)
        functions[f"compiled {ratio}"] = lambda share=share: compiled(images, budget=share)
        inputs = [
            pack(torch.randn(1, count + 1, dim)) for count, dim in zip(counts, model.shape.embed_dims, strict=True)
        ]
        for name, is_scored in (("scored", True), ("unscored", False)):
            functions[f"{name} {ratio}"] = lambda inputs=inputs, is_scored=is_scored: stages(
                compiled, inputs, is_scored
            )
        functions[f"run {ratio}"] = lambda thresholds=thresholds: model.run(images, thresholds)
        functions[f"ceiling {ratio}"] = lambda counts=counts: static_forward(model, images, counts)
    model.points = compiled.points = table_of(model, rungs)
    every = [torch.randn(1, model.shape.num_patches + 1, dim) for dim in model.shape.embed_dims]
    functions["blocks"] = lambda: blocks_alone(model, every)
    samples = interleave(functions, args.rounds)
    stopwatch = Stopwatch()  # last: it takes time itself
    budgets = {
        kind: {name: functions[name] for name in functions if name.startswith(kind)} for kind in ("compiled", "budget")
    }
    timed_inside = interleave(budgets["compiled"], args.rounds, stopwatch)
    stopwatch.include_scores()
    timed_inside |= interleave(budgets["budget"], args.rounds, stopwatch)
    choosing_in = {
        name: statistics.median(chosen / spent for spent, chosen in each) for name, each in timed_inside.items()
    }
    for ratio in RATIOS[1:]:  # at 1 nothing is chosen
        pairs = zip(samples[f"scored {ratio}"], samples[f"unscored {ratio}"], samples[f"compiled {ratio}"], strict=True)
        choosing_in[f"compiled {ratio}"] += statistics.median((a - b) / c for (a, _), (b, _), (c, _) in pairs)

    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "samples.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["what", "trial", "time_s", "choosing_s"])
        for prefix, each in (("", samples), ("with a stopwatch inside, ", timed_inside)):
            writer.writerows(
                [prefix + name, trial, *both] for name, times in each.items() for trial, both in enumerate(times)
            )
    machine = doctor.processor_name()
    env = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": machine,
        "threads": 1,
        "batch": 1,
    }
    (args.out / "env.json").write_text(json.dumps(env, indent=1) + "\n")
    (args.out / "recipe.json").write_text(json.dumps({"rounds": args.rounds, "ratios": RATIOS}, indent=1) + "\n")
    table = report(samples, choosing_in, counts_of, macs_of)
    said = (
        f"`python benchmarks/speed.py --rounds {args.rounds}`: `iret_small`, batch 1, one thread, {machine}; medians."
    )
    (args.out / "README.md").write_text("\n".join([said, "", *table, ""]))
    print("\n".join(table))


def report(
    samples: dict[str, list[tuple[float, float]]], choosing_in: dict[str, float], counts_of: dict, macs_of: dict
) -> list[str]:
    """Markdown: median times, and medians over the rounds of ratios within a round, which drift does not touch."""

    def milliseconds(name: str) -> str:
        return f"{1e3 * statistics.median(spent for spent, _ in samples[name]):.2f}"

    def ratio_of(first: str, second: str) -> float:
        return statistics.median(a / b for (a, _), (b, _) in zip(samples[first], samples[second], strict=True))

    lines = [
        "| MAC ratio | patches | time (ms) | ceiling (ms) | ceiling / time | choosing | share | its ceiling | run (ms) "
        "| compiled (ms) | ceiling / compiled | choosing compiled | share compiled |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ratio, counts in counts_of.items():
        budget, ceiling = f"budget {ratio}", f"ceiling {ratio}"
        real = macs_of[1.0] / macs_of[ratio]
        share, best = ratio_of("budget 1.0", budget) / real, ratio_of("ceiling 1.0", ceiling) / real
        compiled = f"compiled {ratio}"
        cells = [f"{real:.2f}", "/".join(map(str, counts)), milliseconds(budget), milliseconds(ceiling)]
        cells += [f"{ratio_of(ceiling, budget):.3f}", f"{choosing_in[budget]:.1%}", f"{share:.2f}", f"{best:.2f}"]
        cells += [milliseconds(f"run {ratio}"), milliseconds(compiled), f"{ratio_of(ceiling, compiled):.3f}"]
        cells += [f"{choosing_in[compiled]:.1%}", f"{ratio_of('compiled 1.0', compiled) / real:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Everything kept: the blocks alone / model(images) = {ratio_of('blocks', 'budget 1.0'):.3f}."]
    return lines


if __name__ == "__main__":
    main()
