"""What a run shows and writes while it goes, and how it is stopped: `Log`, `bar`, `Interrupt`."""

import csv
import ctypes
import io
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress as ProgressBar, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from iret.weights import write_atomically


class Log:
    """`log.csv` and TensorBoard; what a killed leg wrote past its last checkpoint is cut off before going on."""

    FIELDS = ("step", "lr", "loss", "ce", "ce_dropped", "kl_dropped", "lifting", "accuracy", "accuracy_threshold_1")

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / "log.csv"
        rows = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["step"] and int(row["step"]) < step]
        text = io.StringIO()
        writer = csv.DictWriter(text, self.FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue().encode())
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step)

    def write(self, step: int, lr: float, parts: dict[str, Tensor]) -> None:
        values = {"lr": lr} | {name: value.item() for name, value in parts.items() if name in self.FIELDS}
        self._append(step, values)

    def write_accuracy(self, step: int, full: float, dropped: float) -> None:
        self._append(step, {"accuracy": full, "accuracy_threshold_1": dropped})

    def _append(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.FIELDS, lineterminator="\n").writerow({"step": step, **values})
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()


@contextmanager
def bar(num_steps: int, step: int, is_shown: bool) -> Iterator:
    """A progress bar on stderr with images/s, loss and time left; yields advance(step, loss, images) and say(line).

    The bar shows on a terminal alone, what is said also in a file that stderr is sent to.
    """
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[rate]:.0f} images/s  loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(elapsed_when_finished=True, compact=True),
    )
    with ProgressBar(*columns, console=Console(stderr=True), disable=not is_shown) as shown:
        task = shown.add_task("train", total=num_steps, completed=step, rate=0.0, loss=float("nan"))
        last = time.monotonic()

        def advance(done: int, loss: float, images: int) -> None:
            nonlocal last
            now = time.monotonic()
            rate, last = images / max(now - last, 1e-9), now
            shown.update(task, completed=done, rate=rate, loss=loss)

        yield advance, partial(shown.console.print, highlight=False, soft_wrap=True)


class Interrupt:
    """Ctrl-C while it is entered: noted, for the end of the step; a second one interrupts at once."""

    def __init__(self) -> None:
        self.is_set = False

    def __enter__(self) -> None:
        self.before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.before)

    def _note(self, *_: object) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


def return_memory() -> None:
    """Give freed memory back to the system: batches of ever other sizes leave holes that glibc keeps, without end."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
