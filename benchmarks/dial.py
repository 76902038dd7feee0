"""Is the budget that was asked for met? MACs and milliseconds, on test images that no threshold was found on.

    python benchmarks/dial.py MODEL --data DATA --out results/...        one thread; run it alone on the machine

MACs: `iret eval` at each budget. Between points: halfway between any two neighbours, is the accuracy within the 95 % interval
of the chord between theirs? Milliseconds: the clock of this machine is measured first (as `iret calibrate --device-only` does,
on noise); then test images are answered one by one, every budget on every image in an order drawn anew.
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

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25)
REPEATS = 5  # timed runs of every image at every budget
STEPS = 6  # of milliseconds, from nearly the cheapest to the full run


def check_macs(model, data, max_images: int | None) -> list[dict]:
    """Asked and met shares of the full MACs, with the accuracy."""
    settings = [model.setting(budget) for budget in (1.0, *BUDGETS)]
    scores = evaluate(model, data, settings, max_images=max_images)
    full = full_macs(model.shape)
    return [
        {
            "asked": budget,
            "met": score.macs_mean / full,
            "error": score.macs_mean / full / budget - 1,
            "top1": score.accuracy,
        }
        for budget, score in zip((1.0, *BUDGETS), scores, strict=True)
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
        row = {"budget": budgets[len(shares) + low], "met": half.macs_mean / full, "top1": half.accuracy}
        rows.append(row | {"chord": chord, "is_inside": bool(abs(half.accuracy - chord) <= 1.96 * error)})
    return rows


def command_of(args: argparse.Namespace) -> str:
    """What was typed, without the paths of this machine."""
    limit = [] if args.max_images is None else [f"--max-images {args.max_images}"]
    words = [Path(args.model).name, f"--data {name_of(args.data)}", f"--images {args.images}", *limit]
    return " ".join(["python benchmarks/dial.py", *words, f"--out results/{args.out.name}"])


@torch.inference_mode()
def check_ms(model, data, num_images: int, samples_path: Path) -> list[dict]:
    """Asked and met milliseconds, mean over test images at batch 1."""
    table, _ = measure_device(model, model.points)
    model.points = model.points.with_device(table)
    cheapest, full = min(table.ms_mean), table.ms_mean[0]
    asked = [float(ms) for ms in np.linspace(1.05 * cheapest, full, STEPS)]
    budgets = [model.budget_for(ms=ms) for ms in asked]
    chosen = random.Random(0).sample(range(len(data)), num_images)
    images = [model.normalise(data[index][0][None].float() / 255) for index in chosen]
    spent: dict[float, list[list[float]]] = {ms: [[] for _ in images] for ms in asked}
    order = list(zip(asked, budgets, strict=True))
    draw = random.Random(1)
    for round_ in range(1 + REPEATS):  # the first warms up
        for place in draw.sample(range(num_images), num_images):
            for ms, budget in draw.sample(order, len(order)):
                model(images[place], budget=budget)  # so that its weights are in the caches, as in a stream
                started = time.perf_counter()
                model(images[place], budget=budget)
                if round_:
                    spent[ms][place].append(1e3 * (time.perf_counter() - started))
    met = {ms: float(np.median(each, axis=1).mean()) for ms, each in spent.items()}  # as the table's: a median an image
    with samples_path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("asked_ms", "image", *(f"ms_{place}" for place in range(REPEATS))))
        for ms, each in spent.items():
            writer.writerows((f"{ms:.4f}", place, *(f"{x:.4f}" for x in one)) for place, one in enumerate(each))
    return [
        {"asked_ms": ms, "budget": budget, "met_ms": met[ms], "error": met[ms] / ms - 1}
        for ms, budget in zip(asked, budgets, strict=True)
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
        f"{len(found['chords'])} places.",
        "",
        "| budget halfway | met | top-1 | chord | inside |",
        "|---|---|---|---|---|",
        *(
            f"| {row['budget']:.3f} | {row['met']:.3f} | {row['top1']:.2%} | {row['chord']:.2%} | "
            f"{'yes' if row['is_inside'] else 'no'} |"
            for row in found["chords"]
        ),
        "",
        "| ms asked | budget | met | error |",
        "|---|---|---|---|",
        *(
            f"| {row['asked_ms']:.2f} | {row['budget']:.3f} | {row['met_ms']:.2f} | {row['error']:+.1%} |"
            for row in found["ms"]
        ),
    ]
    (args.out / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
