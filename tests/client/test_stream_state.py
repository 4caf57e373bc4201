"""What each event of a stream becomes, and what the state of an ended one holds."""

from __future__ import annotations

import pytest

from kvmesh import ClosedError, Delta, FinishReason, ProtocolError
from kvmesh.client.stream_state import StreamState
from kvmesh.client.types import (
    Prefilling,
    PromptLogprobs,
    TokenLogprob,
    TokenLogprobs,
    ToolCallDelta,
)
from kvmesh.protos import pb


def started(request_id: str = "sent") -> StreamState:
    state = StreamState(pb.GenerateRequest(request_id=request_id))
    state.feed(pb.GenerateStreamResponse(started=pb.Started(request_id="of the server", seed=5)))
    return state


def feed(state: StreamState, **event: object) -> object:
    return state.feed(pb.GenerateStreamResponse(**event))  # type: ignore[arg-type]


def chosen(token_id: int, text: str, logprob: float) -> TokenLogprobs:
    return TokenLogprobs(TokenLogprob(token_id, text, logprob, tuple(text.encode())), ())


def test_every_event_is_returned_as_what_it_says() -> None:
    state = StreamState(pb.GenerateRequest(request_id="sent"))
    assert (state.queued, state.prefilling, state.started, state.usage) == (None,) * 4
    feed(state, started=pb.Started(request_id="r"))
    computed = feed(state, prefilling=pb.Prefilling(computed_tokens=7, total_tokens=9))
    assert isinstance(computed, Prefilling) and computed is state.prefilling
    assert computed.computed_tokens == 7
    columns = pb.Logprobs(chosen=[-0.5], chosen_bytes=[b"x"], chosen_token_ids=[8])
    assert feed(state, prompt_logprobs=columns) == PromptLogprobs((chosen(8, "x", -0.5),))
    calls = [
        pb.ToolCallDelta(index=0, id="a", name="f", arguments_json="{"),
        pb.ToolCallDelta(index=1, id="b", name="g"),
        pb.ToolCallDelta(index=0, arguments_json="}"),
        pb.ToolCallDelta(index=2, id="c", name="h"),
    ]
    delta = pb.Delta(
        index=2,
        text="hi",
        token_ids=[4],
        logprobs=pb.Logprobs(chosen=[-0.25], chosen_bytes=[b"hi"]),
        reasoning="because",
        tool_calls=calls,
    )
    assert feed(state, delta=delta) == Delta(
        index=2,
        text="hi",
        token_ids=(4,),
        logprobs=(chosen(4, "hi", -0.25),),
        reasoning="because",
        tool_calls=tuple(ToolCallDelta(x.index, x.id, x.name, x.arguments_json) for x in calls),
    )
    finished = pb.ChoiceFinished(
        index=2, finish_reason=pb.FINISH_REASON_STOP, matched_stop_string="."
    )
    assert feed(state, choice_finished=finished) == Delta(
        2, "", finish_reason=FinishReason.STOP, finish_reason_number=1, matched_stop="."
    )


def test_an_event_of_a_newer_server_is_skipped() -> None:
    assert started().feed(pb.GenerateStreamResponse()) is None


def test_a_completion_comes_with_the_end_and_has_the_servers_id() -> None:
    state = started()
    feed(state, delta=pb.Delta(text="a", token_ids=[1]))
    with pytest.raises(ClosedError, match="has not ended yet") as early:
        state.completion()
    assert early.value.request_id == "sent"
    feed(state, choice_finished=pb.ChoiceFinished(finish_reason=pb.FINISH_REASON_LENGTH))
    feed(state, usage=pb.Usage(completion_tokens=1))
    done = state.completion()
    assert (done.request_id, done.text, done.seed, done.prompt_logprobs) == (
        "of the server",
        "a",
        5,
        (),
    )


def test_a_stream_that_violates_the_contract_is_named() -> None:
    state = started()
    with pytest.raises(ProtocolError, match="delta starts at token 3") as caught:
        feed(state, delta=pb.Delta(token_ids=[1], token_offset=3))
    assert caught.value.request_id == "sent"
