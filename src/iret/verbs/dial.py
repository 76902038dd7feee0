"""`calibrate`, `bench`, `simulate`: what the dial gives, what it costs here, and how a controller turns it."""

import argparse
import json
import shlex
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import reduce
from pathlib import Path

from iret.verbs.console import (
    check_above_zero,
    check_counts,
    check_device,
    check_folder,
    check_idle_watts,
    check_picture,
    check_unused,
    choose_meter,
    explain_idle,
    explain_joules,
    explain_rate,
    fail,
    measure_bundle,
    open_data,
    print_table,
    say,
    set_threads,
)

SEARCH_NAME = "search.jsonl"
BUNDLE_LEAVES_OUT: dict[str, object] = {  # options that say nothing to a bundle, and what stands there if not given
    **dict.fromkeys(("data", "trials", "max_images", "show", "out", "battery_wh", "label_column")),
    "device": "cpu",
    "precision": "float32",
    "meter": "auto",
    "workers": 0,
    "on_corrupt": "skip",
}
TRIALS = 8  # of `iret calibrate`, unless --trials says otherwise


def do_calibrate(args: argparse.Namespace) -> int:
    from iret.presets import list_checkpoints
    from iret.runtime.bundle import FILE_NAME as BUNDLE_NAME

    is_shipped = args.model in list_checkpoints()  # which goes before a folder of that name
    if not is_shipped and (Path(args.model) / BUNDLE_NAME).is_file():
        return _calibrate_bundle(args)
    if args.engine is not None:
        raise ValueError(f"--engine is of a bundle, and {args.model} is none; a model runs on torch.")
    from iret.calibrate import explain_noise
    from iret.classifier import read_points
    from iret.clock import measure_device
    from iret.draw import draw_search
    from iret.measure.latency import pin_threads
    from iret.precision import prepare
    from iret.runtime.points import FILE_NAME, OperatingPoints
    from iret.weights import write_atomically
    from iret.zoo import load

    own = None if is_shipped or not Path(args.model).is_dir() else Path(args.model).resolve()
    folder = Path(args.out or args.model)
    check_picture(args.show)
    check_folder(folder)
    set_threads(args.threads)
    loaded = load(args.model).to(check_device(args.device))
    model, context = prepare(loaded, args.precision)
    meter = choose_meter(args)
    if args.out is None and own is None:
        raise ValueError(f"{args.model} is no folder of yours to write {FILE_NAME} into; name a new one with --out.")
    there = read_points(folder)  # before anything is measured, for it may be damaged
    has_weights = folder.resolve() == own or _holds_copy(args, loaded, there)
    with context:
        try:
            points = _find_points(args, model, folder, there)
            with nullcontext() if args.threads is None else pin_threads(args.threads):
                table, _ = measure_device(model, points, meter, say)
        except KeyboardInterrupt:
            kept = (
                "nothing was changed" if args.device_only else "what was searched is kept, and the same command goes on"
            )
            return fail(f"stopped; {kept}.", 130)
    if there is not None and there.points == points.points:  # it may know clocks that the model does not
        points = reduce(OperatingPoints.with_device, there.devices, points)
    loaded.points = points.with_device(table)
    if has_weights:
        write_atomically(folder / FILE_NAME, loaded.points.to_json().encode())
    else:
        loaded.save_pretrained(folder)
    if args.show:
        draw_search(loaded.points, folder / SEARCH_NAME, Path(args.show))
        say(f"drawn: {args.show}")
    if args.json:
        print(json.dumps(asdict(loaded.points)))
        return 0
    _print_points(loaded.points, table)
    say(f"{explain_noise(points, loaded.shape)}: {folder / FILE_NAME}")
    return 0


def _holds_copy(args: argparse.Namespace, model, there) -> bool:
    """Whether --out is a copy of the model already, `there` its points; if not, it is new.

    Raises:
        ValueError: it is something else, or it is to have another clock and has other points.
    """
    from iret.weights import holds

    out = Path(args.out)
    is_copy = holds(out, model.state_dict())
    # names with a dot: what a save that was killed had not moved into place
    if not is_copy and out.is_dir() and any(path.name[0] != "." and path.name != SEARCH_NAME for path in out.iterdir()):
        raise ValueError(f"{args.out} holds something that is no copy of {args.model}; give a new folder.")
    if args.device_only and there is not None and (model.points is None or there.points != model.points.points):
        raise ValueError(
            f"{args.out} has operating points of its own; their clock is measured by `iret calibrate {args.out} --device-only`."
        )
    return is_copy


def _calibrate_bundle(args: argparse.Namespace) -> int:
    """The clock of a bundle, whose points are its model's; without torch."""
    if not args.device_only:
        raise ValueError(
            f"{args.model} is a bundle, whose points are its model's; --device-only measures its clock here, and new points "
            "are for `iret calibrate` of the model, before it is exported again."
        )
    for name, left_out in BUNDLE_LEAVES_OUT.items():
        if getattr(args, name) != left_out:
            raise ValueError(f"a bundle is timed as it is; leave out --{name.replace('_', '-')}.")
    check_folder(Path(args.model))
    session, table = measure_bundle(Path(args.model), args.engine, args.threads)
    if args.json:
        print(json.dumps(asdict(session.points)))
        return 0
    _print_points(session.points, table)
    say(f"kept in {args.model}, for ms= and joules= of a session with this engine and as many threads")
    return 0


def _find_points(args: argparse.Namespace, model, folder: Path, there):
    """Those the model has, with --device-only; else from a search on held-out images."""
    from iret.calibrate import MAX_IMAGES, calibrate, keep_clocks
    from iret.doctor import describe_device
    from iret.train.data import name_of

    if args.device_only:
        given = [word for word in ("data", "trials", "max_images") if getattr(args, word) is not None]
        if given:
            raise ValueError(f"--device-only measures the clock alone; leave out --{given[0].replace('_', '-')}.")
        if model.points is None:
            raise ValueError(
                f"{args.model} has no operating points to measure; run `iret calibrate` with --data first."
            )
        return model.points
    if args.data is None:
        raise ValueError(
            "operating points are found on held-out images; give --data, or --device-only for the clock alone."
        )
    check_counts(args, "trials", "max_images")
    data = open_data(args, "val", model)
    most = MAX_IMAGES if args.max_images is None else args.max_images
    before, where = (model.points, args.model) if there is None else (there, folder)
    if before is not None and min(len(data), most) < before.num_images:
        say(
            f"the operating points in {where} are of {before.num_images} images; this search looks at {min(len(data), most)}, so "
            "its accuracies are less sure"
            + ("" if there is None else "; its points take the place of those (--out NEW keeps them)")
        )
    folder.mkdir(parents=True, exist_ok=True)
    points = calibrate(
        model,
        data,
        data_name=name_of(args.data),
        max_images=most,
        workers=args.workers,
        trials=TRIALS if args.trials is None else args.trials,
        memory_path=folder / SEARCH_NAME,
        say=say,
    )
    if model.points is not None and model.points.points == points.points:
        before = model.points  # whose clocks hold here, too; the folder's own are added where they do
    return keep_clocks(points, before, describe_device(model.pos_embed.device, model.precision), say)


def _print_points(points, table) -> None:
    say(f"ms and joules an image at batch 1 on {table.device}; {explain_joules(table)}")
    if not table.device.endswith(", float32"):
        say("top-1 is that of float32, in which the points were searched; `iret eval` measures this format's")
    print_table(
        ("keep thresholds", "leave at", "top-1", "of full", "p95", "ms", "p95", "mJ"),
        [
            (
                " ".join(
                    f"{keep:.3g}" if keep == refine else f"{keep:.3g}:{refine:.3g}" for keep, refine in p.thresholds
                ),
                "-" if p.exit_confidence is None else f"{p.exit_confidence:.2f}",
                f"{p.accuracy:.2%}",
                f"{p.macs_mean / points.full_macs:.1%}",
                f"{p.macs_p95 / points.full_macs:.1%}",
                f"{ms:.2f}",
                f"{ms_p95:.2f}",
                f"{1e3 * joules:.3g}",
            )
            for p, ms, ms_p95, joules in zip(points.points, table.ms_mean, table.ms_p95, table.joules, strict=True)
        ],
    )


def do_bench(args: argparse.Namespace) -> int:
    import torch

    from iret.bench import bench, save
    from iret.doctor import describe_device
    from iret.measure.latency import pin_threads
    from iret.precision import prepare
    from iret.presets import PRESETS
    from iret.zoo import create_model, load

    if args.out:
        check_unused(Path(args.out))
    device = check_device(args.device)
    set_threads(args.threads)
    check_counts(args, "rounds")
    if min(args.batch) < 1:
        raise ValueError(f"--batch {min(args.batch)} must be 1 or more.")
    models = {}
    context: AbstractContextManager = nullcontext()
    for name in args.models:
        fresh = create_model(name) if name in PRESETS else load(name)
        models[name], context = prepare(fresh.eval().to(device), args.precision)
    meter = choose_meter(args)
    with pin_threads(args.threads) as pinning, context:
        place = describe_device(torch.device(device), args.precision)
        rows, samples = bench(
            models, args.budgets, args.batch, rounds=args.rounds, seed=args.seed, meter=meter, say=say
        )
    say(f"{place}; {pinning.note}")
    if device.startswith("cuda"):
        say("thresholds make a GPU wait for the host at every transition; iret.FixedCounts does not: docs/gpu.md")
    if args.out:
        save(Path(args.out), shlex.join(["iret", *args.words]), rows, samples)
        say(f"kept: {args.out}")
    if args.json:
        print(json.dumps({"device": place, "rows": [asdict(row) for row in rows]}))
        return 0
    _print_rows(rows)
    return 0


def _print_rows(rows) -> None:
    print_table(
        ("model", "batch", "budget", "of full", "ms p50", "ms p95", "images/s", "times faster", "share", "mJ/image"),
        [
            (
                row.model,
                str(row.batch),
                f"{row.budget:g}",
                f"{row.macs_share:.1%}",
                f"{row.ms_p50:.2f}",
                f"{row.ms_p95:.2f}",
                f"{row.images_per_s:.1f}",
                f"{row.speedup:.2f}",
                f"{row.share:.2f}",
                f"{1e3 * row.joules:.3g}{' (faint)' if row.is_faint else ''}",
            )
            for row in rows
        ],
    )
    say(
        f"{explain_joules(rows[0])}; images/s and times faster by the mean of all rounds; share: times faster, over the MACs of "
        "the full run / MACs"
    )


def do_simulate(args: argparse.Namespace) -> int:
    from iret.simulate import Day, Thermal, best_of, draw, simulate

    check_picture(args.show)
    check_above_zero(args, "hours", "rate", "battery_wh", "busy", "max_celsius", "kelvin_per_watt")
    check_idle_watts(args.idle_watts)
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} must be 0 or more.")
    if args.busy > 1:
        raise ValueError(f"--busy {args.busy:g} is above 1; it is the share of the stated images that come.")
    points, table = _clocked(args)
    menu = points.menu(table.device, args.idle_watts)
    images = 3600 * args.hours * args.rate
    halfway = 3600 * args.hours * menu.idle_watts + images * (min(table.joules) + max(table.joules)) / 2
    day = Day(
        hours=args.hours,
        images_per_second=args.rate,
        battery_joules=halfway if args.battery_wh is None else 3600 * args.battery_wh,
        arrivals=args.arrivals,
        busy=args.busy,
        thermal=Thermal(kelvin_per_watt=args.kelvin_per_watt),
        seed=args.seed,
    )
    goal = day.goal() if args.max_celsius is None else day.goal(max_celsius=args.max_celsius)
    outcomes = simulate(menu, goal, day)
    if args.show:
        draw(outcomes, Path(args.show), f"{args.model}: {args.hours:g} h, {args.arrivals} arrivals", args.max_celsius)
        say(f"drawn: {args.show}")
    notes = explain_rate(args.rate, table.device, menu.ms) + explain_idle(args.battery_wh, args.hours, menu.idle_watts)
    if args.clock is None and table.device != _here():
        notes.insert(0, f"there is no clock of {_here()}; {_remedy(args.model, '--device-only')} measures it")
    if args.json:
        rows = [{name: value for name, value in asdict(outcome).items() if name != "series"} for outcome in outcomes]
        found = {"model": args.model, "device": table.device, "arrivals": day.arrivals, "battery_j": day.battery_joules}
        found |= {"energy_source": table.energy_source, "energy_kind": table.energy_kind, "idle_watts": menu.idle_watts}
        print(json.dumps({**found, "battery_is_given": args.battery_wh is not None, "outcomes": rows, "notes": notes}))
        return 0
    say(_explain_battery(args, day.battery_joules, menu.idle_watts))
    stated = 3600 * args.hours * args.rate
    say(f"{args.arrivals} arrivals: {outcomes[0].images} images come, of {stated:.0f} stated (--arrivals, --busy)")
    say(f"costs of {table.device}; {explain_joules(table)}; right answers are expected from held-out accuracy")
    say("a fixed budget is one operating point for every image")
    for note in notes:
        say(note)
    _print_outcomes(outcomes)
    say(_sum_up(outcomes[0], best_of(outcomes[1:])))
    return 0


def _print_outcomes(outcomes) -> None:
    print_table(
        ("policy", "hours", "lasts", "answered", "right", "right of all", "energy (J)", "peak C"),
        [
            (
                outcome.policy,
                f"{outcome.hours:.1f}",
                "yes" if outcome.lasts else "no",
                str(outcome.answered),
                f"{outcome.correct:.0f}",
                f"{outcome.correct / outcome.images:.2%}",
                f"{outcome.energy_j:.3g}",
                f"{outcome.peak_celsius:.1f}",
            )
            for outcome in outcomes
        ],
    )


def _sum_up(controller, best) -> str:
    """The controller beside the best fixed budget that keeps the goal, or None."""
    said = f"the controller {controller.life}, {controller.correct:.0f} right"
    if controller.hot:
        said += f", {controller.hot} of its images above the cap"
    if best is None:
        return said + "; no fixed budget keeps the goal"
    policy = best.policy.removeprefix("fixed ")
    return said + f"; of the fixed budgets that keep the goal, {policy} has the most, {best.correct:.0f}"


def _explain_battery(args: argparse.Namespace, joules: float, idle_watts: float) -> str:
    """Of `iret simulate`: how large it is and who says so, and what of it no budget can save."""
    said = f"a battery of {joules / 3600:.3g} Wh"
    if args.battery_wh is None:
        said += ", chosen halfway between what the day takes at the cheapest and at the dearest point (--battery-wh)"
    idle_wh = args.hours * idle_watts
    return said + (f"; the idle device takes {idle_wh:.3g} Wh ({idle_watts:g} W) in the day" if idle_wh else "")


def _clocked(args: argparse.Namespace):
    """The model's operating points, and the columns of the device that was named; else the only ones, or those of this device."""
    from iret.zoo import load

    points = load(args.model).points
    if points is None:
        raise ValueError(f"{args.model} has no operating points; find them with {_remedy(args.model, '--data DATA')}.")
    if not points.devices:
        raise ValueError(f"{args.model} has no clock; measure it with {_remedy(args.model, '--device-only')}.")
    if args.clock is None and len(points.devices) > 1 and _here() not in [table.device for table in points.devices]:
        known = "; ".join(repr(table.device) for table in points.devices)
        raise ValueError(f"{args.model} has several clocks, and none of {_here()}; name one with --clock: {known}.")
    if args.clock is not None or len(points.devices) > 1:
        return points, points.table_of(args.clock or _here())
    return points, points.devices[0]


def _remedy(model: str, words: str) -> str:
    """A command that calibrates: in place if the model is a folder of the user's, else into a new one."""
    return f"`iret calibrate {model} {words}{'' if Path(model).is_dir() else ' --out FOLDER'}`"


def _here() -> str:
    """This device, as a table names it."""
    import torch

    from iret.doctor import describe_device

    return describe_device(torch.device("cpu"), "float32")
