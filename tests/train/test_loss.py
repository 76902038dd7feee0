"""The objective against torch's own losses, written out term by term."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from iret.model import Iret
from iret.runtime.cost import Shape
from iret.train.loss import Objective, autocast, distill, draw_thresholds, soft_cross_entropy
from iret.train.recipe import Recipe, find_recipe

ROUNDING = 1e-5  # float32, losses of a few units


def make_model(**options) -> Iret:
    """24 patches of 8 x 8, three stages, 4 classes; attention and answers far from uniform, so that thresholds cut."""
    torch.manual_seed(0)
    settings = dict(img_size=(32, 48), patch_size=8, in_chans=3, num_classes=4, embed_dims=(16, 16, 32), head_dim=16)
    model = Iret(Shape(**{**settings, "depths": (1, 1, 1), **options}))
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.weight") or "head" in name:
            nn.init.normal_(parameter, std=0.4)
    return model


def make_recipe(**options) -> Recipe:
    settings = dict(name="x", model="iret_pico", epochs=1.0, batch_size=4, lr=0.1, precision="32-true")
    return Recipe(**{**settings, "stage_weights": (0.25, 0.75), "lifting_weight": 0.5, **options})


def make_batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 32, 48, generator=draw), torch.rand(4, 4, generator=draw).softmax(1)


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    return kl_divergence(Categorical(logits=teacher), Categorical(logits=student)).mean()


THRESHOLDS = torch.tensor([[0.0, 0.0], [0.8, 0.9], [1.0, 1.0], [1.2, 1.2]])


# ---- terms


def test_soft_cross_entropy_is_that_of_torch_for_hard_and_soft_targets():
    logits, targets = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.eye(5)[[0, 4, 2, 2, 1, 3]]
    for soft in (targets, 0.9 * targets + 0.02):
        torch.testing.assert_close(soft_cross_entropy(logits, soft), F.cross_entropy(logits, soft))
    hard = F.cross_entropy(logits, torch.tensor([0, 4, 2, 2, 1, 3]))
    torch.testing.assert_close(soft_cross_entropy(logits, targets), hard)


def test_distillation_is_the_divergence_from_the_teacher_by_hand():
    teacher = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    student = torch.tensor([[0.25, 0.75], [0.75, 0.25]]).log()
    # 0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75) = 0.1438; the second agrees
    assert distill(student, teacher).item() == pytest.approx(0.1438 / 2, abs=1e-4)  # as many digits as typed
    assert distill(student, teacher).item() != pytest.approx(distill(teacher, student).item(), abs=1e-3)
    assert distill(student + 3, student - 5).item() == pytest.approx(0, abs=1e-6)  # float32


def test_no_gradient_reaches_the_teacher():
    student, teacher = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    distill(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None


# ---- thresholds

DRAWN = replace(find_recipe("digits_nano"), max_threshold=1.5)


@pytest.mark.parametrize("keep_all", [0.0, 0.3, 1.0])
def test_a_share_of_images_keeps_all_and_a_fifth_is_cut_most(keep_all):
    drawn = draw_thresholds(20_000, 3, DRAWN, torch.Generator().manual_seed(0), keep_all)
    assert drawn.shape == (20_000, 3)
    assert drawn.min() >= 0
    assert drawn.max() == (0 if keep_all == 1 else 1.5)
    is_zero = (drawn == 0).all(1)
    assert torch.equal(is_zero, (drawn == 0).any(1))
    level = drawn.mean(1) / 1.5
    cut_most, below_half = (0.2, (0.8 - keep_all) / 2) if keep_all < 1 else (0.0, 0.0)
    # shares of 20,000 draws: standard deviation of at most 0.0036
    assert is_zero.float().mean().item() == pytest.approx(keep_all, abs=0.015)
    assert (level < 0.5).float().mean().item() == pytest.approx(keep_all + below_half, abs=0.015)
    assert (drawn >= 0.9 * 1.5).all(1).float().mean().item() >= cut_most - 0.015


def test_thresholds_of_one_image_differ_by_their_jitter_alone():
    drawn = draw_thresholds(1000, 3, DRAWN, torch.Generator().manual_seed(0))
    ratio = drawn.amax(1) / drawn.amin(1)
    assert 1.15 < ratio.max() <= 1.1 / 0.9 + 1e-6  # float32
    assert ratio.min() < 1.01


def test_thresholds_rise_with_depth_by_a_ratio_of_the_image():
    rising = replace(DRAWN, smallest_ratio=0.2)
    drawn = draw_thresholds(20_000, 3, rising, torch.Generator().manual_seed(0))
    first, second = drawn[:, 0] / drawn[:, 2], drawn[:, 1] / drawn[:, 2]
    jitter = 1.1 / 0.9
    assert first.min() >= 0.2 / jitter
    assert first.max() <= jitter
    assert first.mean().item() == pytest.approx(0.6, abs=0.01)  # uniform between 0.2 and 1
    assert (
        (second / first.sqrt()).log().abs() <= torch.tensor(jitter).log() * 1.5 + 1e-6
    ).all()  # geometric but for the jitter


def test_a_power_moves_levels_to_small_thresholds():
    level = (
        draw_thresholds(20_000, 2, replace(DRAWN, threshold_power=2.0), torch.Generator().manual_seed(0)).mean(1) / 1.5
    )
    assert (level < 0.25).float().mean().item() == pytest.approx(0.4, abs=0.015)  # half of the four fifths


def test_thresholds_follow_their_generator_and_nothing_else():
    torch.manual_seed(0)
    first = draw_thresholds(5, 2, DRAWN, torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    again, other = (draw_thresholds(5, 2, DRAWN, torch.Generator().manual_seed(seed)) for seed in (3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---- the objective


@pytest.mark.parametrize("has_teacher", [False, True])
@pytest.mark.parametrize(
    ("thresholds", "is_sandwich"), [(None, False), (None, True), (THRESHOLDS, False), (THRESHOLDS, True)]
)
def test_the_loss_is_the_sum_that_is_written_above_it(thresholds, is_sandwich, has_teacher):
    model, recipe, (images, targets) = make_model(), make_recipe(teacher_weight=0.3), make_batch()
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 48, 4)) if has_teacher else None
    parts = Objective(model, recipe, teacher)(images, targets, thresholds, is_sandwich)

    is_sampled = thresholds is not None and not is_sandwich
    first, second, last = model.run(images, thresholds if is_sampled else 0.0).trace.stage_logits
    expected = {
        "ce": F.cross_entropy(last, targets),
        "ce_stage1": F.cross_entropy(first, targets),
        "ce_stage2": F.cross_entropy(second, targets),
        "lifting": model.lifting_loss(images),
    }
    total = expected["ce"] + 0.25 * (expected["ce_stage1"] + kl(last, first))
    total = total + 0.75 * (expected["ce_stage2"] + kl(last, second)) + 0.5 * expected["lifting"]
    if thresholds is not None and is_sandwich:
        fewer = model.run(images, thresholds).logits
        expected |= {"kl_dropped": kl(last, fewer), "ce_dropped": F.cross_entropy(fewer, targets)}
        total = total + expected["kl_dropped"] + 0.5 * expected["ce_dropped"]
    if teacher is not None:
        expected["kl_teacher"] = kl(teacher(images), last)
        total = total + 0.3 * expected["kl_teacher"]
    assert parts.keys() == expected.keys() | {"loss"}
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(parts["loss"], total, rtol=0, atol=ROUNDING)


def test_without_thresholds_nothing_is_dropped_and_with_them_something_is(monkeypatch):
    model, kept = make_model(), []
    run = model.run

    def spy(*args):
        out = run(*args)
        kept.append(out.trace.kept.sum((2, 3)).tolist())
        return out

    monkeypatch.setattr(model, "run", spy)
    objective = Objective(model, make_recipe())
    whole = [[24] * 4] * 3
    for is_sandwich in (False, True):
        objective(*make_batch(), None, is_sandwich)
    assert kept == [whole, whole]
    kept.clear()
    objective(*make_batch(), THRESHOLDS, False)
    objective(*make_batch(), THRESHOLDS, True)
    sampled, first, second = kept
    assert first == whole
    assert sampled == second != whole
    assert sampled[2][0] == 24  # the image whose thresholds are 0


def test_gradients_reach_every_parameter_and_none_of_the_teacher():
    model, teacher = make_model(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 48, 4))
    objective = Objective(model, make_recipe(), teacher)
    objective(*make_batch(), THRESHOLDS, True)["loss"].backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert len(list(objective.parameters())) == len(list(model.parameters()))


def test_the_whole_run_teaches_the_other_and_not_the_other_way():
    # With the cross entropies taken away, the last head learns from nobody where nothing is dropped.
    model, (images, targets) = make_model(), make_batch()
    parts = Objective(model, make_recipe(lifting_weight=0.0))(images, targets, None, False)
    (parts["loss"] - parts["ce"]).backward()
    assert not model.stages[2].head.weight.grad.any()
    assert model.stages[1].head.weight.grad.any()


def test_a_fixed_lifting_is_not_penalised():
    assert "lifting" not in Objective(make_model(lifting="haar"), make_recipe())(*make_batch(), None, False)
    assert "lifting" not in Objective(make_model(), make_recipe(lifting_weight=0.0))(*make_batch(), None, False)


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_products_are_rounded_to_bf16_only_where_asked_and_the_loss_never(precision, dtype):
    with autocast(precision, torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    parts = Objective(make_model(), make_recipe(precision=precision))(*make_batch(), THRESHOLDS, True)
    assert {part.dtype for part in parts.values()} == {torch.float32}
