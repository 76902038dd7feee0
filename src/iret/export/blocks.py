"""A model's blocks on a dense batch, written out in the order that engines run fastest.

Tokens are packed token after token, [N B, D]: a head's queries, keys and values are then one stride apart in what the products
left, and ONNX Runtime multiplies them there without moving them first. They come of a product each, because splitting
one would copy it; the queries' carries the scale of the logits.

On x86 processors ONNX Runtime computes a product of wide tokens faster as a 1x1 convolution: it waits less for the weights, and
the fewer tokens there are, the more of the time that is. Without its blocked layout, in a browser or on OpenVINO, it is slower.

Read next: `graphs`.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from iret import vit
from iret.attention import attend

Rewrite = Callable[[nn.Linear], nn.Module]  # what stands for a linear layer
MIN_CONVOLVED_WIDTH = 256  # convolutions of narrower stages are slower: their weights stay in the cache (docs/LOG.md)


class PointwiseConvolution(nn.Module):
    """A linear layer as a 1x1 convolution, weights [E, D, 1, 1]: tokens are pixels of an image of one row, channels last."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(linear.weight[..., None, None]), linear.bias

    def forward(self, x: Float[Tensor, "1 1 NB D"]) -> Float[Tensor, "1 1 NB E"]:
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Softmax attention, in products and a softmax.

    Exporters write the fused kernel in many more steps, every size left open.
    """

    def __init__(self, attention: vit.Attention, importance: str | None, rewrite: Rewrite) -> None:
        """`importance`, "cls" or "column", is read here; None: it is not."""
        super().__init__()
        self.num_heads, self.importance = attention.num_heads, importance
        dim = attention.proj.in_features
        assert attention.function is attend, "only softmax attention is written out here"
        # queries, keys, values
        parts = [nn.utils.skip_init(nn.Linear, dim, dim) for _ in range(3)]
        factors = ((dim // self.num_heads) ** -0.5, 1.0, 1.0)
        with torch.no_grad():
            for part, weight, bias, factor in zip(
                parts, attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), factors, strict=True
            ):
                part.weight.copy_(weight * factor)
                part.bias.copy_(bias * factor)
        self.parts, self.proj = nn.ModuleList(map(rewrite, parts)), rewrite(attention.proj)

    def forward(
        self, x: Float[Tensor, "*one NB D"], batch: int, bias: Float[Tensor, "B 1 1 N"] | None
    ) -> tuple[Float[Tensor, "*one NB D"], Float[Tensor, "B H Q N"] | None]:
        """The update, and the logits that importance is read off: of the class token, or of every query.

        `bias` is added to a key's logits. The logits stand beside the attention, which engines can fuse then.
        """
        q, k, v = (part(x).reshape(-1, batch, self.num_heads, x.shape[-1] // self.num_heads) for part in self.parts)
        keys = k.permute(1, 2, 3, 0)
        weights = _plus(q.permute(1, 2, 0, 3) @ keys, bias).softmax(-1)
        heads = (weights @ v.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)
        update = self.proj(heads.reshape(*x.shape[:-2], -1, x.shape[-1]))
        if self.importance is None:
            return update, None
        return update, (q[:1] if self.importance == "cls" else q).permute(1, 2, 0, 3) @ keys


class Blocks(nn.Module):
    """The blocks of one `iret.model.Stage`; if scored without the MLP of the last, which is its `Rest`."""

    def __init__(self, stage: Any, is_scored: bool, is_convolved: bool = False) -> None:
        """`is_convolved`: linear layers are 1x1 convolutions, if tokens are wide enough to gain by it."""
        super().__init__()
        self.is_convolved, rewrite = _form_of(stage, is_convolved)
        unscored = len(stage.blocks) - stage.num_scored if is_scored else len(stage.blocks)
        self.importance = stage.importance
        self.blocks = nn.ModuleList(
            _Block(
                block,
                None if place < unscored else stage.importance,
                rewrite,
                has_mlp=not is_scored or block is not stage.blocks[-1],
            )
            for place, block in enumerate(stage.blocks)
        )
        if is_scored:
            self.register_buffer("head_shares", stage.head_shares[None])

    def forward(
        self, x: Float[Tensor, "NB D"], batch: int, bias: Float[Tensor, "B 1 1 N"] | None
    ) -> tuple[Float[Tensor, "NB D"], Float[Tensor, "B patches"] | None]:
        """The tokens after all of them, and the attention each patch received in the scored ones, if any is."""
        scored = []
        x = x[None, None] if self.is_convolved else x
        for block in self.blocks:
            x, logits = block(x, batch, bias)
            if logits is not None:
                scored.append(logits)
        return x.flatten(0, -2), self.received(torch.cat(scored, 1), bias) if scored else None

    def received(self, logits: Float[Tensor, "B H Q N"], bias: Float[Tensor, "B 1 1 N"] | None) -> Tensor:
        """[B, patches]: as `iret.attention.receive`; sums to 1 an image."""
        weights = _plus(logits, bias)[..., 1:].softmax(-1)
        if self.importance == "cls" or bias is None:
            weights = weights.mean(2)
        else:  # the mean over queries that are no padding
            alive = bias.exp().transpose(2, 3)
            weights = (weights * alive).sum(2) / alive.sum(2)
        return (self.head_shares @ weights).squeeze(1)


class Rest(nn.Module):
    """What the scored `Blocks` of a stage leave to the tokens that stay, and to a head: the MLP of its last block."""

    def __init__(self, stage: Any, is_convolved: bool = False) -> None:
        super().__init__()
        self.is_convolved, rewrite = _form_of(stage, is_convolved)
        self.second = _SecondHalf(stage.blocks[-1], rewrite)

    def forward(self, x: Float[Tensor, "NB D"]) -> Float[Tensor, "NB D"]:
        return self.second(x[None, None] if self.is_convolved else x).flatten(0, -2)


class _SecondHalf(nn.Module):
    """The second half of a block."""

    def __init__(self, block: Any, rewrite: Rewrite) -> None:
        super().__init__()
        assert type(block.mlp) is vit.Mlp, "only two layers with GELU between are written out here"
        self.norm2 = block.norm2
        self.mlp = nn.Sequential(OrderedDict(fc1=rewrite(block.mlp.fc1), act=nn.GELU(), fc2=rewrite(block.mlp.fc2)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm2(x))


class _Block(nn.Module):
    def __init__(self, block: Any, importance: str | None, rewrite: Rewrite, has_mlp: bool) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.attn = Attention(block.attn, importance, rewrite)
        self.second = _SecondHalf(block, rewrite) if has_mlp else nn.Identity()

    def forward(self, x: Tensor, batch: int, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        update, logits = self.attn(self.norm1(x), batch, bias)
        return self.second(x + update), logits


def _form_of(stage: Any, is_convolved: bool) -> tuple[bool, Rewrite]:
    """Whether linear layers of `stage` become convolutions, and what makes of one what stands for it."""
    if is_convolved and stage.norm.weight.shape[0] >= MIN_CONVOLVED_WIDTH:
        return True, PointwiseConvolution
    return False, lambda linear: linear


def _plus(logits: Tensor, bias: Tensor | None) -> Tensor:
    return logits if bias is None else logits + bias
