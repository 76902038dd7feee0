"""`page`: a bundle becomes a static site that runs it in the visitor's browser."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from iret.verbs.console import say


def do_page(args: argparse.Namespace) -> int:
    from iret.serve.site import build_site

    runtime = None if args.runtime is None else Path(args.runtime)
    photos = None if args.photos is None else [Path(each) for each in args.photos]
    site = build_site(Path(args.bundle), Path(args.out), runtime=runtime, photos=photos)
    if args.json:
        print(json.dumps({"site": args.out, "bytes": asdict(site)}))
    else:
        parts = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in asdict(site).items())
        say(f"{args.out}: {site.total / 1e6:.1f} MB ({parts})")
        say(f"serve it from anywhere, for one: python -m http.server --bind 127.0.0.1 --directory {args.out}")
    return 0
