"""Learnable 2-D lifting of a patch, update first, so that the coarse band never needs a detail.

One step along one axis splits a line into its even and odd samples:

    coarse = (even + U(odd)) / 2          update first: needs no detail
    detail = odd - P(coarse)              only for patches that are looked at again

and is undone by  odd = detail + P(coarse),  even = 2 coarse - U(odd),  whatever U and P are. A level works along the
width, then along the height; `coarse` runs the update steps of all levels, `details` one level on demand.
Nothing crosses a patch's border, so a patch's detail does not depend on whether its neighbour was dropped.

Source: IRET, GLSVLSI 2024, abstract ("learnable 2D lifting scheme"); the order of the steps is the default of the DAWN code
(github.com/mxbastidasr/DAWN_WACV2020, models/lifting.py); linear taps and Haar start are ours (the full text was not available).
"""

from collections.abc import Callable
from functools import wraps

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from iret.runtime.cost import LIFTINGS


class LinearOperator(nn.Module):
    """Three taps along the last axis that sum to one, replicated at the border; starts as the identity (Haar)."""

    basis: Tensor
    identity: Tensor

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.length = length
        middle = torch.arange(length)
        taps = F.one_hot(torch.stack([middle - 1, middle, middle + 1]).clamp(0, length - 1), length).float()
        # The taps are identity + weight - mean(weight); here as what each weight adds to the matrix.
        self.register_buffer("basis", (taps - taps.mean(0)).flatten(1).T.contiguous(), persistent=False)
        self.register_buffer("identity", torch.eye(length).flatten(), persistent=False)

    def matrix(self) -> Float[Tensor, "length length"]:
        """The operator as a matrix from the left."""
        return torch.addmv(self.identity, self.basis, self.weight).view(self.length, self.length)

    def forward(self, x: Float[Tensor, "T C lines length"]) -> Float[Tensor, "T C lines length"]:
        return x @ self.matrix().mT.to(x.dtype)


class DawnOperator(nn.Module):
    """DAWN's non-linear operator: convolution of 4 taps to twice the channels, ReLU, 1x1 convolution back, tanh.

    Differs from DAWN: the border is replicated, because a patch's short lines cannot be reflected.
    """

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * channels, (1, 4), bias=False)
        self.conv2 = nn.Conv2d(2 * channels, channels, 1, bias=False)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def forward(self, x: Float[Tensor, "T C lines length"]) -> Float[Tensor, "T C lines length"]:
        padded = F.pad(x, (2, 1, 0, 0), mode="replicate")
        return torch.tanh(self.conv2(F.relu(self.conv1(padded))))


class IdentityOperator(nn.Module):
    """U = P = identity: the Haar wavelet, fixed."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.register_buffer("eye", torch.eye(length), persistent=False)

    def matrix(self) -> Float[Tensor, "length length"]:
        eye: Tensor = self.get_buffer("eye")
        return eye

    def forward(self, x: Float[Tensor, "T C lines length"]) -> Float[Tensor, "T C lines length"]:
        return x


OPERATORS = dict(zip(LIFTINGS, (LinearOperator, IdentityOperator, DawnOperator), strict=True))


class LiftingStep(nn.Module):
    """One update and one predict along the last axis of length 2 * `half`."""

    half_eye: Tensor
    odd: Tensor

    def __init__(self, operator: str, channels: int, half: int) -> None:
        super().__init__()
        self.update = OPERATORS[operator](channels, half)
        self.predict = OPERATORS[operator](channels, half)
        odd = torch.eye(half).repeat_interleave(2, dim=1)
        odd[:, 0::2] = 0
        self.register_buffer("half_eye", torch.eye(half) / 2, persistent=False)
        self.register_buffer("odd", odd, persistent=False)  # picks the odd samples

    def coarse(self, x: Float[Tensor, "T C lines X"]) -> Float[Tensor, "T C lines X//2"]:
        return (x[..., 0::2] + self.update(x[..., 1::2])) / 2

    def forward(
        self, x: Float[Tensor, "T C lines X"]
    ) -> tuple[Float[Tensor, "T C lines X//2"], Float[Tensor, "T C lines X//2"]]:
        """The coarse and the detail half."""
        coarse = self.coarse(x)
        return coarse, x[..., 1::2] - self.predict(coarse)

    def coarse_matrix(self) -> Float[Tensor, "half 2*half"]:
        """A = (E + U O) / 2 of a linear step, where E and O pick the even and the odd samples."""
        return torch.stack([self.half_eye, self.update.matrix() / 2], dim=2).flatten(1)

    def matrix(self) -> Float[Tensor, "length length"]:
        """A above D = O - P A."""
        coarse = self.coarse_matrix()
        return torch.cat([coarse, self.odd - _product(self.predict.matrix(), coarse)])

    def inverse(
        self, coarse: Float[Tensor, "T C lines half"], detail: Float[Tensor, "T C lines half"]
    ) -> Float[Tensor, "T C lines 2*half"]:
        odd = detail + self.predict(coarse)
        even = 2 * coarse - self.update(odd)
        return torch.stack([even, odd], dim=-1).flatten(-2)


class Remembering(nn.Module):
    """Keeps what is made of a few weights alone while they have the same values: many small steps, the same at every run.

    On a CPU; a device would have to be waited for to compare them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[str, tuple[bytes, tuple[Tensor, ...]]] = {}

    def once(self, name: str, operators: list[nn.Module], make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` gives of the weights of `operators`; made anew where a gradient or a graph of it is wanted."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        weights = [weight for operator in operators for weight in operator._parameters.values()]
        if not all(type(weight) is nn.Parameter and weight.device.type == "cpu" for weight in weights):
            return make()  # on a device, or under a transform such as vmap
        values = b"".join(weight.detach().view(torch.uint8).numpy().tobytes() for weight in weights)
        kept = self._made.get(name)
        if kept is None or kept[0] != values:
            with torch.inference_mode(False), torch.no_grad():  # of use, and to be copied, in any mode
                kept = self._made[name] = values, make()
        return kept[1]

    def _apply(self, *args, **kwargs):
        self._made.clear()  # buffers are moved and cast, too
        return super()._apply(*args, **kwargs)


class Lifting2d(Remembering):
    """One level in two dimensions: a patch of side 2 * `half` into four bands of side `half`."""

    def __init__(self, operator: str, channels: int, half: int) -> None:
        super().__init__()
        self.width = LiftingStep(operator, channels, half)
        self.height = LiftingStep(operator, channels, half)

    def updates(self) -> list[nn.Module]:
        """All that the coarse band depends on."""
        return [self.width.update, self.height.update]

    def coarse(self, x: Float[Tensor, "T C Y X"]) -> Float[Tensor, "T C Y//2 X//2"]:
        """The approximation alone: update steps only."""
        return self.height.coarse(self.width.coarse(x).mT).mT

    def forward(
        self, x: Float[Tensor, "T C Y X"]
    ) -> tuple[Float[Tensor, "T C Y//2 X//2"], Float[Tensor, "T C 3 Y//2 X//2"]]:
        """The approximation LL and the details LH, HL, HH (width first: HL is high along the width)."""
        low, high = self.width(x)
        (ll, lh), (hl, hh) = self.height(low.mT), self.height(high.mT)
        return ll.mT, torch.stack([lh.mT, hl.mT, hh.mT], dim=2)

    def inverse(
        self, ll: Float[Tensor, "T C half half"], details: Float[Tensor, "T C 3 half half"]
    ) -> Float[Tensor, "T C 2*half 2*half"]:
        lh, hl, hh = (band.mT for band in details.unbind(2))
        low, high = self.height.inverse(ll.mT, lh).mT, self.height.inverse(hl, hh).mT
        return self.width.inverse(low, high)


class LinearLifting2d(Lifting2d):
    """The same level where U and P are matrices: two small products, W_height x W_width^T, several times faster.

    W stacks the two matrices of `LiftingStep`.
    """

    def coarse(self, x: Float[Tensor, "T C Y X"]) -> Float[Tensor, "T C Y//2 X//2"]:
        height, width = self.once("coarse", self.updates(), self._coarse_matrices)
        return height.to(x.dtype) @ (x @ width.mT.to(x.dtype))

    def forward(
        self, x: Float[Tensor, "T C Y X"]
    ) -> tuple[Float[Tensor, "T C Y//2 X//2"], Float[Tensor, "T C 3 Y//2 X//2"]]:
        operators = [*self.updates(), self.width.predict, self.height.predict]
        height, width = self.once("both", operators, self._matrices)
        bands = height.to(x.dtype) @ (x @ width.mT.to(x.dtype))
        top, bottom = bands.chunk(2, dim=-2)
        (ll, hl), (lh, hh) = top.chunk(2, dim=-1), bottom.chunk(2, dim=-1)
        return ll, torch.stack([lh, hl, hh], dim=2)

    def _coarse_matrices(self) -> tuple[Tensor, ...]:
        return self.height.coarse_matrix(), self.width.coarse_matrix()

    def _matrices(self) -> tuple[Tensor, ...]:
        return self.height.matrix(), self.width.matrix()


LEVELS = {"linear": LinearLifting2d, "haar": LinearLifting2d, "dawn": Lifting2d}


def _exact(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Without autocast: in half precision a flat patch would have details, and the norm behind would magnify them."""

    @wraps(method)
    def exact(self: nn.Module, patches: Tensor, *args: int) -> Tensor:
        with torch.autocast(patches.device.type, enabled=False):
            return method(self, patches, *args)

    return exact


class Lifting(Remembering):
    """A pyramid over patches of side `patch_size`: level 1 is the finest."""

    def __init__(self, operator: str, channels: int, patch_size: int, num_levels: int) -> None:
        super().__init__()
        level = LEVELS[operator]
        self.levels = nn.ModuleList(level(operator, channels, patch_size // 2**n) for n in range(1, num_levels + 1))

    def updates(self) -> list[nn.Module]:
        return [update for level in self.levels for update in level.updates()]

    @_exact
    def coarse(self, patches: Float[Tensor, "T C P P"]) -> Float[Tensor, "T C p p"]:
        """The coarsest band of every patch: update steps of all levels, no detail.

        Linear update steps are one matrix from a patch's pixels to its coarse band.
        """
        if not isinstance(self.levels[0], LinearLifting2d):
            for level in self.levels:
                patches = level.coarse(patches)
            return patches
        matrix, height, width = self.once("coarse", self.updates(), self._coarse_matrix)
        return (patches.flatten(2) @ matrix.mT.to(patches.dtype)).unflatten(-1, (len(height), len(width)))

    def _coarse_matrix(self) -> tuple[Tensor, ...]:
        """From the pixels of a patch to its coarse band, and the matrices along height and width that it is made of."""
        height, width = self.levels[0].height.coarse_matrix(), self.levels[0].width.coarse_matrix()
        for level in self.levels[1:]:
            height, width = _product(level.height.coarse_matrix(), height), _product(level.width.coarse_matrix(), width)
        return (height[:, None, :, None] * width[None, :, None, :]).flatten(0, 1).flatten(1), height, width

    @_exact
    def details(self, patches: Float[Tensor, "K C P P"], level: int) -> Float[Tensor, "K C 3 p p"]:
        """Details of `level` for the given patches, read again from their pixels."""
        for finer in self.levels[: level - 1]:
            patches = finer.coarse(patches)
        return self.levels[level - 1](patches)[1]

    def matrix(self, level: int | None = None) -> Float[Tensor, "pixels band"]:
        """What linear lifting makes of one channel of a patch: the details of `level`, or None: the coarsest band.

        More MACs than step by step, in one product in place of many tiny ones.
        """
        half = self.get_buffer("levels.0.width.half_eye")
        side = 2 * len(half)
        with torch.inference_mode(False), torch.no_grad():  # of use in any mode
            units = torch.eye(side**2, dtype=half.dtype, device=half.device).view(-1, 1, side, side)
            return (self.coarse(units) if level is None else self.details(units, level)).flatten(1)

    def inverse(self, coarsest: Float[Tensor, "T C p p"], details: list[Tensor]) -> Float[Tensor, "T C P P"]:
        """The patches again, from the coarsest band and the details of levels 1, 2, ..."""
        x = coarsest
        for level, bands in zip(reversed(self.levels), reversed(details), strict=True):
            x = level.inverse(x, bands)
        return x


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right for matrices so small that it is not counted as work on the image."""
    return (left[:, :, None] * right).sum(1)


def lifting_penalty(
    x: Float[Tensor, "T C Y X"], ll: Float[Tensor, "T C Y//2 X//2"], details: Float[Tensor, "T C 3 Y//2 X//2"]
) -> Float[Tensor, ""]:
    """Small details and a coarse band that keeps the mean: mean |LH, HL, HH| + mean (mean LL - mean x)^2 per patch.

    Source: after DAWN's two regularisers (models/dawn.py), with all three detail bands and a square (ours).
    """
    drift = ll.mean((-2, -1)) - x.mean((-2, -1))
    return details.abs().mean() + drift.square().mean()
