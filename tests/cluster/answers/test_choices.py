"""A choice whose text has reasoning and tool calls: how it ends, and how it is resumed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvmesh.cluster.errors import ResumeMismatchError
from kvmesh.cluster.ingress import wire
from kvmesh.cluster.ingress.answers.call_ids import call_id
from kvmesh.cluster.ingress.answers.pieces import CallPiece, Pieces
from kvmesh.cluster.ingress.answers.reader import AnswerForm
from kvmesh.cluster.ingress.answers.syntaxes import SYNTAXES
from kvmesh.cluster.ingress.choice import ChoiceOutput, RunningChoice
from kvmesh.cluster.ingress.resume import ResumedChoice
from kvmesh.cluster.ingress.validate import TextRules
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.constraint import Reasoning
from kvmesh.workers.request import EndReason, SequenceDelta, TokenIds
from kvmesh.workers.sampling_params import SamplingParams
from tests.cluster.machine import LetterCodec

EOS, SPECIAL = 1, 0
ANSWER = (
    '<think>\nwell\n</think>\n\nSo:\n<tool_call>\n{"name": "f", "arguments": {"x": [1, 2]}}\n'
    '</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
)
FORM = AnswerForm(Reasoning("<think>", "</think>", started=False), SYNTAXES["hermes"], ["f", "g"])


class CharacterStream:
    def push(self, ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in ids if token not in (EOS, SPECIAL))

    def flush(self) -> str:
        return ""


class CharacterCodec(LetterCodec):
    """Tokens are Unicode's characters, except for the end of sequence and a special token."""

    def stream(  # type: ignore[override]
        self, prompt: Sequence[int] | TokenIds, skip_special_tokens: bool
    ) -> CharacterStream:
        return CharacterStream()


def running(
    resumed: ResumedChoice | None = None,
    form: AnswerForm = FORM,
    stops: Sequence[str] = (),
    **params: object,
) -> RunningChoice:
    settings = SamplingParams(max_tokens=1000, **params)  # type: ignore[arg-type]
    rules, codec = TextRules(tuple(stops)), CharacterCodec()
    return RunningChoice(0, settings, rules, codec, resumed or ResumedChoice(), (), form)


def add(total: Pieces, output: ChoiceOutput) -> None:
    total.add(Pieces(output.reasoning, output.text, list(output.calls)))


def run(choice: RunningChoice, tokens: Sequence[int]) -> Pieces:
    """What the choice emits for the tokens, each in a delta of its own, and its owed output."""
    total = Pieces()
    add(total, choice.owed())
    for token in tokens:
        if choice.finish is None:
            ends = token == EOS
            reason, matched = (EndReason.STOP, EOS) if ends else (None, None)
            delta = SequenceDelta("r", (token,), finish_reason=reason, matched_stop_token=matched)
            add(total, choice.accept([delta]))
    return total


TOKENS = [*map(ord, ANSWER), EOS]


def test_an_answer_has_all_its_parts() -> None:
    choice = running()
    found = run(choice, TOKENS)
    assert (found.reasoning, found.text) == ("well", "So:")
    assert [(c.name, c.arguments) for c in found.merged_calls()] == [
        ("f", '{"x": [1, 2]}'),
        ("g", "{}"),
    ]
    assert choice.finish is not None
    finished = wire.choice_finished(0, choice.finish)
    assert finished.finish_reason == pb.FINISH_REASON_TOOL_CALLS
    assert finished.matched_stop_token_id == EOS


def test_an_answer_that_is_cut_within_a_call_does_not_end_in_calls() -> None:
    choice = running()
    run(choice, TOKENS[:100])
    output = choice.end(EndReason.LENGTH)
    assert choice.finish is not None
    assert wire.choice_finished(0, choice.finish).finish_reason == pb.FINISH_REASON_LENGTH
    assert "{" not in output.text


def test_it_continues_from_every_token_and_whatever_of_it_was_received() -> None:
    whole = run(running(), TOKENS)
    for count in range(len(TOKENS)):
        had = run(running(), TOKENS[:count])
        calls = had.merged_calls()
        for less in (False, True):  # the latest of each may not have arrived
            resumed = ResumedChoice(
                tuple(TOKENS[:count]),
                max(len(had.text) - less, 0),
                reasoning_chars=max(len(had.reasoning) - less, 0),
                tool_arguments_chars=tuple(
                    max(len(c.arguments) - less, 0) for c in (calls[:-1] if less else calls)
                ),
            )
            rest = run(running(resumed), TOKENS[count:])
            assert had.text[: resumed.text_chars] + rest.text == whole.text
            assert had.reasoning[: resumed.reasoning_chars] + rest.reasoning == whole.reasoning
            arguments = dict.fromkeys(range(2), "")
            for index, chars in enumerate(resumed.tool_arguments_chars):
                arguments[index] = calls[index].arguments[:chars]
            named = dict.fromkeys(range(2), "")
            for piece in rest.calls:
                arguments[piece.index] += piece.arguments
                named[piece.index] += piece.name
            assert [arguments[i] for i in range(2)] == ['{"x": [1, 2]}', "{}"]
            known = len(resumed.tool_arguments_chars)
            assert [named[i] for i in range(known, 2)] == ["f", "g"][known:]
            assert not any(named[i] for i in range(known))


@pytest.mark.parametrize(
    "more",
    [
        {"text_chars": 4},
        {"reasoning_chars": 5},
        {"tool_arguments_chars": (13, 2, 0)},
        {"tool_arguments_chars": (14,)},
    ],
)
def test_who_has_more_than_the_tokens_say_is_refused(more: dict[str, object]) -> None:
    with pytest.raises(ResumeMismatchError):
        running(ResumedChoice(tuple(TOKENS[:-1]), **more))  # type: ignore[arg-type]


def test_the_first_of_calls_that_may_not_be_parallel_ends_the_choice() -> None:
    form = AnswerForm(None, SYNTAXES["hermes"], ["f", "g"], parallel=False)
    choice = running(form=form)
    found = run(choice, TOKENS)
    assert [call.name for call in found.merged_calls()] == ["f"]
    assert choice.finish is not None
    assert (choice.cut, choice.finish.in_calls) == (True, True)
    first = ANSWER[: ANSWER.index("\n</tool_call>")]
    assert "".join(map(chr, choice.token_ids)) == first, "it ends at once"


def test_a_marker_that_is_a_special_token_is_read() -> None:
    form = AnswerForm(None, SYNTAXES["mistral"], ["f"], markers={SPECIAL: "[TOOL_CALLS]"})
    tokens = [SPECIAL, *map(ord, '[{"name": "f", "arguments": {}}]'), EOS]
    found = run(running(form=form), tokens)
    assert ([call.name for call in found.merged_calls()], found.text) == (["f"], "")


def test_a_stop_string_ends_reasoning_too() -> None:
    choice = running(stops=["ell"])
    found = run(choice, TOKENS)
    assert (found.reasoning, found.text) == ("w", "")
    assert choice.finish is not None
    assert choice.finish.stop_string == "ell"


def test_ids_of_calls_are_the_same_on_every_ingress() -> None:
    first = call_id("t/r", SYNTAXES["hermes"], 0, 0)
    assert first == call_id("t/r", SYNTAXES["hermes"], 0, 0)
    assert len({first, call_id("t/r", None, 0, 1), call_id("t/r", None, 1, 0)}) == 3
    short = call_id("t/r", SYNTAXES["mistral"], 0, 0)
    assert len(short) == 9
    assert short.isalnum()


def test_pieces_of_a_long_output_are_joined_as_they_are_added() -> None:
    parts = [
        Pieces("Let"),
        Pieces(" me", "A", [CallPiece(0, "look", "{")]),
        Pieces(),
        Pieces(text="B", calls=[CallPiece(0, "", "}"), CallPiece(1, "go"), CallPiece(0, "", " ")]),
    ]
    added = Pieces()
    for part in parts:
        added.add(part)
    assert Pieces.joined(parts) == added
    assert added.merged_calls() == [CallPiece(0, "look", "{} "), CallPiece(1, "go")]
    assert not Pieces.joined([])
