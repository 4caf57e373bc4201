"""When reasoning that has had its tokens is ended."""

from __future__ import annotations

import pytest

from kvmesh.workers.constraint import Reasoning
from kvmesh.workers.structured.state import MAX_CHARACTER_TOKENS, ReasoningBudget

TOKENS = [b"<t>", b"</", b"t>", b"a", b"\n", b"\xf0", b"\x9f", b"\x98", b"\x80"]
START, END, TEXT, NEWLINE, SMILE = 0, [1, 2], 3, 4, [5, 6, 7, 8]


def budget(max_tokens: int | None, *, started: bool = True) -> ReasoningBudget:
    reasoning = Reasoning("<t>", "</t>", started=started, max_tokens=max_tokens)
    return ReasoningBudget(reasoning, TOKENS, END)


def accept(budget: ReasoningBudget, *tokens: int) -> list[int | None]:
    """What is forced after each of them."""
    forced = []
    for token in tokens:
        budget.accept(token)
        forced.append(budget.forced)
    return forced


def test_the_end_is_forced_token_by_token_and_then_anything_may_come() -> None:
    forced = accept(budget(2), TEXT, TEXT, *END, TEXT, TEXT, TEXT)
    assert forced == [None, END[0], END[1], None, None, None, None]
    assert budget(0).forced == END[0]
    assert accept(budget(None), *[TEXT] * 50) == [None] * 50


def test_tokens_count_from_the_start_marker_on() -> None:
    forced = accept(budget(1, started=False), NEWLINE, START, TEXT)
    assert forced == [None, None, END[0]]
    assert accept(budget(0, started=False), TEXT, START, TEXT) == [None] * 3, "it is an answer"


def test_reasoning_that_ends_by_itself_is_not_ended_again() -> None:
    assert accept(budget(3), TEXT, *END, TEXT, TEXT) == [None] * 5


def test_a_character_is_completed_first() -> None:
    assert accept(budget(1), *SMILE) == [None, None, None, END[0]]


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_what_never_becomes_a_character_is_not_waited_for(max_tokens: int) -> None:
    forced = accept(budget(max_tokens), *SMILE[:1] * (max_tokens + MAX_CHARACTER_TOKENS))
    assert forced == [None] * (max_tokens + MAX_CHARACTER_TOKENS - 1) + [END[0]]
