"""Thresholds as they are typed; the rest of the command line is tested with what it does, in test_cli."""

import pytest

from iret.arguments import read_thresholds


@pytest.mark.parametrize(
    ("words", "thresholds"),
    [
        (["1"], 1.0),
        (["0.5", "1.5"], (0.5, 1.5)),
        (["1.0", "1.2:1.5"], (1.0, (1.2, 1.5))),
        (["0.7:1.1", "0.8:1.3"], ((0.7, 1.1), (0.8, 1.3))),
        (["1.0:1.5"], ((1.0, 1.5),)),
        (["-1"], -1.0),  # refused later, by the model
    ],
)
def test_words_become_thresholds(words, thresholds):
    assert read_thresholds(words) == thresholds


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("high", "threshold 'high' is not a number or keep:refine, e.g. 1.0 or 1.2:1.5"),
        ("1:", "threshold '1:' is not a number"),
        ("1,5", "threshold '1,5' is not a number"),
        ("1:2:3", "threshold '1:2:3' has 3 parts; write keep or keep:refine"),
    ],
)
def test_a_word_that_is_no_threshold_is_named(word, message):
    with pytest.raises(ValueError, match=message):
        read_thresholds(["1.0", word])
