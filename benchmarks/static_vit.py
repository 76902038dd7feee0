"""A plain ViT of the same MACs as a preset, trained with the same recipe on the same data for the same time or epochs.

The baseline that a model with a dial has to be held against: what would a static model of its full cost have reached?

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/static_vit.py --recipe cifar10_pico_cpu \
        --data DATA --minutes 100 --out results/...          or --epochs instead of --minutes

The width is the multiple of 4 (heads) that comes closest in MACs at the same depth. With `--minutes`, the first
steps are timed and fix how many these make on an idle machine: leave it alone for that first minute. What runs
beside the rest of the training, or pauses it, changes nothing in its result; a leg that was stopped goes on with the same
command.
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
WARM_STEPS, TIMED_STEPS = 10, 60
PLAN_NAME = "plan.json"


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


def learning_rate(recipe: Recipe, step: int, warmup_steps: float, total_steps: int | None) -> float:
    """Linear warm-up, times a cosine over the steps there are (the very first are taken before these are counted)."""
    floor, share = recipe.final_lr_ratio, 0.0 if total_steps is None else step / total_steps
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))
    return recipe.lr * min(1.0, (step + 1) / warmup_steps) * cosine


def train(fabric: Fabric, recipe: Recipe, model: nn.Module, carrier: Iret, data: ImageData, args: argparse.Namespace):
    """Train for the steps that `args.epochs` or `args.minutes` make.

    Returns the running mean of the weights, the step reached and the plan.

    A leg that ends early (`--stop-after`) or is cut off goes on from its last saved state.
    """
    augment, out = Augmenter(recipe, carrier), args.out
    model = fabric.to_device(model)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = make_optimizer(recipe, model)
    progress, plan, starts = Progress(num_processes=fabric.world_size, machine=doctor.processor_name()), None, []
    steps_per_epoch = len(data) // recipe.batch_size
    if args.epochs is not None:
        plan = {"steps": round(args.epochs * steps_per_epoch)}
    if (out / STATE_NAME).exists():
        progress = load_state(out, model, ema, optimizer, recipe, 0)
        if plan is None and (out / PLAN_NAME).exists():
            plan = json.loads((out / PLAN_NAME).read_text())
    elif fabric.is_global_zero:
        (out / "samples.csv").write_text("step,loss\n")
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    warmup_steps = recipe.warmup_epochs * len(data) / recipe.batch_size
    leg_started = saved_at = time.monotonic()
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
            step = progress.step
            starts.append(time.perf_counter())
            if plan is None and len(starts) > WARM_STEPS + TIMED_STEPS:
                step_s = (starts[-1] - starts[WARM_STEPS]) / TIMED_STEPS
                step_s = fabric.broadcast(step_s)  # the first process's clock: all plan alike
                plan = {"seconds_per_step": step_s, "steps": round(60 * args.minutes / step_s)}
                if fabric.is_global_zero:
                    (out / PLAN_NAME).write_text(json.dumps(plan) + "\n")
            leg_s = fabric.broadcast(time.monotonic() - leg_started)
            stops_early = args.stop_after is not None and leg_s > 60 * args.stop_after
            is_over = stops_early or (plan is not None and step >= plan["steps"])
            if fabric.is_global_zero and (is_over or time.monotonic() - saved_at > 120):
                save_state(out, model, ema, optimizer, recipe, progress)
                saved_at = time.monotonic()
            if is_over:
                return ema, step, plan
            torch.manual_seed(step * fabric.world_size + fabric.global_rank)
            images, targets = augment(*fabric.to_device((pixels, labels)))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step, warmup_steps, plan and plan["steps"])
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
                    file.write(f"{step},{float(loss.detach()):.5f}\n")
            progress = replace(progress, step=step + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--data", required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="undisturbed training time of the other model")
    length.add_argument("--epochs", type=float, help="as many as the other model had")
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
    trained, step, plan = train(fabric, recipe, model, carrier, data, args)
    if not fabric.is_global_zero:
        return
    if plan is None or step < plan["steps"]:
        print(f"stopped after {step} steps; the same command goes on")
        return
    write_weights(args.out / "model.safetensors", dict(trained.state_dict()))
    result = {
        "recipe": recipe.name,
        "macs": macs,
        "macs_of_preset": full_macs(carrier.shape),
        "embed_dim": model.num_features,
        "processes": fabric.world_size,
        **plan,
        "epochs": step * recipe.batch_size / len(data),
        "minutes": args.minutes,
        "test_top1": accuracy(trained, carrier, open_data(args.data, "test", carrier.preprocessing)),
    }
    (args.out / "recipe.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "env.json").write_text(json.dumps(doctor.report(), indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
