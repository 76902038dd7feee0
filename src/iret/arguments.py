"""The words of the `iret` command: what each verb takes. What they do is in `cli`."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from iret.runtime.bundle import ENGINES
from iret.runtime.points import BUDGETS, PRECISIONS

DEFAULT_MODEL = "iret_pico-cifar10"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as all else does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"iret: {message}; `{self.prog} --help` says what it takes.\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; `verb` in what it parses is the name of the verb."""
    from iret import __version__

    parser = _Parser(prog="iret", description="A vision transformer whose cost is a dial.")
    parser.add_argument("--version", action="version", version=f"iret {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    _add_predict(verbs)
    _add_train(verbs)
    _add_eval_and_calibrate(verbs)
    _add_narrow(verbs)
    _add_bench(verbs)
    _add_simulate(verbs)
    _add_export(verbs)
    _add_serve(verbs)
    _add_page(verbs)
    card = _verb(verbs, "card", "measure a model folder and write its model card")
    card.add_argument("model", help="model folder")
    card.add_argument("--data", required=True, help="as for train; its test images are used")
    card.add_argument("--name", help="title (default: the folder's name)")
    card.add_argument("--max-images", type=int)
    _add_data(card)
    _add_common(card)

    demo = _verb(verbs, "demo", "shipped models on embedded images at five budgets")
    demo.add_argument("--out", default="demo", help="folder for the pictures (default demo)")
    _verb(verbs, "list", "shipped checkpoints and presets").add_argument("--json", action="store_true")
    _verb(verbs, "doctor", "versions, devices, what is missing").add_argument("--json", action="store_true")
    return parser


def _add_predict(verbs) -> None:
    predict = _verb(verbs, "predict", "label photos within a budget")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="path of a photo")
    predict.add_argument("--model", default=DEFAULT_MODEL, help="shipped name, folder or hub id (default %(default)s)")
    dial = predict.add_mutually_exclusive_group()
    dial.add_argument("--budget", type=float, help="share of the full model's MACs, in (0, 1]")
    dial.add_argument(
        "--ms", type=float, help="the best within so many milliseconds an image, in the mean, on this device"
    )
    dial.add_argument(
        "--joules", type=float, help="the best within so many joules an image, in the mean, on this device"
    )
    _add_threshold(dial)
    _add_goal(dial, predict)
    _add_exit(predict)
    _add_precision(predict)
    predict.add_argument("--show", metavar="PNG", help="draw what was looked at")
    _add_common(predict)


def _add_train(verbs) -> None:
    train = _verb(verbs, "train", "train or fine-tune a model")
    train.add_argument(
        "--data", required=True, help="image folder, parquet file or folder, hub id, or cluttered-digits"
    )
    train.add_argument("--recipe", help="named recipe (default: images_tiny, or fine_tune with --init)")
    train.add_argument("--out", help="run folder (default out/RECIPE)")
    train.add_argument("--init", metavar="MODEL", help="start from this model; classes and size may differ")
    train.add_argument(
        "--img-size", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="pixels, instead of the model's"
    )
    train.add_argument("--resume", action="store_true", help="go on with the run in --out")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--steps", type=int, help="length of the run, instead of the recipe's epochs")
    train.add_argument("--stop-after", type=float, metavar="MINUTES", help="end this leg early; go on with --resume")
    train.add_argument("--checkpoint-minutes", type=float, default=5.0, help="save at least this often (default 5)")
    _add_data(train)
    _add_common(train, "auto")


def _add_eval_and_calibrate(verbs) -> None:
    evaluate = _verb(verbs, "eval", "accuracy and cost on labelled images")
    evaluate.add_argument("model", help="shipped name, folder or hub id")
    evaluate.add_argument("--data", required=True, help="as for train")
    evaluate.add_argument("--split", choices=("train", "val", "test"), default="test")
    dial = evaluate.add_mutually_exclusive_group()
    dial.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="default: %(default)s")
    _add_threshold(dial)
    _add_exit(evaluate)
    evaluate.add_argument("--rule", default="threshold", help="keep rule: threshold, mass or topk")
    evaluate.add_argument("--control", default="attention", help="choose by attention, random or inverse")
    _add_precision(evaluate)
    evaluate.add_argument("--batch-size", type=int, default=100)
    evaluate.add_argument("--max-images", type=int)
    _add_data(evaluate)
    _add_common(evaluate)

    calibrate = _verb(verbs, "calibrate", "measure the operating points that --budget needs")
    calibrate.add_argument("model", help="model folder; with --device-only also an exported bundle")
    calibrate.add_argument("--data", help="as for train; its held-out images are used")
    calibrate.add_argument("--device-only", action="store_true", help="measure the clock of this device alone; no data")
    calibrate.add_argument("--engine", help="of a bundle (default: the first that runs its kind)")
    calibrate.add_argument("--out", help="model folder to write (default: MODEL, if it is a folder)")
    calibrate.add_argument("--trials", type=int, help="courses through thresholds to try (default 8)")
    calibrate.add_argument("--max-images", type=int, help="held-out images at most (default 5000)")
    calibrate.add_argument("--show", metavar="PNG", help="draw the search and what it found")
    _add_data(calibrate)
    _add_clock(calibrate)
    _add_precision(calibrate)
    _add_common(calibrate)


def _add_narrow(verbs) -> None:
    narrow = _verb(
        verbs, "narrow", "take channels out of a trained model's MLPs: fewer weights and MACs at every budget"
    )
    narrow.add_argument("model", help="shipped name, folder or hub id")
    narrow.add_argument(
        "--mlp-ratio", type=float, required=True, help="width inside an MLP over its tokens'; most have 4"
    )
    narrow.add_argument("--data", required=True, help="as for train: training images to fit, held-out ones to check")
    narrow.add_argument("--out", required=True, help="model folder to write, new or empty")
    narrow.add_argument("--max-images", type=int, default=1000, help="to fit and to check, each (default %(default)s)")
    narrow.add_argument("--threads", type=int, help="that torch computes with (default: as it likes)")
    _add_data(narrow)
    _add_common(narrow)


def _add_simulate(verbs) -> None:
    day = _verb(verbs, "simulate", "play a day on battery: the controller against fixed budgets")
    day.add_argument("model", help="shipped name, folder or hub id, with a clock (iret calibrate)")
    day.add_argument("--hours", type=float, default=24.0, help="that the battery must last (default 24)")
    day.add_argument("--rate", type=float, default=1.0, help="images a second, in the mean of the day (default 1)")
    day.add_argument(
        "--battery-wh",
        type=float,
        help="default: halfway between what the day takes at the cheapest and the dearest point",
    )
    day.add_argument("--arrivals", choices=("steady", "office", "bursts"), default="office", help="default %(default)s")
    day.add_argument("--busy", type=float, default=0.9, help="share of the stated images that come (default 0.9)")
    day.add_argument("--idle-watts", type=float, help="that the device draws always (default: as measured, else 0)")
    day.add_argument("--max-celsius", type=float, help="temperature to stay under")
    day.add_argument("--kelvin-per-watt", type=float, default=8.0, help="of the device's case (default 8)")
    day.add_argument("--clock", help="device whose columns are played (default: the only one, or this one)")
    day.add_argument("--seed", type=int, default=0, help="of arrivals and noise")
    day.add_argument("--show", metavar="PNG", help="draw battery, budget and accuracy over the day")
    day.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _add_bench(verbs) -> None:
    bench = _verb(verbs, "bench", "time and energy against the budget, on this machine")
    bench.add_argument("models", nargs="+", metavar="MODEL", help="shipped name, preset, folder or hub id")
    bench.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="default: %(default)s")
    bench.add_argument("--batch", type=int, nargs="+", default=(1,), help="batch sizes (default 1)")
    bench.add_argument("--rounds", type=int, default=20, help="timed runs of each (default 20)")
    bench.add_argument("--seed", type=int, default=0, help="of the order of the runs and the images replayed")
    bench.add_argument("--out", metavar="FOLDER", help="keep the table and the raw samples there")
    _add_clock(bench)
    _add_precision(bench)
    bench.set_defaults(threads=1)
    _add_common(bench)


def _add_export(verbs) -> None:
    export = _verb(verbs, "export", "write a bundle that runs without torch: graphs, table, preprocessing, labels")
    export.add_argument("model", help="shipped name, folder or hub id")
    export.add_argument("--format", choices=tuple(ENGINES), default="onnx", help="of the graphs (default %(default)s)")
    export.add_argument("--out", required=True, metavar="FOLDER", help="new, or an older bundle to replace")
    export.add_argument("--single-graph", action="store_true", help="one graph, thresholds among its inputs; batch 1")
    export.add_argument("--int8", action="store_true", help="by the engine's own quantiser, calibrated on --data")
    export.add_argument(
        "--convolutions",
        action="store_true",
        help="linear layers of stages 256 wide or more as 1x1 convolutions: for ONNX Runtime on x86, fp32 alone",
    )
    export.add_argument(
        "--buckets",
        type=_read_counts,
        default=(),
        metavar="N,N,...",
        help="graphs for these numbers of patches alone, for accelerators of static shapes",
    )
    export.add_argument("--data", help="as for train; check, and calibrate int8, on its images")
    export.add_argument("--max-images", type=int, help="of --data (default 64)")
    _add_data(export)
    export.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _add_page(verbs) -> None:
    page = _verb(verbs, "page", "write a static page that runs a bundle in the visitor's browser")
    page.add_argument("bundle", help="folder that iret export --format onnx wrote")
    page.add_argument("--out", required=True, help="folder of the site to write")
    page.add_argument("--runtime", metavar="FOLDER", help="an unpacked onnxruntime-web (default: fetched with npm)")
    page.add_argument("--photos", nargs="+", metavar="FILE", help="examples to try (default: those that ship)")
    page.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _add_serve(verbs) -> None:
    serve = _verb(verbs, "serve", "answer requests over HTTP from a bundle, each at its own budget")
    serve.add_argument("bundle", metavar="BUNDLE", help="folder that iret export wrote")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="0: any that is free (default %(default)s)")
    serve.add_argument("--engine", help="default: the first that runs this kind of bundle")
    serve.add_argument("--workers", type=int, help="processes that compute (default: cores / threads)")
    serve.add_argument("--threads", type=int, default=1, help="of each worker (default %(default)s)")
    batch = serve.add_argument_group("batches")
    batch.add_argument("--max-batch", type=int, default=16, help="images computed together (default %(default)s)")
    batch.add_argument("--batch-wait-ms", type=float, default=2.0, help="for more of them (default %(default)s)")
    limits = serve.add_argument_group("limits")
    limits.add_argument("--queue", type=int, default=64, help="images in the house; then 429 (default %(default)s)")
    limits.add_argument("--max-body-mb", type=float, default=10.0, help="of a request (default %(default)s)")
    limits.add_argument("--max-pixels", type=int, default=25_000_000, help="of a photo (default %(default)s)")
    limits.add_argument("--timeout-s", type=float, default=10.0, help="from request to answer (default %(default)s)")
    limits.add_argument("--api-key", metavar="KEY", help="that clients must show; env: taken from $IRET_API_KEY")
    costs = serve.add_argument_group("what things cost, for ms, joules and battery_percent")
    costs.add_argument("--measure", action="store_true", help="measure this machine's clock first; BUNDLE keeps it")
    costs.add_argument("--battery-wh", type=float, help="of the full battery (default: 24 hours at full budget)")
    costs.add_argument("--rate", type=float, default=1.0, help="images a second that it must last for (default 1)")


def _verb(verbs, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary)
    return parser


def _add_threshold(parser) -> None:
    parser.add_argument(
        "--threshold",
        nargs="+",
        metavar="T",
        help="times uniform attention: one number for all transitions, or one entry each, keep or keep:refine",
    )


def _add_exit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--exit-confidence",
        type=float,
        help="answer at the first stage this sure, in [0, 1], whatever the budget's own; above 1 none is",
    )


def _add_goal(dial, parser: argparse.ArgumentParser) -> None:
    dial.add_argument("--battery", type=float, metavar="HOURS", help="let a controller choose: it must last so long")
    goal = parser.add_argument_group("with --battery, or alone: goals of the controller")
    goal.add_argument("--rate", type=float, help="images a second that the battery must last for")
    goal.add_argument(
        "--battery-wh", type=float, help="of the full battery, where the gauge tells a percentage or nothing"
    )
    goal.add_argument(
        "--idle-watts", type=float, help="that the device draws always (default: as iret calibrate measured, or 0)"
    )
    goal.add_argument("--deadline", type=float, metavar="MS", help="for 95 of 100 images")
    goal.add_argument("--max-celsius", type=float, help="to stay under; without a sensor, the cheapest point is served")
    goal.add_argument("--min-accuracy", type=float, help="in (0, 1], by the table; yields to the other goals")


def _add_clock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--meter", default="auto", help="source of joules; `iret doctor` lists them (default auto)")
    parser.add_argument(
        "--battery-wh", type=float, help="of the full battery, for --meter battery where its gauge is a percentage"
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument(
        "--on-corrupt", choices=("skip", "stop"), default="skip", help="what to do with unreadable images"
    )
    parser.add_argument("--label-column", help="column of the labels, if it has an unusual name")


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of the products (default %(default)s); float32-onednn, which is faster on some processors, and int8 on a CPU alone",
    )
    parser.add_argument(
        "--threads",
        type=int,
        help="that torch computes with, up to the processors here (default: as it likes; bench: 1)",
    )


def _add_common(parser: argparse.ArgumentParser, device: str = "cpu") -> None:
    parser.add_argument("--device", default=device, help="cpu, cuda or mps (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _read_counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 32,64") from error


def read_thresholds(words: Sequence[str]) -> object:
    """`["1.0"]` -> 1.0 for all transitions; `["1.0", "1.2:1.5"]` -> (1.0, (1.2, 1.5)), one entry per transition.

    Raises:
        ValueError: a word that is not a number or keep:refine.
    """
    entries: list[float | tuple[float, ...]] = []
    for word in words:
        try:
            numbers = [float(part) for part in word.split(":")]
        except ValueError as error:
            raise ValueError(f"threshold {word!r} is not a number or keep:refine, e.g. 1.0 or 1.2:1.5.") from error
        if len(numbers) > 2:
            raise ValueError(f"threshold {word!r} has {len(numbers)} parts; write keep or keep:refine.")
        entries.append(numbers[0] if len(numbers) == 1 else tuple(numbers))
    return entries[0] if len(entries) == 1 and isinstance(entries[0], float) else tuple(entries)
