"""The objective of one step, as a module, so that a data-parallel wrapper sees one forward per backward.

    full     CE(z_S) + sum_s w_s [CE(z_s) + KL(stopgrad z_S || z_s)]          s: the heads before the last
    sandwich + KL(stopgrad z_S || z'_S) + 0.5 CE(z'_S)                        z': the same images at random thresholds
    sampled  only the first line, at random thresholds
    + lambda_lift R_lift + lambda_T KL(teacher || z_S)

Source: in-place distillation and sampled sub-models as in Length-Adaptive Transformer (Kim and Cho 2021); the weights and
their combination are ours.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from iret.model import Iret
from iret.train.recipe import Recipe

SUB_RUN_CE = 0.5


def soft_cross_entropy(logits: Float[Tensor, "B classes"], targets: Float[Tensor, "B classes"]) -> Float[Tensor, ""]:
    return -(targets * logits.log_softmax(1)).sum(1).mean()


def distill(student: Float[Tensor, "B classes"], teacher: Float[Tensor, "B classes"]) -> Float[Tensor, ""]:
    """KL(teacher || student); no gradient reaches the teacher."""
    return F.kl_div(student.log_softmax(1), teacher.detach().log_softmax(1), log_target=True, reduction="batchmean")


def draw_thresholds(
    batch: int,
    transitions: int,
    recipe: Recipe,
    generator: torch.Generator,
    keep_all: float = 0.0,
) -> Float[Tensor, "batch transitions"]:
    """Per image: a share `keep_all` at 0, a fifth at `recipe.max_threshold`, the rest below; 10 % jitter per transition.

    Below the largest, levels are uniform to the power `recipe.threshold_power`. Thresholds rise geometrically with depth, from
    a share drawn uniformly between `recipe.smallest_ratio` and 1.
    """
    level = torch.rand(batch, 1, generator=generator) ** recipe.threshold_power
    kind = torch.rand(batch, 1, generator=generator)
    jitter = 1 + 0.1 * (2 * torch.rand(batch, transitions, generator=generator) - 1)
    drawn = torch.where(kind < keep_all, 0.0, torch.where(kind > 0.8, 1.0, level)) * recipe.max_threshold
    if recipe.smallest_ratio < 1:
        ratio = torch.lerp(
            torch.tensor(recipe.smallest_ratio), torch.tensor(1.0), torch.rand(batch, 1, generator=generator)
        )
        drawn = drawn * ratio ** torch.linspace(1, 0, transitions)
    return (drawn * jitter).clamp(max=recipe.max_threshold)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 where it is safe for "bf16-mixed", nothing for "32-true".

    Ours rather than Fabric's, which would also round the images, targets and thresholds to bf16.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


class Objective(nn.Module):
    """The model under training with everything its loss needs."""

    def __init__(self, model: Iret, recipe: Recipe, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        self._teacher = [teacher]  # in a list: not a parameter of ours

    def forward(
        self,
        images: Float[Tensor, "B C Y X"],
        targets: Float[Tensor, "B classes"],
        thresholds: Float[Tensor, "B transitions"] | None,
        is_sandwich: bool,
    ) -> dict[str, Tensor]:
        """The parts of the loss, "loss" their weighted sum. `thresholds` None: nothing is dropped."""
        with autocast(self.recipe.precision, images.device):
            return self._parts(images, targets, thresholds, is_sandwich)

    def _parts(
        self, images: Tensor, targets: Tensor, thresholds: Tensor | None, is_sandwich: bool
    ) -> dict[str, Tensor]:
        recipe = self.recipe
        first = self.model.run(images, 0.0 if thresholds is None or is_sandwich else thresholds).trace.stage_logits
        last = first[-1]
        parts = {"ce": soft_cross_entropy(last, targets)}
        total = parts["ce"]
        for stage, weight in enumerate(recipe.stage_weights):
            parts[f"ce_stage{stage + 1}"] = soft_cross_entropy(first[stage], targets)
            total = total + weight * (parts[f"ce_stage{stage + 1}"] + distill(first[stage], last))
        if thresholds is not None and is_sandwich:
            fewer = self.model.run(images, thresholds).trace.stage_logits[-1]
            parts["kl_dropped"], parts["ce_dropped"] = distill(fewer, last), soft_cross_entropy(fewer, targets)
            total = total + parts["kl_dropped"] + SUB_RUN_CE * parts["ce_dropped"]
        if recipe.lifting_weight and self.model.shape.lifting != "haar":
            parts["lifting"] = self.model.lifting_loss(images)
            total = total + recipe.lifting_weight * parts["lifting"]
        if self._teacher[0] is not None:
            with torch.no_grad():
                taught = self._teacher[0](images).float()
            parts["kl_teacher"] = distill(last, taught)
            total = total + recipe.teacher_weight * parts["kl_teacher"]
        return {"loss": total, **parts}
