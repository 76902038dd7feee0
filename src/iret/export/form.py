"""How a bundle's graphs are written, and what of that an engine or a model cannot have."""

from dataclasses import dataclass

from iret.export.blocks import MIN_WIDTH
from iret.runtime.bundle import ENGINES
from iret.runtime.cost import Shape


@dataclass(frozen=True, kw_only=True)
class Form:
    """A graph a stage, of any number of tokens, in fp32, products as matrices; unless said otherwise.

    single_graph: one graph, the thresholds among its inputs.
    buckets: numbers of patches that graphs are made for, in place of graphs that take any; all patches are always one of them.
    int8: by the engine's own quantiser.
    convolutions: products of tokens that are wide enough as 1x1 convolutions, which ONNX Runtime computes faster on x86.
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
        if bad:
            raise ValueError(
                f"bucket {bad[0]} is outside [{shape.min_keep}, {shape.num_patches}], the patches that an image can keep."
            )
        wrong = {
            "ExecuTorch runs a graph with data-dependent sizes 12 times too slowly (docs/export.md); leave out "
            "--single-graph.": self.single_graph and kind == "executorch",
            "a single graph has no fixed token counts; give --single-graph or --buckets, not both.": self.single_graph
            and bool(self.buckets),
            "int8 is calibrated stage by stage; leave out --single-graph.": self.int8 and self.single_graph,
            "convolutions are faster on ONNX Runtime alone; leave out --convolutions.": self.convolutions
            and kind != "onnx",
            "int8 products stay matrices; give --int8 or --convolutions, not both.": self.convolutions and self.int8,
            f"no stage's tokens are {MIN_WIDTH} wide, and convolutions of narrower ones are slower; leave out "
            "--convolutions.": self.convolutions and max(shape.embed_dims) < MIN_WIDTH,
        }
        found = [sentence for sentence, is_wrong in wrong.items() if is_wrong]
        if found:
            raise ValueError(found[0])
