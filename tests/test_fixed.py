"""The model at fixed counts: it says what the rule "topk" says, waits for nothing, and costs what it states."""

import numpy as np
import pytest
import torch

import iret
from iret.fixed import FixedCounts, capture_graph, counts_at, fixed_macs, keep_best
from iret.runtime.cost import full_macs, scoring_macs, transition_macs
from iret.tokens import pack
from models import make_model

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.device, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
)
COUNTS = [((9, 6), None), ((9, 6), (4, 2)), ((12, 5), None), ((12, 12), (7, 3)), ((5, 5), (5, 1)), ((1, 1), None)]


def topk_strengths(fixed: FixedCounts, batch: int) -> np.ndarray:
    """Strengths of `Iret.run` that keep and refine as many."""
    live = np.array([fixed.model.shape.num_patches, *fixed.kept[:-1]])
    return np.broadcast_to(1 - np.stack([fixed.kept, fixed.refined], 1) / live[:, None], (batch, len(live), 2))


def images_of(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 24, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("kept", "refined"), COUNTS)
@torch.no_grad()
def test_it_answers_as_the_rule_topk(kept, refined, batch):
    model = make_model()
    model.shape.__dict__["min_keep"] = 1  # of a grid this small the rule would keep 4
    fixed, images = FixedCounts(model, kept, refined), images_of(batch)
    expected = model.run(images, topk_strengths(fixed, batch), rule="topk")
    torch.testing.assert_close(fixed(images), expected.logits, rtol=0, atol=2e-5)
    assert (expected.trace.kept[-1].sum((1, 2)) == kept[-1]).all()


@pytest.mark.parametrize("options", [{"lifting": "dawn"}, {"lifting": "haar"}, {"importance": "column"}])
@torch.no_grad()
def test_other_liftings_and_importance_too(options):
    model = make_model(**options)
    fixed, images = FixedCounts(model, (9, 6), (7, 4)), images_of(3)
    expected = model.run(images, topk_strengths(fixed, 3), rule="topk")
    torch.testing.assert_close(fixed(images), expected.logits, rtol=0, atol=2e-5)


@torch.no_grad()
def test_all_kept_is_the_full_model():
    model, images = make_model(), images_of(4)
    fixed = FixedCounts(model, (12, 12))
    torch.testing.assert_close(fixed(images), model(images), rtol=0, atol=2e-6)
    assert fixed.macs == full_macs(model.shape)


@torch.no_grad()
def test_of_equal_patches_the_lower_cells_stay():
    tokens = pack(torch.arange(8.0).repeat(2, 1)[..., None])
    place_BN = torch.arange(8).expand(2, -1)
    received = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 3, 1, 2, 1, 3, 1]]).float().flatten()
    kept, place_BN = keep_best(tokens, place_BN, received, 4)
    assert place_BN.tolist() == [[0, 1, 2, 3, 4], [0, 2, 6, 4, 1]]
    assert kept.x_TD.flatten().tolist() == place_BN.flatten().tolist()
    assert kept.cell_T.tolist() == (place_BN.flatten() - 1).tolist()


@torch.no_grad()
def test_macs_are_those_of_a_run_without_its_early_heads():
    model = make_model()
    heads = sum(dim * model.num_classes for dim in model.shape.embed_dims[:-1])
    for kept, refined in (((9, 6), (9, 6)), ((9, 6), (7, 4))):
        fixed = FixedCounts(model, kept, refined)
        run = model.run(images_of(2), topk_strengths(fixed, 2), rule="topk")
        assert (run.macs == fixed.macs + heads).all()
    # where nothing is chosen nothing is scored
    shape = model.shape
    saved = scoring_macs(shape, 0, 13) - transition_macs(shape, 1, 12, 12) + transition_macs(shape, 1, 12, 11)
    assert fixed_macs(shape, (12, 6), (12, 6)) == fixed_macs(shape, (12, 6), (11, 6)) - saved


@pytest.mark.graph
@torch.no_grad()
def test_one_graph_for_a_compiler_and_one_program_to_export():
    model, images = make_model(), images_of(2)
    fixed = FixedCounts(model, (9, 6), (7, 4))
    wanted = fixed(images)
    exported = torch.export.export(fixed, (images,)).module()
    torch.testing.assert_close(exported(images), wanted, rtol=0, atol=1e-6)
    graphs = []
    fixed.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)  # a break would be an error
    torch.testing.assert_close(fixed(images), wanted, rtol=0, atol=0)
    torch.testing.assert_close(fixed(images.flip(0)), wanted.flip(0), rtol=0, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.graph
@torch.no_grad()
def test_many_counts_can_be_compiled():
    model, images, graphs = make_model(), images_of(1), []
    for kept in range(1, 11):  # torch stops at 8 unless told
        fixed = FixedCounts(model, (kept, 1))
        wanted = fixed(images)
        fixed.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
        torch.testing.assert_close(fixed(images), wanted, rtol=0, atol=0)
    assert len(graphs) == 10


@torch.no_grad()
def test_half_precision_finds_no_details_in_flat_patches():
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
    wanted = FixedCounts(model, (12, 12))(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(FixedCounts(model, (12, 12))(images).float(), wanted, rtol=0, atol=0.1)
    got = FixedCounts(model.to(torch.bfloat16), (12, 12))(images.bfloat16())
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=0.1)


def test_it_learns_with_the_weights_of_the_model():
    model = make_model()
    FixedCounts(model, (9, 6))(images_of(2)).sum().backward()
    for name in ("stages.0.blocks.0.attn.qkv.weight", "transitions.1.detail_embed.weight", "patch_embed.weight"):
        assert model.get_parameter(name).grad.abs().max() > 0


@pytest.mark.parametrize("budget", [1.0, 0.75, 0.5, 0.35, 0.25])
def test_counts_of_a_budget_come_close_and_not_above(budget):
    model = iret.load("iret_pico-cifar10")
    fixed = FixedCounts.at(model, budget)
    share = fixed.macs / full_macs(model.shape)
    assert budget - 0.03 < share <= budget
    assert (fixed.kept == (64, 64)) == (budget == 1)


def test_counts_carry_over_to_another_grid():
    points, small = iret.load("iret_pico-cifar10").points, iret.create_model("iret_small").shape
    kept = counts_at(points, small, 0.4)
    assert 0.37 < fixed_macs(small, kept, kept) / full_macs(small) <= 0.4


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
    with pytest.raises(ValueError, match="images are on cpu"):
        capture_graph(FixedCounts(model, (9, 6)), images_of(1))
    with pytest.raises(ValueError, match="not captured under autocast"), torch.autocast("cpu", torch.bfloat16):
        capture_graph(FixedCounts(model, (9, 6)), images_of(1))


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("is_compiled", [False, True])
@torch.no_grad()
def test_a_captured_graph_answers_as_the_module(device, is_compiled):
    model = make_model().to(device)
    fixed = FixedCounts(model, (9, 6), (7, 4))
    images, others = images_of(4).to(device), images_of(4).flip(0)
    expected = [fixed(images), fixed(others.to(device))]
    if is_compiled:
        fixed.compile()
    run = capture_graph(fixed, images)
    first, second = run(images), run(others)  # an answer is not overwritten by the next; images may come from the host
    torch.testing.assert_close([first, second], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(run(others[:2]), expected[1][:2], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="give as many or fewer"):
        run(torch.zeros(5, 3, 24, 32))


@pytest.mark.parametrize("device", [CUDA])
@torch.no_grad()
def test_a_gpu_keeps_what_a_cpu_keeps(device):
    """Fixed counts and thresholds, against the same model on the CPU."""
    model, images = iret.load("iret_pico-cifar10"), torch.randn(32, 3, 32, 32)
    fixed = FixedCounts.at(model, 0.5)(images)
    ran = model.run(images, budget=0.5)
    model = model.to(device)
    got = model.run(images.to(device), budget=0.5)
    torch.testing.assert_close(FixedCounts.at(model, 0.5)(images.to(device)).cpu(), fixed, rtol=0, atol=5e-3)
    same = (got.trace.kept.cpu() == ran.trace.kept).flatten(2).all((0, 2))
    assert same.float().mean() > 0.9  # but for ties by rounding
    torch.testing.assert_close(got.logits.cpu()[same], ran.logits[same], rtol=0, atol=5e-3)
