"""Tokens to text, one choice: where stop strings and stop tokens end it, and from where on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from kvmesh.cluster.errors import ResumeMismatchError
from kvmesh.cluster.ingress import wire
from kvmesh.cluster.ingress.answers.pieces import CallPiece
from kvmesh.cluster.ingress.choice import (
    ChoiceFinish,
    ChoiceOutput,
    RunningChoice,
    choice_seed,
)
from kvmesh.cluster.ingress.resume import ResumedChoice
from kvmesh.cluster.ingress.validate import TextRules
from kvmesh.workers.request import EndReason, SampledLogprobs, SequenceDelta, TokenIds
from kvmesh.workers.sampling_params import SamplingParams
from tests.cluster.machine import LetterCodec, LetterStream, text_of
from tests.workers.memory_executor import EOS

CODEC = LetterCodec()
ABCD = CODEC.encode("abcd").tolist()


def choice(stops: tuple[str, ...] = (), resumed: int = 0, **params: object) -> RunningChoice:
    """Of which the client has the first `resumed` tokens, and the text before the last."""
    settings = SamplingParams(max_tokens=20, **params)  # type: ignore[arg-type]
    had = (
        ResumedChoice(tuple(ABCD[:resumed]), text_chars=resumed - 1) if resumed else ResumedChoice()
    )
    return RunningChoice(0, settings, TextRules(stops), CODEC, had)


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


@pytest.mark.parametrize("token_id", [0, 7])
def test_the_stop_token_is_named_whatever_its_id(token_id: int) -> None:
    found = wire.choice_finished(0, ChoiceFinish(EndReason.STOP, stop_token_id=token_id))
    assert found.WhichOneof("matched_stop") == "matched_stop_token_id"
    assert found.matched_stop_token_id == token_id


@pytest.mark.parametrize(("min_tokens", "ends"), [(0, True), (2, True), (3, False)])
def test_a_resumed_choice_ends_at_its_stop_token_from_min_tokens_on(
    min_tokens: int, ends: bool
) -> None:
    made = choice(resumed=2, min_tokens=min_tokens, stop_token_ids=(ABCD[1],))
    stopped = ChoiceFinish(EndReason.STOP, stop_token_id=ABCD[1])
    assert made.finish == (stopped if ends else None)


class NamedCodec(LetterCodec):
    """Of which the token 25 is special, and has a name of several letters."""

    special = 25

    def special_text(self, token_id: int) -> str:
        return "<|end|>" if token_id == self.special else ""

    def token_bytes(self, token_id: int) -> bytes:
        return (self.special_text(token_id) or text_of([token_id])).encode()

    def stream(self, prompt: Sequence[int] | TokenIds, skip_special_tokens: bool) -> NamedStream:
        return NamedStream(self.special, skip_special_tokens)


class NamedStream(LetterStream):
    def __init__(self, special: int, skip: bool) -> None:
        self._special, self._name = special, "" if skip else "<|end|>"

    def push(self, ids: Sequence[int]) -> str:
        return "".join(self._name if i == self._special else text_of([i]) for i in ids)


def ended(tokens: str, pieces: int = 1, **rules: object) -> tuple[str, object, int]:
    """Text, match, and number of tokens of an output; Z is the special token.

    rules: of the text, and min_tokens
    """
    codec = NamedCodec()
    min_tokens = int(str(rules.pop("min_tokens", 0)))
    ids = [25 if letter == "Z" else int(codec.encode(letter)[0]) for letter in tokens]
    params = SamplingParams(max_tokens=40, min_tokens=min_tokens)
    made = RunningChoice(0, params, TextRules(**rules), codec, ResumedChoice())  # type: ignore[arg-type]
    text = ""
    for start in range(0, len(ids), pieces):
        if made.finish is None:
            text += made.accept([SequenceDelta("r", tuple(ids[start : start + pieces]))]).text
    if made.finish is None:
        text += made.end(EndReason.LENGTH).text
    assert made.finish is not None
    return text, made.finish.stop_string, len(made.token_ids)


@pytest.mark.parametrize("pieces", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("tokens", "rules", "expected"),
    [
        # A special token's text is found, whether it is shown or not.
        ("abZcd", {"stop": ("<|end|>",)}, ("ab", "<|end|>", 3)),
        ("abZcd", {"stop": ("<|end|>",), "skip_special_tokens": False}, ("ab", "<|end|>", 3)),
        ("abZcd", {"stop": ("<|end|>",), "include_stop": True}, ("ab<|end|>", "<|end|>", 3)),
        ("abZcd", {"stop": ("b<|e",)}, ("a", "b<|e", 3)),
        ("abZcd", {"stop": ("d|>c", ">c")}, ("ab", "d|>c", 4)),
        # So is one that only what is shown has.
        ("abZcd", {"stop": ("bc",)}, ("a", "bc", 4)),
        ("abZZcd", {"stop": ("bck", "bcd")}, ("a", "bcd", 6)),
        ("abZcd", {"stop": ("bc",), "skip_special_tokens": False}, ("ab<|end|>cd", None, 5)),
        ("abZcd", {"stop": ("><",), "skip_special_tokens": False}, ("ab<|end|>cd", None, 5)),
        (
            "abZcd",
            {"stop": ("end|>",), "skip_special_tokens": False, "include_stop": True},
            ("ab<|end|>", "end|>", 3),
        ),
        # Without a match, everything that is shown, and nothing else.
        ("abZcd", {"stop": ("bZ", "<|end|>k")}, ("abcd", None, 5)),
        ("abZ", {"stop": ("<|end|>k",)}, ("ab", None, 3)),
        ("abZ", {"skip_special_tokens": False}, ("ab<|end|>", None, 3)),
        # Before min_tokens a stop string may begin, but not be complete.
        ("abSTOPklm", {"stop": ("STOP",), "min_tokens": 4}, ("ab", "STOP", 6)),
        ("abSTOPklm", {"stop": ("STOP",), "min_tokens": 6}, ("ab", "STOP", 6)),
        ("abSTOPklm", {"stop": ("STOP",), "min_tokens": 7}, ("abSTOPklm", None, 9)),
        ("abSTOPkSTOP", {"stop": ("STOP",), "min_tokens": 7}, ("abSTOPk", "STOP", 11)),
        ("aaaa", {"stop": ("aa",), "min_tokens": 3}, ("a", "aa", 3)),
        ("abck", {"stop": ("b", "abcd"), "min_tokens": 3}, ("abck", None, 4)),
        ("abZcd", {"stop": ("<|end|>",), "min_tokens": 4}, ("abcd", None, 5)),
        ("abab", {"stop": ("ab",), "include_stop": True}, ("ab", "ab", 2)),
    ],
)
def test_stop_strings_special_tokens_and_min_tokens(
    tokens: str, rules: dict[str, object], expected: tuple[str, object, int], pieces: int
) -> None:
    assert ended(tokens, pieces, **dict(rules)) == expected


@pytest.mark.parametrize("tokens", ["abZcd", "abSTOPklm", "abSTZOPklm", "STOSTOP", "aZbZSTOP"])
@pytest.mark.parametrize("stop", ["STOP", "<|end|>", "b<|end|>c", "TO", "bc"])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("min_tokens", [0, 4])
def test_a_choice_resumed_anywhere_has_the_text_of_one_that_was_not(
    tokens: str, stop: str, skip: bool, min_tokens: int
) -> None:
    codec = NamedCodec()
    ids = [25 if letter == "Z" else int(codec.encode(letter)[0]) for letter in tokens]
    params = SamplingParams(max_tokens=40, min_tokens=min_tokens)
    rules = TextRules((stop,), skip)

    def run(resumed: int, text_chars: int) -> tuple[str, list[int], ChoiceFinish | None]:
        had = ResumedChoice(tuple(ids[:resumed]), text_chars)
        made = RunningChoice(0, params, rules, codec, had)
        text = made.owed().text
        for token in ids[resumed:]:
            if made.finish is None:
                text += made.accept([SequenceDelta("r", (token,))]).text
        if made.finish is None:
            text += made.end(EndReason.LENGTH).text
        return text, made.token_ids, made.finish

    whole, kept, finish = run(0, 0)
    sent = ""
    made = RunningChoice(0, params, rules, codec, ResumedChoice())
    for resumed, token in enumerate(kept):
        assert run(resumed, len(sent)) == (whole[len(sent) :], kept, finish)
        sent += made.accept([SequenceDelta("r", (token,))]).text


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abS")])
def test_a_stop_token_is_in_the_text_if_stops_are_included(include: bool, text: str) -> None:
    codec = LetterCodec()
    ids = codec.encode("abS").tolist()
    params = SamplingParams(max_tokens=9, stop_token_ids=(ids[-1],))
    made = RunningChoice(0, params, TextRules(include_stop=include), codec, ResumedChoice())
    end = SequenceDelta("r", (ids[2],), (), EndReason.STOP, ids[2])
    found = made.accept([SequenceDelta("r", tuple(ids[:2])), end]).text
    assert found == text
    assert made.finish == ChoiceFinish(EndReason.STOP, stop_token_id=ids[2])
    again = RunningChoice(
        0, params, TextRules(include_stop=include), codec, ResumedChoice(tuple(ids))
    )
    assert (again.owed().text, again.finish) == (text, made.finish)
    # It ends by its token, and not by a stop string that is complete with its text.
    rules = TextRules(("bS",), include_stop=include)
    either = RunningChoice(0, params, rules, codec, ResumedChoice())
    assert either.accept([SequenceDelta("r", tuple(ids[:2])), end]).text == text
    assert either.finish == made.finish


@pytest.mark.parametrize(
    ("resumed", "message"),
    [
        (ResumedChoice((*ABCD, ABCD[0])), "the resumed output ends at token 4, but it has 5"),
        (ResumedChoice((*ABCD[:2],), 3), "decode to 2 characters, but the client has"),
    ],
)
def test_a_client_that_cannot_have_what_it_says_is_refused(
    resumed: ResumedChoice, message: str
) -> None:
    params = SamplingParams(max_tokens=4)
    with pytest.raises(ResumeMismatchError, match=message):
        RunningChoice(0, params, TextRules(), CODEC, resumed)


@pytest.mark.parametrize(("skip", "name"), [(True, b""), (False, b"<|end|>")])
def test_the_bytes_of_logprobs_are_those_of_the_text(skip: bool, name: bytes) -> None:
    codec = NamedCodec()
    ids = [int(codec.encode("a")[0]), 25, int(codec.encode("b")[0])]
    params = SamplingParams(max_tokens=3, logprobs=1)
    made = RunningChoice(0, params, TextRules((), skip), codec, ResumedChoice())
    scores = tuple(SampledLogprobs(-1.0, ((token, -1.0),)) for token in ids)
    output = made.accept([SequenceDelta("r", tuple(ids), scores, EndReason.LENGTH)])
    columns = wire.delta(0, output, codec, lambda *_: "", skip).logprobs
    assert columns.chosen_bytes == columns.top_bytes == [b"a", name, b"b"]
    assert b"".join(columns.chosen_bytes).decode() == output.text


@pytest.mark.parametrize(
    ("stop", "rules", "text"),
    [
        ("<|end|>", {}, "ab"),
        ("<|end|>", {"include_stop": True}, "ab<|end|>"),
        ("<|end|>", {"include_stop": True, "skip_special_tokens": False}, "ab<|end|>"),
        ("b<|end|>", {"skip_special_tokens": False}, "a"),
        ("other", {}, "ab"),
        ("other", {"include_stop": True}, "ab"),
        ("other", {"include_stop": True, "skip_special_tokens": False}, "ab<|end|>"),
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_stop_string_may_name_the_end_of_sequence(
    stop: str, rules: dict[str, bool], text: str, resumed: bool
) -> None:
    codec = NamedCodec()
    ids = (int(codec.encode("a")[0]), int(codec.encode("b")[0]), 25)
    params = SamplingParams(max_tokens=9, stop_token_ids=(25,))
    had = ResumedChoice(ids) if resumed else ResumedChoice()
    made = RunningChoice(0, params, TextRules((stop,), **rules), codec, had)
    if resumed:
        found = made.owed().text
    else:
        found = made.accept([SequenceDelta("r", ids, (), EndReason.STOP, 25)]).text
    assert found == text
    by_string = ChoiceFinish(EndReason.STOP, stop_string=stop)
    by_token = ChoiceFinish(EndReason.STOP, stop_token_id=25)
    assert made.finish == (by_token if stop == "other" else by_string)


class HoldingStream(LetterStream):
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
    def stream(self, prompt: Sequence[int] | TokenIds, skip_special_tokens: bool) -> HoldingStream:
        return HoldingStream()


@pytest.mark.parametrize("replayed", range(4))
def test_nothing_follows_a_stop_string(replayed: int) -> None:
    """Whether it is found in a replay or not, and whatever the decoder holds back."""
    had = ResumedChoice(tuple(ABCD[:replayed]))
    settings = SamplingParams(max_tokens=20)
    made = RunningChoice(0, settings, TextRules(("b",)), HoldingCodec(), had)
    text = made.owed().text
    for token in ABCD[replayed:]:
        text += made.accept([SequenceDelta("r", (token,))]).text
    assert text == "a"
    assert made.finish == ChoiceFinish(EndReason.STOP, stop_string="b")
    assert made.token_ids == ABCD[:3], "the decoder gives b with the token that follows"


@pytest.mark.parametrize("reason", [EndReason.LENGTH, EndReason.DEADLINE])
@pytest.mark.parametrize("stops", [(), ("x", "d!")])
def test_at_the_end_nothing_is_held_back(reason: EndReason, stops: tuple[str, ...]) -> None:
    params, rules = SamplingParams(max_tokens=4), TextRules(stops)
    made = RunningChoice(0, params, rules, HoldingCodec(), ResumedChoice())
    text = made.accept([SequenceDelta("r", tuple(ABCD))]).text
    if reason is EndReason.LENGTH:
        text += made.accept([SequenceDelta("r", (), finish_reason=reason)]).text
    else:
        text += made.end(reason).text
    assert text == "abcd"
    assert made.finish == ChoiceFinish(reason)
    assert made.token_ids == ABCD
    again = RunningChoice(0, params, rules, HoldingCodec(), ResumedChoice(tuple(ABCD), 1))
    assert again.owed().text == "bcd"
    assert again.owed().text == "", "it is owed once"
    assert again.finish == ChoiceFinish(EndReason.LENGTH)


def test_a_stop_string_may_be_complete_only_at_the_end() -> None:
    made = RunningChoice(
        0, SamplingParams(max_tokens=4), TextRules(("d",)), HoldingCodec(), ResumedChoice()
    )
    end = SequenceDelta("r", tuple(ABCD), finish_reason=EndReason.LENGTH)
    assert made.accept([end]).text == "abc"
    assert made.finish == ChoiceFinish(EndReason.STOP, stop_string="d")


def test_an_output_says_which_tokens_it_has_and_where_they_begin() -> None:
    made = choice(resumed=2)
    assert made.owed() == ChoiceOutput(2, (), "b", ())
    scores = tuple(SampledLogprobs(-float(token), ()) for token in ABCD[2:])
    deltas = [SequenceDelta("r", tuple(ABCD[2:]), scores), SequenceDelta("r", (ABCD[0],))]
    assert made.accept(deltas) == ChoiceOutput(2, (*ABCD[2:], ABCD[0]), "cda", scores)
    assert made.accept([]) == ChoiceOutput(5, (), "", ())
    assert made.end(EndReason.ABORT) == ChoiceOutput(5, (), "", ())


def test_only_a_choice_that_its_text_ends_is_cut() -> None:
    made = choice(("b",))
    assert (made.cut, made.already_finished) == (False, False)
    made.accept([SequenceDelta("r", tuple(ABCD), finish_reason=EndReason.LENGTH)])
    assert made.cut
    made = choice(("x",))
    made.accept([SequenceDelta("r", tuple(ABCD), finish_reason=EndReason.LENGTH)])
    assert (made.finish, made.cut) == (ChoiceFinish(EndReason.LENGTH), False)


def test_text_is_decoded_after_the_prompt_and_as_the_rules_say() -> None:
    class Asked(LetterCodec):
        def stream(self, prompt: object, skip_special_tokens: bool) -> LetterStream:
            asked.append((prompt, skip_special_tokens))
            return LetterStream()

    asked: list[tuple[object, bool]] = []
    params, had = SamplingParams(), ResumedChoice((3,), finished=True)
    for skip in (True, False):
        made = RunningChoice(7, params, TextRules((), skip), Asked(), had, prompt=[1, 2])
    assert asked == [([1, 2], True), ([1, 2], False)]
    assert (made.index, made.params, made.already_finished) == (7, params, True)
    assert made.finish == ChoiceFinish(EndReason.ABORT), "for a reason that tokens do not show"


def test_an_output_is_true_if_it_has_anything_to_send() -> None:
    assert not ChoiceOutput(5, (), "", ())
    for part in (
        ChoiceOutput(0, (3,), "", ()),
        ChoiceOutput(0, (), "a", ()),
        ChoiceOutput(0, (), "", (), reasoning="a"),
        ChoiceOutput(0, (), "", (), calls=(CallPiece(0, "f", ""),)),
    ):
        assert part


@pytest.mark.parametrize(
    ("min_tokens", "ignore_eos", "grammar", "ends"),
    [
        (3, False, False, True),
        (4, False, False, False),
        (3, True, False, False),
        # Only the grammar knows where an output ends.
        (4, False, True, True),
        (3, True, True, True),
    ],
)
def test_a_resumed_choice_ends_at_the_end_of_sequence(
    min_tokens: int, ignore_eos: bool, grammar: bool, ends: bool
) -> None:
    params = SamplingParams(max_tokens=9, min_tokens=min_tokens, ignore_eos=ignore_eos)
    had = ResumedChoice((*ABCD[:2], EOS))
    given: Any = {"grammar": True} if grammar else {}
    made = RunningChoice(0, params, TextRules(), CODEC, had, **given)
    assert made.finish == (ChoiceFinish(EndReason.STOP, stop_token_id=EOS) if ends else None)


def test_seeds_of_choices_are_the_outputs_of_splitmix64() -> None:
    """As its authors' splitmix64.c prints them for the state 0."""
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [choice_seed(0, index) for index in range(5)] == [0, *outputs]
    golden = 0x9E3779B97F4A7C15
    assert choice_seed(2**64 - golden, 2) == outputs[0], "its state has 64 bits"
