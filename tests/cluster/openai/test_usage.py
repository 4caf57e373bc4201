"""The usage of several generations that one call has asked for."""

from __future__ import annotations

import pytest

from kvmesh.cluster.openai.usage import ReasoningTokens, RunningUsage, token_usage
from kvmesh.v1 import kvmesh_pb2 as pb

FIRST = pb.Usage(
    prompt_tokens=5,
    completion_tokens=2,
    cached_tokens=3,
    kv_reserved_bytes=4096,
    kv_used_bytes=2048,
    group="engine-0",
    kv_format="int8",
    queue_s=0.5,
    time_to_first_token_s=0.75,
    total_s=2.0,
    preemptions=1,
    failovers=2,
)
SECOND = pb.Usage(
    prompt_tokens=7,
    completion_tokens=4,
    cached_tokens=1,
    kv_reserved_bytes=8192,
    kv_used_bytes=1024,
    group="engine-1",
    kv_format="k4v4",
    queue_s=0.25,
    time_to_first_token_s=1.5,
    total_s=1.0,
    preemptions=3,
    failovers=1,
)


@pytest.mark.parametrize("parts", [[FIRST, SECOND], [SECOND, FIRST]])
def test_what_is_used_adds_up_and_times_are_those_of_the_call(parts: list[pb.Usage]) -> None:
    """It waits until all have a place, has a token with the first, and ends with the last."""
    usage = token_usage(parts, 3)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (12, 6, 18)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 4
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == 3
    own = usage.kvmesh
    assert own
    assert (own.kv_reserved_bytes, own.kv_used_bytes) == (12288, 3072)
    assert (own.queue_s, own.time_to_first_token_s, own.total_s) == (0.5, 0.75, 2.0)
    assert (own.preemptions, own.failovers) == (4, 3)
    assert (own.group, own.kv_format) == (parts[-1].group, parts[-1].kv_format)


def test_without_a_token_there_is_no_time_to_the_first() -> None:
    own = token_usage([pb.Usage(group="engine-0")], 0).kvmesh
    assert own and own.time_to_first_token_s is None


def test_a_running_call_has_used_what_was_announced_and_sent() -> None:
    running = RunningUsage()
    for index, tokens in ((0, 5), (1, 7)):
        started = pb.Started(prompt_tokens=tokens)
        running.note(index, pb.GenerateStreamResponse(started=started))
    for index, ids in ((0, [1, 2]), (1, [3]), (0, [4])):
        running.note(index, pb.GenerateStreamResponse(delta=pb.Delta(index=index, token_ids=ids)))
    so_far = running.so_far
    assert (so_far.prompt_tokens, so_far.completion_tokens, so_far.total_tokens) == (12, 4, 16)
    # A stream that is resumed within the server starts again.
    running.note(0, pb.GenerateStreamResponse(started=pb.Started(prompt_tokens=5)))
    assert running.so_far.prompt_tokens == 12
    for usage in (FIRST, SECOND):
        running.note(0, pb.GenerateStreamResponse(usage=usage))
    assert running.final == token_usage([FIRST, SECOND], 0)


@pytest.mark.parametrize(
    ("shown", "count"),
    [
        ("rrt", 2),
        ("_rr__tt", 5),  # within markers
        ("_t_", 0),
        ("t_r", 2),
        ("t", 0),
        ("rc_", 1),
        ("mt", 1),  # the end of the reasoning, and the first text
    ],
)
def test_tokens_of_reasoning_are_counted_by_choice(shown: str, count: int) -> None:
    """_: nothing, r: reasoning, t: text, c: a call, m: reasoning and text"""
    reasoning = ReasoningTokens()
    for index in range(2):
        for kind in shown:
            for choice in range(2):
                reasoning.note(
                    index,
                    pb.Delta(
                        index=choice,
                        token_ids=[1],
                        reasoning="a" if kind in "rm" else "",
                        text="b" if kind in "tm" else "",
                        tool_calls=[pb.ToolCallDelta(name="f")] if kind == "c" else [],
                    ),
                )
    assert reasoning.count == 4 * count
