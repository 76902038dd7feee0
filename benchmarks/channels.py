"""Fewer channels beside fewer tokens: a shipped model narrowed to several MLP ratios, in several formats, at several budgets.

    python benchmarks/channels.py --model iret_pico-cifar10 --data DATA --out results/...        one thread; run it alone

`iret.narrow` fits on training images. Every model runs the original's own thresholds, so that rows of one budget drop by the
same rule. Accuracy is of test images, each answer kept: a difference to the original in float32 stands with its 95 % interval,
which the images that both answer alike do not widen. Milliseconds are of one image a call, every model and format in turn.
"""

import argparse
import csv
import json
import os
from collections.abc import Callable
from functools import partial
from itertools import islice, product
from pathlib import Path
from statistics import median

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch

from iret import doctor
from iret.measure.latency import measure_latency, pin_threads
from iret.narrow import narrow
from iret.precision import prepare
from iret.runtime.cost import full_macs
from iret.train.data import make_loader, name_of, open_data
from iret.zoo import load

RATIOS = (4, 2, 1, 0.5)
BUDGETS = (1.0, 0.5, 0.25)
FORMATS = ("float32", "bfloat16", "int8")
FIT_IMAGES = 1000
TIMED_IMAGES = 20  # a timed call answers all of them, one by one
BATCH = 100

Key = tuple[float, float, str]  # MLP ratio, budget, number format


def make(args: argparse.Namespace) -> dict[float, torch.nn.Module]:
    """By MLP ratio, the original first."""
    plain = load(args.model)
    data = open_data(args.data, "train", plain.preprocessing)
    loader = make_loader(data, BATCH, seed=0, epoch=0, shuffle=True, drop_last=False)
    images = [plain.normalise(pixels.float() / 255) for pixels, *_ in islice(loader, FIT_IMAGES // BATCH)]
    return {ratio: plain if ratio == plain.shape.mlp_ratio else narrow(plain, images, ratio) for ratio in RATIOS}


@torch.inference_mode()
def answer(args: argparse.Namespace, models: dict) -> tuple[dict[Key, np.ndarray], dict[Key, float]]:
    """[images], whether each was right, and MACs an image; by model, budget and format."""
    plain = models[RATIOS[0]]
    data = open_data(args.data, "test", plain.preprocessing)
    right: dict[Key, list[np.ndarray]] = {key: [] for key in product(models, BUDGETS, FORMATS)}
    macs: dict[Key, list[np.ndarray]] = {key: [] for key in right}
    for name, ratio in product(FORMATS, models):
        model, context = prepare(load_copy(models[ratio]), name)
        batches = make_loader(data, BATCH, seed=0, epoch=0, shuffle=False, drop_last=False)
        with context:
            for pixels, labels, _ in islice(batches, -(-args.max_images // BATCH)):
                images = plain.normalise(pixels.float() / 255)
                for budget in BUDGETS:
                    setting = plain.setting(budget)
                    out = model.run(images, setting.thresholds, setting.exit_confidence)
                    right[ratio, budget, name].append((out.logits.argmax(1) == labels).numpy())
                    macs[ratio, budget, name].append(out.macs.numpy())
    joined = {key: np.concatenate(parts)[: args.max_images] for key, parts in right.items()}
    return joined, {key: float(np.concatenate(parts).mean()) for key, parts in macs.items()}


def load_copy(model):
    """The model again, for a number format to lay out as it likes."""
    copy = type(model)(model.shape, attention=model.attention)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


@torch.inference_mode()
def time_all(args: argparse.Namespace, models: dict) -> dict[Key, np.ndarray]:
    """Milliseconds an image, [rounds]."""
    plain = models[RATIOS[0]]
    data = open_data(args.data, "test", plain.preprocessing)
    images = [plain.normalise(data[index][0][None].float() / 255) for index in range(TIMED_IMAGES)]

    def run(model, context, setting) -> None:
        with context:
            for image in images:
                model.run(image, setting.thresholds, setting.exit_confidence)

    work: dict[str, Callable[[], None]] = {}
    for name, ratio in product(FORMATS, models):
        prepared = prepare(load_copy(models[ratio]), name)
        for budget in BUDGETS:
            work[f"{ratio} {budget} {name}"] = partial(run, *prepared, plain.setting(budget))
    with pin_threads(1):
        found = measure_latency(work, rounds=args.rounds, warm_up=1)
    return {
        key: 1e3 / TIMED_IMAGES * found["{} {} {}".format(*key)].samples_s for key in product(models, BUDGETS, FORMATS)
    }


def report(right: dict[Key, np.ndarray], macs: dict[Key, float], ms: dict[Key, np.ndarray], full: int) -> list[str]:
    """Markdown, a row per budget and MLP ratio."""
    lines = [
        f"| budget | MLP ratio | of full MACs | top-1 | {' | '.join(f'{name}, points' for name in FORMATS)} | "
        f"{' | '.join(f'{name}, ms' for name in FORMATS)} |",
        "|" + "---|" * (4 + 2 * len(FORMATS)),
    ]
    for budget, ratio in product(BUDGETS, RATIOS):
        base, cells = right[RATIOS[0], budget, "float32"], []
        for name in FORMATS:
            change = 100 * (right[ratio, budget, name].astype(float) - base)
            is_base = (ratio, name) == (RATIOS[0], "float32")
            cells.append(
                "" if is_base else f"{change.mean():+.2f} ± {1.96 * change.std(ddof=1) / len(change) ** 0.5:.2f}"
            )
        cells += [f"{median(ms[ratio, budget, name].tolist()):.2f}" for name in FORMATS]
        share, top1 = macs[ratio, budget, "float32"] / full, right[ratio, budget, "float32"].mean()
        lines.append(f"| {budget:g} | {ratio:g} | {share:.1%} | {top1:.2%} | {' | '.join(cells)} |")
    return lines


def save(out: Path, name: str, column: str, table: dict[Key, np.ndarray]) -> None:
    with (out / name).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((column, *(f"{ratio:g} {budget:g} {form}" for ratio, budget, form in table)))
        writer.writerows((place, *row) for place, row in enumerate(np.stack(list(table.values()), 1).tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--max-images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.max_images < 2 or args.rounds < 1:
        parser.error("--max-images must be 2 or more (of one image there is no interval), --rounds 1 or more.")
    torch.set_num_threads(1)
    models = make(args)
    ms = time_all(args, models)
    right, macs = answer(args, models)
    args.out.mkdir(parents=True, exist_ok=True)
    save(args.out, "answers.csv", "image", {key: each.astype(int) for key, each in right.items()})
    save(args.out, "ms.csv", "round", ms)
    (args.out / "env.json").write_text(json.dumps(doctor.report(), indent=1) + "\n")
    words = f"--model {Path(args.model).name} --data {name_of(args.data)} --max-images {args.max_images} --rounds {args.rounds}"
    num_images = len(next(iter(right.values())))
    said = (
        f"`python benchmarks/channels.py {words}`: {num_images} test images, the difference to the original in float32 in "
        f"points, with its 95 % interval; milliseconds an image at batch 1, one thread, {doctor.processor_name()}, medians of "
        f"{args.rounds} interleaved rounds."
    )
    lines = [said, "", *report(right, macs, ms, full_macs(models[RATIOS[0]].shape)), ""]
    (args.out / "README.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
