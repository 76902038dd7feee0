"""One stage of a bundle: packed tokens in, calls of the engine on dense groups of images, packed tokens out.

Images of similar count share a call, the shorter ones padded behind a key mask where that is cheaper than a call of their own.

Read next: `session`, which goes from stage to stage.
"""

import time

import numpy as np

from iret.runtime.bundle import Bundle, GraphFile
from iret.runtime.choice import Layout, to_starts
from iret.runtime.cost import numbers_moved, stage_macs
from iret.runtime.engines import Graph

MASKED = -1e9  # of a padded key: its weight is exactly 0, and no engine makes NaN of it
# What a call costs beside its MACs: its weights are read from memory, which takes as long as this many MACs each.
MACS_A_WEIGHT = 8


class Stage:
    """The graphs of one stage, fed from packed tokens."""

    def __init__(self, bundle: Bundle, index: int, graphs: list[tuple[GraphFile, Graph]]) -> None:
        self._shape, self._index, self._max_batch = bundle.shape, index, bundle.max_batch
        self._graphs = sorted(graphs, key=lambda each: each[0].tokens or 0)
        self.engine_s = 0.0  # of the latest `run` or `call`

    def call(self, inputs: list[np.ndarray], width: int = 0) -> list[np.ndarray]:
        """The graph that takes `width` tokens an image."""
        graph = next(graph for file, graph in self._graphs if file.tokens in (None, width))
        began = time.perf_counter()
        outputs = graph(inputs)
        self.engine_s += time.perf_counter() - began
        return outputs

    def run(
        self, images: np.ndarray, x_TD: np.ndarray, layout: Layout, refined_T: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens and received attention, packed, and logits, an image a row. `refined_T` None: every patch with a token."""
        self.engine_s = 0.0
        groups = self._groups(layout.counts)
        found = [self._run_group(group, images, x_TD, layout, refined_T) for group in groups]
        if len(found) == 1:
            return found[0]
        back = np.argsort(np.concatenate(groups))
        x, received, logits = zip(*found, strict=True)
        if self._index == len(self._shape.depths) - 1:
            return np.empty(0), np.empty(0), np.concatenate(logits)[back]
        # packed group after group; back into the order of the images
        counts = layout.counts[np.concatenate(groups)]
        pieces = np.split(np.arange(counts.sum()), to_starts(counts)[1:-1])
        rows = np.concatenate([pieces[place] for place in back])
        return np.concatenate(x)[rows], np.concatenate(received)[rows], np.concatenate(logits)[back]

    def _run_group(
        self, group: np.ndarray, images: np.ndarray, x_TD: np.ndarray, layout: Layout, refined_T: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One call for the images at these places of `layout`."""
        if not self._index:
            outputs = self.call([images[layout.images[group]]], 1 + self._shape.num_patches)
            if len(outputs) == 1:  # a model of one stage
                return np.empty(0), np.empty(0), outputs[0]
            x, received, logits = outputs
            return x.reshape(-1, x.shape[-1]), received.ravel(), logits
        counts = layout.counts[group]
        width = self._width(int(counts.max()))
        offsets = np.arange(width)
        is_live = offsets < counts[:, None]
        places = np.where(is_live, layout.starts[group][:, None] + offsets, layout.starts[group][:, None])
        cell = layout.cell_T[places]
        is_read = is_live & (cell >= 0)
        if refined_T is not None:
            is_read &= refined_T[places]
        pixels = self._pixels(images, layout.images[group], cell, is_read)
        source = is_read.ravel().cumsum().reshape(is_read.shape) * is_read
        bias = np.where(is_live, np.float32(0), np.float32(MASKED))
        outputs = self.call([x_TD[places], cell, pixels, source, bias], width)
        if len(outputs) == 1:
            return np.empty(0), np.empty(0), outputs[0]
        x, received, logits = outputs
        return x[is_live], received[is_live], logits

    def _pixels(self, images: np.ndarray, owners: np.ndarray, cell: np.ndarray, is_read: np.ndarray) -> np.ndarray:
        """float32 [1 + R, C, P, P]: zeros, then the patches that are looked at again, image after image."""
        (rows, columns), side, channels = self._shape.grid, self._shape.patch_size, self._shape.in_chans
        image, token = is_read.nonzero()
        row, column = np.divmod(cell[image, token], columns)
        grid = images.reshape(len(images), channels, rows, side, columns, side)
        room = len(image) + 1 if self._graphs[0][0].tokens is None else is_read.size
        pixels = np.zeros((room, channels, side, side), np.float32)
        pixels[1 : len(image) + 1] = grid[owners[image], :, row, :, column]
        return pixels

    def _width(self, most: int) -> int:
        """Tokens an image that a graph exists for, the fewest that fit `most`."""
        return next((file.tokens for file, _ in self._graphs if file.tokens and file.tokens >= most), most)

    def _groups(self, counts: np.ndarray) -> list[np.ndarray]:
        """Places of the images that share a call."""
        batch, limit = len(counts), self._max_batch or len(counts)
        if batch == 1:
            return [np.zeros(1, np.int64)]
        if self._index == 0 or counts.min() == counts.max():
            return np.split(np.arange(batch), range(limit, batch, limit))
        weights = numbers_moved(self._shape, [0] * (self._index + 1)) - numbers_moved(self._shape, [0] * self._index)
        widths = np.array([self._width(int(count)) for count in counts])
        image = stage_macs(self._shape, self._index, widths - 1, widths - 1, scored=True)
        return group_by_count(widths, np.asarray(image), float(MACS_A_WEIGHT * weights), limit)


def group_by_count(counts: np.ndarray, cost: np.ndarray, call_cost: float, limit: int) -> list[np.ndarray]:
    """Images that share a call, so that all calls together cost the least: places [n] of each group, at most `limit`.

    An image of `counts` [B] tokens costs `cost` [B] alone and, padded, as much as the longest of its call; a call costs
    `call_cost` beside. Exact: the best groups are runs of the images in the order of their counts.
    """
    order = np.argsort(counts, kind="stable")
    best, cut = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=np.int64)
    for end in range(1, len(order) + 1):
        begin = np.arange(max(0, end - limit), end)
        total = best[begin] + call_cost + (end - begin) * cost[order[end - 1]]
        cheapest = int(total.argmin())
        best[end], cut[end] = total[cheapest], begin[cheapest]
    groups, end = [], len(order)
    while end:
        groups.append(np.sort(order[cut[end] : end]))
        end = int(cut[end])
    return groups[::-1]
