"""A plain ViT of the same MACs as a preset, trained with the same recipe on the same data for the same time.

The baseline that a model with a dial has to be held against: what would a static model of its full cost have reached?

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/static_vit.py --recipe cifar10_pico_cpu \
        --data DATA --minutes 100 --out results/...

The width is the multiple of 4 (heads) that comes closest in MACs at the same depth; the schedule of the learning rate runs
over the minutes given, in as many legs as it takes.
"""

import argparse
import copy
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from lightning_fabric import Fabric
from torch import nn

from iret import doctor
from iret.model import Iret
from iret.runtime.cost import Shape, full_macs
from iret.train.augment import Augmenter
from iret.train.checkpoint import FILE_NAME as STATE_NAME, Progress, load_state, save_state
from iret.train.data import ImageData, make_loader, open_data
from iret.train.loop import launch, make_optimizer
from iret.train.loss import autocast, soft_cross_entropy
from iret.train.recipe import Recipe, find_recipe
from iret.vit import VisionTransformer
from iret.weights import write_weights
from iret.zoo import create_model

NUM_HEADS = 4


def vit_macs(shape: Shape, dim: int, depth: int) -> int:
    """MACs of a plain ViT on the grid of `shape`."""
    tokens = shape.num_patches + 1
    embed = shape.num_patches * shape.in_chans * shape.patch_size**2 * dim
    return embed + depth * (12 * tokens * dim * dim + 2 * tokens * tokens * dim) + dim * shape.num_classes


def build(shape: Shape, drop_path_rate: float) -> tuple[VisionTransformer, int]:
    """The ViT of the same depth whose MACs come closest, and its MACs."""
    depth = sum(shape.depths)
    dims = range(NUM_HEADS, 2 * max(shape.embed_dims), NUM_HEADS)
    dim = min(dims, key=lambda d: abs(vit_macs(shape, d, depth) - full_macs(shape)))
    model = VisionTransformer(
        img_size=shape.img_size,
        patch_size=shape.patch_size,
        in_chans=shape.in_chans,
        num_classes=shape.num_classes,
        embed_dim=dim,
        depth=depth,
        num_heads=NUM_HEADS,
        drop_path_rate=drop_path_rate,
    )
    return model, vit_macs(shape, dim, depth)


@torch.no_grad()
def accuracy(model: nn.Module, carrier: Iret, data: ImageData) -> float:
    """Top-1 in [0, 1]."""
    model.eval()
    correct, seen, device = 0, 0, next(model.parameters()).device
    for pixels, labels, _ in make_loader(data, 250, seed=0, epoch=0, shuffle=False, drop_last=False):
        correct += int((model(carrier.normalise(pixels.to(device).float() / 255)).argmax(1).cpu() == labels).sum())
        seen += len(labels)
    return correct / seen


def learning_rate(recipe: Recipe, step: int, warmup_steps: float, share_of_time: float) -> float:
    """Linear warm-up over steps, times a cosine over the time there is."""
    floor = recipe.final_lr_ratio
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share_of_time))
    return recipe.lr * min(1.0, (step + 1) / warmup_steps) * cosine


def train(fabric: Fabric, recipe: Recipe, model: nn.Module, carrier: Iret, data: ImageData, args: argparse.Namespace):
    """Train for `args.minutes` in all; returns the running mean of the weights and how far it is.

    A leg that ends early (`--stop-after`) or is cut off goes on from its last saved state.
    """
    augment, out = Augmenter(recipe, carrier), args.out
    model = fabric.to_device(model)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = make_optimizer(recipe, model)
    progress = Progress(num_processes=fabric.world_size, machine=doctor.processor_name())
    if (out / STATE_NAME).exists():
        progress = load_state(out, model, ema, optimizer, recipe, 0)
    elif fabric.is_global_zero:
        (out / "samples.csv").write_text("step,share_of_time,loss\n")
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    warmup_steps, steps_per_epoch = recipe.warmup_epochs * len(data) / recipe.batch_size, len(data) // recipe.batch_size
    leg_started, time_before, saved_at = time.monotonic(), progress.time_s, time.monotonic()
    while True:
        epoch, start = divmod(progress.step, steps_per_epoch)
        for pixels, labels, _ in make_loader(
            data,
            recipe.batch_size,
            seed=0,
            epoch=epoch,
            shuffle=True,
            share=(fabric.global_rank, fabric.world_size),
            start_batch=start,
            drop_last=True,
        ):
            # the first process's clock: all stop at the same step
            leg_s = fabric.broadcast(time.monotonic() - leg_started)
            progress = replace(progress, time_s=time_before + leg_s)
            share, step = progress.time_s / (60 * args.minutes), progress.step
            is_over = share >= 1 or (args.stop_after is not None and leg_s > 60 * args.stop_after)
            if fabric.is_global_zero and (is_over or time.monotonic() - saved_at > 120):
                save_state(out, model, ema, optimizer, recipe, progress)
                saved_at = time.monotonic()
            if is_over:
                return ema, progress
            torch.manual_seed(step * fabric.world_size + fabric.global_rank)
            images, targets = augment(*fabric.to_device((pixels, labels)))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step, warmup_steps, share)
            wrapped.train()
            with autocast(recipe.precision, images.device):
                loss = soft_cross_entropy(wrapped(images).float(), targets)
            fabric.backward(loss)
            fabric.clip_gradients(wrapped, wrapped_optimizer, max_norm=recipe.clip_norm)
            wrapped_optimizer.step()
            optimizer.zero_grad()
            decay = min(recipe.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            if fabric.is_global_zero and step % 20 == 0:
                with (out / "samples.csv").open("a") as file:
                    file.write(f"{step},{share:.5f},{float(loss.detach()):.5f}\n")
            progress = replace(progress, step=step + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, required=True, help="training time, the time the other model took")
    parser.add_argument(
        "--stop-after", type=float, metavar="MINUTES", help="end this leg early; the same command goes on"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    fabric = launch(args.device)
    recipe = find_recipe(args.recipe)
    torch.manual_seed(0)
    carrier = create_model(recipe.model)  # for its shape and normalisation
    data = open_data(args.data, "train", carrier.preprocessing)
    carrier.reset_classifier(data.num_classes)
    model, macs = build(carrier.shape, recipe.drop_path_rate)
    args.out.mkdir(parents=True, exist_ok=True)
    trained, progress = train(fabric, recipe, model, carrier, data, args)
    if not fabric.is_global_zero:
        return
    if progress.time_s < 60 * args.minutes:
        print(
            f"{progress.time_s / 60:.1f} of {args.minutes:g} minutes after {progress.step} steps; the same command goes on"
        )
        return
    steps = progress.step
    write_weights(args.out / "model.safetensors", dict(trained.state_dict()))
    result = {
        "recipe": recipe.name,
        "macs": macs,
        "macs_of_preset": full_macs(carrier.shape),
        "embed_dim": model.num_features,
        "processes": fabric.world_size,
        "steps": steps,
        "epochs": steps * recipe.batch_size / len(data),
        "minutes": args.minutes,
        "test_top1": accuracy(trained, carrier, open_data(args.data, "test", carrier.preprocessing)),
    }
    (args.out / "recipe.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "env.json").write_text(json.dumps(doctor.report(), indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
