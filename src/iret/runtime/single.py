"""A bundle of one graph: everything in one call an image, which chooses inside.

Read first: `session`. The graph: `iret.export.graphs.SingleGraph`.
"""

import numpy as np

from iret.runtime.cost import Shape
from iret.runtime.record import Record
from iret.runtime.stage import Batch, Stage


def run_single(
    stage: Stage, images: Batch, shape: Shape, strengths: np.ndarray
) -> tuple[Record, np.ndarray, np.ndarray]:
    """The record, logits [S, B, classes] (NaN but for the last head) and importance [S - 1, B, rows, columns].

    As in a run of stages, importance is NaN everywhere where no image has a threshold: nothing was chosen.
    """
    batch, num_stages = len(images.images), len(shape.depths)
    record = Record(shape, batch)
    stage_logits = np.full((num_stages, batch, shape.num_classes), np.nan, np.float32)
    importance = np.full((num_stages - 1, batch, shape.num_patches), np.nan)
    for row in range(batch):
        logits, kept, refined, seen = stage.call(images, [images.images[row, None], strengths[row].astype(np.float32)])
        stage_logits[-1, row] = logits[0]
        record.kept[:, row], record.refined[:, row] = kept > 0, refined > 0
        if strengths.any():
            importance[:, row] = np.where(record.kept[:-1, row], seen, np.nan)
    record.stages_run = num_stages
    return record, stage_logits, importance.reshape(num_stages - 1, batch, *shape.grid)
