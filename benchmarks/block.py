"""What does one block gain by packing? The last stage's block of `iret_small`, 16 images, one thread, in turn, raw samples kept.

The same block on the same counts of patches, packed and padded to the longest image, by where the counts come from:

even      drawn evenly from 20 to 178 patches, of a grid of 196
85 of 178 likewise, of these the draws with 84 to 87 in the mean and 175 or more at most: uneven ones
1.5 ...   what a calibrated model (`--counts`) keeps of test images (`--data`) in its last stage, as shares of its grid, all at
          one operating point, chosen for that ratio of MACs
mixed     likewise, every image at a budget of its own, drawn evenly

Images that left before are in the padded batch, which has a place for each, and not in the packed one; `of those that stay`
leaves them out of both. Every batch is its own draw. `benchmarks/batch.py` times whole runs and all later stages.

python benchmarks/block.py --out results/...     takes some minutes; run it alone on the machine
"""

import argparse
import csv
import json
import os
import random
import statistics
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from batch import RATIOS, choose_plans, command_of, counts_of, mix_plans, packed_tokens, padded_tokens, plans_of

import iret
from iret import doctor
from iret.measure.latency import measure_latency, pin_threads, ratio
from iret.precision import prepare
from iret.runtime.cost import block_macs

EVEN = (20, 178)  # patches an image
UNEVEN = (84, 87)  # in the mean of a batch
NEAR_MOST = 175


def draw_counts(args: argparse.Namespace, model: iret.Iret) -> dict[str, list[list[int]]]:
    """Patches of each image in the last stage, 0 of one that left before, by kind and batch."""
    last, draw = len(model.stages) - 1, random.Random(0)

    def evenly() -> list[int]:
        return [draw.randint(*EVEN) for _ in range(args.batch)]

    def unevenly() -> list[int]:
        while True:
            counts = evenly()
            if UNEVEN[0] <= statistics.mean(counts) <= UNEVEN[1] and max(counts) >= NEAR_MOST:
                return counts

    rows, budgets = plans_of(args.counts, args.data, 8 * args.batch, model)
    found = {"even": [evenly() for _ in range(args.batches)], "85 of 178": [unevenly() for _ in range(args.batches)]}
    makers = {f"{wanted:g}": partial(choose_plans, model, rows, wanted, draw, args.batch) for wanted in RATIOS}
    makers["mixed"] = partial(mix_plans, rows, budgets, draw, args.batch)
    for kind, make in makers.items():
        found[kind] = [counts_of(make(), last) for _ in range(args.batches)]
    return found


def macs_ratio(model: iret.Iret, counts: list[int]) -> float:
    """MACs of the padded block over those of the packed one."""
    last = len(model.stages) - 1
    packed = sum(block_macs(model.shape, last, count + 1) for count in counts if count)
    return len(counts) * block_macs(model.shape, last, max(counts) + 1) / packed


def table(command: str, found: list[dict]) -> list[str]:
    """The lines of README.md: a row a kind."""
    lines = [
        f"`{command}`: one block, {doctor.processor_name()}, one thread; padded over packed, mean (least to most) of batches.",
        "",
        "| counts | patches, mean (most) | packed, ms | padded / packed | in MACs | of those that stay | in MACs |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in found):
        rows = [row for row in found if row["kind"] == kind]
        patches = [count for row in rows for count in row["counts"]]
        cells = [kind, f"{statistics.mean(patches):.0f} ({max(patches)})"]
        cells.append(f"{statistics.mean(row['packed_ms'] for row in rows):.1f}")
        for name in ("padded", "macs", "padded, of those that stay", "macs_stay"):
            values = [row[name] for row in rows]
            cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", default="iret_pico-cifar10", help="calibrated model that keeps the counts")
    parser.add_argument("--data", default="cifar10", help="whose test images it looks at")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=24, help="of each kind")
    parser.add_argument("--rounds", type=int, default=5, help="of each batch")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    model, _ = prepare(iret.create_model("iret_small").eval(), "float32")
    block, dim = model.stages[-1].blocks[0], model.shape.embed_dims[-1]
    found, samples = [], {}
    with pin_threads(1):
        for kind, batches in draw_counts(args, model).items():
            for number, counts in enumerate(batches):
                stay = [count for count in counts if count]
                packed = packed_tokens(counts, dim)
                padded = [padded_tokens(torch.randn(len(each) * (max(each) + 1), dim), each) for each in (counts, stay)]
                work = {"packed": partial(block, packed.x_TD, packed)}
                for name, tokens in zip(("padded", "padded, of those that stay"), padded, strict=True):
                    work[name] = partial(block, tokens.x_TD, tokens)
                timed = measure_latency(work, rounds=args.rounds, warm_up=1, lead=1, seed=number)
                row = {"kind": kind, "counts": counts, "macs": macs_ratio(model, counts)}
                row |= {name: ratio(timed[name], timed["packed"]).median for name in work if name != "packed"}
                found.append(row | {"packed_ms": timed["packed"].p50_ms, "macs_stay": macs_ratio(model, stay)})
                samples |= {(kind, number, name): latency.samples_s for name, latency in timed.items()}
    command = command_of(args, "block")
    kept = {"command": command, "batches": found, "env": doctor.report()}
    (args.out / "block.json").write_text(json.dumps(kept, indent=1) + "\n")
    with (args.out / "samples.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("kind", "batch", "what", "round", "seconds"))
        writer.writerows((*key, i, f"{s:.9f}") for key, each in samples.items() for i, s in enumerate(each))
    text = "\n".join(table(command, found))
    (args.out / "README.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
