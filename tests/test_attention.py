"""Attention over a ragged batch against a loop written out in float64, and the importance read beside it."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from iret import attention
from iret.attention import (
    LOGITS,
    attend,
    attend_each,
    attend_padded,
    attend_varlen,
    choose_backend,
    head_shares,
    receive,
)
from iret.tokens import Tokens, pack

COUNTS = (5, 2, 7)  # tokens of three images, the class token included


def make_tokens(counts: tuple[int, ...] = COUNTS, sizes: str = "ones") -> Tokens:
    """`sizes`: "ones" (None), "merged" (1, 2 or 3 patches a token) or "masked" (some patches are 0)."""
    cells = torch.cat([torch.arange(-1, count - 1) for count in counts])
    starts = F.pad(torch.tensor(counts).cumsum(0), (1, 0))
    size_T = None
    if sizes != "ones":
        size_T = torch.ones(len(cells))
        size_T[1::2] = 3.0 if sizes == "merged" else 0.0
        size_T[starts[:-1]] = 1.0
    return Tokens(torch.zeros(len(cells), 1), cells, starts, len(set(counts)) == 1, size_T)


def random_qkv(tokens: Tokens, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """Two heads of width 4; logits of a few units, so that no softmax is nearly uniform."""
    torch.manual_seed(seed)
    return [2 * torch.randn(len(tokens.cell_T), 2, 4, dtype=dtype) for _ in range(3)]


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Each token of size s weighs s * exp(q . k / sqrt(E)) in its own image, summed in float64."""
    q, k, v = q.double(), k.double(), v.double()
    size_T = torch.ones(len(q)).double() if tokens.size_T is None else tokens.size_T.double()
    out = torch.zeros_like(q)
    for start, end in zip(tokens.starts[:-1].tolist(), tokens.starts[1:].tolist(), strict=True):
        for head in range(q.shape[1]):
            weights = size_T[start:end] * (q[start:end, head] @ k[start:end, head].T / math.sqrt(q.shape[2])).exp()
            out[start:end, head] = weights / weights.sum(1, keepdim=True) @ v[start:end, head]
    return out


# ---- one result, whatever the form of the batch


@pytest.mark.parametrize("counts", [COUNTS, (4, 4, 4), (6,), (1, 5)])
@pytest.mark.parametrize("sizes", ["ones", "merged", "masked"])
def test_attention_is_the_size_weighted_softmax_of_each_image(counts, sizes):
    tokens = make_tokens(counts, sizes)
    q, k, v = random_qkv(tokens)
    expected = written_out(q, k, v, tokens)
    torch.testing.assert_close(attend(q, k, v, tokens).double(), expected, rtol=0, atol=2e-6)  # float32, 7 terms


@pytest.mark.parametrize("sizes", ["ones", "merged", "masked"])
def test_an_even_batch_may_also_be_treated_as_ragged(sizes):
    tokens = make_tokens((4, 4), sizes)
    q, k, v = random_qkv(tokens)
    got = attend(q, k, v, replace(tokens, is_even=False))
    torch.testing.assert_close(got, attend(q, k, v, tokens), rtol=0, atol=2e-6)  # float32, sums of 4


@pytest.mark.parametrize("counts", [COUNTS, (3, 5, 3, 1, 5), (4, 4), (0, 3)])
@pytest.mark.parametrize("sizes", ["ones", "merged", "masked"])
def test_image_by_image_equals_the_padded_reference(counts, sizes):
    tokens = make_tokens(counts, sizes)
    q, k, v = random_qkv(tokens)
    bias_T = None if tokens.size_T is None else tokens.size_T.log()
    width = max(counts)
    padded = attend_padded(q, k, v, tokens.starts, width, bias_T)
    torch.testing.assert_close(attend_each(q, k, v, tokens.starts, width, bias_T), padded, rtol=0, atol=2e-6)  # 7 terms


def test_gradients_through_padding_are_those_of_image_by_image():
    tokens = make_tokens((3, 5, 3, 1, 5))
    qkv = [x.requires_grad_() for x in random_qkv(tokens)]
    weights = torch.randn_like(qkv[0])
    padded, each = (
        torch.autograd.grad((backend(*qkv, tokens.starts, 5, None) * weights).sum(), qkv)
        for backend in (attend_padded, attend_each)
    )
    for got, wanted in zip(padded, each, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)  # float32, sums of 5


def test_varlen_is_called_as_torch_documents_it(monkeypatch):
    """A stand-in with the signature of `torch.nn.attention.varlen.varlen_attn`, which runs on CUDA alone."""

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, num_splits=None):
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert max_q == max_k == int(cu_seq_q.diff().max())
        assert num_splits in (1, None)
        return written_out(query, key, value, replace(tokens, starts=cu_seq_q.long())).float()

    tokens = make_tokens()
    q, k, v = random_qkv(tokens)
    monkeypatch.setattr(attention, "_varlen_attn", varlen_attn)
    got = attend_varlen(q, k, v, tokens.starts, tokens.width, None)
    torch.testing.assert_close(got, attend_padded(q, k, v, tokens.starts, tokens.width, None), rtol=0, atol=2e-6)


@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_varlen_equals_the_padded_reference_on_cuda(dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: flash attention of ragged batches runs nowhere else")
    torch.manual_seed(0)
    starts = torch.tensor([0, 5, 70, 71, 268], device="cuda")
    qkv = [torch.randn(268, 6, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
    weights = torch.randn(268, 6, 64, device="cuda", dtype=dtype)
    results = []
    for backend in (attend_varlen, attend_padded):
        out = backend(*qkv, starts, 197, None)
        results.append((out, *torch.autograd.grad((out * weights).sum(), qkv)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)  # half precision


@pytest.mark.parametrize(
    ("device", "dtype", "has_bias", "wanted"),
    [
        ("cpu", torch.float32, False, attend_each),
        ("cpu", torch.bfloat16, True, attend_each),
        ("cuda", torch.bfloat16, False, attend_varlen),
        ("cuda", torch.bfloat16, True, attend_padded),
        ("cuda", torch.float32, False, attend_padded),
        ("mps", torch.float16, False, attend_padded),
    ],
)
def test_the_back_end_is_the_fastest_that_can(monkeypatch, device, dtype, has_bias, wanted):
    monkeypatch.setattr(attention, "_varlen_attn", print)
    assert choose_backend(device, dtype, has_bias) is wanted


def test_without_varlen_cuda_pads(monkeypatch):
    monkeypatch.setattr(attention, "_varlen_attn", None)
    assert choose_backend("cuda", torch.bfloat16, False) is attend_padded


def test_a_dense_batch_equals_its_packed_form():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 2, 4)
    tokens = pack(torch.zeros(2, 5, 1))
    packed = attend(*(x.flatten(0, 1) for x in (q, k, v)), tokens)
    torch.testing.assert_close(packed.unflatten(0, (2, 5)), attend(q, k, v), rtol=0, atol=1e-6)  # the same kernel


def test_an_image_does_not_see_its_batch_mates():
    tokens = make_tokens()
    q, k, v = random_qkv(tokens)
    others = [x.clone() for x in (q, k, v)]
    for x in others:
        x[:5] = 9.0
        x[7:] = -9.0
    assert torch.equal(attend(*others, tokens)[5:7], attend(q, k, v, tokens)[5:7])


def test_a_token_of_size_two_equals_the_token_twice():
    q, k, v = random_qkv(make_tokens((3,)))
    twice = torch.tensor([0, 1, 2, 2])
    merged = replace(make_tokens((3,)), size_T=torch.tensor([1.0, 1.0, 2.0]))
    expected = attend(q[twice], k[twice], v[twice], make_tokens((4,)))[:3]
    torch.testing.assert_close(attend(q, k, v, merged), expected, rtol=0, atol=1e-6)  # float32, sums of 4


def test_a_masked_token_might_as_well_not_be_there():
    tokens = replace(make_tokens((5, 2)), size_T=torch.tensor([1.0, 1, 0, 1, 1, 1, 1]))
    q, k, v = random_qkv(tokens)
    stays = torch.tensor([0, 1, 3, 4, 5, 6])
    expected = attend(q[stays], k[stays], v[stays], make_tokens((4, 2)))
    torch.testing.assert_close(attend(q, k, v, tokens)[stays], expected, rtol=0, atol=1e-6)  # float32, sums of 4


def test_attention_of_two_tokens_by_hand():
    # E = 1: logits q k = ln 3 and 0 for the first token, 0 and 0 for the second.
    q, k = torch.tensor([[[math.log(3)]], [[0.0]]]), torch.tensor([[[1.0]], [[0.0]]])
    v = torch.tensor([[[4.0]], [[8.0]]])
    out = attend(q, k, v, make_tokens((2,)))
    torch.testing.assert_close(out.flatten(), torch.tensor([5.0, 6.0]), rtol=0, atol=1e-5)  # float32, ln 3 is rounded


# ---- gradients


@pytest.mark.parametrize("bias", [None, [0.0, 0.7, -math.inf, 0.0, 0.3]])
def test_the_packed_gradient_is_the_numerical_one(bias):
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    starts = torch.tensor([0, 3, 5])
    bias_T = None if bias is None else torch.tensor(bias, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: torch.ops.iret.attend(*x, starts, 3, bias_T), (q, k, v))


@pytest.mark.parametrize("sizes", ["ones", "merged", "masked"])
def test_the_packed_gradient_equals_that_of_the_fused_kernel(sizes):
    tokens = make_tokens((4, 4), sizes)
    gradients = []
    for form in (tokens, replace(tokens, is_even=False)):
        qkv = [x.requires_grad_() for x in random_qkv(tokens)]
        attend(*qkv, form).square().sum().backward()
        gradients.append(torch.stack([x.grad for x in qkv]))
    torch.testing.assert_close(*gradients, rtol=0, atol=5e-5)  # float32, gradients up to 30


def test_nothing_flows_back_from_one_image_into_another():
    tokens = make_tokens()
    qkv = [x.requires_grad_() for x in random_qkv(tokens)]
    attend(*qkv, tokens)[5:7].square().sum().backward()
    for x in qkv:
        assert x.grad[5:7].count_nonzero() > 0
        assert x.grad[:5].count_nonzero() == x.grad[7:].count_nonzero() == 0


@pytest.mark.parametrize("counts", [COUNTS, (4, 4)])
def test_training_in_bf16_on_a_processor_agrees_with_single_precision(counts):
    tokens = make_tokens(counts, "merged")
    exact = [x.bfloat16().float().requires_grad_() for x in random_qkv(tokens)]
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    expected, got = attend(*exact, tokens), attend(*half, tokens)
    assert got.dtype == torch.bfloat16
    # bf16 has 8 bits: log(3) as a logit is off by 2^-8 relative, values up to 5 by half a unit of 2^-6.
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.04)
    expected.sum().backward()
    got.sum().backward()
    for x, y in zip(half, exact, strict=True):
        torch.testing.assert_close(x.grad.float(), y.grad, rtol=0.02, atol=0.05)  # 8 bits, a few products deep


@pytest.mark.parametrize("bias", [None, [0.0, 0.7, -math.inf, 0.0, 0.3]])
def test_the_operator_keeps_torch_s_contract(bias):
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, 4, requires_grad=True) for _ in range(3))
    bias_T = None if bias is None else torch.tensor(bias)
    torch.library.opcheck(torch.ops.iret.attend, (q, k, v, torch.tensor([0, 3, 5]), 3, bias_T))


# ---- importance


def softmax_over_patches(q: torch.Tensor, k: torch.Tensor, tokens: Tokens, only_class: bool) -> torch.Tensor:
    """Every live token (or the class token alone) asks, the image's patches answer; mean over queries and heads."""
    q, k = q.double(), k.double()
    size_T = torch.ones(len(q)).double() if tokens.size_T is None else tokens.size_T.double()
    out = torch.zeros(len(q), dtype=torch.float64)
    for start, end in zip(tokens.starts[:-1].tolist(), tokens.starts[1:].tolist(), strict=True):
        rows = []
        for query in [start] if only_class else range(start, end):
            if size_T[query] > 0:
                for head in range(q.shape[1]):
                    logits = k[start + 1 : end, head] @ q[query, head] / math.sqrt(q.shape[2])
                    weights = size_T[start + 1 : end] * logits.exp()
                    rows.append(weights / weights.sum())
        out[start + 1 : end] = torch.stack(rows).mean(0)
    return out


def ask(
    importance: str, q: torch.Tensor, k: torch.Tensor, tokens: Tokens, shares: torch.Tensor | None = None
) -> torch.Tensor:
    """What patches received in one block, packed or, where `q` and `k` are, dense; every head weighs the same."""
    shares = torch.full((q.shape[-2],), 1 / q.shape[-2]) if shares is None else shares
    return receive([LOGITS[importance](q, k, None if q.dim() == 4 else tokens)], tokens, shares)


@pytest.mark.parametrize("counts", [COUNTS, (4, 4, 4), (6,)])
@pytest.mark.parametrize("sizes", ["ones", "merged", "masked"])
@pytest.mark.parametrize("importance", ["cls", "column"])
def test_importance_is_the_softmax_over_the_patches_of_an_image(importance, counts, sizes):
    tokens = make_tokens(counts, sizes if counts != COUNTS or sizes != "masked" else "merged")
    if sizes == "masked" and counts == COUNTS:  # the image of one patch must keep it
        tokens = replace(tokens, size_T=torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1]))
    q, k, _ = random_qkv(tokens)
    got = ask(importance, q, k, tokens)
    expected = softmax_over_patches(q, k, tokens, only_class=importance == "cls")
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6)  # float32, means of up to 14 rows
    if tokens.is_even and tokens.size_T is None:
        dense = ask(importance, *(each.unflatten(0, (tokens.batch_size, -1)) for each in (q, k)), tokens)
        torch.testing.assert_close(dense, got, rtol=0, atol=5e-7)  # float32, the same numbers in other steps
    sums = torch.zeros(len(counts)).index_add(0, tokens.image_T(), got)
    torch.testing.assert_close(sums, torch.ones(len(counts)), rtol=0, atol=2e-6)
    assert got[tokens.starts[:-1]].tolist() == [0.0] * len(counts)


def test_class_row_by_hand():
    # One head of width 1: the class token's logits over three patches are ln 1, ln 2, ln 1.
    k = torch.tensor([9.0, 0.0, math.log(2), 0.0]).view(4, 1, 1)
    q = torch.tensor([1.0, -7.0, 5.0, 3.0]).view(4, 1, 1)
    got = ask("cls", q, k, make_tokens((4,)))
    torch.testing.assert_close(got, torch.tensor([0.0, 0.25, 0.5, 0.25]), rtol=0, atol=1e-7)  # float32


def test_class_row_averages_heads_after_the_softmax():
    k = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [0.0, 0.0]]).unsqueeze(2)
    q = torch.ones(3, 2, 1)
    got = ask("cls", q, k, make_tokens((3,)))
    torch.testing.assert_close(got, torch.tensor([0.0, 0.625, 0.375]), rtol=0, atol=1e-7)  # 1/2, 1/2 and 3/4, 1/4


@pytest.mark.parametrize("is_dense", [True, False])
def test_heads_weigh_what_their_shares_say(is_dense):
    k = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [0.0, 0.0]]).unsqueeze(2)
    k = k[None] if is_dense else k
    got = ask("cls", torch.ones_like(k), k, make_tokens((3,)), torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(got, torch.tensor([0.0, 0.6875, 0.3125]), rtol=0, atol=1e-7)  # 1/2, 1/2 and 3/4, 1/4


@pytest.mark.parametrize("counts", [COUNTS, (4, 4, 4), (6,)])
def test_blocks_are_received_side_by_side(counts):
    tokens, shares = make_tokens(counts), torch.tensor([0.1, 0.2, 0.3, 0.4])
    (q1, k1, _), (q2, k2, _) = random_qkv(tokens), random_qkv(tokens, seed=1)
    both = receive([LOGITS["cls"](q, k, tokens) for q, k in ((q1, k1), (q2, k2))], tokens, shares)
    apart = ask("cls", q1, k1, tokens, shares[:2]) + ask("cls", q2, k2, tokens, shares[2:])
    torch.testing.assert_close(both, apart, rtol=0, atol=1e-6)  # float32, sums of four


def test_column_mean_by_hand():
    # Patches answer ln 3 : 1 to a query of 1, 1 : 1 to a query of 0; of three queries one is 1.
    k = torch.tensor([5.0, math.log(3), 0.0]).view(3, 1, 1)
    q = torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1)
    got = ask("column", q, k, make_tokens((3,)))
    expected = torch.tensor([0.0, (0.5 + 0.75 + 0.5) / 3, (0.5 + 0.25 + 0.5) / 3])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)  # float32, mean of 3


@pytest.mark.parametrize("importance", ["cls", "column"])
def test_equal_keys_receive_exactly_equal_attention(importance):
    tokens = make_tokens((8, 8))
    q, _, _ = random_qkv(tokens)
    got = ask(importance, q, torch.ones(16, 2, 4), tokens).view(2, 8)[:, 1:]
    assert torch.equal(got, got[:, :1].expand_as(got))


@pytest.mark.parametrize("patches", [9, 16, 59, 196])
@pytest.mark.parametrize("heads", [2, 6, 24])
def test_equal_keys_of_one_image_receive_exactly_equal_attention(patches, heads):
    keys = torch.ones(1, 1 + patches, heads, 4)
    got = ask("cls", torch.randn_like(keys), keys, make_tokens((1 + patches,)), torch.rand(heads))[1:]
    assert torch.equal(got, got[:1].expand_as(got))


@pytest.mark.parametrize(
    ("blocks", "expected"), [(1, [1.0]), (2, [0.5, 0.5]), (3, [0.25, 0.25, 0.5]), (4, [0.125, 0.125, 0.25, 0.5])]
)
def test_blocks_weigh_as_in_a_running_mean_and_their_heads_alike(blocks, expected):
    shares = head_shares(blocks, 3)
    assert torch.equal(shares, torch.tensor(expected).repeat_interleave(3) / 3)
    attention, running = torch.rand(blocks, 7), None
    for latest in attention:
        running = latest if running is None else (running + latest) / 2
    mean = shares @ attention.repeat_interleave(3, 0)
    torch.testing.assert_close(mean, running, rtol=0, atol=1e-6)  # float32, sums of up to 12
