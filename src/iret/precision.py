"""Number formats, and weights packed for the processor, for models that are only run.

`to_onednn` keeps the weights of every block's linear layers as oneDNN wants them, and has bias and GELU done while it
multiplies: the same but for rounding. torch's own products in float32 are MKL's, which are slow on the AMD processor that this
was made for (docs/LOG.md, 2026-11-26).

`to_int8` keeps the weights of every block's linear layers in 8 bits, a scale per output channel, and rounds what enters a layer
to 8 bits when it comes, with a scale per batch: a quarter of the weight bytes, which is what a small batch waits for, and
integer products. Importance, norms, softmax and heads stay in float.

The kernels are those of `torch.ops.quantized` (FBGEMM or oneDNN on x86, QNNPACK on ARM), eager: torchao's dynamic
quantisation reaches their speed on a CPU only when compiled.
"""

import copy
import platform
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iret.model import Iret
from iret.runtime.points import PRECISIONS
from iret.vit import lay_out


class OneDnnLinear(nn.Module):
    """A linear layer whose weights oneDNN has laid out for itself, in float32; `gelu`: of what it gives."""

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        self.packed = _pack(linear.weight.detach().float())
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.then: tuple[str, list, str] = ("gelu", [], "none") if gelu else ("none", [], "")

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        if x.dtype != torch.float32 or (x.requires_grad and torch.is_grad_enabled()):
            raise ValueError(
                "a model for oneDNN takes float32, outside autocast, and has no gradients; use the one that it was made from."
            )
        # torch has no public name for it; its compiler's programs call it
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *self.then)

    def __getstate__(self) -> dict:
        """To be copied and pickled, which packed weights cannot be."""
        return super().__getstate__() | {"packed": self.packed.to_dense()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state | {"packed": _pack(state["packed"])})


def _pack(weight: Float[Tensor, "out in"]) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def to_onednn(model: Iret) -> Iret:
    """A copy of `model` on CPU, in eval mode, with packed linear layers in its blocks.

    It can be run, in float32 outside autocast, not differentiated, trained, moved, saved or compiled. For a number of rows that
    is new to a layer oneDNN writes its code first, in about half a millisecond: an image whose counts of tokens were not seen
    before takes some milliseconds more, which no clock contains. oneDNN keeps the last 1,024 such codes
    (`ONEDNN_PRIMITIVE_CACHE_CAPACITY`).

    Raises:
        ValueError: this build of torch has no oneDNN, or the model is not on a CPU in float32, or converted already.
    """
    kind, dtype = model.pos_embed.device.type, model.pos_embed.dtype
    if (kind, dtype) != ("cpu", torch.float32):
        raise ValueError(
            f"packed weights are float32 on a CPU, not {str(dtype)[6:]} on {kind}; move the model there, or take float32 "
            "or bfloat16 as it is."
        )
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        raise ValueError("this build of torch has no oneDNN to pack weights for; take float32.")
    return _convert(model, "float32-onednn", OneDnnLinear, lambda fc1: OneDnnLinear(fc1, gelu=True))


def adds_in_16_bits() -> bool:
    """Whether int8 products are added up in pairs in 16 bits, where two of full size do not fit: x86 without VNNI.

    Then inputs are rounded to 7 bits. Source: pytorch/FBGEMM issue 125, where AVX-512 without VNNI gave wrong sums.
    """
    is_supported = getattr(torch.cpu, "_is_vnni_supported", lambda: False)  # torch has no public name for it
    return platform.machine().lower() in ("x86_64", "amd64") and not is_supported()


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, symmetric per output channel; inputs are rounded as they come, one scale for all."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "torch.quantize_per_tensor"
            )  # going one day; no other eager kernel rounds its input
            rounded = torch.quantize_per_channel(
                weight, scales, torch.zeros(len(scales), dtype=torch.int64), 0, torch.qint8
            )
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack(rounded, bias)
        self.reduce_range = adds_in_16_bits()

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range)


def to_int8(model: Iret) -> Iret:
    """A copy of `model` on CPU, in eval mode, with int8 linear layers in its blocks; it can be run, not trained, moved or saved.

    The scale of what enters a layer is that of the whole batch, so an image's answer depends a little on its batch mates, as
    it does in no other number format; how much, a test states. At batch 1 there is nothing to depend on.

    Raises:
        ValueError: this build of torch has no int8 kernels, or the model is not on a CPU, or converted already.
    """
    if model.pos_embed.device.type != "cpu":
        raise ValueError("int8 runs on a CPU; on an accelerator take bfloat16.")
    engines = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
    if not engines:
        raise ValueError("this build of torch has no int8 kernels; take float32 or bfloat16.")
    return _convert(model, "int8", Int8Linear, lambda fc1: nn.Sequential(Int8Linear(fc1), nn.GELU()))


def _convert(
    model: Iret, precision: str, convert: Callable[[nn.Linear], nn.Module], and_gelu: Callable[[nn.Linear], nn.Module]
) -> Iret:
    """A copy whose blocks have converted linear layers, GELU included where it follows."""
    _refuse_converted(model)
    converted = copy.deepcopy(model).eval().requires_grad_(False)
    for stage in converted.stages:
        for block in stage.blocks:
            block.attn.qkv, block.attn.proj = convert(block.attn.qkv), convert(block.attn.proj)
            block.mlp = nn.Sequential(and_gelu(block.mlp.fc1), convert(block.mlp.fc2))
    converted.own_precision = precision
    return converted


def _refuse_converted(model: Iret) -> None:
    if model.own_precision:
        raise ValueError(f"this model is in {model.own_precision} already; convert the one that it was made from.")


CONVERSIONS = {"float32-onednn": to_onednn, "int8": to_int8}


def prepare(model: Iret, precision: str) -> tuple[Iret, AbstractContextManager]:
    """The model, laid out to be run, and the context to run it in for a precision of `PRECISIONS`.

    Raises:
        ValueError: an unknown precision, one that the device does not have, or a model that was converted already.
    """
    _refuse_converted(model)
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; choose from {', '.join(PRECISIONS)}.")
    if precision in CONVERSIONS:
        return CONVERSIONS[precision](model), nullcontext()
    lay_out(model)
    if precision == "bfloat16":
        return model, torch.autocast(model.pos_embed.device.type, torch.bfloat16)
    return model, nullcontext()
