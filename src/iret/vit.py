"""Attention, Mlp, Block and the plain VisionTransformer they make. Hosts any attention function; contains none.

Parameters carry timm's names, so a timm ViT's weights load unmapped and give the same logits. A Block works on packed
tokens ([T, D] with their `Tokens`) and on a dense batch ([B, N, D], `tokens` None).

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", pre-norm as in timm's `vision_transformer`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from iret.attention import LOGITS, AttentionFunction, attend
from iret.tokens import Tokens

NORM_EPS = 1e-6  # timm's value for ViT


@dataclass(frozen=True)
class Evidence:
    """What a block saw; a field is added when a second method needs it."""

    logits: Float[Tensor, "B H Q patches"]  # of those asked for importance, for the patches; see `iret.attention`


class Attention(nn.Module):
    """Multi-head attention with the function it was given."""

    def __init__(self, dim: int, num_heads: int, function: AttentionFunction = attend) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.function = function
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "*tokens D"], tokens: Tokens | None = None, importance: str | None = None
    ) -> tuple[Float[Tensor, "*tokens D"], Evidence | None]:
        """The update, and the evidence if an `importance` ("cls", "column") is asked for."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        out = self.proj(self.function(q, k, v, tokens).flatten(-2))
        if importance is None:
            return out, None
        return out, Evidence(LOGITS[importance](q.detach(), k.detach(), tokens))


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens D"]:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Skips a branch for whole images in training, with probability `rate`, and scales up the others.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth".
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "*tokens D"], tokens: Tokens | None = None) -> Float[Tensor, "*tokens D"]:
        if not self.training or self.rate == 0:
            return x
        batch = tokens.batch_size if isinstance(tokens, Tokens) else x.shape[0]
        scale = x.new_empty(batch, 1).bernoulli_(1 - self.rate) / (1 - self.rate)
        return x * (scale[tokens.image_T()] if isinstance(tokens, Tokens) else scale[:, None])


class Block(nn.Module):
    """Pre-norm transformer block; its MLP is `mlp_dim` wide inside, four times the tokens' width unless told."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int | None = None,
        drop_path_rate: float = 0.0,
        function: AttentionFunction = attend,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads, function)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim if mlp_dim is None else mlp_dim)
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self, x: Float[Tensor, "*tokens D"], tokens: Tokens | None = None, importance: str | None = None
    ) -> tuple[Float[Tensor, "*tokens D"], Evidence | None]:
        x, evidence = self.attention_half(x, tokens, importance)
        return self.mlp_half(x, tokens), evidence

    def attention_half(
        self, x: Float[Tensor, "*tokens D"], tokens: Tokens | None, importance: str | None
    ) -> tuple[Float[Tensor, "*tokens D"], Evidence | None]:
        """The tokens after its first half, in which they see each other, and the evidence."""
        update, evidence = self.attn(self.norm1(x), tokens, importance)
        return x + self.drop_path(update, tokens), evidence

    def mlp_half(self, x: Float[Tensor, "*tokens D"], tokens: Tokens | None) -> Float[Tensor, "*tokens D"]:
        """The tokens after its second half, which takes each by itself."""
        return x + self.drop_path(self.mlp(self.norm2(x)), tokens)


class PatchEmbed(nn.Module):
    """Patches of side `patch_size` to tokens: one strided convolution."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, images: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B N D"]:
        return self.proj(images).flatten(2).mT


class VisionTransformer(nn.Module):
    """The plain ViT with a class token: the static baseline, and the host of other papers' token reduction."""

    def __init__(
        self,
        *,
        img_size: tuple[int, int] = (224, 224),
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_features = embed_dim
        rows, columns = img_size[0] // patch_size, img_size[1] // patch_size
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, drop_path_rate=rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        init_linear(self)

    def forward_features(self, images: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B N D"]:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x, _ = block(x)
        return self.norm(x)

    def forward(self, images: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B classes"]:
        return self.head(self.forward_features(images)[:, 0])


def sincos_positions(grid: tuple[int, int], dim: int) -> Float[Tensor, "1 N D"]:
    """Sines and cosines of row and column at dim / 4 wavelengths from 2 pi to 2 pi 10,000 cells; first a class token of noise.

    Where learned positions start. Source: the 2-D form of Vaswani et al. 2017 as in Beyer et al. 2022, "Better plain ViT
    baselines for ImageNet-1k".
    """
    frequencies = 10_000.0 ** -torch.linspace(0, 1, dim // 4)
    rows, columns = (torch.arange(side)[:, None] * frequencies for side in grid)
    angles = torch.stack(
        [rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)], dim=2
    )  # [rows, columns, 2, dim / 4]
    places = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(0, 1).flatten(1)
    class_token = nn.init.trunc_normal_(torch.empty(1, dim), std=0.02)  # a norm's gradient explodes at zero
    return torch.cat([class_token, F.pad(places, (0, dim - places.shape[1]))])[None]


def lay_out(module: nn.Module) -> None:
    """Keep the weights of linear layers input by input in memory, for models that are only run; nothing else changes.

    A CPU's matrix product reads them in that order: with few tokens it is up to twice as fast, with many no slower
    (docs/LOG.md, 2026-11-25).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.data = part.weight.data.t().contiguous().t()


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights (std 0.02) and zero biases in every linear layer, as ViTs are started."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
