"""One image of which everything is kept, with its stages joined into one graph: for engines that run fixed sizes faster.

Read first: `session`. The joining: `engines`.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock

import numpy as np

from iret.runtime.bundle import Bundle
from iret.runtime.choice import Layout
from iret.runtime.engines import Graph, Place
from iret.runtime.record import Record
from iret.runtime.stage import Batch

Join = Callable[[Sequence[Path], Sequence[Sequence[Place]], int | None], Graph]

log = logging.getLogger(__name__)


class Whole:
    """The joined graph of a bundle of stages. It holds the weights once more, so it is made when it is first needed."""

    def __init__(self, join: Join, folder: Path, bundle: Bundle, threads: int | None) -> None:
        """`bundle`, in `folder`: of stages whose graphs take any number of tokens."""
        self._join, self._folder, self._bundle, self._threads = join, folder, bundle, threads
        self._graph: Graph | None = None
        self._is_given_up, self._in_turn = False, Lock()

    @property
    def is_made(self) -> bool:
        return self._graph is not None

    def make(self) -> bool:
        """Whether there is a graph to run now. What cannot be made, for want of memory or of the files, is not tried again."""
        with self._in_turn:
            if self._graph is None and not self._is_given_up:
                try:
                    self._bundle.verify(self._folder)  # by now the folder may hold another bundle
                    self._graph = self._joined()
                except (ValueError, RuntimeError, OSError, MemoryError) as error:
                    self._is_given_up = True
                    log.warning("stages are run one by one, because they could not be joined: %s", error)
        return self.is_made

    def _joined(self) -> Graph:
        shape = self._bundle.shape
        cell, side = Layout.whole(1, shape.num_patches).cell_T[:, None], shape.patch_size
        pixels, source = (len(cell), shape.in_chans, side, side), np.arange(len(cell), dtype=np.int64)[:, None]
        first, later = (
            [(1, shape.in_chans, *shape.img_size)],
            [None, cell, pixels, source, np.zeros(cell.T.shape, np.float32)],
        )
        paths = [self._folder / graphs[0].file for graphs in self._bundle.stages]
        return self._join(paths, [first, *[later] * (len(paths) - 1)], self._threads)

    def run(self, batch: Batch) -> tuple[Record, np.ndarray]:
        """As a run of stages on one image: the record and logits [S, 1, classes]."""
        assert self._graph is not None
        shape = self._bundle.shape
        num_stages, layout, record = len(shape.depths), Layout.whole(1, shape.num_patches), Record(shape, 1)
        pixels = batch.read(layout.cell_T[1:], len(layout.cell_T))
        logits = batch.call(self._graph, [batch.images, *[pixels] * (num_stages - 1)])
        for stage in range(num_stages):
            record.add(stage, layout, None)
        return record, np.stack(logits)
