"""The `iret` command: parses, calls the verb, and turns a user's mistake into one sentence and exit status 2.

Nothing heavy is imported before a verb needs it.
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from iret.arguments import build_parser
from iret.verbs import dial, learning, looking, paging, serving, shipping
from iret.verbs.console import fail

VERBS = {
    "predict": looking.do_predict,
    "train": learning.do_train,
    "eval": learning.do_evaluate,
    "calibrate": dial.do_calibrate,
    "narrow": learning.do_narrow,
    "bench": dial.do_bench,
    "simulate": dial.do_simulate,
    "export": shipping.do_export,
    "serve": serving.do_serve,
    "page": paging.do_page,
    "card": learning.do_card,
    "demo": looking.do_demo,
    "list": looking.do_list,
    "doctor": looking.do_doctor,
}


def end(number: int, _: object) -> NoReturn:
    """Leave on a signal as on a mistake, so that what was begun is cleared away on the way out."""
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    args.words = words
    # libgomp's barriers spin, which slows two threads 10 to 30 times beside another busy process; read when torch loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)
    try:
        return VERBS[args.verb](args)
    except KeyboardInterrupt:
        return fail("stopped.", 130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "iret":
            raise
        return fail(f"this needs {error.name}, which is not installed; pip install 'iret[torch]'.")
    except (ValueError, ImportError, OSError) as error:
        return fail(str(error))


if __name__ == "__main__":
    sys.exit(main())
