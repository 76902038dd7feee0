"""The lone image's shorter way, and the cut of packed tokens. Rules and importance: tests/test_selection.py, through torch."""

import numpy as np
import pytest

from iret.runtime.choice import Choice, Layout, choose, cut, to_importance, to_starts
from iret.runtime.keep import RULES


def draw_layout(draw: np.random.Generator, images: int, cells: int = 12) -> Layout:
    """Images that lost some of their cells."""
    kept = [np.flatnonzero(draw.random(cells) < 0.7) for _ in range(images)]
    cell = np.concatenate([np.concatenate([[-1], each]) for each in kept])
    return Layout(cell, to_starts(np.array([1 + len(each) for each in kept])), np.arange(images))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(10))
def test_an_image_goes_the_same_way_alone_and_in_a_batch(rule, seed):
    """Importance, choice, what is refined and what is cut: the last with rows of numbers in place of tokens."""
    draw = np.random.default_rng(seed)
    here = draw_layout(draw, 3)
    received, x = draw.uniform(0, 1, len(here.cell_T)).astype(np.float32), draw.random((len(here.cell_T), 2))
    strengths = np.sort(draw.uniform(0, 1.5 if rule == "threshold" else 0.99, (3, 2)), axis=1)
    strengths[0, 1] = strengths[0, 0]  # this one refines all that it keeps
    importance = to_importance(received, here)
    choice = choose(importance, here, strengths, rule, 2)
    rest, after, refined = cut(x, here, choice)
    for image in range(3):
        own, rows = here.take(np.arange(3) == image)
        alone = to_importance(received[rows], own)
        np.testing.assert_allclose(alone[1:], importance[rows][1:], rtol=1e-12)
        chosen = choose(alone, own, strengths[[image]], rule, 2)
        tokens, left, read = cut(x[rows], own, chosen)
        there = slice(after.starts[image], after.starts[image + 1])
        assert left.cell_T.tolist() == after.cell_T[there].tolist()
        assert (left.starts[-1], left.images.tolist()) == (len(tokens), [image])
        assert np.array_equal(tokens, rest[there])
        assert (left.cell_T[1:] >= 0 if read is None else read[1:]).tolist() == refined[there][1:].tolist()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_at_the_floor_an_image_alone_keeps_what_it_keeps_in_a_batch(ties, seed):
    draw = np.random.default_rng(seed)
    importance, strengths = draw.uniform(0, 2, 1 + 9), np.sort(draw.uniform(1, 3, (1, 2)))
    if ties:  # at the floor's edge, most often
        importance = importance.round()
    if seed % 4 == 0:
        importance[draw.permutation(9)[:6] + 1] = -np.inf  # masked: three live, fewer than the floor
    if seed % 5 == 0:
        strengths[0, 1] = strengths[0, 0]
    alone = choose(importance, Layout.whole(1, 9), strengths, "threshold", 4)
    twice = choose(np.tile(importance, 2), Layout.whole(2, 9), strengths.repeat(2, axis=0), "threshold", 4)
    assert np.array_equal(alone.kept_T, twice.kept_T[:10])
    assert (alone.refined_T is None) == (twice.refined_T is None)
    if alone.refined_T is not None:
        assert np.array_equal(alone.refined_T, twice.refined_T[:10])
    assert alone.kept_T[1:].sum() >= min(4, np.isfinite(importance[1:]).sum())


@pytest.mark.parametrize("cells", [3, 4])
def test_an_image_of_no_more_patches_than_the_floor_keeps_them_all(cells):
    importance = np.arange(1.0 + cells)
    assert choose(importance, Layout.whole(1, cells), np.full((1, 2), 99.0), "threshold", 4).kept_T.all()


def test_a_cut_keeps_class_tokens_order_and_owners():
    here = Layout(np.array([-1, 1, 4, 5, -1, 0, 2]), np.array([0, 4, 7]), np.array([3, 8]))
    kept = np.array([True, False, True, True, True, True, False])
    again = np.array([False, False, False, True, False, True, False])
    x, after, refined = cut(np.arange(7.0)[:, None], here, Choice(kept, again))
    assert x.ravel().tolist() == [0, 2, 3, 4, 5]
    assert after.cell_T.tolist() == [-1, 4, 5, -1, 0]
    assert after.starts.tolist() == [0, 3, 5]
    assert after.image_T().tolist() == [3, 3, 3, 8, 8]
    assert refined.tolist() == [False, False, True, False, True]
    assert cut(x, after, Choice(np.ones(5, bool), None))[2] is None


@pytest.mark.parametrize("images", [1, 2])
def test_what_a_class_token_receives_means_nothing(images):
    here = Layout.whole(images, 4)
    received = np.tile(np.array([0.0, 3.0, 1.0, 2.0, 2.0], np.float32), images)
    loud = received.copy()
    loud[here.starts[:-1]] = 1e6
    for each in (received, loud):
        importance = to_importance(each, here)
        assert importance.reshape(images, 5)[:, 1:].tolist() == [[1.5, 0.5, 1.0, 1.0]] * images
        assert choose(importance, here, np.full((images, 2), 1.2), "threshold", 1).kept_T.sum() == 2 * images
    assert received[1] == 3.0  # what came in was not written to


def test_images_that_are_taken_keep_their_numbers_and_their_masks():
    live = np.array([True, True, False, True, False, True])
    here = Layout(np.array([-1, 0, 1, -1, 0, 1]), np.array([0, 3, 6]), np.array([4, 7]), live)
    own, rows = here.take(np.array([False, True]))
    assert rows.tolist() == [3, 4, 5]
    assert (own.images.tolist(), own.starts.tolist()) == ([7], [0, 3])
    assert own.live_T.tolist() == [True, False, True]


def test_a_whole_layout_numbers_every_cell_of_every_image():
    here = Layout.whole(2, 3)
    assert here.cell_T.tolist() == [-1, 0, 1, 2, -1, 0, 1, 2]
    assert (here.starts.tolist(), here.counts.tolist(), here.is_one) == ([0, 4, 8], [4, 4], False)
    assert Layout.whole(1, 3).is_one


@pytest.mark.parametrize("rule", RULES)
def test_an_image_that_has_no_patch_left_keeps_its_class_token_alone(rule):
    here = Layout(np.array([-1, 0, 1, 2, -1]), np.array([0, 4, 5]), np.arange(2))
    importance = np.array([0.0, 2.0, 0.5, 0.5, 0.0])
    strength = 1.5 if rule == "threshold" else 0.6
    kept = choose(importance, here, np.full((2, 2), strength), rule, 1).kept_T
    assert kept[[0, 4]].all() and kept[1] and not kept[3]
