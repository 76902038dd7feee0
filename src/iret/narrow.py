"""Narrower MLPs for a trained model: the channels inside that it can best do without go, and those that stay make up for them.

Channels are the other half of a smaller bill. Dropping takes tokens out of a block's products, this takes columns out of two of
their weights, for all images alike. What comes out is an `Iret` of a smaller `Shape.mlp_ratio`, with nothing in it that knows of
this file, so it is saved, calibrated, exported, rounded to int8, fine-tuned and turned like any other.

Of an MLP  y = W2 h + b2, h the hidden channels with covariance C over the tokens of some images: without channel j, and with all
others' columns of W2 fitted again by least squares, the squared error of y grows by  |W2_j|^2 / (C^-1)_jj.  The channel with the
least is taken out, W2 and C^-1 follow in closed form, and so on until few enough are left; b2 takes up the means. No gradients.

Source: Hassibi and Stork 1993, "Second order derivatives for network pruning: Optimal Brain Surgeon", their formula for one
weight, here for the columns of a linear layer, whose error is quadratic.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from iret.model import Iret
from iret.runtime.cost import Shape
from iret.vit import Mlp, lay_out

LOOKS = (0.0, 0.75, 2.0)  # thresholds that images are run at: which tokens pass an MLP depends on what was dropped
DAMPING = 1e-3  # of the mean variance of a channel, added to each: keeps the inverse finite and the fit tame
TOKENS_A_CHANNEL = 10  # seen at least, to fit so many weights; the same image at another threshold counts again


@torch.inference_mode(False)  # weights made in it could not learn
@torch.no_grad()
def narrow(model: Iret, images: Iterable[Float[Tensor, "_ C Y X"]], mlp_ratio: int | float) -> Iret:
    """A copy of `model`, in eval mode, whose MLPs are `mlp_ratio` times as wide inside as their tokens, without operating points.

    `images`: batches as the model takes them, on its device, of those that it was trained on: a thousand images for a model of
    8 million parameters or less. They are run at several thresholds, once each; all MLPs are fitted to what the whole model does.

    Raises:
        ValueError: a ratio that is not below the model's or gives no whole widths, too few images, images that do not fit, or a
            model that is not in float32.
    """
    if model.precision != "float32":
        raise ValueError(f"channels are taken out of a model in float32, not {model.precision}; convert it afterwards.")
    if not mlp_ratio < model.shape.mlp_ratio:
        raise ValueError(
            f"mlp_ratio={mlp_ratio:g} takes no channel out: this model's is {model.shape.mlp_ratio:g}; ask for less."
        )
    shape = replace(model.shape, mlp_ratio=mlp_ratio)
    whole = _copy(model, model.shape, model.state_dict())  # hooks see nothing of compiled parts
    seen = _observe(whole, images)
    state = whole.state_dict()
    for name, mlp in _mlps(whole).items():
        kept, weight, bias = _solve(mlp, seen[mlp.fc2], int(mlp_ratio * mlp.fc1.in_features))
        new = {
            "fc1.weight": mlp.fc1.weight[kept],
            "fc1.bias": mlp.fc1.bias[kept],
            "fc2.weight": weight,
            "fc2.bias": bias,
        }
        state |= {f"{name}.{part}": value for part, value in new.items()}
    return _copy(model, shape, state)


def _copy(model: Iret, shape: Shape, state: dict[str, Tensor]) -> Iret:
    """The model with other weights, in eval mode."""
    copy = Iret(shape, attention=model.attention, name=model.name).to(model.pos_embed.device)
    copy.load_state_dict(state)
    copy.preprocessing, copy.labels = model.preprocessing, model.labels
    lay_out(copy)
    return copy.eval()


def _mlps(model: Iret) -> dict[str, Mlp]:
    """By the name in the state."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Mlp)}


class _Moments:
    """Of the hidden channels of one MLP, over all tokens that passed it: summed up by batches in float64, on the CPU."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sum = torch.zeros(channels, dtype=torch.float64)
        self.products = torch.zeros(channels, channels, dtype=torch.float64)

    def take(self, hidden: Float[Tensor, "*tokens H"]) -> None:
        hidden = hidden.flatten(0, -2)
        self.count += len(hidden)
        self.sum += hidden.sum(0).cpu()
        self.products += (hidden.T @ hidden).cpu()

    @property
    def mean(self) -> Float[Tensor, " H"]:
        return self.sum / self.count

    @property
    def covariance(self) -> Float[Tensor, "H H"]:
        """Damped, so that it has an inverse."""
        covariance = self.products / self.count - torch.outer(self.mean, self.mean)
        damping = DAMPING * float(covariance.diagonal().mean())
        return covariance + max(damping, torch.finfo(torch.float64).tiny) * torch.eye(
            len(covariance), dtype=torch.float64
        )


def _observe(model: Iret, images: Iterable[Float[Tensor, "_ C Y X"]]) -> dict[nn.Module, _Moments]:
    """By the second layer of each MLP, what enters it."""
    layers = [mlp.fc2 for mlp in _mlps(model).values()]
    seen: dict[nn.Module, _Moments] = {layer: _Moments(layer.in_features) for layer in layers}
    hooks = [layer.register_forward_pre_hook(lambda layer, args: seen[layer].take(args[0])) for layer in layers]
    try:
        for batch in images:
            for threshold in LOOKS:
                model.run(batch, threshold)
    finally:
        for hook in hooks:
            hook.remove()
    for layer in layers:
        if seen[layer].count < TOKENS_A_CHANNEL * layer.in_features:
            raise ValueError(
                f"{seen[layer].count} tokens tell too little of an MLP {layer.in_features} channels wide, which takes "
                f"{TOKENS_A_CHANNEL * layer.in_features}; give more images."
            )
    return seen


def _solve(
    mlp: Mlp, moments: _Moments, channels: int
) -> tuple[Int[Tensor, " kept"], Float[Tensor, "D kept"], Float[Tensor, " D"]]:
    """The hidden channels to keep, the second layer's weights for them, and its bias."""
    weight = before = mlp.fc2.weight.cpu().double()
    inverse = torch.linalg.inv(moments.covariance)
    kept = torch.arange(len(inverse))
    for _ in range(len(inverse) - channels):
        out = int((weight.square().sum(0) / inverse.diagonal()).argmin())
        rest = torch.arange(len(kept)) != out
        step = inverse[out, rest] / inverse[out, out]
        weight = weight[:, rest] - torch.outer(weight[:, out], step)
        inverse = inverse[rest][:, rest] - torch.outer(inverse[rest, out], step)
        kept = kept[rest]
    bias = mlp.fc2.bias.cpu().double() + before @ moments.mean - weight @ moments.mean[kept]
    return kept, weight.to(mlp.fc2.weight), bias.to(mlp.fc2.bias)
