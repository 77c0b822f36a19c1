"""Prompt lookup: the latest earlier occurrence of the longest run of newest tokens, and what followed it."""

from __future__ import annotations

from hypothesis import example, given, strategies as st

from medusa_deploy.runtime.drafting.lookup import DEEPEST, LONGEST_MATCH, RATES, PromptLookup

_texts = st.lists(st.integers(0, 3), max_size=40)


def searched(tokens: list[int], depth: int) -> list[tuple[int, float]]:
    """The definition, by looking through the whole text."""
    for match in range(LONGEST_MATCH, 0, -1):
        for start in range(len(tokens) - 1, match - 1, -1):
            if len(tokens) > match and tokens[start - match : start] == tokens[len(tokens) - match :]:
                going_on = list(tokens)
                for step in range(depth):
                    going_on.append(going_on[start + step])
                return list(zip(going_on[len(tokens) :], RATES[match - 1], strict=False))
    return []


@example([1, 2, 1, 2], [[1, 2]], 4)
@given(_texts, st.lists(_texts, max_size=5), st.integers(1, DEEPEST))
def test_it_finds_what_a_search_through_the_text_finds(text: list[int], more: list[list[int]], depth: int) -> None:
    tokens = list(text)
    lookup = PromptLookup(tokens)
    assert lookup.continuation(depth) == searched(tokens, depth)
    for added in more:
        tokens += added
        assert lookup.continuation(depth) == searched(tokens, depth)


def test_a_text_that_repeats_itself_goes_on_repeating() -> None:
    assert [token for token, _ in PromptLookup([7, 1, 2, 3, 1, 2, 3, 1]).continuation(4)] == [2, 3, 1, 2]


def test_nothing_follows_a_token_that_is_new() -> None:
    assert PromptLookup([]).continuation(4) == PromptLookup([1]).continuation(4) == PromptLookup([1, 2, 3]).continuation(4) == []


def test_rates_fall_along_a_continuation_and_rise_with_the_match() -> None:
    assert len(RATES) == LONGEST_MATCH and {len(row) for row in RATES} == {DEEPEST}
    assert all(list(row) == sorted(row, reverse=True) for row in RATES)
    assert all(list(column) == sorted(column) for column in zip(*RATES, strict=True))
