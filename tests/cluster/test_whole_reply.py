"""The events of a stream in one reply."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvmesh.cluster.ingress.whole_reply import WholeReply
from kvmesh.v1 import kvmesh_pb2 as pb
from tests.cluster.openai.server import delta, finished, started, usage


def test_pieces_of_each_kind_are_joined_in_order() -> None:
    whole = WholeReply()
    call = pb.ToolCallDelta(index=0, id="c-0", name="look", arguments_json='{"a"')
    rest = [pb.ToolCallDelta(index=0, arguments_json=": 1}"), pb.ToolCallDelta(index=1, name="b")]
    for event in (
        started(pb.GenerateRequest(request_id="r")),
        delta("", 1, reasoning="Let", token_ids=[1]),
        delta("", 1, reasoning=" me", token_ids=[2]),
        delta("zero", 0, token_ids=[3]),
        delta("A", 1, token_ids=[4], tool_calls=[call]),
        delta("B", 1, token_ids=[5], tool_calls=rest),
        finished(1, pb.FINISH_REASON_TOOL_CALLS),
        finished(0, matched_stop_string="."),
        usage(),
    ):
        whole.add(event)
    reply = whole.reply()
    first, second = reply.choices
    assert (first.index, first.text, first.matched_stop_string) == (0, "zero", ".")
    assert (second.index, second.text, second.reasoning) == (1, "AB", "Let me")
    assert list(second.token_ids) == [1, 2, 4, 5]
    assert [(x.id, x.name, x.arguments_json) for x in second.tool_calls] == [
        ("c-0", "look", '{"a": 1}'),
        ("", "b", ""),
    ]
    assert (reply.request_id, reply.seed, reply.usage.prompt_tokens) == ("r", 7, 5)


# 40,000 values of a text, each 4 characters longer than the last, are 3 GB together.
GROW = """
import resource
from kvmesh.cluster.ingress.whole_reply import WholeReply
from kvmesh.v1 import kvmesh_pb2 as pb

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
whole = WholeReply()
for _ in range(40_000):
    call = pb.ToolCallDelta(arguments_json="abcd")
    delta = pb.Delta(text="abcd", reasoning="abcd", token_ids=[1], tool_calls=[call])
    whole.add(pb.GenerateStreamResponse(delta=delta))
(choice,) = whole.reply().choices
for text in (choice.text, choice.reasoning, choice.tool_calls[0].arguments_json):
    assert len(text) == 160_000
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address spaces are limited on Linux alone")
def test_memory_grows_with_the_output_and_not_with_its_square() -> None:
    done = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
