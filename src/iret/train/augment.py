"""Augmentation of whole batches with kornia, on the device that trains. All randomness is torch's global generator."""

import torch
from jaxtyping import Float, Int, UInt8
from kornia import augmentation as K
from torch import Tensor, nn
from torch.nn import functional as F

from iret.model import Iret
from iret.train.recipe import Recipe


class Augmenter:
    """uint8 images and labels to what `model` takes and target distributions."""

    def __init__(self, recipe: Recipe, model: Iret) -> None:
        size = model.shape.img_size
        self.recipe, self.num_classes, self.normalise = recipe, model.num_classes, model.normalise
        parts: list[nn.Module] = []
        if recipe.crop_padding:
            parts.append(K.RandomCrop(size, padding=recipe.crop_padding))
        elif recipe.min_crop < 1:
            parts.append(K.RandomResizedCrop(size, scale=(recipe.min_crop, 1.0)))
        if recipe.flip:
            parts.append(K.RandomHorizontalFlip(p=0.5))
        num_ops, magnitude = recipe.rand_augment
        if num_ops:
            parts.append(K.auto.RandAugment(n=num_ops, m=magnitude))
        self.geometry = nn.Sequential(*parts)
        self.paste = K.RandomCutMixV2(
            beta=torch.tensor(recipe.cutmix or 1.0), data_keys=["input", "class"], use_correct_lambda=True
        )

    @torch.no_grad()
    def __call__(
        self, images: UInt8[Tensor, "B C Y X"], labels: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B C Y X"], Float[Tensor, "B classes"]]:
        """Moved, mirrored and mixed images with smoothed, mixed targets that sum to 1."""
        pixels = self.geometry(images.float() / 255)
        targets = F.one_hot(labels, self.num_classes).float()
        mixes = [mix for mix, is_on in ((self._mixup, self.recipe.mixup), (self._cutmix, self.recipe.cutmix)) if is_on]
        if mixes:
            pixels, targets = mixes[int(torch.randint(len(mixes), ()))](pixels, targets)
        smoothing = self.recipe.label_smoothing
        return self.normalise(pixels), targets * (1 - smoothing) + smoothing / self.num_classes

    def _mixup(self, pixels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Zhang et al. 2018: every image is blended with another, the share from a beta distribution."""
        alpha = torch.full((len(pixels),), self.recipe.mixup)
        share = torch.distributions.Beta(alpha, alpha).sample().to(pixels.device)  # on CPU: MPS cannot draw it
        other = torch.randperm(len(pixels), device=pixels.device)
        return (
            torch.lerp(pixels[other], pixels, share[:, None, None, None]),
            torch.lerp(targets[other], targets, share[:, None]),
        )

    def _cutmix(self, pixels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Yun et al. 2019: a box of another image is pasted in; targets mix by area."""
        order = torch.arange(len(pixels), device=pixels.device)
        pasted, pairs = self.paste(pixels, order)
        own, other, share = pairs[0].unbind(1)  # kornia gives the labels it mixed, here the indices, and the own share
        return pasted, torch.lerp(targets[other.long()], targets[own.long()], share[:, None])
