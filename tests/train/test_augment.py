"""Augmented batches: pixels are moved and mixed, and the targets say how much of each image is in the picture."""

import pytest
import torch
from torch import Tensor

from iret.model import Iret
from iret.runtime.cost import Shape
from iret.train.augment import Augmenter
from iret.train.recipe import Recipe

NUM_CLASSES = 12
OFF = dict(crop_padding=0, min_crop=1.0, flip=False, rand_augment=(0, 0), mixup=0.0, cutmix=0.0, label_smoothing=0.0)
EVERYTHING = dict(min_crop=0.35, flip=True, rand_augment=(2, 9), mixup=0.8, cutmix=1.0, label_smoothing=0.1)


def make_augmenter(channels: int = 3, num_classes: int = NUM_CLASSES, **options) -> Augmenter:
    recipe = Recipe(name="x", model="iret_pico", epochs=1.0, batch_size=4, lr=0.1, **{**OFF, **options})
    shape = Shape(
        img_size=(16, 24),
        patch_size=4,
        in_chans=channels,
        num_classes=num_classes,
        embed_dims=(8, 8),
        depths=(1, 1),
        head_dim=8,
    )
    return Augmenter(recipe, Iret(shape))


def make_plain_images() -> tuple[Tensor, Tensor]:
    """Image i, of class i, is of grey value 20 i throughout, so a pixel tells where it came from."""
    labels = torch.arange(NUM_CLASSES)
    return (20 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 3, 16, 24).contiguous(), labels


def make_noise(channels: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (NUM_CLASSES, channels, 16, 24), generator=draw, dtype=torch.uint8)
    return images, torch.arange(NUM_CLASSES)


def to_grey(normalised: Tensor) -> Tensor:
    """Back from mean and std of 0.5 to bytes, as floats."""
    return (normalised * 0.5 + 0.5) * 255


@pytest.mark.parametrize("channels", [1, 3])
def test_with_nothing_on_pixels_are_only_normalised_and_targets_are_the_labels(channels):
    images, labels = make_noise(channels)
    pixels, targets = make_augmenter(channels)(images, labels)
    assert torch.equal(pixels, (images.float() / 255 - 0.5) / 0.5)
    assert torch.equal(targets, torch.eye(NUM_CLASSES))


def test_smoothing_gives_every_class_its_share():
    images = torch.zeros(2, 3, 16, 24, dtype=torch.uint8)
    _, targets = make_augmenter(num_classes=4, label_smoothing=0.2)(images, torch.tensor([1, 3]))
    expected = torch.tensor([[0.05, 0.85, 0.05, 0.05], [0.05, 0.05, 0.05, 0.85]])
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-7)  # float32


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_mixes_targets_by_the_pixels_that_really_changed(seed):
    torch.manual_seed(seed)
    images, labels = make_plain_images()
    pixels, targets = make_augmenter(cutmix=1.0)(images, labels)
    source = (to_grey(pixels)[:, 0] / 20).round().long()  # whose pixel it is
    shares = torch.nn.functional.one_hot(source, NUM_CLASSES).float().mean((1, 2))
    torch.testing.assert_close(targets, shares, rtol=0, atol=1e-6)  # float32
    assert ((shares > 0).sum(1) == 2).any()


@pytest.mark.parametrize("seed", range(5))
def test_mixup_mixes_targets_as_it_mixes_pixels(seed):
    torch.manual_seed(seed)
    images, labels = make_plain_images()
    pixels, targets = make_augmenter(mixup=0.8)(images, labels)
    grey = to_grey(pixels)
    assert (grey - grey[:, :1, :1, :1]).abs().max() < 1e-3  # the whole image is blended alike; float32 of up to 255
    torch.testing.assert_close(targets @ (20.0 * labels), grey[:, 0, 0, 0], rtol=0, atol=1e-3)
    assert ((targets > 0).sum(1) == 2).any()
    assert len({round(share, 4) for share in targets.amax(1).tolist()}) > 2  # every image has a share of its own


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_and_smoothed_targets_are_distributions(smoothing):
    torch.manual_seed(0)
    images, labels = make_noise()
    augment = make_augmenter(**{**EVERYTHING, "label_smoothing": smoothing})
    for _ in range(8):
        pixels, targets = augment(images, labels)
        assert pixels.shape == images.shape
        assert pixels.isfinite().all()
        torch.testing.assert_close(targets.sum(1), torch.ones(NUM_CLASSES), rtol=0, atol=1e-6)  # float32, 12 terms
        assert targets.min() >= smoothing / NUM_CLASSES - 1e-7


def test_mixup_and_cutmix_take_turns():
    torch.manual_seed(0)
    images, labels = make_plain_images()
    augment = make_augmenter(mixup=0.8, cutmix=1.0)
    is_cut = []
    for _ in range(20):
        grey = to_grey(augment(images, labels)[0])
        is_cut.append(bool(((grey - grey[:, :, :1, :1]).abs() > 1).any()))
    assert 3 < sum(is_cut) < 17  # either with odds of a half: outside this once in 400 seeds


def test_flips_mirror_about_half_of_the_images_and_nothing_else():
    torch.manual_seed(0)
    images, labels = make_noise()
    num_mirrored = 0
    for _ in range(20):
        pixels, _ = make_augmenter(flip=True)(images, labels)
        for got, image in zip(to_grey(pixels), images.float(), strict=True):
            if torch.allclose(got, image, rtol=0, atol=1e-3):  # float32 of up to 255
                continue
            torch.testing.assert_close(got, image.flip(2), rtol=0, atol=1e-3)
            num_mirrored += 1
    assert 90 < num_mirrored < 150  # of 240: 120 expected, standard deviation 8


def test_a_padded_crop_moves_the_image_by_at_most_its_padding():
    torch.manual_seed(0)
    images, labels = make_noise()
    pixels, _ = make_augmenter(crop_padding=2, min_crop=0.1)(images, labels)
    padded = torch.nn.functional.pad(images.float(), (2, 2, 2, 2))
    places = set()
    for got, canvas in zip(to_grey(pixels), padded, strict=True):
        found = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.allclose(got, canvas[:, y : y + 16, x : x + 24], rtol=0, atol=1e-3)  # float32 of up to 255
        ]
        assert len(found) == 1
        places.update(found)
    assert len(places) > 3


def test_the_same_seed_gives_the_same_batch_and_another_does_not():
    images, labels = make_noise()
    augment = make_augmenter(**EVERYTHING)
    first, second, third = ((torch.manual_seed(seed), augment(images, labels))[1] for seed in (0, 0, 1))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], third[0])
