"""The model at fixed counts: it says what the rule "topk" says, waits for nothing, and costs what it states."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import iret
from iret.fixed import CapturedGraph, FixedCounts, capture_graph, counts_at, fixed_macs, keep_best, take_places
from iret.precision import to_int8, to_onednn
from iret.runtime.cost import full_macs
from iret.tokens import pack
from models import make_model

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.device, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
)
COUNTS = [((9, 6), None), ((9, 6), (4, 2)), ((12, 5), None), ((12, 12), (7, 3)), ((5, 5), (5, 1)), ((4, 4), (1, 4))]
ROUNDING = 2e-5  # of logits of about 2, in float32 and another order


def topk_strengths(fixed: FixedCounts, batch: int) -> np.ndarray:
    """Strengths of `Iret.run` that keep and refine as many."""
    live = np.array([fixed.model.shape.num_patches, *fixed.kept[:-1]])
    return np.broadcast_to(1 - np.stack([fixed.kept, fixed.refined], 1) / live[:, None], (batch, len(live), 2))


def images_of(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 24, 32, generator=torch.Generator().manual_seed(3))


def check_equal(got: torch.Tensor, wanted: torch.Tensor, atol: float = ROUNDING) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


# ---- answers


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("kept", "refined"), COUNTS)
@torch.no_grad()
def test_it_answers_as_the_rule_topk(kept, refined, batch):
    model = make_model()
    fixed, images = FixedCounts(model, kept, refined), images_of(batch)
    expected = model.run(images, topk_strengths(fixed, batch), rule="topk")
    check_equal(fixed(images), expected.logits)
    assert (expected.trace.kept[-1].sum((1, 2)) == kept[-1]).all()


@pytest.mark.parametrize("options", [{"lifting": "dawn"}, {"lifting": "haar"}, {"importance": "column"}])
@torch.no_grad()
def test_other_liftings_and_importance_too(options):
    model = make_model(**options)
    fixed, images = FixedCounts(model, (9, 6), (7, 4)), images_of(3)
    check_equal(fixed(images), model.run(images, topk_strengths(fixed, 3), rule="topk").logits)


@torch.no_grad()
def test_all_kept_is_the_full_model():
    model, images = make_model(), images_of(4)
    check_equal(FixedCounts.at(model, 1.0)(images), model(images))
    model.double()
    check_equal(
        FixedCounts.at(model, 1.0)(images.double()), model(images.double()), atol=1e-8
    )  # of thirds in single precision


@torch.no_grad()
def test_of_equal_patches_those_that_stood_first_stay():
    tokens = pack(torch.arange(8.0).repeat(2, 1)[..., None])
    received = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 3, 1, 2, 1, 3, 1]]).float().flatten()
    tokens = keep_best(tokens, received, 4)  # of cells in order: the lower one
    assert tokens.cell_T.tolist() == [-1, 0, 1, 2, 3, -1, 1, 5, 3, 0]
    assert (tokens.x_TD[:, 0] == tokens.cell_T + 1).all()
    tokens = keep_best(tokens, torch.tensor([[0, 2, 2, 2, 2], [0, 2, 2, 2, 2]]).float().flatten(), 2)
    assert tokens.cell_T.tolist() == [-1, 0, 1, -1, 1, 5]
    assert tokens.is_even and tokens.width == 3 and tokens.starts.tolist() == [0, 3, 6]
    assert take_places(tokens, torch.tensor([[0, 2], [0, 1]])).cell_T.tolist() == [-1, 1, -1, 1]


@torch.no_grad()
def test_an_image_of_nan_answers_nan_and_moves_nobody_else():
    fixed, images = FixedCounts(make_model(), (9, 6)), images_of(3)
    wanted = fixed(images)
    images[1, 0, 5, 5] = torch.nan
    got = fixed(images)
    assert got[1].isnan().all()
    check_equal(got[[0, 2]], wanted[[0, 2]], atol=0)


@torch.no_grad()
def test_a_model_without_classes_gives_features():
    model, images = make_model(), images_of(2)
    model.reset_classifier(0)
    check_equal(FixedCounts.at(model, 1.0)(images), model.forward_features(images)[:, 0])


@torch.no_grad()
def test_flat_patches_have_no_details_in_half_precision():
    model = make_model().to(torch.bfloat16)
    seen = []
    for transition in model.transitions:
        transition.detail_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max()))
    fixed = FixedCounts(model, (9, 6))
    assert fixed(torch.full((1, 3, 24, 32), 0.7, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert len(seen) == 2 and max(seen) == 0
    fixed(images_of(1).bfloat16())
    assert min(seen[2:]) > 0.1


@pytest.mark.parametrize("options", [{}, {"lifting": "dawn"}])
@torch.no_grad()
def test_half_precision_comes_close(options):
    model, images = make_model(**options), images_of(6)
    wanted = FixedCounts.at(model, 1.0)(images)
    with torch.autocast("cpu", torch.bfloat16):
        check_equal(FixedCounts.at(model, 1.0)(images).float(), wanted, atol=0.1)  # a level's details are 0.25 and more
    got = FixedCounts.at(model.to(torch.bfloat16), 1.0)(images.bfloat16())
    check_equal(got.float(), wanted, atol=0.1)


def test_gradients_are_those_of_the_model_but_for_linear_lifting():
    model, images = make_model(), images_of(2)
    fixed = FixedCounts(model, (9, 6), (7, 4))
    fixed(images).square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.run(images, topk_strengths(fixed, 2), rule="topk").logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("lifting"):
            assert found[name] is None
        elif parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-3)
    assert found["transitions.1.detail_embed.weight"].abs().max() > 0


def test_made_in_inference_mode_it_is_of_use_outside():
    model = make_model()
    with torch.inference_mode():
        fixed = FixedCounts(model, (9, 6))
    images = images_of(1).requires_grad_()
    fixed(images).sum().backward()
    assert images.grad.abs().max() > 0


@pytest.mark.parametrize("lifting", ["linear", "dawn"])
def test_it_keeps_the_mode_and_the_weights_of_its_model(lifting):
    model = make_model(lifting=lifting)
    assert not FixedCounts(model, (9, 6)).training and FixedCounts(model.train(), (9, 6)).training
    assert set(FixedCounts(model, (9, 6)).state_dict()) == {f"model.{name}" for name in model.state_dict()}


# ---- cost


@pytest.mark.parametrize("options", [{}, {"lifting": "haar"}, {"importance": "column"}])
@pytest.mark.parametrize(
    ("kept", "refined"),
    [((12, 12), None), ((9, 6), None), ((9, 9), None), ((12, 6), None), ((9, 6), (7, 4)), ((12, 6), (11, 6))],
)
@torch.no_grad()
def test_macs_are_those_that_are_counted(kept, refined, options):
    fixed = FixedCounts(make_model(**options), kept, refined)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        fixed(images_of(1))
    assert counter.get_total_flops() == 2 * fixed.macs


@pytest.mark.parametrize("budget", [0.75, 0.5, 0.35, 0.25])
def test_counts_of_a_budget_come_close_and_not_above(budget):
    model = iret.load("iret_pico-cifar10")
    fixed = FixedCounts.at(model, budget)
    assert budget - 0.03 < fixed.macs / full_macs(model.shape) <= budget
    assert FixedCounts.at(model, 1.0).kept == (64, 64)


def test_counts_carry_over_to_another_grid():
    points, small = iret.load("iret_pico-cifar10").points, iret.create_model("iret_small").shape
    kept = counts_at(points, small, 0.4)
    assert 0.37 < fixed_macs(small, kept, kept) / full_macs(small) <= 0.4
    with pytest.raises(ValueError, match="of 3 stages, the model has 2"):
        counts_at(points, make_model(embed_dims=(16, 32), depths=(2, 1)).shape, 0.4)


# ---- refusals


def test_what_cannot_be_had_is_refused():
    model, pico = make_model(), iret.load("iret_pico-cifar10")
    for kept, refined, said in [
        ((9,), None, "must be 2 whole numbers"),
        ((9, 0), None, "1 or more"),
        ((6, 9), None, "must not grow"),
        ((13, 6), None, "must not grow from the 12"),
        ((9, 6), (9, 7), "only what stays"),
    ]:
        with pytest.raises(ValueError, match=said):
            FixedCounts(model, kept, refined)
    with pytest.raises(ValueError, match="no operating points"):
        FixedCounts.at(model, 0.5)
    with pytest.raises(ValueError, match="outside"):
        FixedCounts.at(pico, 1.5)
    with pytest.raises(ValueError, match=r"budget=0\.05 is below (\S+),") as caught:
        FixedCounts.at(pico, 0.05)
    least = float(str(caught.value).split("below ")[1].split(",")[0])
    assert FixedCounts.at(pico, least).macs <= least * full_macs(pico.shape)
    with pytest.raises(ValueError, match="this model takes floating"):
        FixedCounts(model, (9, 6))(torch.zeros(1, 3, 8, 8))


@pytest.mark.graph  # what a type checker would refuse first
@pytest.mark.parametrize("kept", [9, (9, None), ("a", "b"), (9, 6.5)])
def test_counts_that_are_none_get_a_sentence(kept):
    with pytest.raises(ValueError, match="must be 2 whole numbers"):
        FixedCounts(make_model(), kept)
    with pytest.raises(ValueError, match="must be one number"):
        FixedCounts.at(make_model(), "0.5")


@pytest.mark.parametrize("convert", [to_int8, to_onednn])
def test_converted_models_are_refused(convert):
    model = convert(make_model())
    with pytest.raises(ValueError, match=f"a model in {model.own_precision}; give the one it was made from"):
        FixedCounts(model, (9, 6))


def test_a_model_that_was_cast_since_is_refused():
    model = make_model()
    fixed = FixedCounts(model, (9, 6))
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"made for torch.float32 on cpu; make new ones"):
        fixed(images_of(1).bfloat16())
    model.float()
    fixed(images_of(1))


def test_what_cannot_be_captured_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="capture FixedCounts"):
        capture_graph(model, images_of(1))
    with pytest.raises(ValueError, match="are on cpu"):
        capture_graph(FixedCounts(model, (9, 6)), images_of(1))
    with pytest.raises(ValueError, match="not captured under autocast"), torch.autocast("cpu", torch.bfloat16):
        capture_graph(FixedCounts(model, (9, 6)), images_of(1))


# ---- graphs


class FakeGraph:
    """Computes into the memory that was captured, as a CUDA graph does."""

    def __init__(self, model: torch.nn.Module, images: torch.Tensor, logits: torch.Tensor) -> None:
        self.model, self.images, self.logits = weakref.ref(model), images, logits

    def replay(self) -> None:
        self.logits.copy_(self.model()(self.images))


@torch.no_grad()
def fake_capture(model: torch.nn.Module, images: torch.Tensor) -> CapturedGraph:
    with torch.inference_mode(False):
        given = images.clone()
        logits = model(given)
    return CapturedGraph(model, given, logits, FakeGraph(model, given, logits))


@torch.no_grad()
def test_a_graph_answers_for_as_many_images_or_fewer():
    fixed, images = FixedCounts(make_model(), (9, 6)), images_of(4)
    run = fake_capture(fixed, images)
    first, second = run(images), run(images.flip(0))
    check_equal(first, fixed(images))  # an answer is not written over by the next
    check_equal(second, first.flip(0))
    check_equal(run(images[2:3]), first[2:3])
    for others in (images_of(5), images[:0], images[..., :8], images.bfloat16(), (images * 255).byte()):
        with pytest.raises(ValueError, match="or capture another"):
            run(others)


def test_a_graph_keeps_its_model_and_no_gradients():
    model = make_model()
    run = fake_capture(FixedCounts(model, (9, 6)), images_of(2))
    gc.collect()
    images = images_of(2).requires_grad_()
    assert not run(images).requires_grad  # the module lives on in the graph
    with torch.inference_mode():
        run(images_of(1))
    assert not run(images).requires_grad and not run.images.requires_grad


@pytest.mark.graph
@torch.no_grad()
def test_one_graph_for_a_compiler_and_one_program_to_export():
    model, images = make_model(), images_of(2)
    fixed = FixedCounts(model, (9, 6), (7, 4))
    wanted = fixed(images)
    exported = torch.export.export(fixed, (images,)).module()
    check_equal(exported(images), wanted)
    graphs = []
    fixed.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)  # a break would be an error
    check_equal(fixed(images), wanted, atol=0)
    check_equal(fixed(images.flip(0)), wanted.flip(0))
    assert len(graphs) == 1


@pytest.mark.graph
@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=8)  # torch's own, whatever was compiled before
def test_many_counts_can_be_compiled():
    model, images, graphs = make_model(), images_of(1), []
    for kept in range(1, 11):
        fixed = FixedCounts(model, (kept, 1))
        wanted = fixed(images)
        fixed.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
        check_equal(fixed(images), wanted, atol=0)
    assert len(graphs) == 10


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_captured_graph_answers_as_the_module(device, is_compiled):
    model, images = make_model().to(device), images_of(4).to(device)
    fixed = FixedCounts(model, (9, 6), (7, 4))
    others = images.flip(0).cpu()
    with torch.no_grad():
        expected = [fixed(images), fixed(others.to(device))]
    if is_compiled:
        fixed.compile()
    with torch.inference_mode():
        run = capture_graph(fixed, images)
    del fixed, model
    gc.collect()
    torch.cuda.empty_cache()
    torch.full((1 << 24,), torch.nan, device=device)  # over what would be free
    first, second = run(images), run(others)  # from the host, too
    torch.testing.assert_close([first, second], expected, rtol=0, atol=1e-4)
    check_equal(run(others[:2]), expected[1][:2], atol=1e-4)


@pytest.mark.parametrize("device", [CUDA])
@torch.no_grad()
def test_a_gpu_keeps_what_a_cpu_keeps(device):
    """Fixed counts and thresholds, against the same model on the CPU."""
    model, images = iret.load("iret_pico-cifar10"), torch.randn(32, 3, 32, 32)
    fixed = FixedCounts.at(model, 0.5)(images)
    ran = model.run(images, budget=0.5)
    model = model.to(device)
    got = model.run(images.to(device), budget=0.5)
    check_equal(FixedCounts.at(model, 0.5)(images.to(device)).cpu(), fixed, atol=5e-3)
    same = (got.trace.kept.cpu() == ran.trace.kept).flatten(2).all((0, 2))
    assert same.float().mean() > 0.9  # but for ties by rounding
    check_equal(got.logits.cpu()[same], ran.logits[same], atol=5e-3)
