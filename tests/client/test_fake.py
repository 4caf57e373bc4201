"""The fake server obeys what a real one obeys, and both of its calls agree."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh import (
    NO_RETRY,
    Choice,
    Client,
    Completion,
    FakeTransport,
    FinishReason,
    Prefilling,
    Queued,
    UnavailableError,
)
from kvmesh.client.fake_output import fake_output
from kvmesh.protos import pb
from tests.exercised import Exercised

TEXT = "one two three four"


def answer(text: str = TEXT, **options: Any) -> Choice:
    completion = both(text, **options)
    return completion.choices[0]


def both(text: str = TEXT, **options: Any) -> Completion:
    """The same from a call and from a stream."""
    options = {"request_id": "r", "seed": 1, **options}
    whole = Client(transport=FakeTransport([text])).generate("hi", **options)
    with Client(transport=FakeTransport([text])).generate_stream("hi", **options) as stream:
        deltas = list(stream)
    assert stream.completion == whole
    for choice in whole.choices:
        of_choice = [delta for delta in deltas if delta.index == choice.index]
        assert "".join(delta.text for delta in of_choice) == choice.text
        assert of_choice[-1].finish_reason is choice.finish_reason
    return whole


def test_without_options_the_text_is_answered() -> None:
    choice = answer()
    assert choice.text == TEXT
    assert choice.token_ids == (0, 1, 2, 3)
    assert choice.finish_reason is FinishReason.STOP
    assert choice.matched_stop is None
    assert choice.logprobs == ()


@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        ({"max_tokens": 1}, "one", FinishReason.LENGTH),
        ({"max_tokens": 3}, "one two three", FinishReason.LENGTH),
        ({"max_tokens": 4}, TEXT, FinishReason.STOP),
        ({"max_tokens": 6, "ignore_eos": True}, f"{TEXT} one two", FinishReason.LENGTH),
        ({"min_tokens": 5}, f"{TEXT} one", FinishReason.STOP),
        ({"min_tokens": 9, "max_tokens": 6}, f"{TEXT} one two", FinishReason.LENGTH),
    ],
)
def test_lengths(options: dict[str, Any], text: str, reason: FinishReason) -> None:
    choice = answer(**options)
    assert (choice.text, choice.finish_reason) == (text, reason)
    assert len(choice.token_ids) == len(text.split())


def test_the_default_length_is_the_servers() -> None:
    assert len(answer(ignore_eos=True).token_ids) == 256


@pytest.mark.parametrize(
    ("options", "text", "tokens", "matched"),
    [
        ({"stop": "three"}, "one two ", 3, "three"),
        ({"stop": "o t"}, "one tw", 3, "o t"),
        ({"stop": ["ee", "three"]}, "one two ", 3, "three"),
        ({"stop": ["nothing"]}, TEXT, 4, None),
        ({"stop": "one"}, "", 1, "one"),
        ({"stop": "one", "min_tokens": 1}, "", 1, "one"),
        ({"stop": ["one", "four"], "min_tokens": 2}, "one two three ", 4, "four"),
        ({"stop_token_ids": [2]}, "one two", 3, 2),
        ({"stop_token_ids": [0, 3], "min_tokens": 2}, "one two three", 4, 3),
        ({"stop": "four", "max_tokens": 3}, "one two three", 3, None),
    ],
)
def test_stops(options: dict[str, Any], text: str, tokens: int, matched: str | int | None) -> None:
    choice = answer(**options)
    assert (choice.text, len(choice.token_ids), choice.matched_stop) == (text, tokens, matched)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_choices(number: int) -> None:
    completion = both(n=number)
    assert [choice.index for choice in completion.choices] == list(range(number))
    assert {choice.text for choice in completion.choices} == {TEXT}
    assert completion.usage.completion_tokens == 4 * number


@pytest.mark.parametrize("best", [0, 1, 3, 20])
def test_logprobs(best: int) -> None:
    choice = answer(logprobs=best)
    assert len(choice.logprobs) == len(choice.token_ids)
    for position, entry in enumerate(choice.logprobs):
        assert entry.chosen.token_id == position
        assert len(entry.top) == best
        ranked = [token.logprob for token in entry.top]
        assert ranked == sorted(ranked, reverse=True)
        assert len({token.token_id for token in entry.top}) == best
        assert sum(math.exp(logprob) for logprob in ranked) < 1.001
        if best:
            assert entry.top[0] == entry.chosen
    assert "".join(entry.chosen.text for entry in choice.logprobs) == TEXT


def test_a_prompt_alone_is_pinned_or_scored() -> None:
    for options in ({"pin_s": 60.0}, {"prompt_logprobs": 1}):
        done = Client(transport=FakeTransport(["a b"])).generate("x", max_tokens=0, **options)
        assert (done.text, done.usage.completion_tokens) == ("", 0)


def test_seeds_are_reported_and_chosen_where_none_is_given() -> None:
    client = Client(transport=FakeTransport())
    assert client.generate("hi", seed=0).seed == 0
    assert client.generate("hi", seed=2**64 - 1).seed == 2**64 - 1
    chosen = [client.generate("hi").seed for _ in range(3)]
    assert len(set(chosen)) == 3


def test_a_resumed_stream_keeps_its_seed() -> None:
    fake = FakeTransport([TEXT])
    fake.server.fail(UnavailableError("gone"), after_tokens=2)
    stream = Client(transport=fake).generate_stream("hi", n=2, max_tokens=3, logprobs=1)
    list(stream)
    assert stream.resumes == 1
    first, second = fake.server.requests
    assert not first.sampling_params.HasField("seed")
    assert second.sampling_params.seed == stream.completion.seed == 1
    assert {choice.text for choice in stream.completion.choices} == {"one two three"}


@pytest.mark.parametrize("seconds", [None, 1.0])
def test_waits_are_sent_by_the_next_stream_that_does_not_fail_at_once(
    seconds: float | None,
) -> None:
    fake = FakeTransport()
    waits: list[Queued | Prefilling] = [Queued(2, 1.5), Prefilling(512, 0, 1024)]
    fake.server.wait(*waits)
    if seconds is None:
        fake.server.fail(UnavailableError("gone"), times=2)
    else:
        fake.server.fail_for(UnavailableError("gone"), seconds)
    client = Client(transport=fake)
    for expected in (waits, []):
        with client.generate_stream("hi") as stream:
            events = [x for x in stream.events() if isinstance(x, Queued | Prefilling)]
        assert events == expected
    assert len(fake.server.requests) > 2, "it was tried again"


def test_the_requested_model_answers() -> None:
    client = Client(transport=FakeTransport())
    assert client.generate("hi").model == "fake"
    assert client.generate("hi", model="mine").model == "mine"


SEEN = Exercised(
    "fake outputs",
    {
        "FINISH_REASON_STOP": 10,
        "FINISH_REASON_LENGTH": 10,
        "stop strings": 1,
        "stop tokens": 1,
    },
)


@SEEN.required
@given(
    text=st.text("ab \n", max_size=12),
    max_tokens=st.integers(1, 8),
    min_tokens=st.integers(0, 8),
    stop=st.lists(st.text("ab ", min_size=1, max_size=3), max_size=2),
    stop_token_ids=st.lists(st.integers(0, 8), max_size=2),
    ignore_eos=st.booleans(),
)
def test_any_output_keeps_the_contract(
    text: str,
    max_tokens: int,
    min_tokens: int,
    stop: list[str],
    stop_token_ids: list[int],
    ignore_eos: bool,
) -> None:
    params = pb.SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=stop,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
    )
    output = fake_output(text, pb.GenerateRequest(sampling_params=params))
    choice = output.choice
    SEEN.add(pb.FinishReason.Name(choice.finish_reason))
    SEEN.add("stop strings", choice.HasField("matched_stop_string"))
    SEEN.add("stop tokens", choice.HasField("matched_stop_token_id"))
    assert "".join(output.pieces) == choice.text
    assert len(output.pieces) == len(choice.token_ids) <= max_tokens
    assert choice.finish_reason in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)
    if choice.finish_reason == pb.FINISH_REASON_LENGTH:
        assert len(choice.token_ids) == max_tokens
    elif text and min_tokens <= max_tokens:
        assert len(choice.token_ids) >= min_tokens
    if min_tokens <= 1 and stop:
        assert not any(string in choice.text for string in stop)


def test_an_outage_passes_on_the_fake_clock() -> None:
    fake = FakeTransport()
    fake.server.fail_for(UnavailableError("gone"), 30.0)
    assert Client(transport=fake).generate("hi").text == "Hello."
    assert fake.server.slept_s >= 30.0
    once = Client(transport=fake, retry=NO_RETRY)
    fake.server.fail_for(UnavailableError("gone"), 5.0)
    with pytest.raises(UnavailableError):
        once.generate("hi")
    fake.server.sleep(5.0)
    assert once.generate("hi").text == "Hello.", "the time is over"
