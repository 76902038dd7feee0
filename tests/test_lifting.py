"""The lifting: exact inverse whatever the operators are, Haar against PyWavelets, details on demand, constants.

Spec b.6, acceptance tests 1 to 3.
"""

import copy

import numpy as np
import pytest
import pywt
import torch
from torch._dynamo.testing import CompileCounter

from iret.lifting import (
    DawnOperator,
    Lifting,
    Lifting2d,
    LiftingStep,
    LinearLifting2d,
    LinearOperator,
    lifting_penalty,
)
from iret.runtime.cost import LIFTINGS


def make_lifting(operator: str, *, patch_size: int = 8, num_levels: int = 2, seed: int = 0) -> Lifting:
    """A pyramid over RGB patches whose learnable parameters are random, in float64."""
    torch.manual_seed(seed)
    lifting = Lifting(operator, 3, patch_size, num_levels).double()
    for parameter in lifting.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return lifting


def all_details(lifting: Lifting, patches: torch.Tensor) -> list[torch.Tensor]:
    return [lifting.details(patches, level) for level in range(1, len(lifting.levels) + 1)]


# ---- perfect reconstruction


@pytest.mark.parametrize("operator", LIFTINGS)
def test_inverse_returns_the_patches_whatever_the_operators_are(operator):
    lifting = make_lifting(operator)
    patches = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    again = lifting.inverse(lifting.coarse(patches), all_details(lifting, patches))
    torch.testing.assert_close(again, patches, rtol=0, atol=1e-12)  # float64, two levels of four steps


@pytest.mark.parametrize("operator", LIFTINGS)
def test_inverse_returns_the_patches_in_single_precision(operator):
    lifting = make_lifting(operator).float()
    patches = torch.rand(5, 3, 8, 8)
    again = lifting.inverse(lifting.coarse(patches), all_details(lifting, patches))
    torch.testing.assert_close(again, patches, rtol=0, atol=1e-5)  # float32; the bound is the spec's


@pytest.mark.parametrize("operator", ["linear", "haar"])
def test_the_level_of_matrices_equals_the_steps_it_stands_for(operator):
    fast, steps = LinearLifting2d(operator, 3, 4).double(), Lifting2d(operator, 3, 4).double()
    for parameter in fast.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    steps.load_state_dict(fast.state_dict())
    patches = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    for got, expected in zip(fast(patches), steps(patches), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)  # float64, sums of 64


def test_haar_inverse_is_exact_on_integers():
    patches = torch.randint(0, 256, (4, 1, 4, 4), generator=torch.Generator().manual_seed(0)).double()
    level = Lifting2d("haar", 1, 2)
    assert torch.equal(level.inverse(*level(patches)), patches)


def test_a_step_is_undone_although_update_and_predict_are_not_invertible():
    step = LiftingStep("haar", 1, 4)
    step.update = step.predict = torch.nn.ReLU()
    x = torch.randn(2, 1, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(step.inverse(*step(x)), x, rtol=0, atol=1e-15)  # float64, two additions


# ---- coarse first, details on demand


@pytest.mark.parametrize("operator", LIFTINGS)
def test_the_coarse_band_alone_equals_the_coarse_band_of_the_full_transform(operator):
    lifting = make_lifting(operator)
    patches = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    band = patches
    for level in lifting.levels:
        torch.testing.assert_close(level.coarse(band), level(band)[0], rtol=0, atol=1e-14)  # float64, sums of 8
        band, _ = level(band)
    torch.testing.assert_close(lifting.coarse(patches), band, rtol=0, atol=1e-13)  # float64, sums of 64


@pytest.mark.parametrize("operator", LIFTINGS)
def test_the_coarse_bands_need_no_predict(operator):
    lifting = make_lifting(operator)
    patches = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = lifting.coarse(patches)
    for level in lifting.levels:
        level.width.predict = level.height.predict = None
    assert torch.equal(lifting.coarse(patches), before)
    with pytest.raises((AttributeError, TypeError)):
        lifting.details(patches, 1)


@pytest.mark.parametrize("operator", LIFTINGS)
def test_details_of_chosen_patches_are_a_slice_of_the_details_of_all(operator):
    lifting = make_lifting(operator)
    patches = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    chosen = torch.tensor([5, 0, 3])
    for level in (1, 2):
        expected = lifting.details(patches, level)[chosen]
        got = lifting.details(patches[chosen], level)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)  # a matrix product may sum in another order


def everything(lifting: Lifting, patches: torch.Tensor) -> torch.Tensor:
    return torch.cat([lifting.coarse(patches).flatten(), *(bands.flatten() for bands in all_details(lifting, patches))])


def test_what_is_made_of_the_weights_alone_is_made_once(monkeypatch):
    lifting, patches = Lifting("linear", 3, 8, 2), torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        before = everything(lifting, patches)
        monkeypatch.setattr(LiftingStep, "coarse_matrix", None)  # nothing may be made again
        assert torch.equal(everything(lifting, patches), before)


def add_to_weights(lifting: Lifting) -> Lifting:
    with torch.no_grad():
        for weight in lifting.parameters():
            weight += torch.arange(3.0).to(weight.dtype)
    return lifting


def load_other_weights(lifting: Lifting) -> Lifting:
    lifting.load_state_dict(add_to_weights(copy.deepcopy(lifting)).state_dict(), assign=True)
    return lifting


def step_an_optimizer(lifting: Lifting) -> Lifting:
    everything(lifting, torch.ones(1, 3, 8, 8).cumsum(-1)).sum().backward()
    torch.optim.SGD(lifting.parameters(), lr=1.0).step()
    return lifting


def step_a_fused_optimizer(lifting: Lifting) -> Lifting:
    """Which tells no version counter."""
    everything(lifting, torch.ones(1, 3, 8, 8).cumsum(-1)).sum().backward()
    torch.optim.AdamW(lifting.parameters(), lr=0.1, fused=True).step()
    return lifting


def add_behind_autograd(lifting: Lifting) -> Lifting:
    for weight in lifting.parameters():
        weight.data.add_(torch.arange(3.0))
    return lifting


@pytest.mark.parametrize(
    "change",
    [
        add_to_weights,
        step_a_fused_optimizer,
        add_behind_autograd,
        load_other_weights,
        step_an_optimizer,
        lambda lifting: add_to_weights(lifting).double().float(),
        lambda lifting: add_to_weights(copy.deepcopy(lifting)),
    ],
)
def test_what_is_made_of_the_weights_follows_them(change):
    lifting, patches = Lifting("linear", 3, 8, 2), torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        before = everything(lifting, patches)
    lifting = change(lifting)
    with torch.no_grad():
        got = everything(lifting, patches)
    assert not torch.equal(got, before)
    fresh = Lifting("linear", 3, 8, 2)
    fresh.load_state_dict(lifting.state_dict())
    wanted = everything(fresh, patches).detach()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)  # float32, products in another order under gradients


@pytest.mark.graph
def test_a_compiled_lifting_is_one_graph_that_follows_its_weights():
    torch._dynamo.reset()
    counter = CompileCounter()
    lifting, patches = Lifting("linear", 3, 8, 2), torch.randn(4, 3, 8, 8)
    compiled = torch.compile(lifting.coarse, backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(patches), lifting.coarse(patches))
            add_to_weights(lifting)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_remembered_too(dtype):
    lifting, patches = Lifting("linear", 3, 8, 2).to(dtype), torch.randn(4, 3, 8, 8).to(dtype)
    with torch.no_grad():
        first = everything(lifting, patches)
        assert torch.equal(everything(lifting, patches), first)
        assert not torch.equal(everything(add_to_weights(lifting), patches), first)


def test_gradients_reach_the_taps_after_a_run_without():
    lifting, patches = Lifting("linear", 3, 8, 2), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        everything(lifting, patches)
    everything(lifting, patches).square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in lifting.parameters())


def test_no_detail_to_choose_from_gives_no_detail():
    lifting = make_lifting("linear")
    assert lifting.details(torch.zeros(0, 3, 8, 8, dtype=torch.float64), 1).shape == (0, 3, 3, 4, 4)


# ---- Haar


def test_haar_bands_of_four_pixels_by_hand():
    ll, details = Lifting2d("haar", 1, 1)(torch.tensor([[[[1.0, 3.0], [5.0, 11.0]]]]))
    assert ll.tolist() == [[[[5.0]]]]
    assert details.flatten().tolist() == [3.0, 2.0, 1.0]  # LH (rows differ), HL (columns differ), HH


@pytest.mark.parametrize("operator", ["haar", "linear"])
def test_haar_equals_pywavelets(operator):
    # pywt's filters have norm 1: a factor of sqrt(2) per axis, and its detail is even - odd where ours is odd - even.
    patches = np.random.default_rng(0).normal(size=(4, 3, 16, 16))
    ll, (horizontal, vertical, diagonal) = pywt.dwt2(patches, "haar", axes=(-2, -1))
    own_ll, own = Lifting2d(operator, 3, 8).double()(torch.from_numpy(patches))
    for got, expected in (
        (own_ll, ll / 2),
        (own[:, :, 0], -horizontal / 2),  # high along the height
        (own[:, :, 1], -vertical / 2),  # high along the width
        (own[:, :, 2], diagonal / 2),
    ):
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=0, atol=1e-14)  # float64, sums of 4


def test_a_haar_pyramid_equals_pywavelets_level_by_level():
    patches = np.random.default_rng(0).normal(size=(2, 1, 16, 16))
    coarse, (h2, v2, d2), (h1, v1, d1) = pywt.wavedec2(patches, "haar", level=2, axes=(-2, -1))
    lifting = Lifting("haar", 1, 16, 2).double()
    pixels = torch.from_numpy(patches)
    np.testing.assert_allclose(lifting.coarse(pixels).numpy(), coarse / 4, rtol=0, atol=1e-14)  # float64, sums of 16
    for level, wanted in ((1, (-h1, -v1, d1)), (2, (-h2, -v2, d2))):
        got = lifting.details(pixels, level).numpy()
        np.testing.assert_allclose(got, np.stack(wanted, 2) / 2**level, rtol=0, atol=1e-14)


def test_the_learnable_lifting_starts_as_haar():
    patches = torch.randn(3, 2, 8, 8)
    start, fixed = LinearLifting2d("linear", 2, 4)(patches), LinearLifting2d("haar", 2, 4)(patches)
    assert torch.equal(start[0], fixed[0])
    assert torch.equal(start[1], fixed[1])


# ---- constant patches


def test_a_constant_patch_has_exactly_no_detail_at_the_start():
    lifting = Lifting("linear", 3, 8, 2)
    patches = torch.rand(4, 3, 1, 1).expand(-1, -1, 8, 8)
    assert all(details.count_nonzero() == 0 for details in all_details(lifting, patches))
    torch.testing.assert_close(lifting.coarse(patches), patches[..., :2, :2], rtol=0, atol=1e-6)  # float32, sums of 64


def test_a_constant_patch_has_no_detail_after_training_either():
    lifting = make_lifting("linear").float()
    patches = torch.rand(4, 3, 1, 1).expand(-1, -1, 8, 8)
    for details in all_details(lifting, patches):
        torch.testing.assert_close(details, torch.zeros_like(details), rtol=0, atol=2e-6)  # float32, taps of size 1
    torch.testing.assert_close(lifting.coarse(patches), patches[..., :2, :2], rtol=0, atol=2e-6)


def test_under_autocast_a_flat_patch_has_no_detail_either():
    lifting = make_lifting("linear").float()
    patches = torch.rand(4, 3, 1, 1).expand(-1, -1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        coarse, details = lifting.coarse(patches), all_details(lifting, patches)
    assert coarse.dtype == torch.float32
    assert (
        max(float(band.detach().abs().max()) for band in details) < 2e-6
    )  # float32, taps of size 1; bfloat16 gives 1e-2


# ---- operators


def test_linear_taps_and_replicated_border_by_hand():
    operator = LinearOperator(1, 3)
    operator.weight.data = torch.tensor([0.25, -0.5, 0.25])  # taps 1/4 1/2 1/4
    assert operator(torch.tensor([[[[1.0, 2.0, 4.0]]]])).tolist() == [[[[1.25, 2.25, 3.5]]]]


def test_linear_taps_have_a_direction():
    operator = LinearOperator(1, 3)
    operator.weight.data = torch.tensor([0.5, 0.0, -0.5])  # taps 1/2 1 -1/2 on left, middle, right
    assert operator(torch.tensor([[[[0.0, 2.0, 0.0]]]])).tolist() == [[[[-1.0, 2.0, 1.0]]]]


@pytest.mark.parametrize("length", [1, 2, 8])
def test_linear_taps_sum_to_one_whatever_was_learned(length):
    operator = LinearOperator(1, length)
    torch.nn.init.normal_(operator.weight, mean=3.0, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, 1, 1, length)
    torch.testing.assert_close(operator(ones), ones, rtol=0, atol=1e-6)  # float32, sum of 3 taps


def test_the_dawn_operator_keeps_lines_apart_and_is_bounded():
    torch.manual_seed(0)
    operator = DawnOperator(2, 4)
    x = 10 * torch.randn(3, 2, 5, 4)
    out = operator(x)
    assert out.shape == x.shape
    assert out.abs().max() <= 1
    other = x.clone()
    other[:, :, 2] += 1
    changed = (operator(other) != out).any(-1).any(1).any(0)
    assert changed.tolist() == [False, False, True, False, False]


def test_every_axis_and_level_learns_its_own_update_and_predict():
    lifting = make_lifting("linear")
    patches = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    weight = torch.arange(1.0, 4.0, dtype=torch.float64)
    sum((weight[:, None, None] * d.square()).sum() for d in all_details(lifting, patches)).backward()
    gradients = [parameter.grad for parameter in lifting.parameters()]
    assert len(gradients) == 2 * 2 * 2  # levels, axes, update and predict
    assert all(gradient is not None and gradient.norm() > 0 for gradient in gradients)


# ---- penalty


def test_the_penalty_by_hand():
    x = torch.tensor([[[[1.0, 3.0], [5.0, 11.0]]]])
    details = torch.tensor([[[[[3.0]], [[-2.0]], [[1.0]]]]])
    assert lifting_penalty(x, torch.tensor([[[[5.0]]]]), details).item() == 2.0  # mean of 3, 2, 1; the mean is kept
    assert lifting_penalty(x, torch.tensor([[[[8.0]]]]), details).item() == 11.0  # 3 off, squared
