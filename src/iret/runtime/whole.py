"""One image of which everything is kept, with its stages joined into one graph: for engines that run fixed sizes faster.

Read first: `session`. The joining: `engines`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from iret.runtime.choice import Layout
from iret.runtime.cost import Shape
from iret.runtime.engines import Graph, Place
from iret.runtime.record import Record
from iret.runtime.stage import Batch

Join = Callable[[Sequence[Path], Sequence[Sequence[Place]], int | None], Graph]


class Whole:
    """The joined graph of a bundle of stages. It holds the weights once more, so it is made when it is first needed."""

    def __init__(self, join: Join, paths: Sequence[Path], shape: Shape, threads: int | None) -> None:
        """`paths`: the graphs of the stages, which take any number of tokens."""
        cell, side = Layout.whole(1, shape.num_patches).cell_T[:, None], shape.patch_size
        pixels = (len(cell), shape.in_chans, side, side)
        later = (None, cell, pixels, np.arange(len(cell))[:, None], np.zeros((1, len(cell)), np.float32))
        images = (1, shape.in_chans, *shape.img_size)
        self._shape = shape
        self._graph = join(paths, [(images,), *[later] * (len(paths) - 1)], threads)

    def run(self, batch: Batch) -> tuple[Record, np.ndarray, np.ndarray]:
        """As a run of stages on one image: the record, logits [S, 1, classes], importance, which is NaN."""
        shape = self._shape
        num_stages, layout, record = len(shape.depths), Layout.whole(1, shape.num_patches), Record(shape, 1)
        pixels = batch.read(layout.cell_T[1:], len(layout.cell_T))
        logits = batch.call(self._graph, [batch.images, *[pixels] * (num_stages - 1)])
        for stage in range(num_stages):
            record.add(stage, layout, None)
        return record, np.stack(logits), np.full((num_stages - 1, 1, *shape.grid), np.nan)
