"""How a bundle's graphs are written, and what of that an engine or a model cannot have.

Every option costs or gains something on some engine; what was measured stands in docs/targets/.

Read next: `bundle`.
"""

from dataclasses import dataclass

from iret.export.blocks import MIN_CONVOLVED_WIDTH
from iret.runtime.bundle import ENGINES
from iret.runtime.cost import Shape


@dataclass(frozen=True, kw_only=True)
class Form:
    """Options of `iret export`; without any, a graph a stage for any number of tokens, in fp32.

    single_graph: one graph, the thresholds among its inputs.
    buckets: patches, each in [min_keep, num_patches], that graphs are made for, in place of graphs that take any number; all
        patches are always one of them.
    int8: by the engine's own quantiser.
    convolutions: linear layers of blocks that are `MIN_CONVOLVED_WIDTH` wide or more as 1x1 convolutions, which ONNX Runtime
        computes faster on x86 processors.
    """

    single_graph: bool = False
    buckets: tuple[int, ...] = ()
    int8: bool = False
    convolutions: bool = False

    def refuse(self, kind: str, shape: Shape) -> None:
        """Raises ValueError for what cannot be written, or gains nothing, with the way out."""
        if kind not in ENGINES:
            raise ValueError(f"format {kind!r} is unknown; choose from {', '.join(ENGINES)}.")
        bad = [count for count in self.buckets if not shape.min_keep <= count <= shape.num_patches]
        wrong = [
            (
                self.single_graph and kind == "executorch",
                "ExecuTorch runs a graph of data-dependent sizes 12 times too slowly (docs/export.md); leave out --single-graph.",
            ),
            (
                self.single_graph and bool(self.buckets),
                "a single graph has no fixed token counts; give --single-graph or --buckets, not both.",
            ),
            (self.int8 and self.single_graph, "int8 is calibrated stage by stage; leave out --single-graph."),
            (
                self.convolutions and kind != "onnx",
                f"convolutions are faster on ONNX Runtime alone, not on {kind}; leave out --convolutions.",
            ),
            (self.convolutions and self.int8, "int8 layers stay matrices; give --int8 or --convolutions, not both."),
            (
                self.convolutions and max(shape.embed_dims) < MIN_CONVOLVED_WIDTH,
                f"stages are {', '.join(map(str, shape.embed_dims))} wide, and convolutions are faster from "
                f"{MIN_CONVOLVED_WIDTH} on; leave out --convolutions.",
            ),
            (
                bool(bad),
                f"bucket {bad and bad[0]} is outside [{shape.min_keep}, {shape.num_patches}], the patches that images keep.",
            ),
        ]
        found = [sentence for is_wrong, sentence in wrong if is_wrong]
        if found:
            raise ValueError(found[0])


PLAIN = Form()  # the default
