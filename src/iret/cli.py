"""The `iret` command: parses, calls one function, prints.

Tables go to stderr; with `--json` one JSON object goes to stdout and nothing else. A user's mistake is one sentence and exit
status 2. Nothing heavy is imported before a verb needs it.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from iret.arguments import build_parser, read_thresholds

LONG_VERBS = ("train", "eval", "calibrate", "card", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    args.words = words
    if args.verb in LONG_VERBS:
        # libgomp's barriers spin, which slows two threads 10 to 30 times beside another busy process; read when torch loads.
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
    try:
        return VERBS[args.verb](args)
    except KeyboardInterrupt:
        return _fail("stopped.", 130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "iret":
            raise
        return _fail(f"this needs {error.name}, which is not installed; pip install 'iret[torch]'.")
    except (ValueError, ImportError, OSError) as error:
        return _fail(str(error))


def _fail(sentence: str, status: int = 2) -> int:
    print(f"iret: {' '.join(sentence.split())}", file=sys.stderr)
    return status


def say(text: str = "") -> None:
    print(text, file=sys.stderr)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain aligned table on stderr; the first column is left-aligned."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say("  ".join(cells).rstrip())


def _check_device(name: str) -> str:
    """Raises ValueError for a device that models do not run on here; torch itself has several ways to fail."""
    import torch

    try:
        is_known = torch.device(name).type in ("cpu", "cuda", "mps")
        torch.empty(0, device=name if is_known else "cpu")
    except (RuntimeError, AssertionError):
        is_known = False
    if not is_known:
        raise ValueError(f"device {name!r} cannot be used here; `iret doctor` lists those that can.")
    return name


def _check_picture(path: str | None) -> None:
    """Raises ValueError for a picture that could not be written, before any work is lost."""
    from PIL import Image

    if path is None:
        return
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{path} cannot be written: the folder {Path(path).parent} does not exist; make it first.")
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path} is no kind of picture that can be written; end its name in .png.")


def _open_data(args: argparse.Namespace, split: str, model):
    from iret.train.data import open_data

    return open_data(args.data, split, model.preprocessing, on_corrupt=args.on_corrupt, label_column=args.label_column)


# ---- verbs


def _predict(args: argparse.Namespace) -> int:
    from iret.draw import draw_focus, stack
    from iret.predict import predict, warm_up
    from iret.runtime.preprocess import open_image
    from iret.zoo import load

    _check_picture(args.show)
    model = load(args.model).to(_check_device(args.device))
    if args.threshold is not None:
        thresholds = read_thresholds(args.threshold)
    else:
        thresholds = model.thresholds(1.0 if args.budget is None else args.budget)
    predictions, pictures, bad = [], [], []
    warm_up(model)
    for path in args.images:
        try:
            photo = open_image(path)
        except ValueError as error:
            if len(args.images) == 1:
                raise
            bad.append((path, str(error)))  # the others are answered all the same
            continue
        prediction, trace = predict(
            model, photo, thresholds=thresholds, exit_confidence=args.exit_confidence, name=path
        )
        predictions.append(prediction)
        if args.show:
            pictures.append(
                draw_focus(
                    model,
                    photo,
                    trace,
                    f"{Path(path).name}: {prediction.label}, {prediction.macs_share:.0%} of full MACs",
                )
            )
    if pictures:
        stack(pictures).save(args.show)
    if args.json:
        errors = [{"image": path, "error": sentence} for path, sentence in bad]
        print(json.dumps({"model": args.model, "predictions": [asdict(p) for p in predictions], "errors": errors}))
    elif predictions:
        _print_predictions(predictions)
        if pictures:
            say(f"drawn: {args.show}")
    for _, sentence in bad:
        _fail(sentence)
    return 2 if bad else 0


def _print_predictions(predictions) -> None:
    print_table(
        ("image", "label", "confidence", "patches a stage", "MMACs", "of full", "ms"),
        [
            (
                p.image,
                p.label,
                f"{p.confidence:.1%}",
                "/".join(str(kept) if stage < p.exit_stage else "-" for stage, kept in enumerate(p.kept)),
                f"{p.macs / 1e6:.1f}",
                f"{p.macs_share:.0%}",
                f"{p.time_s * 1e3:.1f}",
            )
            for p in predictions
        ],
    )


def _train(args: argparse.Namespace) -> int:
    from iret.train.checkpoint import FILE_NAME as STATE_NAME
    from iret.train.loop import RunOptions, train
    from iret.train.recipe import find_recipe

    recipe = find_recipe(args.recipe or ("fine_tune" if args.init else "images_tiny"))
    out = Path(args.out or f"out/{recipe.name}")
    options = RunOptions(
        data=args.data,
        out=out,
        seed=args.seed,
        device=args.device if args.device == "auto" else _check_device(args.device),
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
            return _fail("stopped before anything was saved.", 130)
        return _fail(f"stopped and saved; go on with: {again}", 130)
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


def _eval(args: argparse.Namespace) -> int:
    from iret.evaluate import Setting, evaluate
    from iret.runtime.cost import full_macs
    from iret.zoo import load

    model = load(args.model).to(_check_device(args.device))
    if args.threshold is not None:
        names, thresholds = [" ".join(args.threshold)], [read_thresholds(args.threshold)]
    else:
        names = [f"budget {budget:g}" for budget in args.budgets]
        thresholds = [model.thresholds(budget) for budget in args.budgets]
    settings = [
        Setting(thresholds=each, exit_confidence=args.exit_confidence, rule=args.rule, control=args.control)
        for each in thresholds
    ]
    data = _open_data(args, args.split, model)
    scores = evaluate(
        model, data, settings, batch_size=args.batch_size, max_images=args.max_images, workers=args.workers
    )
    if args.json:
        found = {"model": args.model, "data": args.data, "split": data.split, "scores": [asdict(s) for s in scores]}
        print(json.dumps(found))
        return 0
    full = full_macs(model.shape)
    say(f"{args.model} on {args.data} ({data.split}), {scores[0].num_images} images, {scores[0].num_skipped} skipped")
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


def _calibrate(args: argparse.Namespace) -> int:
    from iret.calibrate import calibrate
    from iret.runtime.points import FILE_NAME
    from iret.train.data import name_of
    from iret.weights import write_atomically
    from iret.zoo import load

    model = load(args.model).to(_check_device(args.device))
    folder = Path(args.out or args.model)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a model folder to write {FILE_NAME} into; give one with --out.")
    data = _open_data(args, "val", model)
    points = calibrate(model, data, data_name=name_of(args.data), max_images=args.max_images, workers=args.workers)
    write_atomically(folder / FILE_NAME, points.to_json().encode())
    if args.json:
        print(json.dumps(asdict(points)))
        return 0
    print_table(
        ("thresholds", "top-1", "of full"),
        [
            (
                " ".join(f"{keep:g}" if keep == refine else f"{keep:g}:{refine:g}" for keep, refine in p.thresholds),
                f"{p.accuracy:.2%}",
                f"{p.macs_mean / points.full_macs:.1%}",
            )
            for p in points.points
        ],
    )
    say(f"{len(points.points)} operating points on {points.num_images} held-out images: {folder / FILE_NAME}")
    return 0


def _card(args: argparse.Namespace) -> int:
    from iret.card import write_card
    from iret.train.data import name_of
    from iret.weights import write_atomically
    from iret.zoo import load

    folder = Path(args.model)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a model folder to write a card into; copy the model first.")
    model = load(folder).to(_check_device(args.device))
    data = _open_data(args, "test", model)
    text = write_card(model, args.name or folder.name, folder, data, name_of(args.data), args.max_images)
    write_atomically(folder / "README.md", text.encode())
    say(f"written: {folder / 'README.md'}")
    if args.json:
        print(json.dumps({"card": str(folder / "README.md")}))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from iret.demo import run_demo

    return run_demo(Path(args.out), say, print_table)


def _list(args: argparse.Namespace) -> int:
    from iret.presets import PRESETS, list_checkpoints

    if args.json:
        print(json.dumps({"checkpoints": list_checkpoints(), "presets": list(PRESETS)}))
        return 0
    say("shipped checkpoints, for `iret predict --model` and `iret.load`:")
    for name in list_checkpoints():
        say(f"  {name}")
    say("presets, for `iret.create_model` and recipes:")
    for name, preset in PRESETS.items():
        say(f"  {name:<10}  {(preset.__doc__ or '').strip()}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from iret.doctor import describe, report

    findings = report()
    if args.json:
        print(json.dumps(findings))
    else:
        say(describe(findings))
    return 0


VERBS = {
    "predict": _predict,
    "train": _train,
    "eval": _eval,
    "calibrate": _calibrate,
    "card": _card,
    "demo": _demo,
    "list": _list,
    "doctor": _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
