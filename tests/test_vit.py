"""The plain ViT against timm with timm's own weights, and a Block on packed against dense tokens."""

import copy
import math

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from iret.attention import ATTENTIONS
from iret.tokens import Tokens, pack
from iret.vit import (
    Attention,
    Block,
    DropPath,
    Mlp,
    PatchEmbed,
    VisionTransformer,
    init_linear,
    lay_out,
    sincos_positions,
)


def randomise(module: nn.Module) -> nn.Module:
    """Weights of a size that makes every part count; the start has zero biases and nearly zero class tokens."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


def ragged(counts: tuple[int, ...], dim: int) -> Tokens:
    torch.manual_seed(1)
    cells = torch.cat([torch.arange(-1, count - 1) for count in counts])
    starts = torch.tensor([0, *counts]).cumsum(0)
    return Tokens(torch.randn(len(cells), dim), cells, starts, is_even=False, most=max(counts))


# ---- timm


@pytest.mark.parametrize(("img_size", "in_chans"), [((32, 32), 3), ((16, 40), 1)])
def test_a_timm_vit_loads_unmapped_and_answers_the_same(img_size, in_chans):
    timm = pytest.importorskip("timm")  # a RuntimeError here: run as `make test` does, with PYTHONPATH=tests
    sizes = dict(img_size=img_size, patch_size=8, in_chans=in_chans, embed_dim=48, depth=3, num_heads=4, num_classes=7)
    theirs = randomise(timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes))
    ours = VisionTransformer(**sizes).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, in_chans, *img_size)
    with torch.no_grad():
        logits, features = ours(images), ours.forward_features(images)
        torch.testing.assert_close(logits, theirs(images), rtol=0, atol=1e-5)  # float32, three blocks
        torch.testing.assert_close(features, theirs.forward_features(images), rtol=0, atol=1e-5)
    assert logits.std() > 0.1
    assert ours.num_features == theirs.num_features


def test_a_vit_without_classes_returns_its_class_token():
    model = VisionTransformer(img_size=(16, 16), patch_size=8, num_classes=0, embed_dim=16, depth=1, num_heads=1)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), model.forward_features(images)[:, 0])


# ---- packed and dense


@pytest.mark.parametrize("function", ATTENTIONS.values(), ids=ATTENTIONS)
def test_a_block_on_packed_tokens_equals_the_block_on_the_dense_batch(function):
    block = randomise(Block(32, 2, function=function))
    x_BND = torch.randn(3, 5, 32)
    tokens = pack(x_BND)
    with torch.no_grad():
        packed, dense = block(tokens.x_TD, tokens)[0], block(x_BND)[0]
    torch.testing.assert_close(packed.view_as(dense), dense, rtol=0, atol=1e-5)  # float32, values up to 10


@pytest.mark.parametrize("function", ATTENTIONS.values(), ids=ATTENTIONS)
def test_a_block_on_a_ragged_batch_equals_the_block_on_each_image(function):
    block, tokens = randomise(Block(32, 2, function=function)), ragged((5, 1, 8), 32)
    with torch.no_grad():
        together = block(tokens.x_TD, tokens)[0]
        alone = torch.cat([block(x[None])[0][0] for x in tokens.x_TD.split((5, 1, 8))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)  # float32, values up to 10


def test_a_block_is_pre_norm_with_two_residual_branches():
    block = randomise(Block(32, 2))
    x = torch.randn(1, 5, 32)
    middle = x + block.attn(block.norm1(x))[0]
    assert torch.equal(block(x)[0], middle + block.mlp(block.norm2(middle)))


def test_the_mlp_has_the_width_it_was_asked_for():
    assert Block(32, 2, mlp_dim=96).mlp.fc1.out_features == 96
    assert Mlp(4, 6)(torch.zeros(2, 4)).shape == (2, 4)


# ---- evidence


def test_evidence_is_given_only_where_it_is_asked_for():
    attention, tokens = randomise(Attention(32, 2)), ragged((5, 3), 32)
    plain, nothing = attention(tokens.x_TD, tokens)
    update, _ = attention(tokens.x_TD, tokens, "cls")
    assert nothing is None
    assert torch.equal(update, plain)


@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("importance", ["cls", "column"])
def test_evidence_is_the_logits_of_those_who_are_asked_and_carries_no_gradient(importance, is_dense):
    attention, tokens = randomise(Attention(32, 2)), ragged((4, 4), 32)
    q, k, _ = attention.qkv(tokens.x_TD).view(2, 4, 3, 2, 16).permute(2, 0, 3, 1, 4)
    x, own = (tokens.x_TD.view(2, 4, 32), None) if is_dense else (tokens.x_TD, tokens)
    update, evidence = attention(x, own, importance)
    asking = q[:, :, :1] if importance == "cls" else q
    torch.testing.assert_close(evidence.logits, asking @ k[:, :, 1:].mT / 4, rtol=0, atol=1e-5)  # float32, sums of 32
    assert update.requires_grad
    assert not evidence.logits.requires_grad


# ---- drop path


def test_drop_path_does_nothing_in_eval_mode_or_at_rate_zero():
    x = torch.randn(4, 3, 2)
    assert torch.equal(DropPath(0.5).eval()(x), x)
    assert torch.equal(DropPath(0.0).train()(x), x)


def test_drop_path_skips_whole_images_and_scales_up_the_others():
    torch.manual_seed(0)
    tokens = ragged((2, 3, 1) * 20, 4)
    out = DropPath(0.2).train()(torch.ones(len(tokens.cell_T), 4), tokens)
    assert set(out.flatten().tolist()) == {0.0, 1.25}
    for image in out.split((2, 3, 1) * 20):
        assert image.unique().numel() == 1
    kept = torch.stack([image[0, 0] > 0 for image in out.split((2, 3, 1) * 20)]).float().mean()
    assert 0.6 < kept < 1.0  # 60 images at 4/5: almost four standard errors


def test_drop_path_of_a_dense_batch_skips_whole_images():
    torch.manual_seed(0)
    out = DropPath(0.5).train()(torch.ones(64, 3, 2))
    assert out.flatten(1).unique(dim=0).tolist() == [[0.0] * 6, [2.0] * 6]


# ---- parts


def test_patches_come_row_by_row():
    embed = PatchEmbed(2, 1, 1)
    nn.init.constant_(embed.proj.weight, 0.25)
    nn.init.zeros_(embed.proj.bias)
    image = torch.arange(6.0).view(2, 3).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert embed(image[None, None]).flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_linear_layers_start_small_and_without_bias():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64, bias=False))
    init_linear(layers)
    assert layers[0].bias.count_nonzero() == 0
    for layer in (layers[0], layers[2]):
        assert 0.018 < layer.weight.std() < 0.022  # 4096 draws
    assert torch.equal(layers[1].weight, torch.ones(64))


# ---- positions


def test_positions_by_hand() -> None:
    places = sincos_positions((2, 3), 8)
    assert places.shape == (1, 7, 8)
    slow = 1e-4
    row, column = 1, 2  # the last cell: sine and cosine of the row at both wavelengths, then of the column
    expected = [f(place * rate) for place in (row, column) for f in (math.sin, math.cos) for rate in (1, slow)]
    torch.testing.assert_close(places[0, -1], torch.tensor(expected), rtol=0, atol=1e-6)  # float32
    assert 0 < places[0, 0].abs().max() < 0.1  # the class token


def test_positions_tell_every_cell_of_a_grid_apart() -> None:
    places = sincos_positions((14, 14), 64)[0, 1:]
    assert torch.pdist(places).min() > 0.1


# ---- compiled


@pytest.mark.graph
def test_the_graph_of_a_block_does_not_depend_on_the_counts() -> None:
    block = randomise(Block(16, 2))
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(block, backend=counter, dynamic=True)
    with torch.no_grad():
        for counts in ((5, 7, 3), (2, 9, 4), (6, 6, 11)):
            tokens = ragged(counts, 16)
            got, _ = compiled(tokens.x_TD, tokens)
            torch.testing.assert_close(got, block(tokens.x_TD, tokens)[0], rtol=0, atol=1e-5)  # float32
    assert counter.frame_count == 1


def test_laying_out_changes_the_order_in_memory_and_nothing_else() -> None:
    block = randomise(Block(16, 2))
    before = copy.deepcopy(block)
    lay_out(block)
    for name, weight in block.named_parameters():
        assert torch.equal(weight, before.get_parameter(name)), name
        assert weight.t().is_contiguous() if weight.dim() > 1 else weight.is_contiguous(), name
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(block(x)[0], before(x)[0], rtol=0, atol=1e-5)  # float32, another order of sums
    block(x)[0].sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in block.parameters())
