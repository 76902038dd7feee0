"""int8, bf16 and oneDNN: the same answers but for rounding, the same tokens but for ties, refused where they cannot run."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import iret
from iret.export.bundle import export
from iret.precision import Int8Linear, OneDnnLinear, adds_in_16_bits, prepare, to_int8, to_onednn
from iret.runtime.points import BUDGETS, PRECISIONS

# anywhere else a torch that lost it, or its operator, is to fail here
needs_onednn = pytest.mark.skipif(sys.platform == "darwin", reason="torch for macOS has no oneDNN")
CONVERSIONS = [pytest.param(to_int8, id="int8"), pytest.param(to_onednn, marks=needs_onednn, id="float32-onednn")]


def make_model() -> iret.Iret:
    torch.manual_seed(0)
    return iret.load("iret_pico-cifar10")


def photos(count: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_is_its_float_layer_but_for_eight_bits(has_bias):
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=has_bias)
    linear.weight.data *= torch.logspace(-3, 1, 96)[:, None]  # channels of very different size: each has its own scale
    x = torch.randn(7, 64)
    wanted, got = linear(x), Int8Linear(linear)(x)
    relative = (got - wanted).norm(dim=0) / wanted.norm(dim=0)
    assert 0 < relative.mean() < 0.02  # a rounding of 1 / 254 of the largest in weights and inputs; no channel is lost:
    assert relative.max() < 0.1


def test_a_channel_of_zeros_stays_zero():
    linear = nn.Linear(8, 4, bias=False)
    linear.weight.data[1] = 0
    assert torch.equal(Int8Linear(linear)(torch.randn(3, 8))[:, 1], torch.zeros(3))


def test_int8_answers_as_float_does_at_every_budget():
    model = make_model()
    quantised = to_int8(model)
    with torch.no_grad():
        for budget in BUDGETS:
            wanted, got = model(photos(), budget=budget), quantised(photos(), budget=budget)
            assert (wanted.argmax(1) == got.argmax(1)).float().mean() >= 0.9  # of 16; noise images are near ties
        assert (model(photos()) - quantised(photos())).abs().max() < 0.2  # logits of up to 3


@needs_onednn
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("rows", [(), (7,), (2, 5)])
def test_a_layer_of_onednn_is_the_layer(rows, has_bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 96, bias=has_bias), torch.randn(*rows, 64)
    with torch.no_grad():
        torch.testing.assert_close(OneDnnLinear(linear)(x), linear(x), atol=1e-5, rtol=0)
        torch.testing.assert_close(OneDnnLinear(linear, gelu=True)(x), F.gelu(linear(x)), atol=1e-5, rtol=0)


@needs_onednn
@pytest.mark.parametrize("budget", BUDGETS)
def test_onednn_answers_as_torch_does_and_keeps_the_same(budget):
    model, images = make_model(), photos()
    fast = to_onednn(model)
    setting = model.setting(budget)
    with torch.no_grad():
        wanted, got = (each.run(images, setting.thresholds, setting.exit_confidence) for each in (model, fast))
        torch.testing.assert_close(fast(images, budget=budget), model(images, budget=budget), atol=1e-4, rtol=0)
    assert torch.equal(wanted.trace.kept, got.trace.kept)
    assert torch.equal(wanted.macs, got.macs)


@needs_onednn
def test_an_answer_of_onednn_does_not_depend_on_its_batch_mates():
    fast, images = to_onednn(make_model()), photos()
    with torch.no_grad():
        alone = torch.cat([fast(image[None], budget=0.5) for image in images])
        torch.testing.assert_close(fast(images, budget=0.5), alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],  # noqa: S301  (our own bytes)
    ids=["copy", "pickle"],
)
def test_a_converted_model_can_be_copied_and_pickled(convert, again):
    converted = convert(make_model())
    with torch.no_grad():
        assert torch.equal(again(converted)(photos(), budget=0.5), converted(photos(), budget=0.5))


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_a_conversion_leaves_the_float_model_as_it_was(convert):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    converted = convert(model)
    precision, kind = ("int8", Int8Linear) if convert is to_int8 else ("float32-onednn", OneDnnLinear)
    assert (model.precision, converted.precision) == ("float32", precision)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(isinstance(part, kind) for part in model.modules())
    layers = sum(isinstance(part, kind) for part in converted.modules())
    assert layers == 4 * sum(model.shape.depths)


def test_an_image_of_an_int8_batch_keeps_its_own_count():
    quantised = to_int8(make_model())
    with torch.no_grad():
        out = quantised.run(photos(), 0.8)
    assert len(set(out.trace.kept[1].sum((1, 2)).tolist())) > 1


@pytest.mark.parametrize("budget", BUDGETS)
def test_an_int8_answer_depends_a_little_on_its_batch_mates(budget):
    """The one exception to the rule that it does not: the scale of what enters a layer is that of the batch."""
    quantised, images = to_int8(make_model()), photos()
    with torch.no_grad():
        together = quantised(images, budget=budget)
        alone = torch.cat([quantised(image[None], budget=budget) for image in images])
    difference = (together - alone).abs()  # of logits with a standard deviation of 1
    assert 0 < difference.mean() < 0.1
    assert budget < 1 or difference.max() < 0.1  # below, more where a patch falls on the other side of a threshold


@pytest.mark.parametrize(
    ("machine", "has_vnni", "overflows"),
    [
        ("x86_64", True, False),
        ("x86_64", False, True),
        ("AMD64", False, True),
        ("x86_64", None, True),
        ("aarch64", False, False),
    ],
)
def test_inputs_lose_a_bit_only_where_products_are_added_in_16(monkeypatch, machine, has_vnni, overflows):
    monkeypatch.setattr("platform.machine", lambda: machine)
    if has_vnni is None:  # a torch that cannot tell
        monkeypatch.delattr(torch.cpu, "_is_vnni_supported")
    else:
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_vnni)
    assert adds_in_16_bits() is overflows
    assert Int8Linear(nn.Linear(4, 4)).reduce_range is overflows


@pytest.mark.parametrize("overflows", [True, False])
def test_sums_of_the_largest_products_are_right_on_this_machine(monkeypatch, overflows):
    """4 inputs and weights of 1: in 16 bits, two products of 255 and 127 are more than 32767."""
    if overflows is False and adds_in_16_bits():
        pytest.skip("this processor adds int8 products in 16 bits")
    monkeypatch.setattr("iret.precision.adds_in_16_bits", lambda: overflows)
    linear = nn.Linear(4, 1, bias=False)
    linear.weight.data.fill_(1.0)
    assert Int8Linear(linear)(torch.ones(1, 4)).item() == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_a_converted_model_is_neither_saved_nor_exported_nor_converted(convert, tmp_path):
    converted = convert(make_model())
    with pytest.raises(ValueError, match=r"in (int8|float32-onednn) cannot be saved; save the model that it was made"):
        converted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be exported; export the model that it was made from"):
        export(converted, tmp_path / "bundle")
    for again in (to_int8, lambda model: prepare(model, "float32"), lambda model: prepare(model, "bfloat16")):
        with pytest.raises(ValueError, match="already; convert the one that it was made from"):
            again(converted)
    assert not any(tmp_path.iterdir())


@needs_onednn
def test_a_model_for_onednn_has_no_gradients_and_one_number_format():
    fast, images = to_onednn(make_model()), photos(2)
    sentence = "takes float32, outside autocast, and has no gradients; use the one that it was made from"
    with pytest.raises(ValueError, match=sentence):
        fast(images.clone().requires_grad_())
    with pytest.raises(ValueError, match=sentence), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fast(images)
    assert fast(images).isfinite().all()  # without anything to differentiate, gradients may be on


@needs_onednn
def test_packed_weights_are_not_compiled():
    with pytest.raises(ValueError, match="packed weights are not compiled; compile the model that it was made from"):
        to_onednn(make_model()).compile()


def test_int8_is_refused_off_the_cpu():
    with pytest.raises(ValueError, match="int8 runs on a CPU; on an accelerator take bfloat16"):
        to_int8(iret.create_model("iret_pico").to("meta"))


@pytest.mark.parametrize(
    ("other", "named"), [({"device": "meta"}, "float32 on meta"), ({"dtype": torch.float64}, "float64 on cpu")]
)
def test_onednn_is_refused_off_the_cpu_and_in_other_formats(other, named):
    with pytest.raises(ValueError, match=f"packed weights are float32 on a CPU, not {named}; move the model there"):
        to_onednn(iret.create_model("iret_pico").to(**other))


def test_onednn_is_refused_where_torch_has_none(monkeypatch):
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    with pytest.raises(ValueError, match="this build of torch has no oneDNN to pack weights for; take float32"):
        to_onednn(make_model())


def test_int8_is_refused_where_torch_has_no_kernels(monkeypatch):
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["none"])
    with pytest.raises(ValueError, match="has no int8 kernels"):
        to_int8(make_model())


@pytest.mark.parametrize(
    "precision", [pytest.param(each, marks=needs_onednn if "onednn" in each else ()) for each in PRECISIONS]
)
def test_a_precision_is_what_the_model_says_it_runs_in(precision):
    model, context = prepare(make_model(), precision)
    with context, torch.no_grad():
        assert model.precision == precision
        assert model(photos(2), budget=0.5).isfinite().all()


def test_an_unknown_precision_is_refused():
    with pytest.raises(
        ValueError, match="precision 'fp8' is unknown; choose from float32, float32-onednn, bfloat16, int8"
    ):
        prepare(make_model(), "fp8")
