"""Fewer channels: what can be spared goes for nothing, the rest is fitted again, and a model like any other comes out."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import iret
from iret.narrow import DAMPING, LOOKS, _Moments, _solve, narrow
from iret.precision import to_int8, to_onednn
from iret.runtime.cost import full_macs
from iret.vit import Mlp
from models import make_model

SPARE = 0.01  # what damping leaves of an exact fit, as a share of what it is fitted to


def images(count: int = 100) -> torch.Tensor:
    return torch.randn(count, 3, 24, 32, generator=torch.Generator().manual_seed(1))


def mlps(model: iret.Iret) -> list[Mlp]:
    return [part for part in model.modules() if isinstance(part, Mlp)]


def make_twins(scale: float) -> iret.Iret:
    """A model in whose MLPs every second channel does what the one before does, times `scale`."""
    model = make_model()
    for mlp in mlps(model):
        mlp.fc1.weight.data[1::2] = mlp.fc1.weight.data[::2]
        mlp.fc1.bias.data[1::2] = mlp.fc1.bias.data[::2]
        mlp.fc2.weight.data[:, 1::2] = scale * torch.randn_like(mlp.fc2.weight.data[:, ::2])
    return model


def distance(model: iret.Iret, other: iret.Iret, threshold: float = 0.0) -> float:
    """Of their logits, as a share of those of the first."""
    with torch.no_grad():
        wanted, got = (each.run(images(), threshold).logits for each in (model, other))
    return float((got - wanted).norm() / wanted.norm())


def gather(hidden: torch.Tensor) -> _Moments:
    moments = _Moments(hidden.shape[-1])
    for part in hidden.chunk(3):
        moments.take(part)
    return moments


def made_up_mlp(tokens: int = 500, channels: int = 12) -> tuple[Mlp, torch.Tensor]:
    """And hidden channels that hang together and have means."""
    torch.manual_seed(3)
    mix = torch.randn(channels, channels) / 3 + torch.eye(channels)
    return Mlp(6, channels), torch.randn(tokens, channels) @ mix + torch.randn(channels)


def test_channels_with_a_twin_go_and_the_twin_takes_their_part():
    model = make_twins(1.0)
    narrowed = narrow(model, images().split(40), 2)
    assert all(mlp.fc1.out_features == mlp.fc2.in_features == 2 * mlp.fc1.in_features for mlp in mlps(narrowed))
    for threshold in LOOKS:
        assert distance(model, narrowed, threshold) < SPARE
    cut = narrow(make_twins(0.0), images().split(40), 2)
    assert distance(model, cut) > 0.1  # so the answers do hang on the second twins


def test_the_second_layer_is_the_least_squares_fit_of_those_that_stay():
    mlp, hidden = made_up_mlp()
    kept, weight, bias = _solve(mlp, gather(hidden), 7)
    assert kept.tolist() == sorted(kept.tolist()) and len(kept) == weight.shape[1] == 7
    x, wanted = hidden.double(), (mlp.fc2(hidden)).detach().double()
    x = x - x.mean(0)
    covariance = x.T @ x / len(x)
    covariance += DAMPING * covariance.diagonal().mean() * torch.eye(12)
    fit = torch.linalg.solve(covariance[kept][:, kept], covariance[kept] @ mlp.fc2.weight.detach().double().T).T
    torch.testing.assert_close(weight.double(), fit, atol=1e-5, rtol=0)
    got = hidden[:, kept].double() @ weight.T.double() + bias
    torch.testing.assert_close(got.mean(0), wanted.mean(0), atol=1e-4, rtol=0)  # means are taken up by the bias


def test_the_first_to_go_is_the_one_whose_loss_can_be_made_up_best():
    mlp, hidden = made_up_mlp()
    wanted, errors = mlp.fc2(hidden).detach().double(), []
    for out in range(12):
        rest = torch.cat([hidden[:, torch.arange(12) != out], torch.ones(len(hidden), 1)], 1).double()
        errors.append(float((rest @ torch.linalg.lstsq(rest, wanted).solution - wanted).square().sum()))
    kept, _, _ = _solve(mlp, gather(hidden), 11)
    (gone,) = set(range(12)) - set(kept.tolist())
    assert errors[gone] == min(errors)
    assert gone != int(mlp.fc2.weight.norm(dim=0).argmin()) or gone != int(
        hidden.var(0).argmin()
    )  # neither alone says it


def test_a_channel_that_is_always_the_same_goes_into_the_bias():
    mlp, hidden = made_up_mlp()
    hidden[:, 4] = 3.0
    kept, weight, bias = _solve(mlp, gather(hidden), 11)
    assert 4 not in kept
    torch.testing.assert_close(hidden[:, kept] @ weight.T + bias, mlp.fc2(hidden).detach(), atol=1e-4, rtol=0)


def test_what_comes_out_is_a_model_like_any_other_and_the_first_is_as_it_was(tmp_path):
    model = make_model()
    model.labels, model.name = ("a", "b", "c", "d", "e"), "mine"
    model.preprocessing = replace(model.preprocessing, mean=(0.1, 0.2, 0.3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    narrowed = narrow(model, images().split(50), 1.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert narrowed.shape == replace(model.shape, mlp_ratio=1.5)
    assert narrowed.points is None and not narrowed.training
    narrowed.save_pretrained(tmp_path / "m")
    back = iret.load(tmp_path / "m")
    assert (back.labels, back.preprocessing, back.shape) == (model.labels, model.preprocessing, narrowed.shape)
    assert (back.name, back.attention) == (model.name, model.attention)
    with torch.no_grad():
        assert torch.equal(back(images(4)), narrowed(images(4)))
    assert full_macs(back.shape) < 0.7 * full_macs(model.shape)


@pytest.mark.parametrize("convert", [to_int8, to_onednn])
@pytest.mark.parametrize("threshold", LOOKS)
def test_number_formats_and_dropping_take_it_as_they_take_any(threshold, convert):
    narrowed = narrow(make_model(), images().split(50), 2)
    with torch.no_grad():
        wanted, got = (each.run(images(1), threshold) for each in (narrowed, convert(narrowed)))
    assert torch.equal(got.trace.kept, wanted.trace.kept)
    assert torch.equal(got.macs, wanted.macs)
    assert (got.logits - wanted.logits).norm() < (0.1 if convert is to_int8 else 1e-4) * wanted.logits.norm()
    assert (wanted.macs < full_macs(narrowed.shape)).all() == (threshold > 0)


def test_images_are_run_at_all_looks_and_fitted_to_what_passes_each_mlp_there(monkeypatch):
    """The last stage's tokens are few at the highest threshold; its fit hangs on them."""
    usual = narrow(make_model(), images().split(50), 1)
    monkeypatch.setattr("iret.narrow.LOOKS", (0.0,) * 3)
    whole = narrow(make_model(), images().split(50), 1)
    model = make_model()
    assert distance(model, usual, LOOKS[-1]) < 0.9 * distance(model, whole, LOOKS[-1])


def test_a_model_that_is_compiled_or_trained_is_fitted_all_the_same_and_goes_on():
    plain, model = make_model(), make_model()
    model.compile(backend="eager")
    model.train()
    wanted, got = (narrow(each, images().split(50), 2).state_dict() for each in (plain, model))
    assert model.training
    assert all(torch.equal(value, wanted[name]) for name, value in got.items())


def test_it_learns_on():
    with torch.inference_mode():
        narrowed = narrow(make_model(), images().split(50), 1).train()
    nn.functional.cross_entropy(narrowed(images(8)), torch.arange(8) % 5).backward()
    assert all(mlp.fc1.weight.grad.abs().sum() > 0 for mlp in mlps(narrowed))


@pytest.mark.parametrize(
    ("ratio", "count", "message"),
    [
        (4, 100, "mlp_ratio=4 takes no channel out: this model's is 4; ask for less"),
        (5.5, 100, "mlp_ratio=5.5 takes no channel out"),
        (float("nan"), 100, "mlp_ratio=nan takes no channel out"),
        (0, 100, "mlp_ratio=0 must be above 0"),
        (-1, 100, "mlp_ratio=-1 must be above 0"),
        (0.3, 100, r"whole widths of embed_dims=\(16, 32, 48\), as 1 and 2 do"),
        (2, 8, r"\d+ tokens tell too little of an MLP \d+ channels wide, which takes \d+; give more images"),
        (2, 0, "0 tokens tell too little"),
    ],
)
def test_what_cannot_be_narrowed_is_refused(ratio, count, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        narrow(model, images(count).split(50) if count else [], ratio)
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_only_float32_is_narrowed():
    for model in (to_int8(make_model()), make_model().to(torch.bfloat16)):
        with pytest.raises(ValueError, match="taken out of a model in float32, not"):
            narrow(model, images().split(50), 2)
