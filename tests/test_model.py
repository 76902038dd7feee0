"""The model against its formula written out, and what must hold whatever was trained. Spec b.6, tests 4 to 11."""

import json
import os
import warnings
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import pywt
import torch
from PIL import Image
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import models
from iret.attention import head_shares
from iret.model import Iret
from iret.precision import PRECISIONS, prepare
from iret.runtime.cost import LIFTINGS, full_macs, macs
from iret.runtime.points import FILE_NAME as POINTS_NAME, OperatingPoints, Point, Setting
from iret.tokens import Tokens, pack
from iret.vit import lay_out

ROUNDING = 2e-5  # float32 through three stages, logits of a few units
CUTS = [0.5, 1.0, (0.8, 1.2), ((0.7, 1.1), (0.8, 1.3)), (0.0, 1.0), ((0.0, 1.0), 0.8)]


# 24 patches of 8 x 8; the lifting is still Haar's, as the references here want it
make_model = partial(models.make_model, img_size=(32, 48), is_haar=True)


def make_images(batch: int = 4, channels: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(batch, channels, 32, 48, generator=torch.Generator().manual_seed(seed))


def kept_counts(out) -> list[list[int]]:
    """[S][B] patches."""
    return out.trace.kept.sum((2, 3)).tolist()


def assert_same(got, expected, atol: float = ROUNDING) -> None:
    """The same choices exactly, the same numbers but for rounding."""
    assert torch.equal(got.trace.kept, expected.trace.kept)
    assert torch.equal(got.trace.refined, expected.trace.refined)
    assert torch.equal(got.trace.exit_stage, expected.trace.exit_stage)
    assert torch.equal(got.macs, expected.macs)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=atol)
    torch.testing.assert_close(got.trace.stage_logits, expected.trace.stage_logits, rtol=0, atol=atol, equal_nan=True)


@pytest.fixture(autouse=True)
def _no_gradient():
    with torch.no_grad():
        yield


# ---- the formula written out


def haar_pyramid(patches: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The coarsest band of two levels and the details [N, C, 3, P, P], coarse ones first, by PyWavelets."""
    coarse, *bands = pywt.wavedec2(patches.double().numpy(), "haar", level=2, axes=(-2, -1))
    details = [np.stack([-h, -v, d], 2) / 2**level for level, (h, v, d) in zip((2, 1), bands, strict=True)]
    return torch.from_numpy(coarse / 4).float(), [torch.from_numpy(band).float() for band in details]


def written_out(model: Iret, image: Tensor, thresholds: list[tuple[float, float]]) -> tuple[Tensor, list[set[int]]]:
    """Logits of every stage and the cells in each, one image, one token list, one plain softmax."""
    patches = torch.stack([image[:, y : y + 8, x : x + 8] for y in range(0, 32, 8) for x in range(0, 48, 8)])
    coarse, details = haar_pyramid(patches)
    cells = torch.arange(len(patches))
    x = torch.cat([torch.zeros(1, 16), model.patch_embed(coarse.flatten(1))]) + model.pos_embed[0]
    logits, seen = [], []
    for index, stage in enumerate(model.stages):
        seen.append(set(cells.tolist()))
        attention = None
        for block in stage.blocks:
            heads = block.attn.num_heads
            q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
            scores = q @ k.mT / q.shape[-1] ** 0.5
            x = x + block.attn.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
            class_row = scores[:, 0, 1:].softmax(-1).mean(0)
            if block in stage.blocks[-2:]:
                attention = class_row if attention is None else (attention + class_row) / 2
        logits.append(stage.head(stage.norm(x[0])))
        if index < len(thresholds):
            keep_at, refine_at = thresholds[index]
            importance = attention / attention.mean()
            best = importance.argsort(descending=True)[:4]  # the floor of a grid of 24
            stays, refined = importance >= keep_at, importance >= refine_at
            stays[best] = True
            refined = refined | stays if keep_at == refine_at else refined
            transition = model.transitions[index]
            widened = transition.widen(transition.norm(x)) + transition.pos_embed[0, F.pad(cells + 1, (1, 0))]
            extra = details[index][cells].flatten(1)
            extra = transition.detail_embed.weight @ F.layer_norm(extra, extra.shape[1:]).T
            widened[1:] += extra.T * refined[:, None]
            x, cells = widened[F.pad(stays, (1, 0), value=True)], cells[stays]
    return torch.stack(logits), seen


@pytest.mark.parametrize("thresholds", [[(0.0, 0.0), (0.0, 0.0)], [(0.8, 0.8), (0.9, 0.9)], [(0.7, 1.1), (0.8, 1.3)]])
def test_the_model_is_its_formula(thresholds):
    model = make_model()
    for image in make_images():
        logits, cells = written_out(model, image, thresholds)
        out = model.run(image[None], tuple(thresholds))
        assert [set(kept.flatten().nonzero().flatten().tolist()) for kept in out.trace.kept[:, 0]] == cells
        torch.testing.assert_close(out.trace.stage_logits[:, 0], logits, rtol=0, atol=ROUNDING)


# ---- nothing dropped


@pytest.mark.parametrize("lifting", LIFTINGS)
def test_threshold_zero_equals_the_unpruned_model(lifting):
    model, images = make_model(lifting=lifting), make_images()
    out = model.run(images)
    torch.testing.assert_close(out.logits, model(images), rtol=0, atol=ROUNDING)
    assert out.trace.kept.all()
    assert out.trace.refined[1:].all()
    assert out.trace.exit_stage.tolist() == [2] * 4
    assert torch.equal(out.logits, out.trace.stage_logits[2])


def test_threshold_zero_for_one_image_leaves_it_whole_beside_a_pruned_one():
    model, images = make_model(), make_images(2)
    out = model.run(images, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert kept_counts(out)[1][0] == kept_counts(out)[2][0] == 24
    assert kept_counts(out)[1][1] < 24
    torch.testing.assert_close(out.logits[:1], model(images[:1]), rtol=0, atol=ROUNDING)


def test_the_full_run_costs_its_other_heads_more_than_a_call():
    model = make_model()
    out = model.run(make_images())
    assert out.macs.tolist() == [full_macs(model.shape) + 5 * (16 + 32)] * 4


# ---- gathered and masked


@pytest.mark.parametrize("importance", ["cls", "column"])
@pytest.mark.parametrize("thresholds", CUTS)
def test_the_gathered_form_equals_the_masked_form(importance, thresholds):
    model, images = make_model(importance=importance), make_images()
    gathered, masked = (model.run(images, thresholds, masked=masked) for masked in (False, True))
    assert_same(gathered, masked)


def test_the_cuts_above_keep_mixed_counts():
    model, images = make_model(), make_images()
    for thresholds in CUTS:
        counts = kept_counts(model.run(images, thresholds))
        assert any(len(set(stage)) > 1 for stage in counts), thresholds
        assert min(counts[2]) < 24


@pytest.mark.parametrize("rule", ["mass", "topk"])
def test_the_gathered_form_equals_the_masked_form_under_other_rules(rule):
    model, images = make_model(), make_images()
    gathered, masked = (model.run(images, (0.3, (0.4, 0.7)), rule=rule, masked=masked) for masked in (False, True))
    assert_same(gathered, masked)


def test_the_gathered_form_equals_the_masked_form_when_images_leave_early():
    model, images = make_model(), make_images(8)
    confidence = between_answers(model, images)
    gathered, masked = (model.run(images, 0.9, confidence, masked=masked) for masked in (False, True))
    assert gathered.trace.exit_stage.unique().numel() > 1
    assert_same(gathered, masked)


# ---- one image among others


@pytest.mark.parametrize("thresholds", CUTS)
@pytest.mark.parametrize("confidence", [None, 0.6])
def test_an_image_does_not_depend_on_its_batch_mates(thresholds, confidence):
    model, images = make_model(), make_images()
    together = model.run(images, thresholds, confidence)
    for index, image in enumerate(images):
        alone = model.run(image[None], thresholds, confidence)
        assert torch.equal(alone.trace.kept[:, 0], together.trace.kept[:, index])
        assert torch.equal(alone.trace.refined[:, 0], together.trace.refined[:, index])
        assert alone.macs[0] == together.macs[index]
        assert alone.trace.exit_stage[0] == together.trace.exit_stage[index]
        torch.testing.assert_close(alone.logits[0], together.logits[index], rtol=0, atol=ROUNDING)


def test_every_image_has_its_own_thresholds():
    model, images = make_model(), make_images()
    strengths = torch.tensor([[0.0, 0.0], [0.7, 0.9], [1.0, 0.5], [1.5, 1.5]])
    pairs = torch.stack([strengths, strengths + 0.3], -1)
    first_answers = model.run(images).trace.stage_logits[0]
    middling = first_answers.softmax(1).amax(1).quantile(0.5).item()  # some leave at once, some do not
    for given, confidence in ((strengths, None), (strengths.numpy(), None), (pairs, None), (pairs, middling)):
        together = model.run(images, given, confidence)
        for index, image in enumerate(images):
            own = tuple(tuple(each) if given is pairs else each for each in given[index].tolist())
            alone = model.run(image[None], own, confidence)
            assert torch.equal(alone.trace.kept[:, 0], together.trace.kept[:, index])
            assert torch.equal(alone.trace.refined[:, 0], together.trace.refined[:, index])
            torch.testing.assert_close(alone.logits[0], together.logits[index], rtol=0, atol=ROUNDING)
    assert together.trace.exit_stage.unique().numel() > 1


def test_shuffling_the_batch_shuffles_the_answers():
    model, images = make_model(), make_images()
    order = torch.tensor([2, 0, 3, 1])
    straight, shuffled = model.run(images, 1.0), model.run(images[order], 1.0)
    assert torch.equal(shuffled.trace.kept, straight.trace.kept[:, order])
    torch.testing.assert_close(shuffled.logits, straight.logits[order], rtol=0, atol=ROUNDING)


# ---- thresholds


def test_the_first_kept_sets_are_nested_as_the_threshold_rises():
    model, images = make_model(), make_images()
    before = torch.ones(4, 4, 6, dtype=torch.bool)
    counts = []
    for threshold in np.linspace(0, 3, 31):
        kept = model.run(images, (float(threshold), 0.0)).trace.kept[1]
        assert not (kept & ~before).any()
        counts.append(int(kept.sum()))
        before = kept
    assert counts[0] == 4 * 24
    assert counts[-1] == 4 * 4  # the floor
    assert len(set(counts)) > 5


def test_stages_only_lose_patches_and_refine_what_they_keep():
    out = make_model().run(make_images(), ((0.7, 1.1), (0.8, 1.3)))
    kept, refined = out.trace.kept, out.trace.refined
    assert kept[0].all()
    assert not refined[0].any()
    assert not (kept[2] & ~kept[1]).any()
    assert not (refined & ~kept).any()
    assert (kept[1:] & ~refined[1:]).any((1, 2, 3)).all()


@pytest.mark.parametrize("masked", [False, True])
def test_the_importance_of_a_trace_is_what_the_choice_saw(masked):
    out = make_model().run(make_images(), ((0.7, 1.1), (0.8, 1.3)), masked=masked)
    seen = out.trace.importance
    assert seen.shape == (2, 4, 4, 6)
    assert torch.equal(~seen.isnan(), out.trace.kept[:2])
    torch.testing.assert_close(seen.nanmean((2, 3)), torch.ones(2, 4), rtol=0, atol=1e-5)
    for transition, (keep, refine) in enumerate(((0.7, 1.1), (0.8, 1.3))):
        assert torch.equal(seen[transition] >= keep, out.trace.kept[transition + 1])
        assert torch.equal(seen[transition] >= refine, out.trace.refined[transition + 1])


def test_where_nothing_is_chosen_no_importance_was_seen_whoever_else_is_in_the_batch():
    model, images = make_model(), make_images(2)
    assert model.run(images).trace.importance.isnan().all()
    seen = model.run(images, torch.tensor([[0.0, 0.0], [0.9, 0.9]])).trace.importance
    assert seen[:, 0].isnan().all()
    assert not seen[0, 1].isnan().any()


@pytest.mark.graph
@pytest.mark.parametrize("budget", ["0.5", ["a"] * 4, [[0.5], [0.5, 1]], None])
def test_a_budget_that_is_no_number_is_refused(budget):
    model = make_model()
    model.points = made_up_points(model)
    with pytest.raises(ValueError, match=r"budget=.* must be one number, or one an image"):
        model(make_images(), budget=budget)


@pytest.mark.parametrize("make", [list, tuple, np.array, lambda row: np.array(row[::-1])[::-1], torch.tensor])
def test_a_budget_an_image_comes_in_any_row_of_numbers(make):
    model, images = make_model(), make_images(3)
    model.points = made_up_points(model)
    budgets = [1.0, 0.5, 0.75]
    alone = torch.cat([model(image[None], budget=budget) for image, budget in zip(images, budgets, strict=True)])
    torch.testing.assert_close(model(images, budget=make(budgets)), alone)
    assert model.run(images, budget=make(budgets)).logits.shape == alone.shape
    with pytest.raises(ValueError, match=r"budget of shape \(2,\) does not fit 3 images; give one each"):
        model(images, budget=make(budgets[:2]))


@pytest.mark.graph
def test_images_that_are_no_tensor_are_refused():
    for call in (make_model(), make_model().run, make_model().forward_features):
        with pytest.raises(
            ValueError, match="images are a ndarray, not a tensor; model.preprocess makes one of photos"
        ):
            call(make_images().numpy())


def test_uniform_attention_keeps_the_floor_above_one_and_all_up_to_one():
    model, images = make_model(), make_images(2)
    for stage in model.stages:
        for block in stage.blocks:
            block.attn.qkv.weight.zero_()
    assert kept_counts(model.run(images, 1.01)) == [[24, 24], [4, 4], [4, 4]]
    assert kept_counts(model.run(images, 1.0)) == [[24, 24]] * 3


@pytest.mark.parametrize(("strength", "counts"), [(0.5, [24, 12, 6]), ((0.25, 0.5), [24, 18, 9]), (0.9, [24, 4, 4])])
def test_topk_keeps_the_same_share_of_every_image(strength, counts):
    out = make_model().run(make_images(), strength, rule="topk")
    assert kept_counts(out) == [[count] * 4 for count in counts]
    assert out.macs.unique().numel() == 1


def test_topk_shares_are_exact_on_a_grid_of_a_hundred():
    model = make_model(img_size=(80, 80))
    out = model.run(torch.zeros(1, 3, 80, 80), 0.9, rule="topk")
    assert kept_counts(out) == [[100], [10], [4]]


def test_mass_keeps_more_of_an_image_that_is_looked_at_evenly():
    model, images = make_model(), make_images()
    counts = kept_counts(model.run(images, 0.3, rule="mass"))
    assert all(4 <= count < 24 for count in counts[1])
    assert len(set(counts[1])) > 1


def test_forms_of_the_same_thresholds_agree():
    model, images = make_model(), make_images(2)
    expected = model.run(images, 0.9)
    for same in ((0.9, 0.9), [0.9, (0.9, 0.9)], torch.full((2, 2), 0.9), np.full((2, 2, 2), 0.9), torch.tensor(0.9)):
        assert torch.equal(model.run(images, same).logits, expected.logits)


# ---- what a dropped or unrefined patch can still say


def add_fine_texture(images: Tensor, cells: Tensor) -> Tensor:
    """Details of level 1 in the given cells [B, Y, X], nothing coarser: a sum of zero in every square of 2 x 2.

    Multiples of 1/8 on images of multiples of 1/8: Haar's means of them are exact.
    """
    texture = torch.randint(-8, 8, (*images.shape[:2], 16, 24, 1, 3), generator=torch.Generator().manual_seed(5)) / 8
    squares = texture @ torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    fine = squares.view(*images.shape[:2], 16, 24, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(images.shape)
    return images + fine * cells[:, None].repeat_interleave(8, 2).repeat_interleave(8, 3)


def eighths(images: Tensor) -> Tensor:
    return (8 * images).round() / 8


@pytest.mark.parametrize("thresholds", [0.9, (0.0, 1.0), ((0.7, 1.1), (0.8, 1.3))])
def test_fine_detail_of_patches_that_are_not_refined_changes_no_bit(thresholds):
    model, images = make_model(), eighths(make_images())
    before = model.run(images, thresholds)
    unseen = ~before.trace.refined[2]  # dropped at either transition, or kept without details
    assert unseen.any((1, 2)).all()
    after = model.run(add_fine_texture(images, unseen), thresholds)
    assert torch.equal(after.trace.stage_logits, before.trace.stage_logits)
    assert torch.equal(after.trace.kept, before.trace.kept)


def test_fine_detail_of_refined_patches_matters():
    model, images = make_model(), eighths(make_images())
    before = model.run(images, 0.9)
    after = model.run(add_fine_texture(images, before.trace.refined[2]), 0.9)
    assert torch.equal(after.trace.stage_logits[:2], before.trace.stage_logits[:2])
    assert ((after.logits - before.logits).abs().amax(1) > 1e-3).all()


def test_no_gradient_reaches_details_that_were_not_sampled():
    # Of a patch without details the logits see the 4 x 4 means alone: the gradient is the same within each.
    model, images = make_model(lifting="haar"), make_images()
    with torch.enable_grad():
        images.requires_grad_()
        out = model.run(images, (0.8, 1.1))
        out.logits.square().sum().backward()
    squares = images.grad.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    uneven = (squares - squares[..., :1]).abs().amax((1, 4))  # [B, 8, 12]: four squares a patch
    uneven = uneven.unfold(1, 2, 2).unfold(2, 2, 2).amax((3, 4))
    sampled = out.trace.refined[1:].any(0)
    assert (uneven[~sampled] < 1e-7).all()
    assert (uneven[sampled] > 1e-5).all()
    assert (images.grad.abs() > 0).any()


def test_a_stage_asks_all_its_scored_blocks_and_no_gradient_passes():
    stage = make_model(scored_blocks=3, depths=(4, 2, 2)).stages[0]
    heads = stage.blocks[0].attn.num_heads
    assert torch.equal(stage.head_shares, head_shares(3, heads))
    with torch.enable_grad():
        after, received = stage(pack(torch.randn(2, 25, 16)), is_scored=True)
    assert after.x_TD.requires_grad
    assert not received.requires_grad
    torch.testing.assert_close(received.view(2, 25).sum(1), torch.ones(2), rtol=0, atol=1e-6)  # float32, sums of 24
    assert received[[0, 25]].tolist() == [0.0, 0.0]


def test_a_dropped_patch_computes_nothing_any_more():
    model, images = make_model(), make_images()
    widths = []
    for stage in model.stages:
        stage.blocks[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[:-1].numel()))
    out = model.run(images, 0.9)
    assert widths == [sum(stage) + 4 for stage in kept_counts(out)]


@pytest.mark.parametrize("has_exits", [False, True])
def test_the_last_mlp_of_a_stage_is_for_the_class_token_and_what_stays(has_exits):
    model, images = make_model(), make_images()
    widths = {}
    for index, stage in enumerate(model.stages):
        note = lambda _, args, index=index: widths.setdefault(index, []).append(args[0].shape[:-1].numel())  # noqa: E731
        stage.blocks[-1].mlp.register_forward_pre_hook(note)
    out = model.run(images, 0.9, 1.1 if has_exits else None)
    _, second, third = (sum(stage) + 4 for stage in kept_counts(out))
    assert widths == {0: [4, second], 1: [4, third], 2: [third]}

    widths.clear()
    model.look(images, np.full((4, 2, 2), 0.9))  # no head but the last answers
    assert widths == {0: [second], 1: [third], 2: [third]}

    widths.clear()
    model.run(images, 0.9, 0.0)
    assert widths == {0: [4]}, "an image that leaves needs it for its class token alone"


def test_a_stage_and_its_rest_are_the_whole_stage():
    model = make_model()
    for stage, dim in zip(model.stages[:-1], model.shape.embed_dims[:-1], strict=True):
        even = pack(torch.randn(2, 25, dim))
        uneven = Tokens(even.x_TD[:34], even.cell_T[:34], torch.tensor([0, 25, 34]), is_even=False)
        for tokens in (even, uneven):
            whole, nothing = stage(tokens, is_scored=False)
            seen, received = stage(tokens, is_scored=True)
            rest, _ = stage(seen, is_scored=True, is_rest=True)
            assert nothing is None and received is not None
            torch.testing.assert_close(rest.x_TD, whole.x_TD, rtol=0, atol=ROUNDING)
            assert not torch.allclose(seen.x_TD, whole.x_TD, rtol=0, atol=100 * ROUNDING)
            answers = stage.answer(whole), stage.answer(seen, is_scored=True)
            torch.testing.assert_close(*answers, rtol=0, atol=ROUNDING)


def test_details_are_computed_for_refined_patches_only():
    model, images = make_model(), make_images()
    asked = []
    for level in model.lifting.levels:
        level.register_forward_pre_hook(lambda _, args: asked.append(args[0].shape[0]))
    out = model.run(images, (0.7, (0.8, 1.3)))
    assert asked == out.trace.refined[1:].sum((1, 2, 3)).tolist()


def test_an_unrefined_patch_is_one_without_details():
    # Constant patches have no detail, so it makes no difference whether they are refined.
    model = make_model()
    images = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(3))
    images = images.repeat_interleave(8, 2).repeat_interleave(8, 3)
    refined, unrefined = model.run(images, 0.8), model.run(images, ((0.8, 9.0), (0.8, 9.0)))
    assert refined.trace.refined.sum() > unrefined.trace.refined.sum()
    assert torch.equal(refined.trace.kept, unrefined.trace.kept)
    torch.testing.assert_close(refined.logits, unrefined.logits, rtol=0, atol=1e-6)  # the same sums, other row counts


# ---- early exit


def between_answers(model: Iret, images: Tensor, threshold: float = 0.9) -> float:
    """A confidence that some of the images reach before the last stage and some do not."""
    reached = model.run(images, threshold).trace.stage_logits[:-1].softmax(2).amax((0, 2))
    return float(reached.median()) + 1e-3


def test_confidence_zero_leaves_after_the_first_stage():
    model, images = make_model(), make_images()
    for thresholds in (0.0, 1.0):
        whole, out = model.run(images, thresholds), model.run(images, thresholds, 0.0)
        assert out.trace.exit_stage.tolist() == [0] * 4
        torch.testing.assert_close(out.logits, whole.trace.stage_logits[0], rtol=0, atol=ROUNDING)
        assert out.trace.stage_logits[1:].isnan().all()
        assert out.trace.stage_logits.shape == (3, 4, 5)
        assert out.trace.kept[0].all()
        assert not out.trace.kept[1:].any()
        assert not out.trace.refined.any()
        assert (out.macs < whole.macs).all()


def test_confidence_above_one_never_leaves():
    model, images = make_model(), make_images()
    assert_same(model.run(images, 1.0, 1.01), model.run(images, 1.0))


def test_an_image_that_is_exactly_as_sure_as_asked_leaves():
    model, images = make_model(), make_images(1)
    sure = model.run(images, 0.9).trace.stage_logits[0].softmax(1).amax().item()
    assert model.run(images, 0.9, sure).trace.exit_stage.item() == 0
    assert model.run(images, 0.9, sure + 1e-6).trace.exit_stage.item() > 0


@pytest.mark.parametrize("thresholds", [0.0, 0.9, (0.7, (0.8, 1.3))])
def test_an_image_leaves_at_the_first_stage_that_is_sure_and_the_others_go_on_unchanged(thresholds):
    model, images = make_model(), make_images(8)
    whole = model.run(images, thresholds)
    sure = whole.trace.stage_logits.softmax(2).amax(2)
    confidence = between_answers(model, images, thresholds)
    stages = torch.where((sure[:2] >= confidence).any(0), (sure[:2] >= confidence).float().argmax(0), 2)
    assert stages.unique().numel() > 1

    out = model.run(images, thresholds, confidence)
    assert torch.equal(out.trace.exit_stage, stages)
    picked = whole.trace.stage_logits[stages, torch.arange(8)]
    torch.testing.assert_close(out.logits, picked, rtol=0, atol=ROUNDING)
    was_run = torch.arange(3)[:, None] <= stages
    assert torch.equal(out.trace.stage_logits.isnan().any(2), ~was_run)
    torch.testing.assert_close(
        out.trace.stage_logits[was_run], whole.trace.stage_logits[was_run], rtol=0, atol=ROUNDING
    )
    assert torch.equal(out.trace.kept, whole.trace.kept & was_run[:, :, None, None])
    assert torch.equal(out.trace.refined, whole.trace.refined & was_run[:, :, None, None])
    counts = (grid.sum((2, 3)).numpy() for grid in (out.trace.kept, out.trace.refined))
    spent = macs(model.shape, *counts, scored=thresholds != 0.0, stages_run=stages.numpy() + 1)
    assert out.macs.tolist() == spent.tolist()


# ---- controls


def test_random_and_inverse_choices_keep_equal_counts_of_other_patches():
    model, images = make_model(), make_images()
    torch.manual_seed(0)
    runs = {
        control: model.run(images, 0.5, rule="topk", control=control) for control in ("attention", "random", "inverse")
    }
    assert len({str(kept_counts(out)) for out in runs.values()}) == 1
    assert torch.equal(runs["inverse"].trace.kept[1], ~runs["attention"].trace.kept[1])
    assert not torch.equal(runs["random"].trace.kept[1], runs["attention"].trace.kept[1])


# ---- shapes and heads


def test_other_sides_channels_and_numbers_of_stages():
    model = make_model(img_size=(16, 64), in_chans=1, embed_dims=(16, 16), depths=(1, 1), num_classes=2)
    images = torch.randn(3, 1, 16, 64)
    out = model.run(images, 0.9)
    assert model(images).shape == out.logits.shape == (3, 2)
    assert out.trace.kept.shape == out.trace.refined.shape == (2, 3, 2, 8)
    assert out.trace.stage_logits.shape == (2, 3, 2)


def test_features_are_the_normalised_tokens_of_the_last_stage():
    model, images = make_model(), make_images()
    features = model.forward_features(images)
    assert features.shape == (4, 1 + 24, model.num_features) == (4, 25, 48)
    assert torch.equal(model.stages[-1].head(features[:, 0]), model(images))
    norm = model.stages[-1].norm
    plain = (features - norm.bias) / norm.weight
    torch.testing.assert_close(plain.mean(-1), torch.zeros(4, 25), rtol=0, atol=1e-5)  # float32, sums of 48
    torch.testing.assert_close(plain.var(-1, correction=0), torch.ones(4, 25), rtol=0, atol=1e-4)


def test_a_new_classifier_replaces_every_head_and_forgets_labels_and_points():
    model, images = make_model(), make_images()
    features = model.forward_features(images)
    model.labels, model.points = tuple("abcde"), made_up_points(model)
    model.reset_classifier(10)
    assert model.num_classes == model.shape.num_classes == 10
    assert model(images).shape == (4, 10)
    assert model.run(images, 1.0, 0.5).trace.stage_logits.shape == (3, 4, 10)
    assert model.labels is None
    assert model.points is None
    assert torch.equal(model.forward_features(images), features)


def test_a_classifier_of_no_classes_leaves_the_features():
    model, images = make_model(), make_images()
    features = model.forward_features(images)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(images), features[:, 0])
    assert full_macs(model.shape) == full_macs(make_model(num_classes=1).shape) - model.num_features


# ---- numbers


@pytest.mark.parametrize("thresholds", [0.0, 0.9])
def test_a_rerun_is_bit_identical(thresholds):
    first, second = (make_model().run(make_images(), thresholds, 0.6) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.trace.kept, second.trace.kept)


def test_under_autocast_tokens_are_added_up_in_single_precision():
    model = make_model()
    seen = []
    for stage in model.stages[1:]:
        stage.register_forward_pre_hook(lambda module, args: seen.append(args[0].x_TD.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(make_images(2))
    assert seen == [torch.float32] * (len(model.stages) - 1)


def test_bf16_autocast_is_close_to_single_precision():
    model, images = make_model(), make_images(8)
    with torch.autocast("cpu", torch.bfloat16):
        called, whole, cut = model(images), model.run(images), model.run(images, 0.5, rule="topk")
    exact, exact_cut = model.run(images), model.run(images, 0.5, rule="topk")
    assert cut.logits.dtype == torch.float32
    assert not torch.equal(whole.logits, exact.logits)
    # bf16 keeps 8 bits; six blocks of it on logits of a standard deviation of 1.3
    torch.testing.assert_close(whole.logits, exact.logits, rtol=0, atol=0.1)
    torch.testing.assert_close(called.float(), exact.logits, rtol=0, atol=0.1)
    assert kept_counts(cut) == kept_counts(exact_cut)
    assert (cut.trace.kept == exact_cut.trace.kept).float().mean() > 0.97  # near ties may turn


def test_a_bright_image_in_half_precision_is_not_taken_for_an_infinite_one():
    # Its sum is beyond float16.
    model = make_model().half()
    assert model.run(torch.full((32, 3, 32, 48), 2.0, dtype=torch.float16), 1.0).logits.isfinite().all()


def test_training_reaches_every_parameter():
    model = make_model().train()
    with torch.enable_grad():
        out = model.run(make_images(), 0.9)
        out.trace.stage_logits.square().sum().backward()
    unreached = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert unreached == []


def test_the_lifting_penalty_is_zero_without_details_and_reaches_the_lifting():
    model = make_model()
    constant = torch.ones(2, 3, 32, 48) * torch.tensor([0.5, -1.0, 2.0])[:, None, None]
    assert model.lifting_loss(constant).item() == 0.0
    with torch.enable_grad():
        loss = model.lifting_loss(make_images())
        loss.backward()
    assert loss > 0
    assert all(parameter.grad is not None for parameter in model.lifting.parameters())


def test_the_lifting_penalty_is_the_mean_over_levels():
    # One patch whose rows are 0 2 4 10, twice. Level 1: coarse 1 and 7, HL 1 and 3; level 2: coarse 4, HL 3.
    model = make_model(img_size=(8, 8), in_chans=1)
    columns = torch.tensor([0.0, 2.0, 4.0, 10.0]).repeat(2).expand(1, 1, 8, 8)
    assert model.lifting_loss(columns).item() == pytest.approx(((1 + 3) / 2 / 3 + 3 / 3) / 2)


# ---- budgets


def made_up_points(model: Iret) -> OperatingPoints:
    full = full_macs(model.shape)
    points = tuple(
        Point(
            thresholds=((keep, refine), (keep, refine)),
            accuracy=accuracy,
            macs_mean=share * full,
            macs_p95=share * full,
            kept_mean=(24.0, 12.0, 6.0),
        )
        for share, accuracy, keep, refine in ((1.0, 0.9, 0.0, 0.0), (0.5, 0.8, 0.8, 1.0), (0.25, 0.7, 1.2, 1.6))
    )
    return OperatingPoints(data="made up", num_images=1, full_macs=full, points=points)


@pytest.mark.parametrize(("budget", "keep", "refine"), [(0.5, 0.8, 1.0), (0.375, 1.0, 1.3), (0.75, 0.4, 0.5)])
def test_a_budget_runs_at_the_thresholds_between_its_points(budget, keep, refine):
    model, images = make_model(), make_images()
    model.points = made_up_points(model)
    assert model.setting(budget).thresholds == (pytest.approx((keep, refine)),) * 2
    expected = model.run(images, ((keep, refine), (keep, refine))).logits
    torch.testing.assert_close(model(images, budget=budget), expected, rtol=0, atol=ROUNDING)
    assert not torch.allclose(expected, model(images), atol=1e-3)


def test_the_full_budget_is_the_whole_model_with_or_without_points():
    model, images = make_model(), make_images()
    assert torch.equal(model(images, budget=1.0), model(images))
    assert model.setting(1.0) == Setting(thresholds=((0.0, 0.0), (0.0, 0.0)))


def test_a_budget_without_points_names_the_command_that_makes_them():
    with pytest.raises(ValueError, match="budget=0.4 needs operating points, .* `iret calibrate MODEL --data DATA`"):
        make_model()(make_images(), budget=0.4)


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5, float("nan")])
def test_a_budget_outside_zero_to_one_is_refused(budget):
    with pytest.raises(ValueError, match=r"is outside \(0, 1\]"):
        make_model()(make_images(), budget=budget)


def test_a_budget_below_the_cheapest_point_names_it():
    model = make_model()
    model.points = made_up_points(model)
    with pytest.raises(ValueError, match="budget=0.2 is below the cheapest operating point of this model, 0.250"):
        model(make_images(), budget=0.2)


@pytest.mark.parametrize("has_exits", [False, True])
def test_every_image_of_a_batch_may_have_its_own_budget(has_exits):
    model, images = make_model(), make_images()
    model.points = made_up_points(model)
    if has_exits:
        points = tuple(replace(each, exit_confidence=1 - 0.3 * place) for place, each in enumerate(model.points.points))
        model.points = replace(model.points, points=points)
    budgets = torch.tensor([1.0, 0.5, 0.3, 0.5])
    alone = [model(image[None], budget=float(budget)) for image, budget in zip(images, budgets, strict=True)]
    torch.testing.assert_close(model(images, budget=budgets), torch.cat(alone), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(model.run(images, budget=budgets).logits, torch.cat(alone), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.3])
def test_a_run_takes_a_budget_as_a_call_does(budget):
    model, images = make_model(), make_images()
    points = made_up_points(model)
    model.points = replace(points, points=(*points.points[:2], replace(points.points[2], exit_confidence=0.5)))
    setting = model.setting(budget)
    assert_same(model.run(images, budget=budget), model.run(images, setting.thresholds, setting.exit_confidence))
    torch.testing.assert_close(
        model.run(images, budget=budget).logits, model(images, budget=budget), rtol=0, atol=ROUNDING
    )
    stayed = model.run(images, exit_confidence=1.1, budget=budget)  # the caller's own
    assert (stayed.trace.exit_stage == 2).all()


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({"thresholds": 0.5}, "give one of budget, ms, joules and thresholds, not budget and thresholds"),
        ({"thresholds": 0.0}, "give one of .*, not budget and thresholds"),
        ({"ms": 3.0}, "give one of .*, not budget and ms"),
        ({"joules": 3.0}, "give one of .*, not budget and joules"),
        ({"rule": "topk"}, "rule='topk' reads thresholds as its own strengths; give them in place of budget"),
    ],
)
def test_a_budget_beside_thresholds_or_another_rule_is_refused(given, seen):
    model = make_model()
    model.points = made_up_points(model)
    with pytest.raises(ValueError, match=seen):
        model.run(make_images(), budget=0.5, **given)


def test_the_exit_confidence_of_a_point_is_served_too():
    model, images = make_model(), make_images()
    points = made_up_points(model)
    model.points = replace(points, points=(points.points[0], replace(points.points[1], exit_confidence=0.0)))
    expected = model.run(images, exit_confidence=0.0).logits  # every image leaves after the first stage
    torch.testing.assert_close(model(images, budget=0.5), expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(model(images, budget=torch.full((4,), 0.5)), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("one", [torch.tensor(0.5), np.array(0.5)], ids=["tensor", "array"])
def test_a_budget_without_dimensions_is_a_number(one):
    model, images = make_model(), make_images()
    model.points = made_up_points(model)
    assert torch.equal(model(images, budget=one), model(images, budget=0.5))
    assert torch.equal(model.run(images, budget=one).macs, model.run(images, budget=0.5).macs)


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        (torch.tensor([0.5, 0.5]), r"budget of shape \(2,\) does not fit 4 images; give one each"),
        (torch.tensor([0.5, 0.5, 2.0, 0.5]), r"budget=2 is outside \(0, 1\]"),
        (torch.tensor([0.5, 0.5, 0.1, 0.5]), "budget=0.1 is below the cheapest"),
    ],
)
def test_budgets_that_do_not_fit_the_batch_are_refused(budget, sentence):
    model = make_model()
    model.points = made_up_points(model)
    with pytest.raises(ValueError, match=sentence):
        model(make_images(), budget=budget)


def test_milliseconds_and_joules_are_looked_up_for_this_device():
    model, images = make_model(), make_images()
    model.points = made_up_points(model)
    with pytest.raises(ValueError, match="no clock was measured on this device .*--device-only"):
        model(images, ms=3.0)
    model.points = model.points.with_device(models.made_up_clock())
    assert torch.equal(model(images, ms=3.0), model(images, budget=0.375))
    assert torch.equal(model(images, joules=0.04), model(images, budget=0.5))
    assert torch.equal(model.run(images, ms=3.0).logits, model.run(images, budget=0.375).logits)
    assert torch.equal(model.run(images, joules=0.04).macs, model.run(images, budget=0.5).macs)
    with pytest.raises(ValueError, match="give one of budget, ms and joules"):
        model(images, budget=0.5, ms=3.0)
    with pytest.raises(ValueError, match="give one of ms and joules"):
        model(images, joules=0.5, ms=3.0)


# ---- exits, per stage and per image


def test_an_exit_may_be_asked_for_at_one_stage_alone():
    model, images = make_model(), make_images()
    assert model.run(images, exit_confidence=(None, 0.0)).trace.exit_stage.tolist() == [1] * 4
    assert model.run(images, exit_confidence=(0.0, None)).trace.exit_stage.tolist() == [0] * 4


def test_every_image_may_have_its_own_exit_confidence():
    model, images = make_model(), make_images()
    found = model.run(images, exit_confidence=torch.tensor([0.0, 2.0, 0.0, 2.0]))
    assert found.trace.exit_stage.tolist() == [0, 2, 0, 2]
    found = model.run(images, exit_confidence=torch.tensor([[2.0, 0.0], [2.0, 2.0], [0.0, 2.0], [2.0, 2.0]]))
    assert found.trace.exit_stage.tolist() == [1, 2, 0, 2]


@pytest.mark.parametrize(
    ("exits", "sentence"),
    [
        (-0.5, "exit_confidence=-0.5 must be 0 .* or more"),
        (float("nan"), "exit_confidence=nan must be 0"),
        ((0.5,), "1 exit confidences were given, but 2 stages can be left"),
        ((0.5, "high"), "holds something that is not a number"),
        (torch.tensor([0.5]), r"exit_confidence of shape \(1,\) does not fit; give \(4,\) or \(4, 2\)"),
        (torch.tensor([0.5, 0.5, float("nan"), 0.5]), "exit_confidence=nan must be 0"),
    ],
)
def test_exit_confidences_that_do_not_fit_are_refused(exits, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_model().run(make_images(), exit_confidence=exits)


# ---- compiled


@pytest.mark.graph
def test_the_compiled_graphs_do_not_depend_on_the_counts():
    model, plain = (make_model(depths=(1, 1, 1)) for _ in range(2))  # torch compiles every block anew
    points = made_up_points(plain)
    alike = [replace(each, thresholds=((each.thresholds[0][0],) * 2,) * 2) for each in points.points]
    model.points = plain.points = replace(points, points=tuple(alike))  # torch compiles 0 and 1 refined patches apart
    counter = CompileCounter()
    model.compile(backend=counter)
    with torch.no_grad():
        for batch in (1, 4):
            for seed, budget in product(range(4), (0.8, 0.5, 0.3)):
                model(make_images(batch, seed=seed), budget=budget)
            seen = counter.frame_count
            for seed, budget in product(range(4, 8), (0.7, 0.45, 0.35)):
                images = make_images(batch, seed=seed)
                torch.testing.assert_close(
                    model(images, budget=budget), plain(images, budget=budget), rtol=0, atol=ROUNDING
                )
            assert counter.frame_count == seen
    assert 0 < seen <= 40


@pytest.mark.graph
def test_torch_compile_of_the_model_compiles_its_parts(monkeypatch):
    model, plain = (make_model(depths=(1, 1, 1)) for _ in range(2))
    model.points = plain.points = made_up_points(plain)
    counter = CompileCounter()
    monkeypatch.setattr(model, "compile", partial(model.compile, backend=counter))  # the default one takes a minute
    whole, images = torch.compile(model, backend="eager"), make_images()
    with pytest.warns(UserWarning, match="compiles this model in its parts"), torch.no_grad():
        whole(images, budget=0.8)
    assert counter.frame_count > 0
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)  # it is said once
        for budget in (1.0, 0.8, 0.5, 0.3, torch.tensor([0.3, 0.8, 0.5, 1.0])):
            torch.testing.assert_close(whole(images, budget), plain(images, budget), rtol=0, atol=ROUNDING)
    with pytest.raises(ValueError, match=r"budget=1.5 is outside \(0, 1\]"):
        whole(images, budget=1.5)


# ---- refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_images_that_hold_no_numbers_are_refused(value):
    images = make_images()
    images[2, 1, 5, 7] = value
    with pytest.raises(ValueError, match="images hold NaN or infinite values; check how they were read"):
        make_model().run(images)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "options",
    [{}, {"exit_confidence": 0.0}, {"masked": True}, {"rule": "topk"}, {"exit_confidence": (0.0, None)}],
    ids=str,
)
@pytest.mark.parametrize("shape", [{}, {"importance": "column"}, {"lifting": "dawn"}], ids=str)
def test_images_that_hold_no_numbers_are_refused_where_patches_are_dropped_too(value, options, shape):
    """Also where only another image of the batch has thresholds, and where all would leave before anything is dropped."""
    model, images = make_model(is_haar=False, **shape), make_images()
    images[2, 1, 5, 7] = value
    uneven = torch.full((4, 2), 0.5).double()
    uneven[2] = 0
    for batch, thresholds in ((images, 0.5), (images[2:3], 0.5), (images, uneven)):
        with pytest.raises(ValueError, match="images hold NaN or infinite values"):
            model.run(batch, thresholds, **options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("thresholds", [0.0, 0.9])
def test_no_precision_hides_what_is_no_number(precision, thresholds):
    images = make_images()
    images[2, 1, 5, 7] = float("nan")
    model, context = prepare(make_model(), precision)
    with context, pytest.raises(ValueError, match="images hold NaN or infinite values"):
        model.run(images, thresholds)


@pytest.mark.parametrize("lifting", LIFTINGS)
def test_no_pixel_hides_what_is_no_number(lifting):
    """It is told by the first tokens, so every pixel must be part of one, by whatever arithmetic."""
    model, clean = make_model(lifting=lifting, is_haar=False), make_images(1)
    size, values = model.shape.patch_size, (float("nan"), float("inf"), -float("inf"))
    for place, value in product(product(range(3), range(size), range(size)), values):
        channel, row, column = place
        images = clean.clone()
        images[0, channel, 16 + row, 8 + column] = value
        with pytest.raises(ValueError, match="images hold NaN or infinite values"):
            model(images)


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_an_infinite_pixel_is_seen_where_the_lifting_makes_a_number_of_it(value):
    model, images = make_model(lifting="dawn", in_chans=1, is_haar=False), make_images(1, channels=1)
    for name, weight in model.lifting.named_parameters():
        if "conv2" in name:
            weight.abs_()  # no infinity meets another of the other sign, which would make NaN
    images[0, 0, 16 + 3, 8 + 3] = value
    with pytest.raises(ValueError, match="images hold NaN or infinite values"):
        model(images)


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_weights_that_are_no_numbers_are_not_blamed_on_the_images(budget):
    model = make_model()
    model.points = made_up_points(model)
    model.patch_embed.bias[0] = float("nan")
    assert model(make_images(), budget=budget).isnan().all()


@pytest.mark.parametrize(
    ("images", "seen"),
    [
        (torch.zeros(1, 3, 48, 32), r"float32 \(1, 3, 48, 32\)"),
        (torch.zeros(1, 1, 32, 48), r"float32 \(1, 1, 32, 48\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, seen):
    model = make_model()
    for call in (model, model.run, model.forward_features):
        with pytest.raises(ValueError, match=seen):
            call(images)


def test_a_call_without_a_budget_refuses_what_a_run_refuses():
    images = make_images()
    images[1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="images hold NaN or infinite values"):
        make_model()(images)
    with pytest.raises(ValueError, match="B 1 or more"):
        make_model().check_images(images[:0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_images_of_another_precision_are_refused(dtype):
    with pytest.raises(ValueError, match="the model torch.float32; convert one, or use torch.autocast"):
        make_model()(make_images().to(dtype))


def test_a_model_without_classes_says_so_where_answers_are_asked_for():
    with pytest.raises(ValueError, match="has no classes to answer with; call forward_features"):
        make_model(num_classes=0).run(make_images())


def test_an_image_pays_for_choosing_only_if_its_own_thresholds_choose():
    model, images = make_model(), make_images(2)
    together = model.run(images, torch.tensor([[0.0, 0.0], [0.9, 0.9]]))
    assert together.macs[0] == model.run(images[:1]).macs[0]
    assert together.macs[1] == model.run(images[1:], 0.9).macs[0]


def test_equal_thresholds_refine_the_floor_whoever_else_is_in_the_batch():
    model, images = make_model(), make_images(2)
    strengths = torch.tensor(
        [[[50.0, 50.0], [50.0, 50.0]], [[0.5, 1.0], [0.5, 1.0]]]
    )  # the first keeps the floor alone
    alone, together = model.run(images[:1], strengths[:1]), model.run(images, strengths)
    assert torch.equal(together.trace.refined[:, 0], alone.trace.refined[:, 0])
    assert alone.trace.refined[1].sum() == 4
    torch.testing.assert_close(together.logits[:1], alone.logits, rtol=0, atol=ROUNDING)


def test_coarse_alone_refines_nothing():
    out = make_model().run(make_images(), ((0.5, 1000.0), (0.5, 1000.0)))
    assert not out.trace.refined.any()
    assert out.trace.kept[2].any()


def test_images_of_bytes_are_refused_with_what_to_do():
    # Asked directly: called from outside, the jaxtyping hook would refuse integers first.
    with pytest.raises(
        ValueError, match=r"uint8 .* takes floating \[B, 3, 32, 48\], B 1 or more\. model\.preprocess makes them"
    ):
        make_model().check_images(torch.zeros(1, 3, 32, 48, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        (-1.0, "threshold -1 is not allowed"),
        ((1.0, 1.0, 1.0), "3 thresholds were given, but the model has 2 transitions"),
        (((1.0, 0.5), 1.0), "refine threshold 0.5 is below keep threshold 1"),
        (torch.zeros(3, 2), r"thresholds of shape \(3, 2\) do not fit; give \(4, 2\)"),
        (torch.tensor([1.0, 1.0]), "do not fit"),
        ("high", "not a number"),
    ],
)
def test_thresholds_that_do_not_fit_are_refused(thresholds, message):
    with pytest.raises(ValueError, match=message):
        make_model().run(make_images(), thresholds)


def test_unknown_rules_controls_and_attentions_are_refused():
    model, images = make_model(), make_images()
    with pytest.raises(ValueError, match="rule='best' is unknown"):
        model.run(images, 1.0, rule="best")
    with pytest.raises(ValueError, match="control='best' is unknown"):
        model.run(images, 1.0, control="best")
    with pytest.raises(ValueError, match="attention='best' is unknown; choose from softmax"):
        Iret(model.shape, attention="best")


# ---- folders


def saved(folder: Path, **options) -> Iret:
    """A model with labels and points, saved in `folder`."""
    model = make_model(**options)
    model.labels, model.points, model.name = tuple("abcde"), made_up_points(model), "mine"
    model.preprocessing = replace(model.preprocessing, mean=(0.1, 0.2, 0.3), crop_ratio=0.9)
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, **entries) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


@pytest.mark.parametrize("lifting", LIFTINGS)
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, lifting):
    model, images = saved(tmp_path, lifting=lifting, importance="column"), make_images()
    again = Iret.from_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "points.json"]
    assert not again.training
    for part in ("shape", "labels", "points", "name", "attention", "preprocessing"):
        assert getattr(again, part) == getattr(model, part), part
    weights = again.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    lay_out(model)  # another order in memory, another order of sums
    assert torch.equal(again.run(images, 0.9).trace.stage_logits, model.run(images, 0.9).trace.stage_logits)
    assert torch.equal(again(images, budget=0.4), model(images, budget=0.4))


def test_a_model_is_not_saved_in_the_place_of_a_file(tmp_path):
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(ValueError, match=r"photo\.jpg is a file; name a folder to save the model in"):
        make_model().save_pretrained(tmp_path / "photo.jpg")
    assert (tmp_path / "photo.jpg").read_text() == "mine"


def test_a_model_without_labels_or_points_comes_back_without(tmp_path):
    make_model().save_pretrained(tmp_path)
    again = Iret.from_folder(tmp_path)
    assert again.labels is None
    assert again.points is None


def test_saving_over_another_model_leaves_none_of_its_points(tmp_path):
    saved(tmp_path)
    make_model(seed=1).save_pretrained(tmp_path)
    assert Iret.from_folder(tmp_path).points is None


def test_the_hub_mixin_reads_a_folder_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket", None)
    model, images = saved(tmp_path), make_images()
    lay_out(model)
    for folder in (tmp_path, str(tmp_path)):
        again = Iret.from_pretrained(folder)
        assert not again.training
        assert torch.equal(again(images), model(images))
        assert again.points == model.points


def test_the_hub_mixin_refuses_what_load_refuses(tmp_path):
    saved(tmp_path)
    edit_config(tmp_path, format=2, shape=dict(sides=[32, 48]))
    with pytest.raises(ValueError, match="config.json has format 2; this version of iret reads 1"):
        Iret.from_pretrained(tmp_path)
    edit_config(tmp_path, format=1)
    with pytest.raises(ValueError, match="config.json is not the configuration of an Iret"):
        Iret.from_pretrained(tmp_path)


def test_a_full_disk_leaves_the_old_model_whole(tmp_path, monkeypatch):
    model, images = saved(tmp_path), make_images()
    with monkeypatch.context() as patch:

        def refuse(_):
            raise OSError(28, "No space left on device")

        patch.setattr("iret.weights.os.fsync", refuse)
        with pytest.raises(OSError, match="No space left"):
            make_model(seed=1).save_pretrained(tmp_path)
    lay_out(model)
    assert torch.equal(Iret.from_folder(tmp_path)(images), model(images))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "points.json"]


def test_points_of_an_earlier_version_are_left_out_and_that_is_said(tmp_path, caplog):
    model, images = saved(tmp_path), make_images()
    path = tmp_path / "points.json"
    path.write_text(path.read_text().replace('"format": 3', '"format": 2'))
    found = Iret.from_folder(tmp_path)
    lay_out(model)
    assert found.points is None and torch.equal(found(images), model(images))
    (record,) = caplog.records
    assert f"{path} counts MACs as an earlier version of iret did and is left out" in record.getMessage()
    path.write_text(path.read_text().replace('"format": 2', '"format": 4'))
    with pytest.raises(ValueError, match="written by another version of iret"):
        Iret.from_folder(tmp_path)


def test_weights_of_another_preset_are_refused(tmp_path):
    saved(tmp_path / "a")
    make_model(depths=(2, 2, 2)).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors belongs to another model: stages.1.blocks.2"):
        Iret.from_folder(tmp_path / "a")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    saved(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{name} does not exist; a model folder holds"):
        Iret.from_folder(tmp_path)


def test_truncated_weights_are_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        Iret.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (dict(format=2), "config.json has format 2; this version of iret reads 1"),
        (dict(format=None), "config.json has format None"),
        (dict(shape={}), "config.json is not the configuration of an Iret"),
        (dict(shape=None), "config.json is not the configuration of an Iret"),
        (dict(shape=dict(colour="red")), "config.json is not the configuration of an Iret"),
        (dict(labels=3), "config.json is not the configuration of an Iret"),
        (dict(preprocess=dict(colour="red")), "a preprocess entry has the keys"),
        (dict(attention="best"), "attention='best' is unknown"),
        (dict(labels=["only one"]), "config.json .* 1 labels .* 5 classes"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, entries, message):
    saved(tmp_path)
    edit_config(tmp_path, **entries)
    with pytest.raises(ValueError, match=message):
        Iret.from_folder(tmp_path)


def test_a_config_that_is_not_json_is_refused(tmp_path):
    saved(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 1,')
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        Iret.from_folder(tmp_path)


def test_points_of_another_model_are_refused(tmp_path):
    model = saved(tmp_path)
    points = made_up_points(model)
    fewer = tuple(replace(point, thresholds=point.thresholds[:1]) for point in points.points)
    for other in (replace(points, full_macs=points.full_macs + 1), replace(points, points=fewer)):
        (tmp_path / POINTS_NAME).write_text(other.to_json())
        with pytest.raises(ValueError, match="points.json .* another model"):
            Iret.from_folder(tmp_path)


# ---- images


def test_photos_become_what_the_model_takes():
    model = make_model()
    photo = Image.fromarray(np.full((50, 70, 3), 255, dtype=np.uint8))
    images = model.preprocess([photo, photo])
    assert images.shape == (2, 3, 32, 48)
    assert images.unique().tolist() == [1.0]  # white, with mean and std of 0.5
    assert model.run(images, 1.0).logits.shape == (2, 5)


def test_images_from_zero_to_one_are_normalised_per_channel():
    model = make_model()
    model.preprocessing = replace(model.preprocessing, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    got = model.normalise(torch.full((1, 3, 32, 48), 0.5))
    assert got[0, :, 0, 0].tolist() == [0.5, 0.0, -2.0]
