"""Cursors: a stream is saved as a text, and another client continues it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from kvmesh import (
    AsyncClient,
    AsyncFakeTransport,
    Client,
    Completion,
    DeadlineExceededError,
    DuplicateRequestError,
    FakeTransport,
    InvalidRequestError,
    ResumeError,
)
from kvmesh.client.cursor import encode_cursor
from kvmesh.protos import pb
from tests.client.servicer import (
    ScriptedServicer,
    delta,
    failing,
    finished,
    serving,
    started,
    usage,
)

ANSWER = "Größe ist 🦊 relativ, sagt man."
OPTIONS: Any = {"max_tokens": 5, "logprobs": 2, "n": 2, "seed": 3, "priority": -1}


def whole() -> Completion:
    return Client(transport=FakeTransport([ANSWER])).generate("hi", request_id="r", **OPTIONS)


def resumed(cursor: str, asynchronous: bool) -> tuple[list[str], Completion, pb.GenerateRequest]:
    """What another client reads, all of the output, and what it has sent."""
    if not asynchronous:
        fake = FakeTransport([ANSWER])
        stream = Client(transport=fake).resume(cursor)
        return [item.text for item in stream], stream.completion, fake.server.requests[0]

    async def run() -> tuple[list[str], Completion, pb.GenerateRequest]:
        fake = AsyncFakeTransport([ANSWER])
        stream = AsyncClient(transport=fake).resume(cursor)
        return [item.text async for item in stream], stream.completion, fake.server.requests[0]

    return asyncio.run(run())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_can_be_continued_from_every_point(asynchronous: bool) -> None:
    expected = whole()
    with Client(transport=FakeTransport([ANSWER])).generate_stream(
        "hi", request_id="r", **OPTIONS
    ) as stream:
        texts: list[str] = []
        cursors = [(0, stream.cursor)]
        for item in stream:
            texts.append(item.text)
            cursors.append((len(texts), stream.cursor))
    assert len(cursors) == 13, "two choices of five tokens, and the end of each"
    for read, cursor in cursors:
        later, completion, request = resumed(cursor, asynchronous)
        assert later == texts[read:]
        assert completion == expected
        assert request.request_id == "r"
        assert request.priority == -1
        assert request.HasField("resume") == (read > 0)
        for choice in request.resume.choices:
            text = "".join(texts[choice.index : read : 2])
            assert (len(choice.token_ids), choice.text_chars) == (len(text.split()), len(text))


def test_a_cursor_is_json_and_holds_no_key() -> None:
    client = Client(transport=FakeTransport([ANSWER]), api_key="secret-key")
    stream = client.generate_stream("hi")
    next(stream)
    cursor = json.loads(json.dumps({"cursor": stream.cursor}))["cursor"]
    assert cursor == stream.cursor
    stream.close()
    assert "secret-key" not in repr(resumed(cursor, False)[2])


IN_ANOTHER_PROCESS = """
import json, sys
from kvmesh import Client
with Client(sys.argv[1], api_key="") as client:
    stream = client.resume(json.load(sys.stdin))
    print(json.dumps([[delta.text for delta in stream], stream.completion.text]))
"""


def test_another_process_continues_a_stream_with_the_same_seed_and_model() -> None:
    def act(request: Any, context: grpc.ServicerContext) -> Iterator[pb.GenerateStreamResponse]:
        received = len(request.resume.choices[0].token_ids) if request.HasField("resume") else 0
        yield started(request)
        for position, text in list(enumerate(["eins ", "zwei ", "drei"]))[received:]:
            yield delta(position, text, 10 + position)
        yield finished()
        yield usage()

    servicer = ScriptedServicer(act)
    with serving(servicer) as target, Client(target) as client:
        with client.generate_stream("zähle", temperature=0.5) as stream:
            next(stream)
        result = subprocess.run(
            [sys.executable, "-c", IN_ANOTHER_PROCESS, target],
            input=json.dumps(stream.cursor), capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert json.loads(result.stdout) == [["zwei ", "drei", ""], "eins zwei drei"]
    first, second = servicer.requests
    assert second.prompt == first.prompt
    assert second.request_id == first.request_id
    assert second.sampling_params.temperature == 0.5
    assert second.sampling_params.seed == 7, "the seed that the server chose"
    assert second.resume == pb.Resume(
        model_revision="r1",
        choices=[pb.ResumedChoice(index=0, token_ids=[10], text_chars=len("eins "))],
    )


def test_a_resumed_stream_waits_until_the_first_has_ended() -> None:
    """Without output there is nothing to resume: the same request is sent, whose id is in use."""
    fake = FakeTransport([ANSWER])
    client = Client(transport=fake)
    cursor = client.generate_stream("hi").cursor
    fake.server.fail(DuplicateRequestError("still there"), times=3)
    assert len(list(client.resume(cursor))) == 7
    fake.server.fail(DuplicateRequestError("in use"))
    with pytest.raises(DuplicateRequestError):
        list(client.generate_stream("hi"))


def test_a_resumed_stream_has_a_timeout_of_its_own() -> None:
    fake = FakeTransport([ANSWER])
    client = Client(transport=fake)
    stream = client.generate_stream("hi", timeout_s=2.0)
    next(stream)
    fake.server.slept_s += 10.0
    list(client.resume(stream.cursor, timeout_s=3.0))
    list(client.resume(stream.cursor))
    sent = fake.server.requests[1:]
    assert sent[0].timeout_s == 3.0
    assert not sent[1].HasField("timeout_s")
    with pytest.raises(InvalidRequestError, match="timeout_s"):
        client.resume(stream.cursor, timeout_s=0)
    fake.server.fail(DeadlineExceededError("too late"))
    with pytest.raises(DeadlineExceededError):
        list(client.resume(stream.cursor))


def test_another_model_cannot_continue_a_stream() -> None:
    mismatch = pb.Error(
        code=grpc.StatusCode.FAILED_PRECONDITION.value[0],
        reason=pb.ERROR_REASON_RESUME_MISMATCH,
        message="another model",
    )
    cursor = Client(transport=FakeTransport()).generate_stream("hi").cursor
    with (
        serving(ScriptedServicer(failing(mismatch))) as target,
        Client(target) as client,
        pytest.raises(ResumeError, match="another model"),
    ):
        list(client.resume(cursor))


GOOD = encode_cursor(pb.GenerateRequest(request_id="r"), pb.GenerateResponse())


@pytest.mark.parametrize(
    "cursor",
    [
        "", "hello", "kvmesh-cursor-1", "kvmesh-cursor-1.AA", f"{GOOD}.AA", f"{GOOD}!",
        GOOD.replace("-1.", "-2."), "kvmesh-cursor-1.AAAA.////", "kvmesh-cursor-1.é.é",
        "kvmesh-cursor-1.AAAA.AAAA", None, 5, b"kvmesh-cursor-1", {"cursor": GOOD}, GOOD[:-1],
    ],
)  # fmt: skip
def test_what_is_no_cursor_is_refused(cursor: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Client(transport=FakeTransport()).resume(cursor)
    assert caught.value.field == "cursor"
