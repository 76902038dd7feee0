"""The record of a run: who answered where, what each stage saw, NaN and False where nothing ran."""

import numpy as np
import pytest
import torch
from torch import Tensor

from iret.output import Output, Record
from iret.runtime.choice import Layout
from iret.runtime.cost import Shape, full_macs, macs

# Two stages on a grid of 2 x 3 patches of 4 px.
SHAPE = Shape(img_size=(8, 12), patch_size=4, in_chans=1, num_classes=2, embed_dims=(8, 8), depths=(1, 1), head_dim=8)
Passed = tuple[Layout, np.ndarray | None]
EVERYONE: Passed = (Layout.whole(3, 6), None)


def passed(images: list[int], kept: list[list[int]], refined: list[list[int]] | None = None) -> Passed:
    """Images with tokens of these of the six cells, and those of them that were refined; None: all."""
    cells = [[-1, *np.flatnonzero(row)] for row in kept]
    starts = np.concatenate([[0], np.cumsum([len(each) for each in cells])])
    here = Layout(np.concatenate(cells).astype(int), starts, np.array(images))
    if refined is None:
        return here, None
    marks = [[False, *(bool(row[cell]) for cell in each[1:])] for each, row in zip(cells, refined, strict=True)]
    return here, np.concatenate(marks)


def record(*stages: tuple[Passed, Tensor], scored: bool) -> Output:
    book = Record(SHAPE, 3, torch.device("cpu"))
    for stage, (what, answers) in enumerate(stages):
        book.add(stage, *what, answers)
    return book.finish(scored)


def test_without_a_choice_every_patch_is_kept_and_refined_but_for_the_first_stage():
    answers = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    out = record((EVERYONE, answers), (EVERYONE, -answers), scored=False)
    assert out.trace.kept.shape == out.trace.refined.shape == (2, 3, 2, 3)
    assert out.trace.kept.all()
    assert "kept" not in repr(out), "it would fill pages"
    assert not out.trace.refined[0].any()
    assert out.trace.refined[1].all()
    assert torch.equal(out.logits, -answers)
    assert torch.equal(out.trace.stage_logits, torch.stack([answers, -answers]))
    assert out.macs.tolist() == [full_macs(SHAPE) + 8 * 2] * 3  # the first stage's head answered too


def test_importance_stands_where_it_was_seen_and_is_no_number_elsewhere():
    book, (left, _) = Record(SHAPE, 3, torch.device("cpu")), passed([1], [[0, 1, 0, 0, 0, 1]])
    book.add(0, *EVERYONE, torch.zeros(3, 2))
    book.see(0, left, np.array([7.0, 0.5, 1.5]), np.ones((1, 1, 2)))  # the class token's means nothing
    seen = book.finish(scored=True).trace.importance
    assert seen.dtype == torch.float32
    assert seen.shape == (1, 3, 2, 3)
    assert seen[0, 1, 0, 1] == 0.5
    assert seen[0, 1, 1, 2] == 1.5
    assert seen.isfinite().sum() == 2


def test_images_that_left_keep_their_answer_and_the_others_get_a_later_one():
    first = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    second = torch.tensor([[7.0, 8.0], [9.0, 0.0]])
    went_on = passed([0, 2], [[1, 1, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0]], [[0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]])
    out = record((EVERYONE, first), (went_on, second), scored=True)
    assert out.trace.exit_stage.tolist() == [1, 0, 1]
    assert out.logits.tolist() == [[7.0, 8.0], [3.0, 4.0], [9.0, 0.0]]
    assert out.trace.stage_logits[1].isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert out.trace.kept[1].int().tolist() == [[[1, 1, 0], [0, 0, 1]], [[0, 0, 0]] * 2, [[0, 0, 0], [1, 0, 0]]]
    assert out.trace.refined[1].int().tolist() == [[[0, 1, 0], [0, 0, 0]], [[0, 0, 0]] * 2, [[0, 0, 0], [1, 0, 0]]]
    spent = macs(SHAPE, [[6, 6, 6], [3, 0, 1]], [[0, 0, 0], [1, 0, 1]], scored=True, stages_run=[2, 1, 2])
    assert out.macs.tolist() == spent.tolist()
    assert out.macs[1] < out.macs[2] < out.macs[0]


def test_a_stage_that_nobody_reached_is_there_and_empty():
    answers = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    out = record((EVERYONE, answers), scored=False)
    assert out.trace.stage_logits.shape == (2, 3, 2)
    assert out.trace.stage_logits[1].isnan().all()
    assert not out.trace.kept[1].any()
    assert not out.trace.refined[1].any()
    assert torch.equal(out.logits, answers)


@pytest.mark.parametrize("scored", [False, True])
def test_what_choosing_costs_is_counted_once_tokens_were_chosen(scored):
    answers = torch.zeros(3, 2)
    out = record((EVERYONE, answers), (EVERYONE, answers), scored=scored)
    # A row of attention over 6 patches of 8 channels; the first head's own MLP of a class token.
    scoring = 6 * 8 + 8 * 8 * 8
    assert out.macs.tolist() == [full_macs(SHAPE) + 8 * 2 + scoring * scored] * 3


def test_gradients_go_to_the_answers_that_were_given():
    first, second = torch.zeros(3, 2, requires_grad=True), torch.zeros(1, 2, requires_grad=True)
    record((EVERYONE, first), (passed([1], [[1] * 6]), second), scored=True).logits.sum().backward()
    assert first.grad.tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    assert second.grad.tolist() == [[1.0, 1.0]]
