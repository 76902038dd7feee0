"""Is the budget that was asked for met? MACs and milliseconds, on test images that no threshold was found on.

    python benchmarks/dial.py MODEL --data DATA --out results/...        one thread; run it alone on the machine

MACs: `iret eval` at each budget. Between points: halfway between any two neighbours, is the accuracy within the 95 % interval
of the chord between theirs? Milliseconds, in legs: the clock of this machine is measured (as `iret calibrate --device-only` does,
on noise); right after that, test images are answered one by one, every budget on every image in an order drawn anew. The error of
a budget is the median over the legs: a machine that gets faster between table and answers says nothing about the dial.
"""

import argparse
import csv
import json
import os
import random
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch

from iret import doctor
from iret.clock import measure_device
from iret.evaluate import evaluate
from iret.measure.latency import pin_threads
from iret.runtime.cost import full_macs
from iret.train.data import name_of, open_data
from iret.zoo import load

BUDGETS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)  # those that the model has
LEGS = 5  # clocks measured, each of them checked at once
REPEATS = 3  # timed runs of every image at every budget in a leg
STEPS = 6  # of milliseconds, from nearly the cheapest to the full run


def check_macs(model, data, max_images: int | None) -> list[dict]:
    """Asked and met shares of the full MACs, with the accuracy."""
    budgets = [budget for budget in BUDGETS if budget >= model.points.cheapest_budget]
    scores = evaluate(model, data, [model.setting(budget) for budget in budgets], max_images=max_images)
    full = full_macs(model.shape)
    return [
        {
            "asked": budget,
            "met": score.macs_mean / full,
            "error": score.macs_mean / full / budget - 1,
            "top1": score.accuracy,
        }
        for budget, score in zip(budgets, scores, strict=True)
    ]


def check_chords(model, data, max_images: int | None) -> list[dict]:
    """Between every two neighbouring points: MACs and accuracy halfway, and the chord of theirs at the same MACs.

    `is_inside`: they differ by at most 1.96 standard errors of an accuracy on so many images. All on the same images.
    """
    full, shares = full_macs(model.shape), model.points.shares  # cheapest first
    budgets = np.append(shares, (shares[:-1] + shares[1:]) / 2).tolist()
    scores = evaluate(model, data, [model.setting(budget) for budget in budgets], max_images=max_images)
    points, halves = scores[: len(shares)], scores[len(shares) :]
    macs, top1 = [point.macs_mean for point in points], [point.accuracy for point in points]
    rows = []
    for low, half in enumerate(halves):
        both = slice(low, low + 2)
        chord = float(np.interp(half.macs_mean, macs[both], top1[both]))
        error = (chord * (1 - chord) / half.num_images) ** 0.5
        asked, met = budgets[len(shares) + low], half.macs_mean / full
        row = {"budget": asked, "met": met, "error": met / asked - 1, "top1": half.accuracy}
        rows.append(row | {"chord": chord, "is_inside": bool(abs(half.accuracy - chord) <= 1.96 * error)})
    return rows


def command_of(args: argparse.Namespace) -> str:
    """What was typed, without the paths of this machine."""
    limit = [] if args.max_images is None else [f"--max-images {args.max_images}"]
    words = [Path(args.model).name, f"--data {name_of(args.data)}", f"--images {args.images}", *limit]
    return " ".join(["python benchmarks/dial.py", *words, f"--out results/{args.out.name}"])


@torch.inference_mode()
def check_ms(model, data, num_images: int, samples_path: Path) -> list[dict]:
    """Asked and met milliseconds, mean over test images at batch 1, by leg."""
    chosen = random.Random(0).sample(range(len(data)), num_images)
    images = [model.normalise(data[index][0][None].float() / 255) for index in chosen]
    draw, legs, raw = random.Random(1), [], []
    for leg in range(LEGS):
        table, _ = measure_device(model, model.points)
        model.points = model.points.with_device(table)
        asked = np.linspace(1.05 * min(table.ms_mean), table.ms_mean[0], STEPS).tolist()
        budgets = [model.budget_for(ms=ms) for ms in asked]
        spent = np.zeros((REPEATS, STEPS, num_images))
        for repeat in range(-1, REPEATS):  # the first warms up: what it writes is overwritten
            for place in draw.sample(range(num_images), num_images):
                for step in draw.sample(range(STEPS), STEPS):
                    model(images[place], budget=budgets[step])  # so that its weights are in the caches, as in a stream
                    started = time.perf_counter()
                    model(images[place], budget=budgets[step])
                    spent[repeat, step, place] = 1e3 * (time.perf_counter() - started)
        met = np.median(spent, axis=0).mean(1)  # as the table's: a median an image
        legs.append(np.array([asked, budgets, met]))
        raw += [(leg, f"{asked[step]:.4f}", place, *(f"{x:.4f}" for x in spent[:, step, place]))
                for step in range(STEPS) for place in range(num_images)]  # fmt: skip
    with samples_path.open("w", newline="") as file:
        head = ("leg", "asked_ms", "image", *(f"ms_{repeat}" for repeat in range(REPEATS)))
        csv.writer(file, lineterminator="\n").writerows((head, *raw))
    every = np.stack(legs)  # [legs, (asked, budget, met), steps]
    errors = every[:, 2] / every[:, 0] - 1
    return [
        dict(zip(("asked_ms", "budget", "met_ms"), np.median(every[:, :, step], axis=0).tolist(), strict=True))
        | {"error": float(np.median(errors[:, step])), "of_legs": errors[:, step].tolist()}
        for step in range(STEPS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=100, help="for the milliseconds")
    parser.add_argument("--max-images", type=int, help="for the MACs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    model = load(args.model)
    data = open_data(args.data, "test", model.preprocessing)
    with pin_threads(1):
        found = {"command": command_of(args), "ms": check_ms(model, data, args.images, args.out / "samples.csv")}
    found["macs"] = check_macs(model, data, args.max_images)
    found["chords"] = check_chords(model, data, args.max_images)
    num_inside = sum(row["is_inside"] for row in found["chords"])
    (args.out / "dial.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "env.json").write_text(json.dumps(doctor.report(), indent=1) + "\n")
    lines = [
        f"`{command_of(args)}`: one thread, {doctor.processor_name()}; test images.",
        "",
        "| budget asked | met | error | top-1 |",
        "|---|---|---|---|",
        *(
            f"| {row['asked']:g} | {row['met']:.3f} | {row['error']:+.1%} | {row['top1']:.2%} |"
            for row in found["macs"]
        ),
        "",
        f"Halfway between neighbouring points, top-1 lies within the 95 % interval of their chord at {num_inside} of "
        f"{len(found['chords'])} places. MACs are furthest off there by {max(abs(row['error']) for row in found['chords']):.1%}.",
        "",
        "| budget halfway | met | error | top-1 | chord | inside |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['budget']:.3f} | {row['met']:.3f} | {row['error']:+.1%} | {row['top1']:.2%} | {row['chord']:.2%} | "
            f"{'yes' if row['is_inside'] else 'no'} |"
            for row in found["chords"]
        ),
        "",
        f"Medians of {LEGS} legs, each column's own.",
        "",
        "| ms asked | budget | met | error | of the legs |",
        "|---|---|---|---|---|",
        *(
            f"| {row['asked_ms']:.2f} | {row['budget']:.3f} | {row['met_ms']:.2f} | {row['error']:+.1%} | "
            + " ".join(f"{error:+.1%}" for error in row["of_legs"])
            + " |"
            for row in found["ms"]
        ),
    ]
    (args.out / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
