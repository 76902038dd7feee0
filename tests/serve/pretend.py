"""What stands in for a session: answers at once, by rules a reader can do in the head. Also a server of such sessions.

Of 16 patches, budget b keeps 16 b in the second and third stage and costs b of the full MACs. Logits: (mean of the image, 0, 1).
"""

import io
import os
import signal
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
from PIL import Image

from iret.runtime.cost import Shape, full_macs
from iret.runtime.points import OperatingPoints, Point, Setting
from iret.runtime.preprocess import Preprocess
from iret.runtime.session import LACKING
from iret.serve.computer import Computer
from iret.serve.server import Options, run
from iret.serve.worker import Worker

SHAPE = Shape(
    img_size=(16, 16), patch_size=4, in_chans=3, num_classes=3, embed_dims=(8, 16, 24), depths=(1, 1, 1), head_dim=8
)
FULL = full_macs(SHAPE)


def point(share: float, accuracy: float, confidence: float | None = None) -> Point:
    return Point(
        thresholds=((1 - share, 1 - share),) * 2,
        exit_confidence=confidence,
        accuracy=accuracy,
        macs_mean=share * FULL,
        macs_p95=share * FULL,
        kept_mean=(16.0, 16 * share, 16 * share),
    )


POINTS = OperatingPoints(
    data="made up", num_images=100, full_macs=FULL, points=(point(1.0, 0.9), point(0.5, 0.8), point(0.25, 0.7, 0.9))
)


class PretendSession:
    """Notes its calls in `calls`: images, then the settings."""

    def __init__(self, points: OperatingPoints | None = POINTS, *, is_single: bool = False) -> None:
        preprocess = Preprocess(img_size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
        self.bundle = SimpleNamespace(name="pretend", is_single=is_single, precision="float32", preprocess=preprocess)
        self.shape, self.labels, self.points = SHAPE, ("a", "b", "c"), points
        self.engine, self.device, self.threads = "pretended", "nowhere, pretended, 1 thread, float32", 1
        self.lacking = LACKING
        self.calls: list[dict] = []

    def setting(self, budget: float) -> Setting:
        return self.points.setting(budget) if self.points else Setting()

    def budget_for(self, *, ms=None, joules=None) -> float:
        return self.points.budget_for(self.device, ms=ms, joules=joules)

    def __call__(self, images, budget=None, *, exit_confidence=None, deadline_ms=None) -> SimpleNamespace:
        self.calls.append(dict(batch=len(images), budget=budget, exits=exit_confidence, deadline_ms=deadline_ms))
        if (images > 100).any():
            raise RuntimeError("/secret/path: a bug")
        batch = len(images)
        if (images < -100).any():  # an image that takes its worker down
            os.kill(os.getpid(), signal.SIGKILL)
        budgets = np.broadcast_to(1.0 if budget is None else budget, batch)
        last = 0 if deadline_ms is not None and deadline_ms < 10 else 2
        kept = np.zeros((3, batch, 16), bool)
        kept[0] = True
        for stage in range(1, last + 1):
            kept[stage] = np.arange(16) < np.round(16 * budgets)[:, None]
        stage_logits = np.full((3, batch, 3), np.nan, np.float32)
        stage_logits[: last + 1] = np.stack(
            [images.mean((1, 2, 3)), np.zeros(batch, np.float32), np.ones(batch, np.float32)], axis=1
        )
        grids = kept.reshape(3, batch, 4, 4)
        trace = SimpleNamespace(
            stage_logits=stage_logits,
            exit_stage=np.full(batch, last),
            kept=grids,
            refined=grids & (np.arange(3) > 0)[:, None, None, None],
        )
        return SimpleNamespace(
            logits=stage_logits[last],
            macs=np.round(budgets * FULL).astype(np.int64),
            trace=trace,
            engine_s=0.001,
            budget=np.asarray(budgets),
        )


def make_computer(**options) -> Computer:
    return Computer(PretendSession(), **{"max_pixels": 10_000, **options})


def photo(side: int = 16, value: int = 128, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value,) * 3).save(file, kind)
    return file.getvalue()


if __name__ == "__main__":
    options = Options(port=0, workers=int(sys.argv[1]), max_batch=4)
    sys.exit(1 if run(partial(Worker, make_computer), options, lambda text: print(text, flush=True)) else 0)
