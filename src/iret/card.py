"""The model card: what a checkpoint is, how it was trained, what it scores. Every figure in it is measured when it is written."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from iret.evaluate import Score, evaluate
from iret.model import Iret
from iret.runtime.cost import Shape, full_macs
from iret.runtime.points import BUDGETS, Setting
from iret.train.checkpoint import FILE_NAME as STATE_NAME
from iret.train.data import ImageData

DROPS = (0.3, 0.5, 0.7)  # share of live patches dropped at each transition, for the comparison with random choice
NUM_SEEDS = 3
SIGNATURE = "This card was written by `iret card`."  # a README with it is replaced, another is its owner's
STATIC_NAME = "static_vit.json"  # what `benchmarks/static_vit.py` found for this model's recipe and data

TERMS = {
    "cluttered-digits": "Made from the UCI data set *Optical Recognition of Handwritten Digits* as scikit-learn distributes it; "
    "its terms are at https://archive.ics.uci.edu/dataset/80.",
    "uoft-cs/cifar10": "Its card on the Hugging Face hub gives its licence as unknown and its source as 80 Million Tiny Images: "
    "check whether your use of weights trained on it is allowed.",
    "cifar10": "CIFAR-10 (JPEG): CIFAR-10 re-encoded as JPEG, so figures are not exactly those on the original PNGs. Its card on "
    "the Hugging Face hub (uoft-cs/cifar10) gives its licence as unknown and its source as 80 Million Tiny Images: "
    "check whether your use of weights trained on it is allowed.",
}


def write_card(
    model: Iret, title: str, folder: Path, data: ImageData, data_name: str, max_images: int | None = None
) -> str:
    """The card as Markdown. `data` is the test split; the training state in `folder` says how the model was trained."""
    cheapest = model.points.cheapest_budget if model.points else 1.0
    budgets = [budget for budget in BUDGETS if budget == 1 or budget >= cheapest]
    settings = [model.setting(budget) for budget in budgets]
    scores = evaluate(model, data, settings, max_images=max_images)
    header = ["---", "library_name: iret", "license: apache-2.0", "pipeline_tag: image-classification", "---"]
    what = (
        f"`{model.name}` for {model.num_classes} classes of {data_name}: {model.shape.img_size[0]} x "
        f"{model.shape.img_size[1]} px, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{full_macs(model.shape):,} MACs at full budget{_narrow(model)}. {SIGNATURE}"
    )
    control = (
        "The same number of patches in every image (top-k), chosen by attention or at random "
        f"({NUM_SEEDS} seeds, mean and range):"
    )
    measured = f"{scores[0].num_images} {data.split} images, all rows from these weights; "
    if model.points is None:
        measured += "no operating points were found yet (`iret calibrate`), so there is one budget."
    else:
        measured += "thresholds found on " + (
            "other images." if data.split == "test" else "the same images, so no test."
        )
    parts = [
        [f"# {title}"],
        [what],
        ["## Accuracy and cost"],
        [measured],
        _budget_table(model, budgets, scores),
        *_beside_static(folder),
        ["## Is it the attention?"],
        [control],
        _control_table(_compare_choices(model, data, max_images)),
        ["## Training"],
        [_training(folder)],
        ["## Terms of the data"],
        [TERMS.get(data_name, "Not known to this package; ask whoever gave you the data.")],
    ]
    return "\n".join(header) + "\n" + "\n\n".join("\n".join(part) for part in parts) + "\n"


def _narrow(model: Iret) -> str:
    """That its MLPs are narrower than those of the presets."""
    ratio, usual = model.shape.mlp_ratio, Shape.mlp_ratio
    return "" if ratio >= usual else f", its MLPs {ratio:g} times as wide as their tokens in place of {usual}"


def _compare_choices(model: Iret, data: ImageData, max_images: int | None) -> list[tuple[Score, list[Score]]]:
    """Per share dropped: the score by attention, and those at random, the same number of patches in every image."""
    compared = []
    for drop in DROPS:
        setting = Setting(thresholds=(drop,) * len(model.transitions), rule="topk")
        (chosen,) = evaluate(model, data, [setting], max_images=max_images)
        others = []
        for seed in range(NUM_SEEDS):
            torch.manual_seed(seed)
            others += evaluate(model, data, [replace(setting, control="random")], max_images=max_images)
        compared.append((chosen, others))
    return compared


def _budget_table(model: Iret, budgets: list[float], scores: list[Score]) -> list[str]:
    lines = ["| budget | top-1 | of full MACs | patches a stage | each head, of the images that got there |"]
    lines.append("|---|---|---|---|---|")
    for budget, score in zip(budgets, scores, strict=True):
        kept, heads = (
            " / ".join("-" if value is None else f"{value:.1f}" for value in values)
            for values in (score.kept_mean, [right and 100 * right for right in score.stage_accuracy])
        )
        share = score.macs_mean / full_macs(model.shape)
        lines.append(f"| {budget:g} | {score.accuracy:.2%} | {share:.1%} | {kept} | {heads} |")
    return lines


def _control_table(compared: list[tuple[Score, list[Score]]]) -> list[str]:
    lines = ["| patches a stage | by attention | at random | difference (points) |", "|---|---|---|---|"]
    for chosen, others in compared:
        accuracies = [other.accuracy for other in others]
        mean = statistics.mean(accuracies)
        kept = " / ".join(f"{count:.0f}" for count in chosen.kept_mean)
        spread = f"{min(accuracies):.2%} to {max(accuracies):.2%}"
        gain = 100 * (chosen.accuracy - mean)
        lines.append(f"| {kept} | {chosen.accuracy:.2%} | {mean:.2%} ({spread}) | {gain:+.2f} |")
    return lines


def _beside_static(folder: Path) -> list[list[str]]:
    """A section on the plain ViT of the same MACs, where one was trained."""
    if not (folder / STATIC_NAME).exists():
        return []
    found = json.loads((folder / STATIC_NAME).read_bytes())
    length = f"{found['steps']:,} steps ({found['epochs']:.1f} epochs)"
    if found["minutes"] is not None:
        spent = f"{found['minutes']:.0f} minutes of an idle machine, about what this model's own steps take there"
        length = f"{spent}: {length}"
    sentence = (
        f"A plain ViT of {found['macs'] / 1e6:.1f} M MACs at any image (width {found['embed_dim']}, as many blocks), "
        f"trained with the same recipe on the same images for {length}, {found['test_top1']:.2%} (`benchmarks/static_vit.py`)."
    )
    return [["## Beside a model without a dial"], [sentence]]


def _training(folder: Path) -> str:
    """What the training state beside the weights says."""
    if not (folder / STATE_NAME).exists():
        return "No training state lies beside these weights."
    with safe_open(folder / STATE_NAME, framework="pt") as file:
        metadata = file.metadata()
    recipe, progress = json.loads(metadata["recipe"]), json.loads(metadata["progress"])
    where = f" in {progress['num_processes']} processes on {progress['machine']}" if progress.get("machine") else ""
    settings = ", ".join(f"{name}={value}" for name, value in recipe.items() if name != "name")
    return (
        f"Recipe `{recipe['name']}`, seed {progress['seed']}: {progress['step']} steps in "
        f"{progress['time_s'] / 60:.0f} minutes{where} ({settings})."
    )
