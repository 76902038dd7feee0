"""One stage of a bundle: packed tokens in, calls of the engine on dense groups of images, packed tokens out.

Images of similar count share a call, the shorter ones padded behind a key mask where that is cheaper than a call of their own.

Read next: `session`, which goes from stage to stage.
"""

import time
from functools import cache, cached_property, partial

import numpy as np

from iret.runtime.bundle import Bundle, GraphFile
from iret.runtime.choice import Layout, to_starts
from iret.runtime.cost import Shape, mlp_macs, numbers_moved, stage_macs
from iret.runtime.engines import Graph

MASKED = -1e9  # of a padded key: its weight is exactly 0, and no engine makes NaN of it
# What a call costs beside its MACs: its weights are read from memory, which takes as long as this many MACs each.
MACS_A_WEIGHT = 8
_NOTHING = np.empty(0, np.float32)


class Stage:
    """The graphs of one stage, fed from packed tokens."""

    def __init__(self, bundle: Bundle, index: int, graphs: list[tuple[GraphFile, Graph]]) -> None:
        self._shape, self._index, self._max_batch = bundle.shape, index, bundle.max_batch
        self._graphs = sorted(graphs, key=lambda each: each[0].tokens or 0)
        self._steps = np.arange(1 + bundle.shape.num_patches, dtype=np.int64)
        macs = stage_macs(bundle.shape, index, self._steps, self._steps, scored=True)
        self._macs = np.asarray(macs, dtype=np.float64)  # of one image, by the patches it has
        self._macs_of_one = self._macs.tolist()

    def macs(self, layout: Layout) -> float:
        """Of all images of `layout` in this stage, every patch refined."""
        if layout.is_one:
            return self._macs_of_one[len(layout.cell_T) - 1]
        return float(self._macs[layout.counts - 1].sum())

    def call(self, batch: "Batch", inputs: list[np.ndarray], width: int = 0) -> list[np.ndarray]:
        """The graph that takes `width` tokens an image, its time noted at `batch`."""
        return batch.call(next(graph for file, graph in self._graphs if file.tokens in (None, width)), inputs)

    def run(
        self, batch: "Batch", x_TD: np.ndarray, layout: Layout, refined_T: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens and received attention, packed, and logits, an image a row. `refined_T` None: every patch with a token."""
        if layout.is_one and not self._is_fixed:
            return self._run_one(batch, x_TD, layout, refined_T)
        groups = self._groups(layout.counts)
        found = [self._run_group(group, batch, x_TD, layout, refined_T) for group in groups]
        if len(found) == 1:
            return found[0]
        back = np.argsort(np.concatenate(groups))
        x, received, logits = zip(*found, strict=True)
        if self._index == len(self._shape.depths) - 1:
            return _NOTHING, _NOTHING, np.concatenate(logits)[back]
        # packed group after group; back into the order of the images
        counts = layout.counts[np.concatenate(groups)]
        pieces = np.split(np.arange(counts.sum()), to_starts(counts)[1:-1])
        rows = np.concatenate([pieces[place] for place in back])
        return np.concatenate(x)[rows], np.concatenate(received)[rows], np.concatenate(logits)[back]

    def _run_one(
        self, batch: "Batch", x_TD: np.ndarray, layout: Layout, refined_T: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`_run_group` for one image alone, in fewer steps: at batch 1 the engine waits for every one of them."""
        owner, cell_T = layout.images[0], layout.cell_T
        if not self._index:
            return _unpack(self.call(batch, [batch.images[owner, None]]), None)
        if refined_T is None:
            index, source = cell_T[1:], self._steps[: len(cell_T)]
        else:
            places = refined_T.nonzero()[0]
            index, source = cell_T[places], np.zeros(len(cell_T), np.int64)
            source[places] = self._steps[1 : len(places) + 1]
        if owner:
            index = index + owner * self._shape.num_patches
        pixels = batch.read(index, len(index) + 1)
        bias = np.zeros((1, len(cell_T)), np.float32)
        return _unpack(self.call(batch, [x_TD[:, None], cell_T[:, None], pixels, source[:, None], bias]), None)

    def _run_group(
        self, group: np.ndarray, batch: "Batch", x_TD: np.ndarray, layout: Layout, refined_T: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One call for the images at these places of `layout`."""
        if not self._index:
            return _unpack(self.call(batch, [batch.images[layout.images[group]]], 1 + self._shape.num_patches), None)
        counts = layout.counts[group]
        width = self._width(int(counts.max()))
        cell_T, is_live = layout.cell_T, None
        is_read_T = cell_T >= 0 if refined_T is None else refined_T
        form = (len(group), width)
        if len(group) == len(layout.images) and len(cell_T) == len(group) * width:  # all images, as they are packed
            x, cell, is_read = x_TD.reshape(*form, -1), cell_T.reshape(form), is_read_T.reshape(form)
            bias = np.zeros(form, np.float32)
        else:
            offsets = np.arange(width)
            is_live = offsets < counts[:, None]
            places = layout.starts[group][:, None] + offsets * is_live
            x, cell, is_read = x_TD[places], cell_T[places], is_read_T[places] & is_live
            bias = np.where(is_live, np.float32(0), np.float32(MASKED))
        image, token = is_read.nonzero()
        index = layout.images[group][image] * self._shape.num_patches + cell[image, token]
        pixels = batch.read(index, is_read.size if self._is_fixed else len(index) + 1)
        source = np.zeros(form, np.int64)
        source[image, token] = np.arange(1, len(index) + 1)
        x, cell, source = (np.ascontiguousarray(each.swapaxes(0, 1)) for each in (x, cell, source))
        return _unpack(self.call(batch, [x, cell, pixels, source, bias], width), is_live)

    @property
    def _is_fixed(self) -> bool:
        """Whether every graph takes one count of tokens alone."""
        return self._graphs[0][0].tokens is not None

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
        moved, before = partial(numbers_moved, self._shape, scored=True), self._index - 1
        # and those of the last MLP of the stage before, for the tokens that stay
        weights = moved([0] * (self._index + 1)) - moved([0] * self._index) + mlp_macs(self._shape, before, 1)
        widths = np.array([self._width(int(count)) for count in counts])
        return group_by_count(widths, self._macs[widths - 1], float(MACS_A_WEIGHT * weights), limit)


class Batch:
    """The images of one run, and their patches, cut out where they are looked at again."""

    def __init__(self, images: np.ndarray, shape: Shape) -> None:
        self.images, self._shape = images, shape
        self.engine_s = 0.0  # that the engine took for them so far

    def call(self, graph: Graph, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """What it answers, its time noted."""
        began = time.perf_counter()
        outputs = graph(inputs)
        self.engine_s += time.perf_counter() - began
        return outputs

    def read(self, index: np.ndarray, room: int) -> np.ndarray:
        """float32 [`room`, C, P, P]: zeros, the patches at `index` (image * cells + cell, rising), zeros again."""
        if room == len(index) + 1 == len(self.images) * self._shape.num_patches + 1:
            return self._everything
        return self._cut(index, room)

    @cached_property
    def _everything(self) -> np.ndarray:
        """Read by every stage of a run that drops nothing."""
        every = len(self.images) * self._shape.num_patches
        return self._cut(np.arange(every), every + 1)

    def _cut(self, index: np.ndarray, room: int) -> np.ndarray:
        side, channels = self._shape.patch_size, self._shape.in_chans
        first, lines = _lines(self._shape)
        if len(self.images) == 1:
            start = first[index]
        else:
            image, cell = np.divmod(index, len(first))
            start = image * (channels * self._shape.img_size[0] * self._shape.grid[1]) + first[cell]
        pixels, end = np.empty((room, channels * side, side), np.float32), 1 + len(index)
        pixels[0], pixels[end:] = 0, 0
        # "clip" only to spare a copy of the output; every place is there
        self.images.reshape(-1, side).take(start[:, None] + lines, axis=0, out=pixels[1:end], mode="clip")
        return pixels.reshape(room, channels, side, side)


@cache
def _lines(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Where a patch's lines of pixels are in an image cut into such lines: of its first, [cells], and of all, from there on."""
    (rows, columns), side = shape.grid, shape.patch_size
    first = (np.arange(rows) * side * columns)[:, None] + np.arange(columns)
    lines = (np.arange(shape.in_chans) * shape.img_size[0] * columns)[:, None] + np.arange(side) * columns
    return first.ravel(), lines.ravel()


def _unpack(outputs: list[np.ndarray], is_live: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and received attention of the places that hold a token (None: all do), and logits, as a graph gave them."""
    if len(outputs) == 1:  # the last stage
        return _NOTHING, _NOTHING, outputs[0]
    x, received, logits = outputs
    x = x.swapaxes(0, 1)  # image after image
    if is_live is None:
        return x.reshape(-1, x.shape[-1]), received.ravel(), logits
    return x[is_live], received[is_live], logits


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
