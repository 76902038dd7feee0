"""What do fixed counts cost in accuracy? The same budgets by thresholds and by `FixedCounts`, on the same test images.

By thresholds, images keep what they need and leave early where they are sure; at fixed counts all keep alike, and MACs are met
for each image. A difference has the standard error of paired answers.

    python benchmarks/fixed_counts.py MODEL --data DATA --out results/...        minutes on two cores
"""

import argparse
import csv
import json
import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch

from iret import doctor
from iret.fixed import FixedCounts
from iret.runtime.cost import full_macs
from iret.runtime.points import BUDGETS
from iret.train.data import make_loader, name_of, open_data
from iret.zoo import load


@torch.inference_mode()
def answers(model, fixed: list[FixedCounts], data, max_images: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Whether each image was right, bool [2, budgets, B], by thresholds and at fixed counts; mean MACs by thresholds."""
    right, macs, seen = [], [], 0
    for pixels, labels, _ in make_loader(data, 200, seed=0, epoch=0, shuffle=False, workers=0, drop_last=False):
        images = model.normalise(pixels.float() / 255)
        runs = [model.run(images, budget=budget) for budget in BUDGETS]
        both = torch.stack([*(run.logits for run in runs), *(each(images) for each in fixed)]).argmax(2) == labels
        right.append(both.unflatten(0, (2, -1)).numpy())
        macs.append(torch.stack([run.macs for run in runs]).numpy())
        seen += len(labels)
        if max_images is not None and seen >= max_images:
            break
    return np.concatenate(right, axis=2), np.concatenate(macs, axis=1).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--max-images", type=int)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = load(args.model)
    every = [FixedCounts.at(model, budget) for budget in BUDGETS]
    right, macs = answers(model, every, open_data(args.data, "test", model.preprocessing), args.max_images)
    full, rows = full_macs(model.shape), []
    for index, (budget, fixed) in enumerate(zip(BUDGETS, every, strict=True)):
        difference = right[1, index].astype(float) - right[0, index]
        row = {
            "budget": budget,
            "kept": fixed.kept,
            "thresholds_macs": macs[index] / full,
            "fixed_macs": fixed.macs / full,
        }
        row |= {"thresholds_top1": float(right[0, index].mean()), "fixed_top1": float(right[1, index].mean())}
        rows.append(row | {"standard_error": float(difference.std() / len(difference) ** 0.5)})
    limit = f" --max-images {args.max_images}" if args.max_images else ""
    command = f"python benchmarks/fixed_counts.py {Path(args.model).name} --data {name_of(args.data)}{limit}"
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"command": command, "num_images": right.shape[2], "rows": rows, "env": doctor.report()}
    (args.out / "fixed.json").write_text(json.dumps(report, indent=1) + "\n")
    with (args.out / "answers.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(f"{kind} {budget:g}" for kind in ("thresholds", "fixed") for budget in BUDGETS)
        writer.writerows(right.reshape(-1, right.shape[2]).T.astype(int))
    lines = [
        f"`{command}`: {right.shape[2]} test images; difference: fixed less thresholds, ± 1.96 standard errors, paired.",
        "",
        "| budget | kept | MACs, thresholds | MACs, fixed | top-1, thresholds | top-1, fixed | difference |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['budget']:g} | {' / '.join(map(str, row['kept']))} | {row['thresholds_macs']:.1%} | "
            f"{row['fixed_macs']:.1%} | {row['thresholds_top1']:.2%} | {row['fixed_top1']:.2%} | "
            f"{row['fixed_top1'] - row['thresholds_top1']:+.2%} ± {1.96 * row['standard_error']:.2%} |"
            for row in rows
        ),
    ]
    (args.out / "README.md").write_text("\n".join(lines) + "\n")
    print((args.out / "README.md").read_text())


if __name__ == "__main__":
    main()
