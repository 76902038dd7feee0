"""Is the budget that was asked for met? MACs and milliseconds, on test images that no threshold was found on.

    python benchmarks/dial.py MODEL --data DATA --out results/...        one thread; run it alone on the machine

MACs: `iret eval` at each budget. Milliseconds: the clock of this machine is measured first (as `iret calibrate --device-only`
does, on noise); then test images are answered one by one, every budget on every image in an order drawn anew.
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
        found = {"model": args.model, "ms": check_ms(model, data, args.images, args.out / "samples.csv")}
    found["macs"] = check_macs(model, data, args.max_images)
    (args.out / "dial.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "env.json").write_text(json.dumps(doctor.report(), indent=1) + "\n")
    lines = [
        f"`python benchmarks/dial.py {args.model}`: one thread, {doctor.processor_name()}; test images of {name_of(args.data)}.",
        "",
        "| budget asked | met | error | top-1 |",
        "|---|---|---|---|",
        *(
            f"| {row['asked']:g} | {row['met']:.3f} | {row['error']:+.1%} | {row['top1']:.2%} |"
            for row in found["macs"]
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
