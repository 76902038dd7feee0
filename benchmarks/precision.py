"""What do fewer bits cost in accuracy? A shipped model in float32, bfloat16 and int8 on the same test images, at several budgets.

Every image's answer is kept, so that formats are compared image by image: the difference stands with its 95 % interval, which
the images that both answer alike do not widen.

    python benchmarks/precision.py --model iret_pico-cifar10 --data DATA --out results/...

Nothing is timed, so it may share the machine.
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
from iret.precision import prepare
from iret.runtime.points import PRECISIONS
from iret.train.data import make_loader, name_of, open_data
from iret.zoo import load

BUDGETS = (1.0, 0.75, 0.5, 0.35, 0.25)


@torch.inference_mode()
def answer(args: argparse.Namespace) -> dict[tuple[str, float], np.ndarray]:
    """[images], whether each was right, by format and budget."""
    models = {}
    for name in PRECISIONS:
        try:
            models[name] = prepare(load(args.model), name)
        except ValueError as error:  # not on this machine
            print(f"without {name}: {error}")
    plain = load(args.model)
    data = open_data(args.data, "test", plain.preprocessing)
    right: dict[tuple[str, float], list[np.ndarray]] = {(name, budget): [] for name in models for budget in BUDGETS}
    seen = 0
    for pixels, labels, _ in make_loader(data, args.batch, seed=0, epoch=0, shuffle=False, drop_last=False):
        images = plain.normalise(pixels.float() / 255)
        for name, (model, context) in models.items():
            with context:
                for budget in BUDGETS:
                    answers = model(images, budget=budget).argmax(1)
                    right[name, budget].append((answers == labels).numpy())
        seen += len(labels)
        if seen >= args.max_images:
            break
    return {key: np.concatenate(parts)[: args.max_images] for key, parts in right.items()}


def report(right: dict[tuple[str, float], np.ndarray]) -> list[str]:
    """Markdown: top-1 of float32, and what each other format adds to it in points."""
    others = [name for name in dict.fromkeys(name for name, _ in right) if name != "float32"]
    lines = [
        f"| budget | float32 | {' | '.join(f'{name}, points' for name in others)} |",
        "|" + "---|" * (2 + len(others)),
    ]
    for budget in BUDGETS:
        base, cells = right["float32", budget], []
        for name in others:
            change = 100 * (right[name, budget].astype(float) - base)
            cells.append(f"{change.mean():+.2f} ± {1.96 * change.std(ddof=1) / len(change) ** 0.5:.2f}")
        lines.append(f"| {budget:g} | {base.mean():.2%} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--max-images", type=int, default=10_000)
    parser.add_argument(
        "--batch", type=int, default=100, help="an int8 batch shares the scales of what enters its layers"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.max_images < 2 or args.batch < 1:
        parser.error("--max-images must be 2 or more (of one image there is no interval), --batch 1 or more.")
    torch.set_num_threads(1)
    right = answer(args)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "samples.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image", *(f"{name} {budget:g}" for name, budget in right)))
        writer.writerows((i, *row) for i, row in enumerate(np.stack(list(right.values()), 1).astype(int).tolist()))
    (args.out / "env.json").write_text(json.dumps(doctor.report(), indent=1) + "\n")
    words = {
        "model": Path(args.model).name,
        "data": name_of(args.data),
        "max-images": args.max_images,
        "batch": args.batch,
    }
    command = " ".join(["python benchmarks/precision.py", *(f"--{name} {value}" for name, value in words.items())])
    num_images = len(next(iter(right.values())))
    said = f"`{command}`: {num_images} test images; the difference to float32 in points, with its 95 % interval."
    lines = [said, "", *report(right), ""]
    (args.out / "README.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
