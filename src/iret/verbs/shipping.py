"""`export`: a model that is there becomes files for another engine."""

import argparse
import json
from pathlib import Path

from iret.verbs.console import check_counts, open_data, print_table, say, set_threads

COLUMNS = ("setting", "images", "top-1 fp32", "int8", "difference", "same answer", "same patches")
MAX_IMAGES = 64  # of --data, to check and calibrate on
MAX_HELD_OUT = 1000  # images that int8, and thresholds without exits, are judged on


def do_export(args: argparse.Namespace) -> int:
    from iret.export.bundle import export
    from iret.export.form import Form
    from iret.runtime.bundle import ENGINES
    from iret.zoo import load

    check_counts(args, "max_images")
    if args.max_images is not None and args.data is None:
        raise ValueError(f"--max-images {args.max_images} is of --data; give both, or neither.")
    set_threads(1)  # tracing is not parallel, and two pools of threads slow each other
    model, out = load(args.model), Path(args.out)
    form = Form(single_graph=args.single_graph, buckets=args.buckets, int8=args.int8, convolutions=args.convolutions)
    images, held_out = (None, None) if args.data is None else _read_images(args, model)
    bundle, parity = export(
        model,
        out,
        args.format,
        form,
        images=images,
        held_out=held_out,
        say=say,
    )
    size = sum((out / name).stat().st_size for name in bundle.checksums)
    if args.json:
        answer = {"bundle": str(out), "files": [*bundle.checksums], "bytes": size, "check": parity.to_dict()}
        print(json.dumps(answer))
        return 0
    say(str(parity))
    if parity.accuracy:
        print_table(COLUMNS, [_row(each) for each in parity.accuracy])
    engines = " or, slower, ".join(ENGINES["onnx"]) if bundle.is_convolved else " or ".join(ENGINES[bundle.kind])
    say(f"{out}: {1 + len(bundle.checksums)} files, {size / 1e6:.1f} MB, runs on {engines}")
    return 0


def _read_images(args: argparse.Namespace, model):
    """Of --data's held-out images: those to check and calibrate on, as the model takes them, and others to judge on or None."""
    from iret.export.accuracy import HeldOut, split
    from iret.train.data import make_loader, name_of

    data = open_data(args, "val", model)
    most = MAX_IMAGES if args.max_images is None else args.max_images
    seen, others = split(data, most, MAX_HELD_OUT if args.int8 or args.single_graph else 0)
    pixels, _, skipped = next(make_loader(seen, len(seen), seed=0, epoch=0, shuffle=False, drop_last=False))
    if not len(pixels):
        raise ValueError(
            f"none of {skipped} images of --data {args.data} could be read; give images that can be opened."
        )
    return model.normalise(pixels.float() / 255), HeldOut(others, name_of(args.data)) if len(others) else None


def _row(each) -> tuple[str, ...]:
    """An `Accuracy` under COLUMNS."""
    if each.model is None:
        scores = ("", "", "")
    else:
        gain = f"{100 * (each.bundle - each.model):+.1f} +- {100 * each.interval:.1f}"
        scores = (f"{each.model:.1%}", f"{each.bundle:.1%}", gain)
    return each.setting, str(each.images), *scores, f"{each.same_answer:.1%}", f"{each.same_cells:.1%}"
