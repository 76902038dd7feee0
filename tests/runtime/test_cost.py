"""The closed form of multiply-accumulates: by hand, against torch's counter to the integer, and the spec's table."""

import json
from copy import copy
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from iret.model import Iret
from iret.output import Output
from iret.presets import iret_pico, iret_small, iret_tiny
from iret.runtime.cost import (
    IMPORTANCES,
    LIFTINGS,
    Shape,
    block_linears,
    coarse_macs,
    detail_macs,
    full_macs,
    macs,
    mlp_macs,
    numbers_moved,
    plan_macs,
    scoring_macs,
)


def by_hand_shape(**options) -> Shape:
    """Two patches of 2 x 2 grey pixels, two stages of one block each, widths 2 and 4, three classes."""
    settings = dict(img_size=(2, 4), patch_size=2, in_chans=1, num_classes=3, embed_dims=(2, 4), depths=(1, 1))
    return Shape(**{**settings, "head_dim": 2, "lifting": "haar", **options})


def small_shape(**options) -> Shape:
    settings = dict(img_size=(32, 48), patch_size=8, in_chans=3, num_classes=5, embed_dims=(16, 32, 48), head_dim=16)
    return Shape(**{**settings, "depths": (2, 3, 1), **options})


def opinionated(shape: Shape) -> Iret:
    """A model whose attention is far from uniform, so that thresholds cut."""
    torch.manual_seed(0)
    model = Iret(shape).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.weight") or "head" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def counted(function, *args, **options) -> tuple[int, object]:
    """Half of what torch counts while attention runs as plain matrix products (the fused kernel counts as 0)."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = function(*args, **options)
    total = counter.get_total_flops()
    assert total % 2 == 0
    return total // 2, result


def table_gmacs(shape: Shape, *kept: int) -> float:
    """GMACs at the given counts without the lifting, two decimals; blocks whole, as the table has them."""
    lifting = kept[0] * coarse_macs(shape) + kept[1] * detail_macs(shape, 2) + kept[2] * detail_macs(shape, 1)
    return round((plan_macs(shape, kept, kept, scored=False) - lifting) / 1e9, 2)


# ---- by hand

# Lifting as matrices: 4 pixels to 1 value; a 2 x 2 patch between two 2 x 2 matrices.
COARSE, DETAIL = 4, 2 * 2**3


def test_the_full_model_by_hand():
    embed, transition = 2 * (COARSE + 1 * 2), 3 * 2 * 4 + 2 * (DETAIL + 3 * 4)
    stage_1, stage_2 = 12 * 3 * 2**2 + 2 * 3**2 * 2, 12 * 3 * 4**2 + 2 * 3**2 * 4
    last_head = 4 * 3
    assert full_macs(by_hand_shape()) == embed + stage_1 + transition + stage_2 + last_head == 932


def test_a_pruned_run_by_hand():
    # One patch kept, none refined; both heads answer; the class token scores two patches in one block of width 2, whose MLP
    # the head needs for the class token and the next stage for the two tokens that stay.
    before = 2 * COARSE + 4 + (180 - 8 * 3 * 2**2) + 2 * 3 + 2 * 2 + 8 * 2**2
    after = 8 * 2 * 2**2 + 2 * 2 * 4 + (12 * 2 * 4**2 + 2 * 2**2 * 4) + 4 * 3
    assert macs(by_hand_shape(), [[2], [1]], [[0], [0]], scored=True).tolist() == [before + after]


def test_column_scoring_by_hand():
    # All three tokens ask, two patches answer, in the stage's last block.
    column, row = (
        macs(by_hand_shape(importance=importance), [[2], [2]], [[0], [2]], scored=True).item()
        for importance in ("column", "cls")
    )
    assert column - row == 3 * 2 * 2 - 2 * 2


def test_dawn_lifting_by_hand():
    # Per place two convolutions: 4 taps of 1 channel to 2, then 2 channels to 1. Lines of one pixel after one step: 2 lines
    # along the width, then 1 (coarse) or 2 (details) along the height, each with an update, with details also a predict.
    place = 4 * 1 * 2 + 2 * 1
    coarse, detail = (2 + 1) * place, 2 * (2 + 2) * place
    change = full_macs(by_hand_shape(lifting="dawn")) - full_macs(by_hand_shape())
    assert change == 2 * (coarse - COARSE + detail - DETAIL)


def test_an_image_that_leaves_early_pays_for_what_it_ran():
    counts = np.array([[2, 2], [0, 1]])
    spent = macs(by_hand_shape(), counts, counts, scored=True, stages_run=np.array([1, 2]))
    assert spent[0] == 2 * COARSE + 4 + (180 - 8 * 2 * 2**2) + 2 * 3 + 2 * 2  # its patches pass no MLP
    assert spent[1] == macs(by_hand_shape(), [[2], [1]], [[2], [1]], scored=True)[0]
    assert spent.dtype == np.int64


# ---- against torch's counter


@pytest.mark.parametrize("lifting", LIFTINGS)
@pytest.mark.parametrize("img_size", [(32, 48), (16, 64)])
def test_the_full_model_equals_the_counter(lifting, img_size):
    model = opinionated(small_shape(lifting=lifting, img_size=img_size))
    count, _ = counted(model, torch.randn(1, 3, *img_size))
    assert count == full_macs(model.shape)


@pytest.mark.parametrize("lifting", LIFTINGS)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_pruned_run_equals_the_counter(lifting, importance):
    model = opinionated(small_shape(lifting=lifting, importance=importance))
    image = torch.randn(1, 3, 32, 48)
    seen = set()
    for thresholds in (0.0, 0.5, (1.0, (0.5, 1.5)), (1.0, 0.0), (0.0, 1.1), 2.0):
        count, out = counted(model.run, image, thresholds)
        assert out.macs.tolist() == [count], thresholds
        seen.add(count)
    assert len(seen) == 6  # the thresholds did cut


@pytest.mark.parametrize("rule", ["mass", "topk"])
def test_other_rules_equal_the_counter(rule):
    model = opinionated(small_shape())
    for strength in (0.0, 0.3, (0.2, (0.5, 0.7))):
        count, out = counted(model.run, torch.randn(1, 3, 32, 48), strength, rule=rule)
        assert out.macs.tolist() == [count], strength


@pytest.mark.parametrize("thresholds", [0.0, 1.0])
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_an_early_exit_equals_the_counter(thresholds, importance):
    model = opinionated(small_shape(importance=importance))
    model.stages[1].head.weight.data *= 4  # so that some images leave here
    exits = set()
    for image in torch.randn(6, 1, 3, 32, 48):
        for confidence in (0.0, 0.5, 0.9, 1.1):
            count, out = counted(model.run, image, thresholds, confidence)
            assert out.macs.tolist() == [count], confidence
            exits.add(out.trace.exit_stage.item())
    assert exits == {0, 1, 2}


def test_a_batch_costs_what_its_images_cost_alone():
    model = opinionated(small_shape())
    images = torch.randn(4, 3, 32, 48)
    with torch.no_grad():
        together = model.run(images, 1.0, 0.5)
        alone = [model.run(image[None], 1.0, 0.5).macs.item() for image in images]
    assert together.macs.tolist() == alone
    assert together.macs.dtype == torch.int64


def test_the_last_mlp_of_a_stage_is_spared_for_what_is_dropped():
    shape = small_shape()
    kept = (24, 10, 3)
    whole, spared = (plan_macs(shape, kept, kept, scored=flag) for flag in (False, True))
    scoring = sum(int(scoring_macs(shape, stage, kept[stage] + 1)) for stage in range(2))
    heads = sum(int(mlp_macs(shape, stage, 1)) for stage in range(2))
    dropped = sum(int(mlp_macs(shape, stage, kept[stage] - kept[stage + 1])) for stage in range(2))
    assert spared == whole + scoring + heads - dropped


@pytest.mark.parametrize("mlp_ratio", [2, 0.5, 1.25])
def test_another_mlp_ratio_and_number_of_scored_blocks_equal_the_counter(mlp_ratio):
    model = opinionated(small_shape(mlp_ratio=mlp_ratio, scored_blocks=3))
    count, out = counted(model.run, torch.randn(1, 3, 32, 48), 1.0)
    assert out.macs.tolist() == [count]


# ---- numbers moved


def moved_by(model: Iret, image: torch.Tensor, thresholds: float, exit_confidence: float) -> tuple[int, Output]:
    """Weights, inputs and outputs of all linear layers in a run that refines all it keeps, as hooks see them; weights once.

    The layers that embed a lifted band count the pixels that the lifting read in place of the band.
    """
    cell, weights = model.shape.in_chans * model.shape.patch_size**2, set()
    lifted = {model.patch_embed, *(transition.detail_embed for transition in model.transitions)}
    moved = sum(parameter.numel() for parameter in model.lifting.parameters())

    def note(layer, args, out):
        nonlocal moved
        weights.add(layer.weight)
        moved += (len(args[0]) * cell if layer in lifted else args[0].numel()) + out.numel()

    for part in model.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(note)
    with torch.no_grad():
        out = model.run(image, thresholds, exit_confidence)
    return moved + sum(map(torch.numel, weights)), out


@pytest.mark.parametrize("options", [*({"lifting": each} for each in LIFTINGS), dict(mlp_ratio=1.5, img_size=(16, 64))])
@pytest.mark.parametrize(("thresholds", "confidence", "stages"), [(0.0, 1.1, 3), (1.0, 1.1, 3), (1.0, 0.0, 1)])
def test_numbers_moved_are_what_hooks_on_every_linear_layer_see(options, thresholds, confidence, stages):
    shape = small_shape(**options)
    moved, out = moved_by(opinionated(shape), torch.randn(1, 3, *shape.img_size), thresholds, confidence)
    kept, refined = (grid[:stages].sum((1, 2, 3)).tolist() for grid in (out.trace.kept, out.trace.refined))
    assert out.trace.exit_stage.item() == stages - 1
    assert numbers_moved(shape, kept, refined, scored=bool(thresholds)) == moved


def test_numbers_moved_by_hand():
    shape = small_shape(depths=(1, 2, 2), num_classes=2)
    embed = 12 * 2 + 3 * 2**2 * 16 + 24 * (3 * 8**2 + 16)
    first = 12 * 16**2 + 16 * 25 * 16 + (16 * 2 + 16 + 2)
    assert numbers_moved(shape, (24,), scored=False) == embed + first
    second = 2 * (12 * 32**2 + 16 * 9 * 32) + (32 * 2 + 32 + 2)
    between = (16 + 9 * 2**2) * 32 + 9 * (16 + 32) + 5 * (3 * 8**2 + 32)  # 8 kept, 5 of them refined
    assert numbers_moved(shape, (24, 8), (0, 5), scored=False) == embed + first + between + second
    spared = 10 * 16 * (25 - 9 - 1) + 10 * 32 * (
        9 - 1
    )  # in and out of two layers; the image left after the second stage
    assert numbers_moved(shape, (24, 8), (0, 5), scored=True) == embed + first + between + second - spared


def test_what_int8_rounds_is_what_the_blocks_multiply_by_weights():
    model = Iret(small_shape())
    linears = [part for stage in model.stages for part in stage.blocks.modules() if isinstance(part, torch.nn.Linear)]
    assert block_linears(model.shape, (0, 0, 0), scored=False) == (sum(part.weight.numel() for part in linears),) * 2
    whole = 12 * (2 * 25 * 16**2 + 3 * 9 * 32**2)
    assert block_linears(model.shape, (24, 8), scored=False)[1] == whole
    spared = 8 * (25 - 9 - 1) * 16**2 + 8 * (9 - 1) * 32**2
    assert block_linears(model.shape, (24, 8), scored=True)[1] == whole - spared


# ---- the spec's table


TABLE_COUNTS = ((196, 196, 196), (196, 137, 96), (196, 98, 49), (196, 69, 24))


@pytest.mark.parametrize(
    ("dims", "depths", "printed"),
    [
        ((64, 128, 192), (4, 4, 4), (0.69, 0.39, 0.25, 0.17)),
        ((128, 256, 384), (4, 4, 4), (2.49, 1.43, 0.91, 0.62)),
        ((96, 192, 384), (3, 3, 6), (2.73, 1.40, 0.79, 0.47)),
        ((96, 192, 384), (4, 4, 8), (3.62, 1.86, 1.05, 0.62)),
    ],
)
def test_the_table_of_the_spec(dims, depths, printed):
    # The table was made without the lifting, which is counted below.
    shape = replace(iret_small(), embed_dims=dims, depths=depths, head_dim=32)
    assert tuple(table_gmacs(shape, *kept) for kept in TABLE_COUNTS) == printed


@pytest.mark.parametrize(("preset", "share"), [(iret_tiny, 0.0137), (iret_small, 0.0039), (iret_pico, 0.0003)])
def test_lifting_as_matrices_is_a_small_share_of_the_macs(preset, share):
    shape = preset()
    lifting = shape.num_patches * (coarse_macs(shape) + detail_macs(shape, 2) + detail_macs(shape, 1))
    assert lifting / full_macs(shape) == pytest.approx(share, abs=5e-5)


def test_small_preset_costs_what_the_table_says():
    assert tuple(table_gmacs(iret_small(), *kept) for kept in TABLE_COUNTS) == (2.49, 1.43, 0.91, 0.62)


def test_cifar_preset_costs_what_the_table_says():
    assert round(full_macs(iret_pico()) / 1e9, 3) == 0.147
    assert round(plan_macs(iret_pico(), (64, 32, 16), (64, 32, 16), scored=False) / 1e9, 3) == 0.055


# ---- order


@given(
    first=st.lists(st.integers(0, 24), min_size=3, max_size=3),
    second=st.lists(st.integers(0, 24), min_size=3, max_size=3),
    importance=st.sampled_from(IMPORTANCES),
)
def test_more_tokens_are_never_cheaper(first, second, importance):
    few, many = np.minimum(first, second)[:, None], np.maximum(first, second)[:, None]
    shape = small_shape(importance=importance)
    assert macs(shape, few, few, scored=True) <= macs(shape, many, many, scored=True)
    assert macs(shape, many, few, scored=True) <= macs(shape, many, many, scored=True)


# ---- Shape


def test_a_shape_knows_its_grid_and_levels():
    shape = small_shape()
    assert shape.grid == (4, 6)
    assert shape.num_patches == 24
    assert shape.levels == 2
    assert [shape.side(level) for level in (0, 1, 2)] == [8, 4, 2]
    assert [shape.detail_level(stage) for stage in (1, 2)] == [2, 1]  # coarse details first


@pytest.mark.parametrize(("side", "floor"), [(224, 8), (112, 4), (32, 4)])
def test_the_floor_of_kept_patches_is_eight_of_196(side, floor):
    assert replace(iret_small(), img_size=(side, side)).min_keep == floor


def test_a_shape_that_was_sent_elsewhere_is_found_by_what_it_says():
    """Words hash differently in another process, so what is remembered of them must not come along."""
    shape = small_shape()
    shape.__dict__["_hash"] = 1
    sent = copy(shape)
    assert sent == shape
    assert hash(sent) == hash(small_shape()) != hash(shape)
    assert sent.num_patches == shape.num_patches


def test_a_shape_survives_json():
    shape = small_shape(importance="column", lifting="dawn")
    assert Shape.from_dict(json.loads(json.dumps(asdict(shape)))) == shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(img_size=(32, 50)), "img_size=32x50 is not a whole number of 8 px patches"),
        (dict(img_size=(0, 48)), "img_size=0x48 is not a whole number"),
        (dict(depths=(2, 2)), "need one entry per stage"),
        (dict(depths=(2,), embed_dims=(16,)), "two stages or more"),
        (dict(depths=(2, 0, 2)), "need one entry per stage"),
        (dict(patch_size=2), "patch_size=2 cannot be halved 2 times; 3 stages need a multiple of 4"),
        (dict(embed_dims=(16, 32, 40)), "multiples of head_dim=16"),
        (dict(embed_dims=(32, 16, 48)), "must not shrink"),
        (dict(lifting="db4"), "lifting='db4' is unknown; choose from linear, haar, dawn"),
        (dict(importance="norm"), "importance='norm' is unknown; choose from cls, column"),
        (dict(in_chans=0), "in_chans=0 must be at least 1"),
        (dict(mlp_ratio=0), "mlp_ratio=0 must be above 0"),
        (dict(mlp_ratio=float("inf")), "mlp_ratio=inf must be above 0"),
        (dict(mlp_ratio=2.3), r"mlp_ratio=2.3 must .* whole widths of embed_dims=\(16, 32, 48\), as 1 and 2 do"),
        (dict(scored_blocks=0), "scored_blocks=0 must be at least 1"),
        (dict(num_classes=-1), "num_classes=-1 must be at least"),
    ],
)
def test_shapes_that_do_not_add_up_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small_shape(**options)
