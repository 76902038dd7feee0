"""One training run, from a recipe and data to a model folder, in as many legs as it takes.

The randomness of a step depends on (seed, step) alone, the order of the data on (seed, epoch), so a run that was killed and
resumed goes through the same losses as one that was not. Lightning Fabric brings devices, precision and processes
(`torchrun`); the loop is ours, because random thresholds and in-place distillation are.

The run folder is a model folder (`iret.load` reads it) plus the training state, `log.csv`, TensorBoard events, `recipe.json`.
"""

import copy
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from iret.calibrate import calibrate
from iret.doctor import processor_name
from iret.evaluate import evaluate
from iret.model import Iret
from iret.runtime.points import Setting
from iret.train.augment import Augmenter
from iret.train.checkpoint import FILE_NAME as STATE_NAME, Progress, load_state, save_state
from iret.train.data import ImageData, make_loader, name_of, open_data
from iret.train.loss import Objective, autocast, draw_thresholds
from iret.train.monitor import Interrupt, Log, bar, return_memory
from iret.train.recipe import Recipe
from iret.weights import write_atomically
from iret.zoo import create_model, load

LOG_EVERY = 20  # steps
EVAL_IMAGES = 2000


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """On what, where and for how long a recipe runs."""

    data: str
    out: Path
    seed: int = 0
    device: str = "auto"
    steps: int | None = None  # of the whole run, instead of the recipe's epochs
    resume: bool = False
    init: str | None = None  # fine-tune from this model
    img_size: tuple[int, int] | None = None
    workers: int = 0
    on_corrupt: str = "skip"
    label_column: str | None = None
    checkpoint_minutes: float = 5.0
    stop_after_minutes: float | None = None  # end this leg early, resumable


@dataclass(frozen=True)
class Report:
    """How a leg ended."""

    is_finished: bool
    step: int
    num_steps: int
    time_s: float
    skipped: int


def train(recipe: Recipe, options: RunOptions) -> Report:
    """Run (or go on with) `recipe`.

    Raises:
        ValueError: data, model or state that does not fit.
        KeyboardInterrupt: after the state is saved.
    """
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"steps={options.steps} must be 1 or more.")
    if not options.resume and (options.out / STATE_NAME).exists():
        raise ValueError(f"{options.out} holds a run already; go on with --resume or choose another --out.")
    fabric = launch(options.device)
    torch.manual_seed(options.seed)
    model, teacher = build_model(recipe, options), load(recipe.teacher) if recipe.teacher else None
    data = _open(options, "train", model)
    if model.num_classes != data.num_classes:
        model.reset_classifier(data.num_classes)
    model.labels = tuple(data.class_names)
    _check_fit(recipe, model, teacher)
    return _Run(fabric, recipe, options, model, teacher, data).go()


def _check_fit(recipe: Recipe, model: Iret, teacher: Iret | None) -> None:
    """Raises ValueError for a recipe or a teacher of another shape than the model."""
    if len(recipe.stage_weights) != model.shape.levels:
        raise ValueError(
            f"recipe {recipe.name} weighs {len(recipe.stage_weights)} heads before the last, the model has "
            f"{model.shape.levels}; choose a recipe of a model with as many stages."
        )
    if teacher is None:
        return
    for what, theirs, ours in (
        ("classes", teacher.num_classes, model.num_classes),
        ("img_size", teacher.shape.img_size, model.shape.img_size),
        ("preprocessing", teacher.preprocessing, model.preprocessing),
    ):
        if theirs != ours:
            raise ValueError(f"teacher {recipe.teacher} has {what} {theirs}, the model {ours}; they must be the same.")


def build_model(recipe: Recipe, options: RunOptions) -> Iret:
    """A fresh model, or one that starts from `options.init` with positions resampled where the grid differs."""
    if options.init is None:
        return create_model(recipe.model, drop_path_rate=recipe.drop_path_rate, img_size=options.img_size)
    start = load(options.init)
    img_size = options.img_size or start.shape.img_size
    model = Iret(
        replace(start.shape, img_size=img_size),
        attention=start.attention,
        drop_path_rate=recipe.drop_path_rate,
        name=start.name,
    )
    weights = start.state_dict()
    for name in weights:
        if name.endswith("pos_embed"):
            weights[name] = resample_positions(weights[name], start.shape.grid, model.shape.grid)
    model.load_state_dict(weights)
    model.preprocessing = replace(start.preprocessing, img_size=img_size)
    return model


def resample_positions(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bicubic, antialiased; the class token's entry passes unchanged."""
    if old == new:
        return pos_embed
    grid = pos_embed[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return torch.cat([pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _open(options: RunOptions, split: str, model: Iret) -> ImageData:
    return open_data(
        options.data,
        split,
        model.preprocessing,
        on_corrupt=options.on_corrupt,
        label_column=options.label_column,
    )


def launch(device: str) -> Fabric:
    """One process, or the ones `torchrun` started."""
    local, world = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    accelerator, _, index = device.partition(":")
    fabric = Fabric(
        accelerator=accelerator,
        devices=[int(index)] if index else local,
        num_nodes=world // local,
        strategy="ddp" if world > 1 else "auto",
    )
    fabric.launch()
    return fabric


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.AdamW:
    """AdamW that leaves biases, norms and the lifting's taps out of the decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    is_fused = all(p.is_cuda for p in model.parameters())  # one launch a step; elsewhere the default is as fast
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=is_fused or None)


def fit_batch(recipe: Recipe, num_images: int, num_processes: int) -> Recipe:
    """The recipe with a batch that the data can fill, in equal shares; the learning rate falls with the batch.

    Raises:
        ValueError: fewer images than processes.
    """
    batch_size = min(recipe.batch_size, num_images) // num_processes * num_processes
    if not batch_size:
        raise ValueError(f"{num_images} training images cannot be shared by {num_processes} processes; use fewer.")
    return replace(recipe, batch_size=batch_size, lr=recipe.lr * batch_size / recipe.batch_size)


class _Run:
    """The parts of one leg."""

    def __init__(
        self,
        fabric: Fabric,
        recipe: Recipe,
        options: RunOptions,
        model: Iret,
        teacher: nn.Module | None,
        data: ImageData,
    ) -> None:
        self.fabric, self.recipe, self.options, self.data = fabric, recipe, options, data
        self.held_out = _open(options, "val", model)
        self.recipe = recipe = fit_batch(recipe, len(data), fabric.world_size)
        self.steps_per_epoch = len(data) // recipe.batch_size
        self.num_steps = options.steps or math.ceil(recipe.epochs * self.steps_per_epoch)
        self.augment = Augmenter(recipe, model)
        self.model = model.to(fabric.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = make_optimizer(recipe, model)
        self.progress = Progress(seed=options.seed, num_processes=fabric.world_size, machine=processor_name())
        if options.resume:
            self.progress = load_state(options.out, self.model, self.ema, self.optimizer, recipe, options.seed)
        teacher = None if teacher is None else fabric.to_device(teacher).requires_grad_(False).eval()
        self.objective, self.wrapped_optimizer = fabric.setup(Objective(self.model, recipe, teacher), self.optimizer)

    def go(self) -> Report:
        started, time_before = time.monotonic(), self.progress.time_s
        saved_at, stop = started, Interrupt()
        out, is_first = self.options.out, self.fabric.is_global_zero
        if is_first:
            write_atomically(out / "recipe.json", (json.dumps(asdict(self.recipe), indent=1) + "\n").encode())
            for leftover in out.glob(f".{STATE_NAME}.*"):  # of a save that was killed
                leftover.unlink()
        log = Log(out, self.progress.step) if is_first else None
        with stop, bar(self.num_steps, self.progress.step, is_first) as (advance, say):
            for images, labels, skipped in self._batches():
                step = self.progress.step
                parts = self._step(step, images, labels)
                now = time.monotonic()
                self.progress = replace(
                    self.progress,
                    step=step + 1,
                    time_s=time_before + now - started,
                    skipped=self.progress.skipped + skipped,
                )
                advance(step + 1, float(parts["loss"]), len(images) * self.fabric.world_size)
                is_last = step + 1 == self.num_steps
                is_looked_at = is_last or (step + 1) % (self.recipe.eval_epochs * self.steps_per_epoch) == 0
                if log and (step % LOG_EVERY == 0 or is_looked_at):
                    log.write(step, self._lr(step), parts)
                if step % LOG_EVERY == 0:
                    return_memory()
                if log and is_looked_at:
                    full, dropped = self._evaluate()
                    log.write_accuracy(step, full, dropped)
                    say(
                        f"step {step + 1} of {self.num_steps} after {self.progress.time_s:.0f} s: top-1 {full:.1%}, at "
                        f"threshold 1 {dropped:.1%}, of {min(EVAL_IMAGES, len(self.held_out))} held-out images"
                    )
                is_over = self._agree(stop.is_set or self._is_late(started))
                if is_looked_at or is_over or now - saved_at > 60 * self.options.checkpoint_minutes:
                    self._save()
                    saved_at = now
                if is_over:
                    break
        if stop.is_set:
            raise KeyboardInterrupt
        is_finished = self.progress.step >= self.num_steps
        if is_finished and is_first:
            say("trained; now its operating points are searched on held-out images")
            self.ema.points = calibrate(self.ema, self.held_out, data_name=name_of(self.options.data), say=say)
            self.ema.save_pretrained(out)
        return Report(is_finished, self.progress.step, self.num_steps, self.progress.time_s, self.progress.skipped)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        while self.progress.step < self.num_steps:
            epoch, start = divmod(self.progress.step, self.steps_per_epoch)
            loader = make_loader(
                self.data,
                self.recipe.batch_size,
                seed=self.options.seed,
                epoch=epoch,
                shuffle=True,
                share=(self.fabric.global_rank, self.fabric.world_size),
                workers=self.options.workers,
                start_batch=start,
                drop_last=True,
            )
            for batch in loader:
                yield batch
                if self.progress.step >= self.num_steps:
                    return

    def _step(self, step: int, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        recipe, rank = self.recipe, self.fabric.global_rank
        if not len(images):
            raise ValueError(
                f"no image of the batch of step {step} could be read; check the data with --on-corrupt stop."
            )
        torch.manual_seed(_seed_of(self.options.seed, step, rank))
        images, targets = self.augment(*self.fabric.to_device((images, labels)))
        share = step / self.num_steps
        thresholds = None
        if share >= recipe.full_until:
            is_sampled = share < recipe.sampled_until
            drawn = draw_thresholds(
                recipe.batch_size,
                self.model.shape.levels,
                recipe,
                torch.Generator().manual_seed(_seed_of(self.options.seed, step, -1)),
                keep_all=0.3 if is_sampled else 0.0,
            )
            local = recipe.batch_size // self.fabric.world_size
            thresholds = drawn[rank * local :][: len(images)]
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(step)
        self.objective.train()
        parts = self.objective(images, targets, thresholds, share >= recipe.sampled_until)
        if not bool(torch.isfinite(parts["loss"])):
            raise ValueError(
                f"the loss of step {step} is not finite; the last checkpoint is kept. Lower the learning rate, or use fp32."
            )
        self.fabric.backward(parts["loss"])
        self.fabric.clip_gradients(self.objective, self.wrapped_optimizer, max_norm=recipe.clip_norm)
        self.wrapped_optimizer.step()
        self.optimizer.zero_grad()
        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        detached = {name: value.detach() for name, value in parts.items()}
        if self.fabric.world_size > 1:
            detached = {name: self.fabric.all_reduce(value) for name, value in detached.items()}
        return detached

    def _lr(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `final_lr_ratio`."""
        recipe = self.recipe
        warmup = recipe.warmup_epochs * self.steps_per_epoch
        if step < warmup and warmup < self.num_steps:
            return recipe.lr * min(1.0, (step + 1) / warmup)
        share = (step - warmup) / max(1, self.num_steps - warmup) if warmup < self.num_steps else step / self.num_steps
        floor = recipe.final_lr_ratio
        return recipe.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))

    def _agree(self, is_over: bool) -> bool:
        """Whether any process wants to stop, so that all do at the same step."""
        if self.fabric.world_size == 1:
            return is_over
        return bool(self.fabric.all_reduce(torch.tensor(float(is_over)), reduce_op="sum"))

    def _is_late(self, started: float) -> bool:
        limit = self.options.stop_after_minutes
        return limit is not None and time.monotonic() - started > 60 * limit

    def _evaluate(self) -> tuple[float, float]:
        """Accuracy of the running mean on held-out images, everything kept and at threshold 1."""
        settings = [Setting(thresholds=threshold) for threshold in (0.0, 1.0)]
        with autocast(self.recipe.precision, self.fabric.device):
            scores = evaluate(self.ema, self.held_out, settings, max_images=EVAL_IMAGES)
        return scores[0].accuracy, scores[1].accuracy

    def _save(self) -> None:
        if self.fabric.is_global_zero:
            save_state(self.options.out, self.model, self.ema, self.optimizer, self.recipe, self.progress)


def _seed_of(seed: int, step: int, rank: int) -> int:
    """A seed for one step of one process; rank -1 for what all processes share."""
    return ((seed * 1_000_003 + step) * 65_537 + rank + 1) % 2**63
