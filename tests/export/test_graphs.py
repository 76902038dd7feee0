"""The dense graphs that are exported, run by torch itself under a session: the model's answers, with no engine in between."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from iret.export.blocks import PointwiseConvolution
from iret.export.bundle import _jobs  # what is traced, without the tracing
from iret.export.form import PLAIN, Form
from iret.export.parity import TIE, Parity, compare
from iret.model import Iret
from iret.runtime.cost import LIFTINGS
from iret.runtime.session import Session
from models import make_model, write_bundle


def torch_session(model: Iret, folder: Path, form: Form = PLAIN, **options) -> Session:
    """A session whose "engine" is torch on the graphs that would be exported."""
    model = copy.deepcopy(model)  # as a file would be
    load = write_bundle(model, folder, form)
    return Session(folder, load=load, **options)


def make_images(model: Iret, batch: int = 6, seed: int = 1) -> torch.Tensor:
    size = (batch, model.shape.in_chans, *model.shape.img_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options",
    [
        *({"lifting": lifting} for lifting in LIFTINGS),
        {"importance": "column"},
        {"in_chans": 1},
        {"depths": (1, 2), "embed_dims": (16, 32)},
        {"depths": (3, 3, 1), "scored_blocks": 3},  # in whose running mean the last counts more
    ],
    ids=str,
)
def test_a_session_keeps_the_model_s_patches_and_gives_its_answers(tmp_path, options):
    model = make_model(**options)
    parity = compare(model, torch_session(model, tmp_path), make_images(model), batches=(1, 6))
    assert parity.problem is None
    assert parity.compared == 2 * 6 * 5
    assert parity.agree == parity.compared
    assert 0 < parity.logit_error < 2e-5  # 0 would mean that the model was compared with itself


def count_convolutions(graph: torch.nn.Module) -> int:
    return sum(isinstance(each, PointwiseConvolution) for each in graph.modules())


@pytest.mark.parametrize("embed_dims", [(16, 256), (256, 256)], ids=str)
def test_convolutions_stand_for_the_layers_of_wide_stages_and_answer_the_same(tmp_path, embed_dims):
    model, form = make_model(depths=(1, 2), embed_dims=embed_dims), Form(convolutions=True)
    found = [count_convolutions(job.graph) for job in _jobs(model, "onnx", form)]
    rest = 2 if embed_dims[0] == 256 else 0  # of the first stage, which its head needs, and the tokens in the next
    assert found == [3 * rest, rest + 6 * 2]
    [single] = _jobs(model, "onnx", Form(convolutions=True, single_graph=True))
    stages = (single.graph.first, *single.graph.later)
    assert count_convolutions(single.graph) - sum(count_convolutions(each.rest) for each in stages) == sum(found) - rest
    parity = compare(model, torch_session(model, tmp_path, form), make_images(model), batches=(1, 6))
    assert parity.problem is None
    assert parity.agree == parity.compared == 2 * 6 * 5


@pytest.mark.parametrize("importance", ["cls", "column"])
def test_padding_behind_a_key_mask_changes_nothing(tmp_path, importance):
    model = make_model(importance=importance)
    later = _jobs(model, "onnx", PLAIN)[1].graph
    generator = torch.Generator().manual_seed(0)
    x, pixels = torch.randn(9, 1, 16, generator=generator), torch.randn(4, 3, 8, 8, generator=generator)
    pixels[0] = 0
    cell, source = torch.arange(-1, 8)[:, None], torch.tensor([0, 1, 0, 2, 0, 0, 3, 0, 0])[:, None]
    with torch.no_grad():
        alone = later(x[:7], cell[:7], pixels, source[:7], torch.zeros(1, 7))
        padded = later(x, cell, pixels, source, torch.tensor([[0.0] * 7 + [-1e9] * 2]))
    torch.testing.assert_close(padded[0][:7], alone[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(padded[1][:, :7], alone[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(padded[2], alone[2], rtol=0, atol=1e-5)
    assert not padded[1][:, 7:].any()


def test_graphs_of_fixed_counts_answer_the_same(tmp_path):
    model = make_model()
    parity = compare(model, torch_session(model, tmp_path, Form(buckets=(5, 8))), make_images(model), batches=(1, 6))
    assert parity.problem is None
    assert parity.split == 0


def test_the_single_graph_drops_at_its_own_thresholds(tmp_path):
    model = make_model()
    session = torch_session(model, tmp_path, Form(single_graph=True))
    parity = compare(model, session, make_images(model), batches=(1, 6))
    assert parity.problem is None
    images = make_images(model, 1).numpy()
    half = np.median(session(images, thresholds=0.01).trace.importance[0])
    counts = [session(images, thresholds=at).trace.kept.sum((1, 2, 3))[1] for at in (0.0, float(half), 9.0)]
    assert counts == [12, 6, 4]  # 4 is the floor


def test_images_leave_where_the_model_s_do(tmp_path):
    model = make_model()
    session, images = torch_session(model, tmp_path), make_images(model)
    with torch.no_grad():
        sure = model.run(images, 0.0).trace.stage_logits[0].softmax(1).amax(1)
    exits = np.stack([sure.double().numpy() + 1e-2 * np.array([1, -1, 1, -1, 1, -1]), np.full(6, 0.6)], axis=1)
    thresholds = ((0.6, 1.2), (0.5, 50.0))
    with torch.no_grad():
        expected = model.run(images, thresholds, torch.from_numpy(exits))
    found = session(images.numpy(), thresholds=thresholds, exit_confidence=exits)
    assert found.trace.exit_stage.tolist() == expected.trace.exit_stage.tolist()
    assert sorted(set(found.trace.exit_stage.tolist()))[0] == 0 < max(found.trace.exit_stage)
    assert (found.trace.kept == expected.trace.kept.numpy()).all()
    assert (found.trace.refined == expected.trace.refined.numpy()).all()
    assert 0 < found.trace.refined[1].sum() < found.trace.kept[1].sum()
    assert found.macs.tolist() == expected.macs.tolist()
    np.testing.assert_allclose(found.trace.stage_logits, expected.trace.stage_logits, rtol=0, atol=2e-5)
    strengths = np.tile(np.array(thresholds), (6, 1, 1))
    assert Parity().plus(expected, found, slice(0, 6), strengths, exits, "here") == Parity(
        compared=6, agree=6, logit_error=Parity().plus(expected, found, slice(0, 6), strengths, exits, "").logit_error
    )
    # an exit on the other side of its confidence is a tie where it is near, else a fault
    for gap, tied in ((1e-5, 1), (1e-2, 0)):
        near = np.full((1, 2), float(sure[0]))
        with torch.no_grad():
            expected = model.run(images[:1], 0.0, torch.from_numpy(near - gap))
        found = session(images[:1].numpy(), thresholds=0.0, exit_confidence=near + gap)
        parity = Parity().plus(expected, found, slice(0, 1), np.zeros((1, 2, 2)), near + gap, "here")
        assert (parity.tied, parity.split) == (tied, 1 - tied)


@pytest.mark.parametrize(("value", "sentence"), [(100.0, "logits differ by"), (np.nan, "logits are not finite")])
def test_every_head_is_compared_and_nothing_that_is_no_number_passes(tmp_path, value, sentence):
    model = make_model()
    session, images = torch_session(model, tmp_path), make_images(model, 1)
    with torch.no_grad():
        expected = model.run(images, 0.0)
    found = session(images.numpy())
    found.trace.stage_logits[1, 0, 0] += value
    parity = Parity().plus(expected, found, slice(0, 1), np.zeros((1, 2, 2)), None, "here")
    assert sentence in parity.problem
    found.trace.stage_logits[2, 0] = np.nan
    assert Parity().plus(expected, found, slice(0, 1), np.zeros((1, 2, 2)), None, "here").problem is not None


def test_a_difference_is_found_and_named(tmp_path):
    model = make_model()
    session = torch_session(model, tmp_path)
    with torch.no_grad():
        model.stages[2].head.bias[0] += 0.01
    parity = compare(model, session, make_images(model), batches=(1,))
    assert "logits differ by 1.0e-02" in parity.problem
    changed = make_model()
    with torch.no_grad():
        changed.stages[0].blocks[1].attn.qkv.weight[:32] *= 1.5
    assert compare(changed, session, make_images(model), batches=(1,)).split > 0


@pytest.mark.parametrize(("gap", "tied", "split"), [(0.3 * TIE, 1, 0), (30 * TIE, 0, 1)])
def test_a_tie_by_rounding_is_counted_and_another_patch_is_a_fault(tmp_path, gap, tied, split):
    model = make_model()
    session = torch_session(model, tmp_path)
    images = make_images(model, 1)
    edge = np.sort(session(images.numpy(), thresholds=0.5).trace.importance[0, 0].ravel())[6]
    found = session(images.numpy(), thresholds=(edge + gap, 0.0))
    with torch.no_grad():
        expected = model.run(images, (edge - gap, 0.0))
    assert found.trace.kept[1].sum() < expected.trace.kept[1].sum()
    parity = Parity().plus(expected, found, slice(0, 1), np.array([[[edge + gap] * 2, [0.0] * 2]]), None, "here")
    assert (parity.compared, parity.tied, parity.split) == (1, tied, split)
    assert (parity.problem is None) == bool(tied)
