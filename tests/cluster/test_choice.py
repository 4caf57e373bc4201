"""Tokens to text, one choice: where stop strings and stop tokens end it, and from where on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvmesh.cluster.ingress.choice import ChoiceFinish, RunningChoice
from kvmesh.cluster.ingress.validate import ResumedChoice
from kvmesh.workers.request import EndReason, SequenceDelta
from kvmesh.workers.sampling_params import SamplingParams
from tests.cluster.machine import LetterCodec, text_of

CODEC = LetterCodec()
ABCD = CODEC.encode("abcd").tolist()


def choice(stops: tuple[str, ...] = (), resumed: int = 0, **params: object) -> RunningChoice:
    """Of which the client has the first `resumed` tokens, and the text before the last."""
    settings = SamplingParams(max_tokens=20, **params)  # type: ignore[arg-type]
    had = (
        ResumedChoice(tuple(ABCD[:resumed]), text_chars=resumed - 1) if resumed else ResumedChoice()
    )
    return RunningChoice(0, settings, stops, CODEC, had)


def accepted(made: RunningChoice, tokens: list[int], pieces: int) -> str:
    """The text of these tokens, that come in deltas of `pieces` tokens, up to the end."""
    text = ""
    for start in range(0, len(tokens), pieces):
        if made.finish is None:
            text += made.accept([SequenceDelta("r", tuple(tokens[start : start + pieces]))]).text
    return text


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize(
    ("min_tokens", "text", "tokens"),
    [
        (0, "a", 2),
        (1, "a", 2),
        (2, "a", 2),  # complete with the token that is the second
        (3, "abcd", 4),  # complete before it may end the output
    ],
)
def test_a_stop_string_ends_a_choice_from_min_tokens_on(
    min_tokens: int, text: str, tokens: int, pieces: int
) -> None:
    made = choice(("b",), min_tokens=min_tokens)
    found = accepted(made, ABCD, pieces)
    assert found == text
    assert len(made.token_ids) == tokens
    stopped = ChoiceFinish(EndReason.STOP, stop_string="b")
    assert made.finish == (stopped if tokens == 2 else None)


@pytest.mark.parametrize(("min_tokens", "ends"), [(0, True), (2, True), (3, False)])
def test_a_resumed_choice_ends_at_its_stop_token_from_min_tokens_on(
    min_tokens: int, ends: bool
) -> None:
    made = choice(resumed=2, min_tokens=min_tokens, stop_token_ids=(ABCD[1],))
    stopped = ChoiceFinish(EndReason.STOP, stop_token_id=ABCD[1])
    assert made.finish == (stopped if ends else None)


class HoldingStream:
    """Holds back the latest character, as a decoder does until it is complete."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, ids: Sequence[int]) -> str:
        text = self._held + text_of(ids)
        self._held = text[-1:]
        return text[:-1]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class HoldingCodec(LetterCodec):
    def stream(self) -> HoldingStream:  # type: ignore[override]
        return HoldingStream()


@pytest.mark.parametrize("replayed", range(4))
def test_nothing_follows_a_stop_string(replayed: int) -> None:
    """Whether it is found in a replay or not, and whatever the decoder holds back."""
    had = ResumedChoice(tuple(ABCD[:replayed]))
    settings = SamplingParams(max_tokens=20)
    made = RunningChoice(0, settings, ("b",), HoldingCodec(), had)
    text = made.owed().text
    for token in ABCD[replayed:]:
        text += made.accept([SequenceDelta("r", (token,))]).text
    assert text == "a"
    assert made.finish == ChoiceFinish(EndReason.STOP, stop_string="b")
    assert made.token_ids == ABCD[:3], "the decoder gives b with the token that follows"


@pytest.mark.parametrize("reason", [EndReason.LENGTH, EndReason.DEADLINE])
@pytest.mark.parametrize("stops", [(), ("x", "d!")])
def test_at_the_end_nothing_is_held_back(reason: EndReason, stops: tuple[str, ...]) -> None:
    made = RunningChoice(0, SamplingParams(max_tokens=4), stops, HoldingCodec(), ResumedChoice())
    text = made.accept([SequenceDelta("r", tuple(ABCD))]).text
    if reason is EndReason.LENGTH:
        text += made.accept([SequenceDelta("r", (), finish_reason=reason)]).text
    else:
        text += made.end(reason).text
    assert text == "abcd"
    assert made.finish == ChoiceFinish(reason)
    assert made.token_ids == ABCD
    again = RunningChoice(
        0, SamplingParams(max_tokens=4), stops, HoldingCodec(), ResumedChoice(tuple(ABCD), 1)
    )
    assert again.owed().text == "bcd"
    assert again.owed().text == "", "it is owed once"
    assert again.finish == ChoiceFinish(EndReason.LENGTH)
