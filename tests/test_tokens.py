"""The ragged batch: order, ownership, and the places its tokens take in a grid or a padded batch."""

from dataclasses import fields, replace

import torch

from iret.tokens import Tokens, pack, pad_index


def ragged() -> Tokens:
    """Two images of a 2 x 2 grid: the first kept cells 1 and 3, the second cell 0."""
    return Tokens(
        x_TD=torch.arange(5.0)[:, None],
        cell_T=torch.tensor([-1, 1, 3, -1, 0]),
        starts=torch.tensor([0, 3, 5]),
        is_even=False,
    )


def test_packing_puts_images_one_after_another_and_the_class_token_first():
    x = torch.arange(12.0).view(2, 3, 2)
    tokens = pack(x)
    assert torch.equal(tokens.x_TD, x.flatten(0, 1))
    assert tokens.cell_T.tolist() == [-1, 0, 1, -1, 0, 1]
    assert tokens.starts.tolist() == [0, 3, 6]
    assert tokens.batch_size == 2
    assert tokens.is_even


def test_each_token_knows_its_image():
    assert ragged().image_T().tolist() == [0, 0, 0, 1, 1]


def test_an_image_without_tokens_is_skipped():
    tokens = Tokens(torch.zeros(3, 1), torch.tensor([-1, -1, 0]), torch.tensor([0, 1, 1, 3]), is_even=False)
    assert tokens.image_T().tolist() == [0, 2, 2]


def test_the_width_is_the_longest_image():
    assert ragged().width == 3
    assert replace(ragged(), most=7).width == 7  # believed, so that a GPU need not be asked
    assert pack(torch.zeros(2, 3, 1)).width == 3


def test_new_values_keep_everything_else():
    tokens = replace(ragged(), size_T=torch.ones(5), most=3)
    x = torch.zeros(5, 7)
    other = tokens.with_x(x)
    assert other.x_TD is x
    for field in fields(Tokens)[1:]:
        assert getattr(other, field.name) is getattr(tokens, field.name), field.name


def test_padding_reads_token_zero_where_there_is_none():
    index, is_live = pad_index(torch.tensor([0, 3, 5, 5]), 3)
    assert is_live.tolist() == [[True, True, True], [True, True, False], [False, False, False]]
    assert index.tolist() == [[0, 1, 2], [3, 4, 0], [0, 0, 0]]


def test_padding_then_dropping_the_padding_gives_the_packed_tokens_back():
    x = torch.randn(7, 2)
    index, is_live = pad_index(torch.tensor([0, 1, 4, 7]), 4)
    assert torch.equal(x[index][is_live], x)
