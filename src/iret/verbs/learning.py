"""`train`, `eval`, `narrow`, `card`: how a model is made and what it scores."""

import argparse
import json
import os
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from iret.arguments import read_thresholds
from iret.verbs.console import (
    announce_hub,
    check_above_zero,
    check_counts,
    check_device,
    check_folder,
    check_unused,
    fail,
    open_data,
    print_table,
    say,
    set_threads,
)


def do_train(args: argparse.Namespace) -> int:
    from iret.train.checkpoint import FILE_NAME as STATE_NAME
    from iret.train.loop import RunOptions, train
    from iret.train.recipe import find_recipe

    recipe = find_recipe(args.recipe or ("fine_tune" if args.init else "images_tiny"))
    out = Path(args.out or f"out/{recipe.name}")
    check_folder(out)
    announce_hub(args.data)
    options = RunOptions(
        data=args.data,
        out=out,
        seed=args.seed,
        device=args.device if args.device == "auto" else check_device(args.device),
        steps=args.steps,
        resume=args.resume,
        init=args.init,
        img_size=tuple(args.img_size) if args.img_size else None,
        workers=args.workers,
        on_corrupt=args.on_corrupt,
        label_column=args.label_column,
        checkpoint_minutes=args.checkpoint_minutes,
        stop_after_minutes=args.stop_after,
    )
    words = [word for word in args.words if word != "--resume"]
    again = shlex.join(["iret", *words, "--resume"])
    try:
        report = train(recipe, options)
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", "0")) > 0:
            return 130
        if not (out / STATE_NAME).exists():
            return fail("stopped before anything was saved.", 130)
        return fail(f"stopped and saved; go on with: {again}", 130)
    if int(os.environ.get("RANK", "0")) > 0:  # the first process speaks for all that torchrun started
        return 0
    if args.json:
        print(json.dumps(asdict(report) | {"out": str(out)}))
    if report.skipped:
        say(f"{report.skipped} corrupt images were skipped; --on-corrupt stop names the first.")
    if not report.is_finished:
        say(f"step {report.step} of {report.num_steps} saved; go on with: {again}")
        return 0
    say(f"trained {report.num_steps} steps in {report.time_s / 60:.1f} minutes: {out}")
    return 0


def do_evaluate(args: argparse.Namespace) -> int:
    from iret.evaluate import evaluate
    from iret.precision import prepare
    from iret.runtime.cost import full_macs
    from iret.runtime.points import Setting
    from iret.zoo import load

    set_threads(args.threads)
    check_counts(args, "batch_size", "max_images")
    model, context = prepare(load(args.model).to(check_device(args.device)), args.precision)
    if args.threshold is not None:
        names, settings = [" ".join(args.threshold)], [Setting(thresholds=read_thresholds(args.threshold))]
    else:
        names = [f"budget {budget:g}" for budget in args.budgets]
        settings = [model.setting(budget) for budget in args.budgets]
    changes: dict[str, Any] = {"rule": args.rule, "control": args.control}
    if args.exit_confidence is not None:
        changes["exit_confidence"] = args.exit_confidence
    settings = [replace(setting, **changes) for setting in settings]
    data = open_data(args, args.split, model)
    with context:
        scores = evaluate(
            model, data, settings, batch_size=args.batch_size, max_images=args.max_images, workers=args.workers
        )
    if args.json:
        found = {"model": args.model, "data": args.data, "split": data.split, "scores": [asdict(s) for s in scores]}
        print(json.dumps(found))
        return 0
    full = full_macs(model.shape)
    counts = f"{scores[0].num_images} images, {scores[0].num_skipped} skipped"
    say(f"{args.model} on {args.data} ({data.split}), {counts}; heads: each one's top-1, of the images that got there")
    if data.split == "val":
        say("held-out images: if its operating points were found on them, this is no test")
    print_table(
        ("setting", "top-1", "heads", "MMACs", "p95", "of full", "patches a stage", "ms an image"),
        [
            (
                name,
                f"{s.accuracy:.2%}",
                "/".join("-" if a is None else f"{a:.1%}" for a in s.stage_accuracy),
                f"{s.macs_mean / 1e6:.1f}",
                f"{s.macs_p95 / 1e6:.1f}",
                f"{s.macs_mean / full:.1%}",
                "/".join(f"{k:.1f}" for k in s.kept_mean),
                f"{1e3 * s.time_s / s.num_images:.2f}",
            )
            for name, s in zip(names, scores, strict=True)
        ],
    )
    return 0


def do_narrow(args: argparse.Namespace) -> int:
    from iret.evaluate import check_classes, points_unsure
    from iret.narrow import narrow
    from iret.zoo import load

    out = Path(args.out)
    check_unused(out)
    set_threads(args.threads)
    check_counts(args, "max_images")
    check_above_zero(args, "mlp_ratio")
    model = load(args.model).to(check_device(args.device))
    data, held_out = (open_data(args, split, model) for split in ("train", "val"))
    check_classes(model, held_out)
    narrowed = narrow(model, _read_images(args, model, data), args.mlp_ratio)
    narrowed.save_pretrained(out)  # before it is checked: a held-out image that cannot be read is no reason to lose it
    num_images, rows = _compare(args, model, narrowed, held_out)
    if args.json:
        print(json.dumps({"out": args.out, "num_images": num_images, "rows": rows}))
        return 0
    sizes = [sum(weight.numel() for weight in each.parameters()) / 1e6 for each in (model, narrowed)]
    say(
        f"MLPs {model.shape.mlp_ratio:g} times as wide as their tokens, and now {args.mlp_ratio:g} times: {sizes[0]:.2f} and "
        f"{sizes[1]:.2f} million parameters"
    )
    unsure = points_unsure((rate for row in rows.values() for rate in row["accuracy"]), num_images)
    say(
        f"on {num_images} held-out images, which tell a top-1 to {unsure:.1f} points or better, and their "
        f"difference more surely; MACs as shares of the full run of {args.model}"
    )
    print_table(
        ("threshold", "MACs", "narrowed", "top-1", "narrowed"),
        [
            (f"{threshold:g}", *(f"{part:.1%}" for part in (*row["macs_share"], *row["accuracy"])))
            for threshold, row in rows.items()
        ],
    )
    column = ["--label-column", args.label_column] if args.label_column else []
    again = shlex.join(["iret", "calibrate", args.out, "--data", args.data, *column])
    say(f"written: {out}; it has no operating points yet, which --budget needs: {again}")
    return 0


def _read_images(args: argparse.Namespace, model, data):
    """The first --max-images of a shuffled training set, in batches, as the model takes them."""
    from iret.train.data import make_loader

    left = args.max_images
    for pixels, *_ in make_loader(data, 100, seed=0, epoch=0, shuffle=True, workers=args.workers, drop_last=False):
        if len(pixels):
            yield model.normalise(pixels[:left].to(model.pos_embed.device).float() / 255)
        left -= len(pixels)
        if left <= 0:
            return


def _compare(args: argparse.Namespace, model, narrowed, data) -> tuple[int, dict[float, dict[str, list[float]]]]:
    """How many images were seen, and by threshold what both give: MACs as shares of the first one's full run, and accuracy."""
    from iret.evaluate import evaluate
    from iret.narrow import LOOKS
    from iret.runtime.cost import full_macs
    from iret.runtime.points import Setting

    settings, full = [Setting(thresholds=threshold) for threshold in LOOKS], full_macs(model.shape)
    scores = [
        evaluate(each, data, settings, max_images=args.max_images, workers=args.workers) for each in (model, narrowed)
    ]
    rows = {
        both[0].setting.thresholds: {
            "macs_share": [score.macs_mean / full for score in both],
            "accuracy": [score.accuracy for score in both],
        }
        for both in zip(*scores, strict=True)
    }
    return scores[0][0].num_images, rows


def do_card(args: argparse.Namespace) -> int:
    from iret.card import SIGNATURE, write_card
    from iret.train.data import name_of
    from iret.weights import write_atomically
    from iret.zoo import load

    folder = Path(args.model)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a model folder to write a card into; copy the model first.")
    card = folder / "README.md"
    if card.exists() and SIGNATURE.encode() not in card.read_bytes():
        raise ValueError(f"{card} is there already, and was not written by `iret card`; move it away first.")
    model = load(folder).to(check_device(args.device))
    data = open_data(args, "test", model)
    text = write_card(model, args.name or folder.name, folder, data, name_of(args.data), args.max_images)
    write_atomically(card, text.encode())
    say(f"written: {card}")
    if args.json:
        print(json.dumps({"card": str(card)}))
    return 0
