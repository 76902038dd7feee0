"""The main job, on what the package brings along: shipped models, embedded digits, two photographs, five budgets."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from iret.draw import draw_focus, draw_tradeoff, stack
from iret.evaluate import evaluate
from iret.model import Iret
from iret.picture import check_picture, save_image
from iret.predict import predict, warm_up
from iret.runtime.cost import full_macs
from iret.runtime.points import BUDGETS
from iret.runtime.preprocess import open_image
from iret.train.data import open_data
from iret.zoo import load

PHOTOS = Path(__file__).parent / "photos"
DIGITS_MODEL, PHOTO_MODEL = "iret_nano-cluttered-digits", "iret_pico-cifar10"
DIGITS_PICTURE, TRADEOFF_PICTURE = "digits.png", "tradeoff.png"
NUM_DIGITS = 500
NUM_DRAWN = 4

Say = Callable[[str], None]
PrintTable = Callable[[Sequence[str], Sequence[Sequence[str]]], None]


def run_demo(out: Path, say: Say, print_table: PrintTable) -> int:
    """Print accuracy and answers at five budgets and write pictures into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (DIGITS_PICTURE, TRADEOFF_PICTURE, *(f"{path.stem}.png" for path in PHOTOS.glob("*.jpg"))):
        check_picture(out / name)
    digits, photos = load(DIGITS_MODEL), load(PHOTO_MODEL)
    for model in (digits, photos):
        warm_up(model)
    curve = _digits(digits, out, say, print_table)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one small image is too little for two
    _photos(photos, out, say, print_table)
    torch.set_num_threads(num_threads)
    curves = {f"{DIGITS_MODEL}, {NUM_DIGITS} test images (measured now)": curve}
    if photos.points is not None:
        curves[f"{PHOTO_MODEL}, {photos.points.num_images} held-out images (its table)"] = (
            [point.macs_mean / photos.points.full_macs for point in photos.points.points],
            [point.accuracy for point in photos.points.points],
        )
    draw_tradeoff(curves, out / TRADEOFF_PICTURE, "Accuracy against cost, one set of weights a curve")
    say(f"pictures: {', '.join(str(path) for path in sorted(out.glob('*.png')))}")
    return 0


def _digits(model: Iret, out: Path, say: Say, print_table: PrintTable) -> tuple[list[float], list[float]]:
    data = open_data("cluttered-digits", "test", model.preprocessing)
    settings = [model.setting(budget) for budget in BUDGETS]
    scores = evaluate(model, data, settings, max_images=NUM_DIGITS)
    shares = [score.macs_mean / full_macs(model.shape) for score in scores]
    say(f"{DIGITS_MODEL} on {scores[0].num_images} test images of cluttered-digits")
    print_table(
        ("budget", "top-1", "of full MACs", "patches a stage", "ms an image"),
        [
            (
                f"{budget:g}",
                f"{score.accuracy:.1%}",
                f"{share:.0%}",
                "/".join(f"{kept:.0f}" for kept in score.kept_mean),
                f"{1e3 * score.time_s / score.num_images:.2f}",
            )
            for budget, share, score in zip(BUDGETS, shares, scores, strict=True)
        ],
    )
    rows = []
    for index in range(NUM_DRAWN):
        item = data[index]
        assert item is not None  # made by us, never corrupt
        pixels, label = item
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        answer, trace = predict(model, image, setting=model.setting(BUDGETS[-1]))
        title = f"digit {data.class_names[label]}, budget {BUDGETS[-1]:g}: {answer.label}, {answer.macs_share:.0%} of full MACs"
        rows.append(draw_focus(model, image, trace, title))
    save_image(stack(rows), out / DIGITS_PICTURE)
    return shares, [score.accuracy for score in scores]


def _photos(model: Iret, out: Path, say: Say, print_table: PrintTable) -> None:
    rows = []
    for path in sorted(PHOTOS.glob("*.jpg")):
        photo, pictures = open_image(path), []
        for budget in BUDGETS:
            answer, trace = predict(model, photo, setting=model.setting(budget), name=path.name)
            rows.append(
                (
                    answer.image,
                    f"{budget:g}",
                    answer.label,
                    f"{answer.confidence:.0%}",
                    f"{answer.macs_share:.0%}",
                    "/".join(map(str, answer.kept)),
                    f"{1e3 * answer.time_s:.1f}",
                )
            )
            title = f"{path.name}, budget {budget:g}: {answer.label}, {answer.macs_share:.0%} of full MACs"
            pictures.append(draw_focus(model, photo, trace, title))
        save_image(stack(pictures), out / f"{path.stem}.png")
    say(f"\n{PHOTO_MODEL} on two photographs, one thread; a budget holds in the mean, one image may take more or less")
    print_table(("photo", "budget", "label", "confidence", "of full MACs", "patches a stage", "ms"), rows)
    if model.points is not None:
        say(
            f"it is right on {model.points.points[0].accuracy:.0%} of held-out images of its {model.num_classes} classes; "
            "a rocket is none of them"
        )
