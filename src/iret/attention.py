"""Attention over a ragged batch, and the importance it gives away.

`attend` lets every token attend to the tokens of its own image: one fused call where all images have the same number,
packed back ends where they do not, equal to one another. A token of size s weighs s * exp(q . k): `log(size)` is added to
the logits, `-inf` at size 0, so merging and masking are one rule and the fused kernel stays.

Importance is how much attention each patch received: from the class token, one more query row beside the fused kernel, or
from all tokens, which needs all N x N weights and is the dearer alternative.

Read next: `selection`, which turns importance into kept tokens.
"""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from iret.tokens import Tokens, pad_index, places_in_padded

try:
    from torch.nn.attention import varlen
except ImportError:  # a torch that is older or built without it
    varlen = None  # type: ignore[assignment]

AttentionFunction = Callable[[Tensor, Tensor, Tensor, "Tokens | None"], Tensor]
AttentionBackend = Callable[[Tensor, Tensor, Tensor, Tensor, int, Tensor | None], Tensor]  # starts, width, log(size)

_varlen_attn: Callable[..., Any] | None = getattr(varlen, "varlen_attn", None)
MOMENTUM = 0.5  # of the running mean over a stage's scored blocks
UNSPLIT = {"num_splits": 1} if _varlen_attn and "num_splits" in inspect.signature(_varlen_attn).parameters else {}


def attend(
    q: Float[Tensor, "*tokens H E"],
    k: Float[Tensor, "*tokens H E"],
    v: Float[Tensor, "*tokens H E"],
    tokens: Tokens | None = None,
) -> Float[Tensor, "*tokens H E"]:
    """Softmax attention within each image, for packed [T, H, E] with their `Tokens`, or dense [B, N, H, E]."""
    if tokens is None:
        return _fused(q, k, v, None)
    bias_T = None if tokens.size_T is None else tokens.size_T.log().to(q.dtype)
    if tokens.is_even:
        q, k, v = (x.unflatten(0, (tokens.batch_size, -1)) for x in (q, k, v))
        bias = None if bias_T is None else bias_T.view(tokens.batch_size, 1, 1, -1)
        return _fused(q, k, v, bias).flatten(0, 1)
    if torch.is_grad_enabled() and q.requires_grad and not torch.compiler.is_compiling():
        # their gradients are fused; the operator's is for the compiler
        is_varlen = choose_backend(q.device.type, q.dtype, bias_T is not None) is attend_varlen
        return (attend_varlen if is_varlen else attend_padded)(q, k, v, tokens.starts, tokens.width, bias_T)
    return torch.ops.iret.attend(q, k, v, tokens.starts, tokens.width, bias_T)


ATTENTIONS: dict[str, AttentionFunction] = {"softmax": attend}


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Dense [B, N, H, E] through the fused kernel; `bias` [B, 1, 1, N] is added to the logits."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled():
        # The fused kernel's backward on CPU is several times slower in bf16 than in fp32.
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.float()
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=bias).to(q.dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.transpose(1, 2)


# ---- the packed back ends, behind one custom operator: to the compiler a graph does not depend on the counts


def attend_padded(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, width: int, bias_T: Tensor | None) -> Tensor:
    """Every image padded to `width`, the longest, with a key mask: the reference, and what always works."""
    batch, place_T = len(starts) - 1, places_in_padded(starts, width, len(q))
    q, k, v = (x.new_zeros(batch * width, *x.shape[1:]).index_copy(0, place_T, x) for x in (q, k, v))
    mask = q.new_full((batch * width,), float("-inf"))
    mask = mask.index_fill(0, place_T, 0.0) if bias_T is None else mask.index_copy(0, place_T, bias_T)
    q, k, v = (x.unflatten(0, (batch, width)) for x in (q, k, v))
    return _fused(q, k, v, mask.view(batch, 1, 1, width)).flatten(0, 1).index_select(0, place_T)


def attend_each(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, width: int, bias_T: Tensor | None) -> Tensor:
    """One fused call an image: nothing is padded. The fastest on CPU, where a call is cheap beside its work."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for start, end in pairwise(starts.tolist()):
        if end > start:
            here = slice(start, end)
            bias = None if bias_T is None else bias_T[None, None, None, here]
            out[here] = _fused(q[None, here], k[None, here], v[None, here], bias)[0]
    return out


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, width: int, bias_T: Tensor | None) -> Tensor:
    """`torch.nn.attention.varlen`, one flash kernel for all images: CUDA, half precision, tokens of size 1.

    Unsplit, so that an image's answer does not depend on its batch mates.
    """
    assert _varlen_attn is not None
    ends = starts.to(torch.int32)
    return _varlen_attn(q.contiguous(), k, v, ends, ends, width, width, **UNSPLIT)


def choose_backend(device_type: str, dtype: torch.dtype, has_bias: bool) -> AttentionBackend:
    """The fastest that can: varlen on CUDA, image by image on CPU, padded otherwise."""
    if device_type == "cpu":
        return attend_each
    if device_type == "cuda" and _varlen_attn is not None and not has_bias and dtype in (torch.float16, torch.bfloat16):
        return attend_varlen
    return attend_padded


def _key_mask(is_live: Tensor, index: Tensor, bias_T: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What padding adds to the logits, [B, 1, 1, N]: -inf where no token is, else the tokens' own bias."""
    mask = torch.zeros(is_live.shape, dtype=dtype, device=is_live.device).masked_fill(~is_live, float("-inf"))
    return (mask if bias_T is None else mask + bias_T[index])[:, None, None, :]


@torch.library.custom_op("iret::attend", mutates_args=())
def _attend_op(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, width: int, bias_T: Tensor | None) -> Tensor:
    backend = choose_backend(q.device.type, q.dtype, bias_T is not None)
    return backend(q, k, v, starts, width, bias_T).contiguous()


@_attend_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, width: int, bias_T: Tensor | None) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("iret::attend_backward", mutates_args=())
def _attend_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, width: int, bias_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    index, is_live = pad_index(starts, width)
    mask = _key_mask(is_live, index, bias_T, torch.float32)
    q, k, v, grad = ((x[index] * is_live[..., None, None]).transpose(1, 2) for x in (q, k, v, grad))  # [B, H, N, E]
    scale = q.shape[-1] ** -0.5
    weights = ((q * scale) @ k.mT + mask).softmax(-1).to(q.dtype)
    grad_weights = grad @ v.mT
    grad_logits = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
    grad_q, grad_k, grad_v = grad_logits @ k * scale, grad_logits.mT @ q * scale, weights.mT @ grad
    return grad_q.transpose(1, 2)[is_live], grad_k.transpose(1, 2)[is_live], grad_v.transpose(1, 2)[is_live]


@_attend_backward_op.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, width: int, bias_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _backward(ctx, grad: Tensor):
    grads = torch.ops.iret.attend_backward(grad, *ctx.saved_tensors, ctx.width, ctx.bias_T)
    return *grads, None, None, None


def _setup_context(ctx, inputs, output) -> None:
    *saved, ctx.width, ctx.bias_T = inputs
    ctx.save_for_backward(*saved)


_attend_op.register_autograd(_backward, setup_context=_setup_context)


# ---- importance: logits of those who are asked, block by block, and what patches received in all of them


def class_logits(
    q: Float[Tensor, "*tokens H E"], k: Float[Tensor, "*tokens H E"], tokens: Tokens | None
) -> Float[Tensor, "B H 1 patches"]:
    """Each image's class token asks its patches; -inf where an image has fewer. Without `tokens`: dense [B, N, H, E]."""
    # The same in fewer steps, each of which costs at batch 1. They round differently, which would tell in half precision.
    if tokens is None and len(q) == 1 and q.dtype == torch.float32:
        keys, unread, scale = k[0, 1:].permute(1, 2, 0), q[0, :1, :1, :1], q.shape[-1] ** -0.5
        return torch.baddbmm(unread, q[0, :1].transpose(0, 1), keys, beta=0, alpha=scale)[None]
    return _patch_logits(q[:, :1] if tokens is None else q[tokens.starts[:-1], None], k, tokens)


def column_logits(
    q: Float[Tensor, "*tokens H E"], k: Float[Tensor, "*tokens H E"], tokens: Tokens | None
) -> Float[Tensor, "B H N patches"]:
    """All N tokens of an image ask its patches, as in `class_logits`."""
    return _patch_logits(q if tokens is None else q[_places(tokens)[0]], k, tokens)


LOGITS = {"cls": class_logits, "column": column_logits}


def _places(tokens: Tokens) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
    return pad_index(tokens.starts, tokens.width)


def _patch_logits(q_BQHE: Tensor, k: Tensor, tokens: Tokens | None) -> Float[Tensor, "B H Q patches"]:
    q_BHEQ, index = (q_BQHE * q_BQHE.shape[-1] ** -0.5).permute(0, 2, 3, 1), None
    if tokens is None:
        k_BNHE = k
    elif tokens.is_even:
        k_BNHE = k.unflatten(0, (tokens.batch_size, -1))
    else:
        index, is_live = _places(tokens)
        k_BNHE = k[index]
    logits = (k_BNHE[:, 1:].transpose(1, 2) @ q_BHEQ).mT
    if tokens is not None and tokens.size_T is not None:
        size = tokens.size_T.view(tokens.batch_size, -1) if index is None else tokens.size_T[index]
        logits = logits + size[:, None, None, 1:].log()
    return logits if index is None else logits.masked_fill(~is_live[:, None, None, 1:], float("-inf"))


def head_shares(blocks: int, heads: int) -> Float[Tensor, " H"]:
    """What each head of a stage's scored blocks weighs: a running mean over the blocks, in which the last weighs most."""
    shares = torch.ones(1)
    for _ in range(blocks - 1):
        shares = torch.cat([MOMENTUM * shares, torch.tensor([1 - MOMENTUM])])
    return shares.repeat_interleave(heads) / heads


def receive(
    logits: list[Float[Tensor, "B h Q patches"]], tokens: Tokens, shares: Float[Tensor, " H"]
) -> Float[Tensor, " T"]:
    """Attention each patch received of those who asked: in the mean over them, heads of all blocks by their `shares`.

    It sums to 1 an image, and is 0 at class tokens.
    """
    weights = (logits[0] if len(logits) == 1 else torch.cat(logits, 1)).float().softmax(-1)
    shares = shares.float()
    if len(weights) == weights.shape[2] == 1:  # what follows, in fewer steps
        received = torch.mv(weights[0, :, 0].t(), shares)
        return torch.cat([received.new_zeros(1), received])
    weights = weights.mul_(shares[:, None, None]).sum(1)  # in place: columns have N x N of them
    if weights.shape[1] == 1 or (tokens.is_even and tokens.size_T is None):
        weights = weights.mean(1)
    else:
        index, is_live = _places(tokens)
        alive = (is_live if tokens.size_T is None else is_live & (tokens.size_T > 0)[index])[..., None].float()
        weights = (weights * alive).sum(1) / alive.sum(1)
    weights = F.pad(weights, (1, 0))
    if tokens.is_even:
        return weights.flatten()
    return weights.flatten().index_select(0, places_in_padded(tokens.starts, weights.shape[1], len(tokens.cell_T)))
