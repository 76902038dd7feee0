"""`export`: a model that is there becomes files for another engine."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from iret.verbs.console import open_data, say, set_threads


def do_export(args: argparse.Namespace) -> int:
    from iret.export.bundle import export
    from iret.runtime.bundle import ENGINES
    from iret.zoo import load

    if args.max_images < 1:
        raise ValueError(f"--max-images {args.max_images} must be 1 or more.")
    set_threads(1)  # tracing is not parallel, and two pools of threads slow each other
    model, out, images = load(args.model), Path(args.out), None
    if args.data is not None:
        from iret.train.data import make_loader

        held_out = open_data(args, "val", model)
        pixels, _, _ = next(make_loader(held_out, args.max_images, seed=0, epoch=0, shuffle=True, drop_last=False))
        images = model.normalise(pixels.float() / 255)
    bundle, parity = export(
        model,
        out,
        args.format,
        single_graph=args.single_graph,
        buckets=args.buckets,
        int8=args.int8,
        images=images,
        say=say,
    )
    size = sum((out / name).stat().st_size for name in bundle.checksums)
    if args.json:
        print(json.dumps({"bundle": str(out), "files": [*bundle.checksums], "bytes": size, "check": asdict(parity)}))
    else:
        say(str(parity))
        say(f"{out}: {len(bundle.checksums)} files, {size / 1e6:.1f} MB, runs on {' or '.join(ENGINES[bundle.kind])}")
    return 0
