"""`predict`, `demo`, `list`, `doctor`: a model that is there, and what it runs on."""

import argparse
import json
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

from iret.arguments import read_thresholds
from iret.verbs.console import check_device, check_picture, fail, print_table, say, set_threads


def do_predict(args: argparse.Namespace) -> int:
    from iret.draw import draw_focus, stack
    from iret.precision import prepare
    from iret.predict import predict, warm_up
    from iret.runtime.preprocess import open_image
    from iret.zoo import load

    check_picture(args.show)
    set_threads(args.threads)
    model, context = prepare(load(args.model).to(check_device(args.device)), args.precision)
    predictions, pictures, bad = [], [], []
    reasons: dict[tuple[str, tuple[str, ...]], list[tuple[str, ...]]] = defaultdict(list)
    with context:
        pilot = _start_pilot(args, model)
        setting = _read_setting(args, model)
        warm_up(model)
        for path in args.images:
            try:
                photo = open_image(path)
            except ValueError as error:
                if len(args.images) == 1:
                    raise
                bad.append((path, str(error)))  # the others are answered all the same
                continue
            if pilot:
                decision = pilot.next()
                setting = _leave_early(args, model.setting(decision.budget))
                reasons[decision.reason, decision.broken].append(decision.doubts)
            prediction, trace = predict(model, photo, setting=setting, name=path)
            if pilot:
                pilot.note(prediction.time_s)
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
        for (reason, broken), doubts in reasons.items():
            notes = [reason, *(f"cannot hold: {goal}" for goal in broken), *doubts[-1]]
            say(f"{len(doubts)} of {len(predictions)} images, {'; '.join(notes)}")
        if pictures:
            say(f"drawn: {args.show}")
    for _, sentence in bad:
        fail(sentence)
    return 2 if bad else 0


def _read_setting(args: argparse.Namespace, model):
    """What --budget, --ms, --joules or --threshold ask for."""
    from iret.runtime.points import Setting

    if args.threshold is not None:
        setting = Setting(thresholds=read_thresholds(args.threshold))
    elif args.ms is not None or args.joules is not None:
        setting = model.setting(model.budget_for(ms=args.ms, joules=args.joules))
    else:
        setting = model.setting(1.0 if args.budget is None else args.budget)
    return _leave_early(args, setting)


def _leave_early(args: argparse.Namespace, setting):
    """With --exit-confidence in place of the table's."""
    return setting if args.exit_confidence is None else replace(setting, exit_confidence=args.exit_confidence)


def _start_pilot(args: argparse.Namespace, model):
    """What turns the dial for the goals that were given; None without any."""
    from iret.doctor import describe_device
    from iret.pilot import Pilot
    from iret.runtime.controller import Goal

    goals = dict(
        hours=args.battery,
        images_per_second=args.rate,
        deadline_ms=args.deadline,
        max_celsius=args.max_celsius,
        min_accuracy=args.min_accuracy,
    )
    for name in ("rate", "battery_wh", "idle_watts"):
        if args.battery is None and getattr(args, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} tells of the battery; say with --battery how long it must last."
            )
    if all(goal is None for goal in goals.values()):
        return None
    if any(choice is not None for choice in (args.budget, args.ms, args.joules, args.threshold)):
        raise ValueError("goals let a controller turn the dial; leave out --budget, --ms, --joules and --threshold.")
    if model.points is None:
        raise ValueError(f"{args.model} has no operating points to choose from; run `iret calibrate` first.")
    goal = Goal(**goals, battery_joules=None if args.battery_wh is None else 3600 * args.battery_wh)
    menu = model.points.menu(describe_device(model.pos_embed.device, model.precision), args.idle_watts)
    return Pilot(menu, goal)


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


def do_demo(args: argparse.Namespace) -> int:
    from iret.demo import run_demo

    return run_demo(Path(args.out), say, print_table)


def do_list(args: argparse.Namespace) -> int:
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


def do_doctor(args: argparse.Namespace) -> int:
    from iret.doctor import describe, report

    findings = report()
    if args.json:
        print(json.dumps(findings))
    else:
        say(describe(findings))
    return 0
