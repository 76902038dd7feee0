"""A bundle of one graph: everything in one call an image, which chooses inside.

Read first: `session`. The graph: `iret.export.graphs.SingleGraph`.
"""

import numpy as np

from iret.runtime.choice import Layout
from iret.runtime.cost import Shape
from iret.runtime.record import Record
from iret.runtime.stage import Batch, Stage


def run_single(stage: Stage, images: Batch, shape: Shape, strengths: np.ndarray) -> tuple[Record, np.ndarray]:
    """The record and logits [S, B, classes] (NaN but for the last head).

    As in a run of stages, no importance is noted where no image has a threshold: nothing was chosen.
    """
    batch, num_stages = len(images.images), len(shape.depths)
    record = Record(shape, batch)
    stage_logits = np.full((num_stages, batch, shape.num_classes), np.nan, np.float32)
    kept, refined = np.empty((2, num_stages, batch, shape.num_patches), dtype=bool)
    importance = np.empty((num_stages - 1, batch, shape.num_patches))
    for row in range(batch):
        logits, *grids, seen = stage.call(images, [images.images[row, None], strengths[row].astype(np.float32)])
        stage_logits[-1, row], importance[:, row] = logits[0], seen
        kept[:, row], refined[:, row] = (grid > 0 for grid in grids)
    for index, grid in enumerate(kept):
        layout = Layout.of(grid)
        record.add(index, layout, layout.pack(refined[index]))
        if index < len(importance) and strengths.any():
            record.see(index, layout, layout.pack(importance[index]))
    return record, stage_logits
