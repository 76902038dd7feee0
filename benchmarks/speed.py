"""Does dropping tokens save time? `iret_small`, eager, batch 1, one thread, interleaved, raw samples kept.

For each MAC ratio two things run in turn on the same image: `model(images, budget=)` at thresholds that give that ratio, and the
*ceiling*, the same blocks at the same token counts on dense tensors, nothing scored, selected or gathered (fixed slices). At the
full count the ceiling is the *plain* model, against which `model(images)` is held; the blocks alone, without embedding,
transitions and head, are timed beside it. The *cut ceiling* slices where the model chooses, before the last MLP of a stage: it
multiplies what the model does, but for scoring, and nothing else; "its ceiling" is its share. Choosing (scoring, rules,
gathering) is also timed inside. `model.run`, which also answers at every stage and keeps the trace, is timed beside it, and the
same budget after `model.compile()`, held against the same eager ceiling. What scoring takes in a compiled graph is the time of
its stages with it, no patch dropped, less that without. Processes differ by where their weights lie in memory, so all of it is
done in several, one after another, and what is reported is their median.

    python benchmarks/speed.py --out results/...     takes about eight minutes; run it alone on the machine
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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from torch import Tensor

import iret.model
import iret.vit
from iret import doctor
from iret.precision import prepare
from iret.runtime.cost import Shape, full_macs, stage_macs
from iret.runtime.points import OperatingPoints, Point
from iret.tokens import Tokens, pack

RATIOS = (1.0, 1.5, 2.5, 4.0, 6.0)
WARMUP = 3  # rounds
Samples = dict[str, list[tuple[float, float]]]
ON_HOST = ("to_importance", "replace_importance", "choose", "select")


def without_last_mlp(stage: iret.model.Stage, x: Tensor) -> Tensor:
    """The blocks of a stage but for what is left to the tokens that stay, nothing scored."""
    for block in stage.blocks[:-1]:
        x, _ = block(x)
    return stage.blocks[-1].attention_half(x, None, None)[0]


def static_forward(model: iret.Iret, images: Tensor, counts: list[int], *, is_cut: bool) -> Tensor:
    """The model at fixed patch counts per stage, taking the first patches: the ceiling, or the cut ceiling."""
    tokens, patches = model._embed(images)
    x = tokens.x_TD[None]
    for index, (stage, count) in enumerate(zip(model.stages, counts, strict=True)):
        if index:
            transition, level = model.transitions[index - 1], model.shape.detail_level(index)
            x = x[:, : count + 1]
            if is_cut:
                x = model.stages[index - 1].blocks[-1].mlp_half(x, None)
            details = model.lifting.details(patches[:count], level)
            x = transition.widen(transition.norm(x)) + transition.pos_embed[:, : count + 1]
            x[:, 1:] += transition.detail_embed(transition.detail_norm(details.flatten(1)))
        if is_cut and stage is not model.stages[-1]:
            x = without_last_mlp(stage, x)
            continue
        for block in stage.blocks:
            x, _ = block(x)
    return model.stages[-1].head(model.stages[-1].norm(x[:, 0]))


def whole_macs(shape: Shape, counts: Sequence[int]) -> int:
    """MACs of a ceiling: whole blocks at these counts of patches, the last head."""
    last = len(counts) - 1
    each = (
        stage_macs(shape, stage, count, count, scored=False, head=stage == last) for stage, count in enumerate(counts)
    )
    return int(sum(each))


def blocks_alone(model: iret.Iret, inputs: list[Tensor]) -> Tensor:
    for stage, x in zip(model.stages, inputs, strict=True):
        for block in stage.blocks:
            x, _ = block(x)
    return x


def stages(model: iret.Iret, inputs: list[Tokens], is_scored: bool) -> None:
    """All stages that may be scored."""
    for stage, tokens in zip(model.stages[:-1], inputs, strict=False):
        seen, _ = stage(tokens, is_scored)
        if is_scored:
            stage(seen, is_scored, is_rest=True)


def table_of(model: iret.Iret, rungs: dict[float, int]) -> OperatingPoints:
    """Operating points as if calibrated on this image: MACs by threshold."""
    full = full_macs(model.shape)
    points = [
        Point(thresholds=((rung, rung),) * 2, accuracy=0.0, macs_mean=mean, macs_p95=mean, kept_mean=())
        for rung, mean in sorted({**rungs, 0.0: full}.items())
    ]
    return OperatingPoints(data="one image", num_images=1, full_macs=full, points=tuple(points))


@dataclass(frozen=True)
class Measured:
    """What one process found: seconds of every call and of choosing in it, patches per stage and MACs by MAC ratio."""

    samples: Samples
    timed_inside: Samples
    counts_of: dict[float, list[int]]
    macs_of: dict[float, int]

    def milliseconds(self, name: str) -> float:
        return 1e3 * statistics.median(spent for spent, _ in self.samples[name])

    def ratio(self, over: str, under: str) -> float:
        """Of times, median over the rounds: within a round drift does not touch it."""
        pairs = zip(self.samples[over], self.samples[under], strict=True)
        return statistics.median(a / b for (a, _), (b, _) in pairs)

    def choosing(self, kind: str, ratio: float) -> float:
        """Share of the time of one run, `kind` "budget" or "compiled"."""
        found = statistics.median(chosen / spent for spent, chosen in self.timed_inside[f"{kind} {ratio}"])
        if kind == "budget" or ratio == 1:  # at 1 nothing is chosen
            return found
        trios = zip(*(self.samples[f"{name} {ratio}"] for name in ("scored", "unscored", kind)), strict=True)
        return found + statistics.median((a - b) / c for (a, _), (b, _), (c, _) in trios)


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


def interleave(functions: dict[str, Callable[[], object]], rounds: int, stopwatch: Stopwatch | None = None) -> Samples:
    """Seconds of every call and of choosing in it; each round calls all, so that drift hits all alike, in an order of its own,
    each after an untimed call of the same, as in a stream of images."""
    draw = random.Random(0)
    samples: Samples = {name: [] for name in functions}
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
def measure(rounds: int) -> Measured:
    """One process's samples."""
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
        for name, is_cut in (("ceiling", False), ("cut ceiling", True)):
            functions[f"{name} {ratio}"] = lambda counts=counts, is_cut=is_cut: static_forward(
                model, images, counts, is_cut=is_cut
            )
    model.points = compiled.points = table_of(model, rungs)
    every = [torch.randn(1, model.shape.num_patches + 1, dim) for dim in model.shape.embed_dims]
    functions["blocks"] = lambda: blocks_alone(model, every)
    samples = interleave(functions, rounds)
    stopwatch = Stopwatch()  # last: it takes time itself
    budgets = {
        kind: {name: functions[name] for name in functions if name.startswith(kind)} for kind in ("compiled", "budget")
    }
    timed_inside = interleave(budgets["compiled"], rounds, stopwatch)
    stopwatch.include_scores()
    timed_inside |= interleave(budgets["budget"], rounds, stopwatch)
    return Measured(samples, timed_inside, counts_of, macs_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=30, help="of each process")
    args = parser.parse_args()
    if min(args.processes, args.rounds) < 1:
        parser.error("--processes and --rounds must be 1 or more.")
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        measured = list(pool.map(measure, [args.rounds] * args.processes))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "samples.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["process", "what", "trial", "time_s", "choosing_s"])
        for process, each in enumerate(measured):
            for prefix, samples in (("", each.samples), ("with a stopwatch inside, ", each.timed_inside)):
                for name, times in samples.items():
                    writer.writerows([process, prefix + name, trial, *both] for trial, both in enumerate(times))
    machine = doctor.processor_name()
    env = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": machine,
        "threads": 1,
        "batch": 1,
    }
    (args.out / "env.json").write_text(json.dumps(env, indent=1) + "\n")
    recipe = {"processes": args.processes, "rounds": args.rounds, "ratios": RATIOS}
    (args.out / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    table = report(measured)
    said = (
        f"`python benchmarks/speed.py --processes {args.processes} --rounds {args.rounds}`: `iret_small`, batch 1, one "
        f"thread, {machine}; medians over {args.processes} processes, in brackets the least and the most of them."
    )
    (args.out / "README.md").write_text("\n".join([said, "", *table, ""]))
    print("\n".join(table))


def report(measured: list[Measured]) -> list[str]:
    """Markdown."""
    first = measured[0]

    def median(number_of: Callable[[Measured], float]) -> float:
        return statistics.median(map(number_of, measured))

    def milliseconds(name: str) -> str:
        return f"{median(lambda each: each.milliseconds(name)):.2f}"

    def spread(over: str, under: str) -> str:
        numbers = [each.ratio(over, under) for each in measured]
        return f"{statistics.median(numbers):.3f} ({min(numbers):.3f} to {max(numbers):.3f})"

    lines = [
        "| MAC ratio | patches | time (ms) | ceiling (ms) | ceiling / time | cut ceiling / time | choosing | share | its ceiling "
        "| run (ms) | compiled (ms) | ceiling / compiled | choosing compiled | share compiled |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ratio, counts in first.counts_of.items():
        real = first.macs_of[1.0] / first.macs_of[ratio]

        def share(kind: str, ratio: float = ratio, real: float = real) -> str:
            return f"{median(lambda each: each.ratio(f'{kind} 1.0', f'{kind} {ratio}')) / real:.2f}"

        def choosing(kind: str, ratio: float = ratio) -> str:
            return f"{median(lambda each: each.choosing(kind, ratio)):.1%}"

        budget, ceiling, compiled = (f"{kind} {ratio}" for kind in ("budget", "ceiling", "compiled"))
        cells = [f"{real:.2f}", "/".join(map(str, counts)), milliseconds(budget), milliseconds(ceiling)]
        cells += [spread(ceiling, budget), spread(f"cut {ceiling}", budget), choosing("budget")]
        cells += [share("budget"), share("cut ceiling")]
        cells += [milliseconds(f"run {ratio}"), milliseconds(compiled), spread(ceiling, compiled)]
        cells += [choosing("compiled"), share("compiled")]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Everything kept: the blocks alone / model(images) = {spread('blocks', 'budget 1.0')}."]
    return lines


if __name__ == "__main__":
    main()
