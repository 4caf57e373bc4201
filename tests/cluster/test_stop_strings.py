"""Stop strings in text that arrives in pieces, compared with a search in the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.cluster.ingress.stop_strings import StopStrings
from tests.exercised import Exercised


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The first stop string to be complete in `text`; of those, the one that begins first."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            found = max(complete, key=len)
            return text[: end - len(found)], found
    return text, None


def fed(pieces: list[str], stops: list[str]) -> tuple[list[str], str | None]:
    """The text emitted for each piece and at the end, and the stop string that ended it."""
    search = StopStrings(stops)
    emitted = []
    for piece in pieces:
        final, matched = search.push(piece)
        emitted.append(final)
        if matched is not None:
            assert search.flush() == ""
            return emitted, matched
    return [*emitted, search.flush()], None


SEEN = Exercised(
    "stop strings",
    {"matches": 100, "matches over several pieces": 30, "texts without a match": 50},
)
HELD = Exercised("held back text", {"pieces with text held back": 30})
ALIKE = Exercised(
    "pieces and characters", {"pieces of several characters": 100, "matches within a piece": 8}
)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)
pieces = st.lists(st.text("ab", max_size=4), max_size=10)


@SEEN.required
@settings(max_examples=500, deadline=None)
@given(pieces=pieces, stops=stop_lists)
def test_any_split_gives_the_result_of_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    emitted, matched = fed(pieces, stops)
    SEEN.add("matches", matched is not None)
    SEEN.add("matches over several pieces", matched is not None and matched not in pieces)
    SEEN.add("texts without a match", matched is None)
    assert ("".join(emitted), matched) == reference("".join(pieces), stops)


@ALIKE.required
@settings(max_examples=300, deadline=None)
@given(pieces=pieces, stops=stop_lists)
def test_the_emitted_text_depends_only_on_the_text_received(
    pieces: list[str], stops: list[str]
) -> None:
    """Otherwise a resumed stream could not be replayed."""
    search, by_character = StopStrings(stops), StopStrings(stops)
    together = apart = ""
    for piece in pieces:
        final, matched = search.push(piece)
        together += final
        ALIKE.add("pieces of several characters", len(piece) > 1)
        ALIKE.add("matches within a piece", matched is not None and not piece.endswith(matched))
        ended = None
        for character in piece:
            if ended is None:
                final, ended = by_character.push(character)
                apart += final
        assert (together, matched) == (apart, ended)
        if matched is not None:
            return


@HELD.required
@settings(max_examples=300, deadline=None)
@given(pieces=pieces, stops=stop_lists)
def test_no_more_is_held_back_than_could_become_a_stop_string(
    pieces: list[str], stops: list[str]
) -> None:
    search = StopStrings(stops)
    seen = emitted = ""
    for piece in pieces:
        final, matched = search.push(piece)
        seen, emitted = seen + piece, emitted + final
        if matched is not None:
            return
        held = seen[len(emitted) :]
        HELD.add("pieces with text held back", bool(held))
        assert emitted + held == seen
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_text_that_could_begin_a_stop_string_is_held_back() -> None:
    search = StopStrings(["\n\nQ:"])
    assert search.push("Answer.\n") == ("Answer.", None)
    assert search.push("\n") == ("", None)
    assert search.push("B") == ("\n\nB", None)
    assert search.push("\n\nQ") == ("", None)
    assert search.push(": more") == ("", "\n\nQ:")


def test_text_held_back_is_emitted_at_the_end() -> None:
    search = StopStrings(["END"])
    assert search.push("the EN") == ("the ", None)
    assert search.flush() == "EN"
    assert search.flush() == ""


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["ab", "b"], "xab", ("x", "ab")),  # complete together: the one that begins first
        (["abcd", "bc"], "xabcd", ("xa", "bc")),  # the one that is complete first
        (["aab"], "aaab", ("a", "aab")),  # a stop string may begin within a false start
        (["aa", "aa"], "baa", ("b", "aa")),
        (["é"], "cafe\u0301 café", ("cafe\u0301 caf", "é")),  # code points, not appearance
        (["🙂🙂"], "🙂x🙂🙂", ("🙂x", "🙂🙂")),
        ([], "anything", ("anything", None)),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 100])
def test_overlapping_stop_strings(
    stops: list[str], text: str, expected: tuple[str, str | None], size: int
) -> None:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    emitted, matched = fed(pieces, stops)
    SEEN.add("matches", matched is not None)
    SEEN.add("matches over several pieces", matched is not None and matched not in pieces)
    SEEN.add("texts without a match", matched is None)
    assert ("".join(emitted), matched) == expected


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stops"):
        StopStrings(["a", ""])
