"""A stop checker releases certain text. Pieces give the same text as the whole."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, strategies as st

from medusa_deploy.runtime.errors import UsageError
from medusa_deploy.runtime.text.stops import StopChecker

TEXT = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: list[str], include_stop: bool) -> tuple[str, bool]:
    """Applies the definition: the shortest prefix that ends with a stop string, cut by the longest one it ends with."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end if include_stop else end - max(map(len, found))], True
    return text, False


@given(TEXT, STOPS, st.booleans(), st.lists(st.integers(0, 30), max_size=8))
def test_pieces_give_the_same_as_the_definition(text: str, stops: list[str], include_stop: bool, borders: list[int]) -> None:
    checker = StopChecker(stops, include_stop)
    edges = [0, *sorted(borders), len(text)]
    out = "".join(checker.push(text[start:end]) for start, end in itertools.pairwise(edges))
    out += checker.flush()
    assert (out, checker.stopped) == cut(text, stops, include_stop)
    if checker.stopped:
        assert checker.push("more") == "" and checker.flush() == ""


@given(TEXT, STOPS)
def test_only_what_could_begin_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    checker = StopChecker(stops)
    released = "".join(checker.push(character) for character in text)
    if checker.stopped:
        return
    held = text[len(released) :]
    assert text == released + held
    if held:
        assert any(stop.startswith(held) and stop != held for stop in stops)
    longer = [text[start:] for start in range(len(released))]
    assert not any(stop.startswith(suffix) for stop in stops for suffix in longer)


def test_a_stop_may_span_pieces() -> None:
    checker = StopChecker(["\n\nUser:"])
    assert [checker.push(piece) for piece in ("Hi", "!\n", "\nUs", "er", ": x")] == ["Hi", "!", "", "", ""]
    assert checker.stopped and checker.flush() == ""


def test_what_was_held_back_comes_out_when_it_is_no_stop() -> None:
    checker = StopChecker(["END"])
    assert checker.push("the EN") == "the "
    assert checker.push("EMY") == "ENEMY"
    assert checker.push(" E") == " "
    assert checker.flush() == "E" and checker.flush() == ""


def test_the_first_stop_to_be_complete_wins_and_of_two_at_once_the_longer() -> None:
    assert StopChecker(["bcd", "abcde"]).push("xabcde") == "xa"
    assert StopChecker(["c", "bc"]).push("abc") == "a"
    assert StopChecker(["c", "bc"], include_stop=True).push("abcd") == "abc"


def test_a_hidden_literal_is_found_and_not_shown() -> None:
    checker = StopChecker(["\n<end>", "xyz"])
    assert checker.push("a") + checker.push("<end>", hidden=True) + checker.push("b\n") == "ab"
    assert checker.push("<end>", hidden=True) + checker.push("more") + checker.flush() == "" and checker.stopped
    kept = StopChecker(["<end>"], include_stop=True)
    assert kept.push("a") + kept.push("<end>", hidden=True) == "a<end>"


@pytest.mark.parametrize("stops", ["END", [""], ["a", ""], [1], ["\ud83d"]], ids=ascii)
def test_a_stop_that_is_no_string_or_empty_is_refused(stops: object) -> None:
    with pytest.raises(UsageError):
        StopChecker(stops)  # type: ignore[arg-type]
