"""A bundle of one graph: everything in one call an image, which chooses inside.

Read first: `session`. The graph: `iret.export.graphs.SingleGraph`.
"""

import numpy as np

from iret.runtime.cost import Shape
from iret.runtime.record import SingleRecord
from iret.runtime.stage import Batch, Stage


def run_single(stage: Stage, images: Batch, shape: Shape, strengths: np.ndarray) -> tuple[SingleRecord, np.ndarray]:
    """What was looked at, and logits [S, B, classes] (NaN but for the last head).

    As in a run of stages, no importance is noted of an image that has no threshold: nothing was chosen.
    """
    stage_logits = np.full((len(shape.depths), len(images.images), shape.num_classes), np.nan, np.float32)
    found = []
    for row, thresholds in enumerate(strengths.astype(np.float32)):
        logits, *seen = stage.call(images, [images.images[row, None], thresholds])
        stage_logits[-1, row] = logits[0]
        found.append(list(zip(seen[0::3], seen[1::3], seen[2::3], strict=True)))
    return SingleRecord(shape, found, strengths), stage_logits
