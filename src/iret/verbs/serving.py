"""`serve`: a bundle over HTTP."""

import argparse
import math
from pathlib import Path

from iret.verbs.console import measure_bundle, say


def do_serve(args: argparse.Namespace) -> int:
    try:
        from iret.serve.guard import read_key
        from iret.serve.server import Options, count_cores, run
        from iret.serve.service import Limits
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "iret":
            raise
        raise ValueError(f"this needs {error.name}, which is not installed; pip install 'iret[serve]'.") from error
    from iret.runtime.bundle import Bundle
    from iret.serve.computer import Supply
    from iret.serve.worker import starter

    for name in ("threads", "rate", "battery_wh", "queue", "max_body_mb", "max_pixels", "timeout_s"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value:g} must be above 0 and finite.")
    limits = Limits(
        queue=args.queue,
        body_bytes=max(1, round(1e6 * args.max_body_mb)),
        max_pixels=args.max_pixels,
        timeout_s=args.timeout_s,
    )
    options = Options(
        host=args.host,
        port=args.port,
        workers=max(1, count_cores() // args.threads) if args.workers is None else args.workers,
        max_batch=args.max_batch,
        batch_wait_s=args.batch_wait_ms / 1e3,
        limits=limits,
        api_key=read_key(args.api_key),
    )
    folder = Path(args.bundle)
    bundle = Bundle.read(folder)
    bundle.verify(folder)
    if args.measure:
        measure_bundle(folder, args.engine, args.threads)
    supply = Supply(battery_wh=args.battery_wh, images_per_second=args.rate)
    start = starter(folder, args.engine, args.threads, max_pixels=limits.max_pixels, supply=supply)
    return 0 if run(start, options, say) == 0 else 1
