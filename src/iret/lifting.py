"""Learnable 2-D lifting of a patch, update first, so that the coarse band never needs a detail.

One step along one axis splits a line into its even and odd samples:

    coarse = (even + U(odd)) / 2          update first: needs no detail
    detail = odd - P(coarse)              only for patches that are looked at again

and is undone by  odd = detail + P(coarse),  even = 2 coarse - U(odd),  whatever U and P are. A level works along the
width, then along the height; `approximations` runs the update steps of all levels, `details` one level on demand.
Nothing crosses a patch's border, so a patch's detail does not depend on whether its neighbour was dropped.

Source: IRET, GLSVLSI 2024, abstract ("learnable 2D lifting scheme"); the order of the steps is the default of the DAWN code
(github.com/mxbastidasr/DAWN_WACV2020, models/lifting.py); linear taps and Haar start are ours (the full text was not available).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from iret.runtime.cost import LIFTINGS


class LinearOperator(nn.Module):
    """Three taps along the last axis that sum to one, replicated at the border; starts as the identity (Haar)."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        middle = torch.arange(length)
        taps = torch.stack([middle - 1, middle, middle + 1]).clamp(0, length - 1)
        self.register_buffer("placement", F.one_hot(taps, length).float(), persistent=False)
        self.register_buffer("identity", torch.tensor([0.0, 1.0, 0.0]), persistent=False)

    def forward(self, x: Float[Tensor, "T C lines length"]) -> Float[Tensor, "T C lines length"]:
        taps = self.identity + self.weight - self.weight.mean()
        matrix = (taps[:, None, None] * self.placement).sum(0)
        return x @ matrix.T.to(x.dtype)


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


class IdentityOperator(nn.Identity):
    """U = P = identity: the Haar wavelet, fixed."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()


OPERATORS = dict(zip(LIFTINGS, (LinearOperator, IdentityOperator, DawnOperator), strict=True))


class LiftingStep(nn.Module):
    """One update and one predict along the last axis of length 2 * `half`."""

    def __init__(self, operator: str, channels: int, half: int) -> None:
        super().__init__()
        self.update = OPERATORS[operator](channels, half)
        self.predict = OPERATORS[operator](channels, half)

    def coarse(self, x: Float[Tensor, "T C lines X"]) -> Float[Tensor, "T C lines X//2"]:
        return (x[..., 0::2] + self.update(x[..., 1::2])) / 2

    def forward(
        self, x: Float[Tensor, "T C lines X"]
    ) -> tuple[Float[Tensor, "T C lines X//2"], Float[Tensor, "T C lines X//2"]]:
        """The coarse and the detail half."""
        coarse = self.coarse(x)
        return coarse, x[..., 1::2] - self.predict(coarse)

    def inverse(
        self, coarse: Float[Tensor, "T C lines half"], detail: Float[Tensor, "T C lines half"]
    ) -> Float[Tensor, "T C lines 2*half"]:
        odd = detail + self.predict(coarse)
        even = 2 * coarse - self.update(odd)
        return torch.stack([even, odd], dim=-1).flatten(-2)


class Lifting2d(nn.Module):
    """One level in two dimensions: a patch of side 2 * `half` into four bands of side `half`."""

    def __init__(self, operator: str, channels: int, half: int) -> None:
        super().__init__()
        self.width = LiftingStep(operator, channels, half)
        self.height = LiftingStep(operator, channels, half)

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


class Lifting(nn.Module):
    """A pyramid over patches of side `patch_size`: level 1 is the finest."""

    def __init__(self, operator: str, channels: int, patch_size: int, num_levels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            Lifting2d(operator, channels, patch_size // 2**level) for level in range(1, num_levels + 1)
        )

    def approximations(self, patches: Float[Tensor, "T C P P"]) -> list[Tensor]:
        """The patches themselves, then the coarse band of each level, the coarsest last; no detail is computed."""
        bands = [patches]
        for level in self.levels:
            bands.append(level.coarse(bands[-1]))
        return bands

    def details(self, finer: Float[Tensor, "K C P P"], level: int) -> Float[Tensor, "K C 3 P//2 P//2"]:
        """Details of `level` for the given patches; `finer` is their approximation of level - 1."""
        return self.levels[level - 1](finer)[1]

    def inverse(self, coarsest: Tensor, details: list[Tensor]) -> Float[Tensor, "T C P P"]:
        """The patches again, from the coarsest band and the details of levels 1, 2, ..."""
        x = coarsest
        for level, bands in zip(reversed(self.levels), reversed(details), strict=True):
            x = level.inverse(x, bands)
        return x


def lifting_penalty(
    x: Float[Tensor, "T C Y X"], ll: Float[Tensor, "T C Y//2 X//2"], details: Float[Tensor, "T C 3 Y//2 X//2"]
) -> Float[Tensor, ""]:
    """Small details and a coarse band that keeps the mean: mean |LH, HL, HH| + mean (mean LL - mean x)^2 per patch.

    Source: after DAWN's two regularisers (models/dawn.py), with all three detail bands and a square (ours).
    """
    drift = ll.mean((-2, -1)) - x.mean((-2, -1))
    return details.abs().mean() + drift.square().mean()
