"""Settings of a request: what is taken, what is refused and how."""

import pytest

from iret.serve.asks import Ask, make_ask, merge, read_settings
from iret.serve.refusal import Refusal


def test_text_and_json_say_the_same():
    values = {"budget": 0.4, "exit_confidence": 1, "deadline_ms": 20.5, "top": 3, "trace": True}
    words = {"budget": "0.4", "exit_confidence": "1", "deadline_ms": "20.5", "top": "3", "trace": "true"}
    ask = Ask(budget=0.4, exit_confidence=1.0, deadline_ms=20.5, top=3, trace=True)
    assert make_ask(read_settings(values, is_text=False)) == make_ask(read_settings(words, is_text=True)) == ask


def test_an_empty_battery_is_a_setting_and_a_budget_of_nothing_is_none():
    assert read_settings({"battery_percent": 0}, is_text=False) == {"battery_percent": 0}
    with pytest.raises(Refusal, match="budget=0 is not a number in"):
        read_settings({"budget": 0}, is_text=False)


@pytest.mark.parametrize(
    ("raw", "is_text", "sentence"),
    [
        ({"budget": "0.4"}, False, "budget='0.4' is not a number in (0, 1]"),
        ({"budget": 0.4}, True, "budget=0.4"),
        ({"budget": True}, False, "budget=True"),
        ({"budget": None}, False, "budget=None"),
        ({"budget": "nan"}, True, "budget='nan'"),
        ({"budget": float("inf")}, False, "budget=inf"),
        ({"budget": 10**400}, False, "budget=1000"),
        ({"budget": [0.4]}, False, "budget=[0.4]"),
        ({"deadline_ms": -1}, False, "deadline_ms=-1"),
        ({"top": 0}, False, "top=0 is not a whole number"),
        ({"top": 1.5}, False, "top=1.5"),
        ({"trace": "yes"}, True, "neither true nor false"),
        ({"trace": 1}, False, "neither true nor false"),
        ({"bugdet": 0.4}, False, "'bugdet' is no setting; choose from budget"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(raw, is_text, sentence):
    with pytest.raises(Refusal) as caught:
        read_settings(raw, is_text=is_text)
    assert sentence in str(caught.value)
    assert caught.value.status == 422
    assert len(str(caught.value)) < 200


def test_settings_that_contradict_are_refused():
    with pytest.raises(Refusal, match="budget and ms were given"):
        make_ask({"budget": 0.4, "ms": 3.0})
    with pytest.raises(Refusal, match="give battery_percent with it"):
        make_ask({"hours_left": 3.0})
    with pytest.raises(Refusal, match="budget was given in the query and in the body"):
        merge({"budget": 0.4}, {"budget": 0.4, "top": 1})
