"""`predict`, `demo`, `list`, `doctor`: a model that is there, and what it runs on."""

import argparse
import json
import re
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from iret.arguments import read_thresholds
from iret.verbs.console import (
    check_above_zero,
    check_device,
    check_idle_watts,
    check_picture,
    explain_idle,
    explain_joules,
    explain_rate,
    fail,
    print_table,
    say,
    set_threads,
)


def do_predict(args: argparse.Namespace) -> int:
    from iret.draw import draw_focus, stack
    from iret.picture import save_image
    from iret.precision import prepare
    from iret.predict import predict, warm_up
    from iret.runtime.preprocess import open_image
    from iret.zoo import load

    check_picture(args.show)
    set_threads(args.threads)
    model, context = prepare(load(args.model).to(check_device(args.device)), args.precision)
    predictions, decisions, pictures, bad = [], [], [], []
    with context, ExitStack() as at_last:
        pilot, on_goals = _start_pilot(args, model)
        if pilot:
            at_last.callback(pilot.close)
        setting, chosen = _read_setting(args, model)
        warm_up(model, setting)
        for path in args.images:
            try:
                photo = open_image(path)
            except ValueError as error:
                if len(args.images) == 1:
                    raise
                bad.append((path, str(error)))  # the others are answered all the same
                continue
            decision = pilot.next() if pilot else None
            if decision:
                setting = _leave_early(args, model.setting(decision.budget))
            prediction, trace = predict(model, photo, setting=setting, name=path)
            if pilot:
                pilot.note(prediction.time_s)
            predictions.append(prediction)
            decisions.append(decision)
            if args.show:
                title = f"{Path(path).name}: {prediction.label}, {prediction.macs_share:.0%} of full MACs"
                pictures.append(draw_focus(model, photo, trace, title))
    if pictures:
        save_image(stack(pictures), Path(args.show))
    notes = [*chosen, *on_goals, *_explain_exit(args, has_goal=pilot is not None), *_count_late(args, predictions)]
    if args.json:
        answers = [
            asdict(answer) | {"decision": decision and asdict(decision)}
            for answer, decision in zip(predictions, decisions, strict=True)
        ]
        errors = [{"image": path, "error": sentence} for path, sentence in bad]
        print(json.dumps({"model": args.model, "predictions": answers, "errors": errors, "notes": notes}))
    elif predictions:
        _print_predictions(predictions)
        for note in [*_explain_decisions(decisions), *notes]:
            say(note)
        if pictures:
            say(f"drawn: {args.show}")
    for _, sentence in bad:
        fail(sentence)
    return 2 if bad else 0


def _read_setting(args: argparse.Namespace, model):
    """What --budget, --ms, --joules or --threshold ask for, and sentences on what was chosen for milliseconds or joules."""
    from iret.doctor import describe_device
    from iret.runtime.points import Setting

    chosen: list[str] = []
    if args.threshold is not None:
        setting = Setting(thresholds=read_thresholds(args.threshold))
    elif args.ms is not None or args.joules is not None:
        budget = model.budget_for(ms=args.ms, joules=args.joules)
        setting, accuracy = model.setting(budget), model.points.accuracy_at(budget)
        asked = f"--joules {args.joules:g}" if args.ms is None else f"--ms {args.ms:g}"
        chosen.append(
            f"{asked}: {budget:.0%} of the MACs, with which {accuracy:.1%} of held-out images are right; a mean of many images, "
            "which a single one may exceed" + (" (--deadline keeps 95 of 100)" if args.joules is None else "")
        )
        if args.joules is not None:
            device = describe_device(model.pos_embed.device, model.precision)
            chosen.append(explain_joules(model.points.table_of(device)))
    else:
        setting = model.setting(1.0 if args.budget is None else args.budget)
    return _leave_early(args, setting), chosen


def _leave_early(args: argparse.Namespace, setting):
    """With --exit-confidence in place of the table's."""
    return setting if args.exit_confidence is None else replace(setting, exit_confidence=args.exit_confidence)


def _explain_exit(args: argparse.Namespace, *, has_goal: bool) -> list[str]:
    """What --exit-confidence does to an operating point that was chosen for its cost."""
    is_chosen = has_goal or args.ms is not None or args.joules is not None or args.budget not in (None, 1.0)
    if args.exit_confidence is None or not is_chosen:
        return []
    return [
        f"images leave at --exit-confidence {args.exit_confidence:g} in place of the operating point's own, so the cost and the "
        "accuracy that it was chosen for need not hold"
    ]


def _count_late(args: argparse.Namespace, predictions) -> list[str]:
    """How many images missed --deadline; nothing without one."""
    if args.deadline is None or not predictions:
        return []
    late = sum(1e3 * answer.time_s > args.deadline for answer in predictions)
    return [f"{late} of {len(predictions)} images took longer than --deadline {args.deadline:g}"]


AFFORDABLE = re.compile(r"(?<=battery: )\S+(?= J an image)")  # in a reason, and other at every image


def _explain_decisions(decisions) -> list[str]:
    """A sentence for each kind of reason that the controller gave, with its last doubts; nothing where none turned the dial."""
    given = defaultdict(list)
    for decision in filter(None, decisions):
        given[AFFORDABLE.sub("", decision.reason), decision.broken].append(decision)
    lines = []
    for (_, broken), alike in given.items():
        reason = alike[-1].reason
        if (first := alike[0].reason) != reason:  # they differ by what is affordable
            reason = AFFORDABLE.sub(f"{AFFORDABLE.findall(first)[0]} to {AFFORDABLE.findall(reason)[0]}", reason)
        said = [reason, *(f"cannot hold: {goal}" for goal in broken), *alike[-1].doubts]
        lines.append(f"{len(alike)} of {len(decisions)} images, {'; '.join(said)}")
    return lines


def _start_pilot(args: argparse.Namespace, model):
    """What turns the dial for the goals that were given, and notes on them; None without any."""
    from iret.doctor import describe_device
    from iret.pilot import Pilot
    from iret.runtime.controller import Goal

    check_above_zero(args, "battery", "rate", "battery_wh", "deadline", "max_celsius", "min_accuracy")
    check_idle_watts(args.idle_watts)
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
    if args.battery is not None and args.rate is None:
        raise ValueError(f"--battery {args.battery:g} needs --rate, the images a second that it must last for.")
    if args.min_accuracy is not None and args.min_accuracy > 1:
        raise ValueError(f"--min-accuracy {args.min_accuracy:g} is above 1; it is a share of right answers.")
    if all(goal is None for goal in goals.values()):
        return None, []
    if any(choice is not None for choice in (args.budget, args.ms, args.joules, args.threshold)):
        raise ValueError("goals let a controller turn the dial; leave out --budget, --ms, --joules and --threshold.")
    if model.points is None:
        raise ValueError(f"{args.model} has no operating points to choose from; run `iret calibrate` first.")
    goal = Goal(**goals, battery_joules=None if args.battery_wh is None else 3600 * args.battery_wh)
    device = describe_device(model.pos_embed.device, model.precision)
    menu, table = model.points.menu(device, args.idle_watts), model.points.table_of(device)
    notes = [] if args.rate is None else explain_rate(args.rate, device, menu.ms)
    notes += explain_idle(args.battery_wh, args.battery, menu.idle_watts)
    meter = None if args.battery is None else _open_meter_of(table, notes)
    return Pilot(menu, goal, meter=meter, idle_watts=table.idle_watts), notes


def _open_meter_of(table, notes: list[str]):
    """The meter that a table's joules were measured with; None, and a note, where there is none to read while images come."""
    from iret.measure.energy import EnergyError
    from iret.measure.sources import open_meter

    if table.energy_kind != "measured" or table.energy_source.startswith("battery"):  # the gauge is read all the same
        return None
    try:
        return open_meter(table.energy_source)
    except EnergyError as error:
        notes.append(f"the table's joules were measured by {table.energy_source}, which is not read here now: {error}")
        return None


def _print_predictions(predictions) -> None:
    print_table(
        ("image", "label", "confidence", "patches a stage", "MMACs", "of full", "ms"),
        [
            (
                p.image,
                p.label,
                f"{p.confidence:.1%}",
                "/".join(str(kept) if stage <= p.exit_stage else "-" for stage, kept in enumerate(p.kept)),
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
