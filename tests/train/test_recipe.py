"""Recipes are frozen, variants are their parents but for what they name, and mistakes are refused with what is known."""

from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from iret.train.recipe import PRECISIONS, RECIPES, Recipe, find_recipe


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="recipe 'digits_huge' is unknown; choose from ") as refusal:
        find_recipe("digits_huge")
    assert str(refusal.value).removesuffix(".").split("choose from ")[1].split(", ") == list(RECIPES)


def test_an_unknown_precision_is_refused_also_in_a_variant():
    with pytest.raises(ValueError, match="precision='16-mixed' is unknown; choose from 32-true, bf16-mixed"):
        replace(find_recipe("fine_tune"), precision="16-mixed")
    assert {replace(find_recipe("fine_tune"), precision=known).precision for known in PRECISIONS} == set(PRECISIONS)


def test_no_epochs_between_two_looks_at_held_out_images_are_refused():
    with pytest.raises(ValueError, match="eval_epochs=0 must be 1 or more"):
        replace(find_recipe("digits_nano"), eval_epochs=0)


def test_a_recipe_cannot_be_changed_and_a_variant_leaves_its_parent_alone():
    parent = find_recipe("fine_tune")
    with pytest.raises(FrozenInstanceError):
        parent.lr = 1.0
    replace(parent, lr=1.0)
    assert find_recipe("fine_tune") == parent


@pytest.mark.parametrize("missing", ["name", "model", "epochs", "batch_size", "lr"])
def test_what_decides_a_run_has_no_default(missing):
    given = dict(name="mine", model="iret_pico", epochs=1.0, batch_size=8, lr=1e-3)
    del given[missing]
    with pytest.raises(TypeError, match=rf"missing .* argument: '{missing}'"):
        Recipe(**given)


@pytest.mark.parametrize(
    ("variant", "parent", "changed"),
    [
        (
            "cifar10_pico",
            "cifar10_pico_cpu",
            "name epochs batch_size lr warmup_epochs ema_decay drop_path_rate precision eval_epochs rand_augment mixup "
            "cutmix full_until sampled_until",
        ),
        ("tiny_imagenet_nano", "cifar10_pico", "name model epochs crop_padding"),
    ],
)
def test_a_variant_differs_from_its_parent_only_in_what_it_names(variant, parent, changed):
    here, there = asdict(find_recipe(variant)), asdict(find_recipe(parent))
    assert {field for field in here if here[field] != there[field]} == set(changed.split())
