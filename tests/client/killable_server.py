"""A server in its own process, to be killed in the middle of a stream.

`python -m tests.client.killable_server PORT [TOKENS_BEFORE_HANGING]` streams the
words of WORDS. A request that is not a resume gets the first few and then nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import grpc

from kvmesh.protos import pb
from tests.client.servicer import (
    ScriptedServicer,
    delta,
    finished,
    serving,
    started,
    usage,
)

WORDS = ["The ", "quick ", "brown ", "fox 🦊 ", "jumps ", "over."]


def act(
    request: pb.GenerateRequest, context: grpc.ServicerContext
) -> Iterator[pb.GenerateStreamResponse]:
    received = 0
    if request.HasField("resume"):
        choice = request.resume.choices[0]
        received = len(choice.token_ids)
        assert list(choice.token_ids) == list(range(100, 100 + received))
        assert choice.text_chars == len("".join(WORDS[:received]))
        assert request.resume.model_revision == "r1"
        assert request.sampling_params.seed == 7
    yield started(request)
    for position in range(received, len(WORDS)):
        if not request.HasField("resume") and position == 3:
            threading.Event().wait()
        yield delta(position, WORDS[position], 100 + position)
    yield finished()
    yield usage(prompt_tokens=1, completion_tokens=len(WORDS))


if __name__ == "__main__":
    with serving(ScriptedServicer(act), f"127.0.0.1:{sys.argv[1]}") as target:
        print(target, flush=True)
        sys.stdin.read()
