"""A plain ViT of the same MACs as a preset, trained with the same recipe on the same data for the same time.

The baseline that a model with a dial has to be held against: what would a static model of its full cost have reached?

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/static_vit.py --recipe cifar10_pico_cpu \
        --data DATA --minutes 100 --out results/...

The width is the multiple of 4 (heads) that comes closest in MACs at the same depth; the schedule of the learning rate runs
over the minutes given.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from lightning_fabric import Fabric
from torch import nn

from iret import doctor
from iret.model import Iret
from iret.runtime.cost import Shape, full_macs
from iret.train.augment import Augmenter
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


def train(fabric: Fabric, recipe: Recipe, model: nn.Module, carrier: Iret, data: ImageData, limit_s: float):
    """Train for `limit_s` seconds; returns the running mean of the weights and (step, share of time, loss) of every 20th step."""
    augment = Augmenter(recipe, carrier)
    model = fabric.to_device(model)
    optimizer = make_optimizer(recipe, model)
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema_decay)
    )
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    warmup_steps = recipe.warmup_epochs * len(data) / recipe.batch_size
    started, step, epoch, losses = time.monotonic(), 0, 0, []
    while True:
        for pixels, labels, _ in make_loader(
            data,
            recipe.batch_size,
            seed=0,
            epoch=epoch,
            shuffle=True,
            share=(fabric.global_rank, fabric.world_size),
            drop_last=True,
        ):
            share = fabric.broadcast((time.monotonic() - started) / limit_s)  # all processes stop at the same step
            if share >= 1:
                return ema.module, step, losses
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
            ema.update_parameters(model)
            if step % 20 == 0:
                losses.append((step, share, float(loss.detach())))
            step += 1
        epoch += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, required=True, help="training time, the time the other model took")
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
    trained, steps, losses = train(fabric, recipe, model, carrier, data, 60 * args.minutes)
    if not fabric.is_global_zero:
        return
    args.out.mkdir(parents=True, exist_ok=True)
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
    rows = [f"{step},{share:.5f},{loss:.5f}" for step, share, loss in losses]
    (args.out / "samples.csv").write_text("\n".join(["step,share_of_time,loss", *rows, ""]))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
