"""Streams: order, resume and cancellation, with both clients."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from kvmesh import (
    NO_RETRY,
    AsyncClient,
    AsyncFakeTransport,
    Client,
    ClosedError,
    DeadlineExceededError,
    Delta,
    FakeTransport,
    FinishReason,
    ProtocolError,
    RetryPolicy,
    ServerError,
    UnavailableError,
)
from kvmesh.protos import pb
from tests.client.killable_server import WORDS
from tests.client.servicer import (
    Action,
    ScriptedServicer,
    aborting,
    delta,
    failing,
    finished,
    reserved_port,
    serving,
    started,
    usage,
)

ENGINE_LOST = pb.Error(
    code=grpc.StatusCode.UNAVAILABLE.value[0],
    reason=pb.ERROR_REASON_ENGINE_LOST,
    message="the engine was lost",
)
EAGER = RetryPolicy(max_attempts=3, initial_backoff_s=0.001, max_backoff_s=0.002)


def events(*later: pb.GenerateStreamResponse) -> Action:
    def act(request: Any, context: grpc.ServicerContext) -> Iterator[pb.GenerateStreamResponse]:
        yield started(request)
        yield from later

    return act


def endless(request: Any, context: grpc.ServicerContext) -> Iterator[pb.GenerateStreamResponse]:
    yield started(request)
    position = 0
    while context.is_active():
        yield delta(position, "x", position)
        position += 1


def silent(request: Any, context: grpc.ServicerContext) -> Iterator[pb.GenerateStreamResponse]:
    """Two tokens, then nothing until the client disconnects."""
    yield started(request)
    yield delta(0, "a", 1)
    yield delta(1, "b", 2)
    gone = threading.Event()
    if context.add_callback(gone.set):
        gone.wait(60)


def collect(target: str, asynchronous: bool, **options: Any) -> tuple[list[Delta], Any]:
    """All deltas and the stream, with either client."""
    if not asynchronous:
        with Client(target, retry=EAGER) as client, client.generate_stream("hi", **options) as got:
            return list(got), got

    async def run() -> tuple[list[Delta], Any]:
        async with (
            AsyncClient(target, retry=EAGER) as client,
            client.generate_stream("hi", **options) as got,
        ):
            return [item async for item in got], got

    return asyncio.run(run())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_is_folded_into_its_completion(asynchronous: bool) -> None:
    servicer = ScriptedServicer(
        events(
            delta(0, "Größe ", 5, 6),
            delta(0, "B", 9, index=1),
            delta(2, "", 7),
            delta(3, "🦊", 8),
            pb.GenerateStreamResponse(
                choice_finished=pb.ChoiceFinished(
                    index=1, finish_reason=pb.FINISH_REASON_STOP, matched_stop_string="\n"
                )
            ),
            finished(),
            usage(prompt_tokens=3, completion_tokens=5, kv_format="int8"),
        )
    )
    with serving(servicer) as target:
        deltas, stream = collect(target, asynchronous, n=2)
    assert [d.text for d in deltas] == ["Größe ", "B", "", "🦊", "", ""]
    completion = stream.completion
    assert completion.text == "Größe 🦊"
    assert completion.choices[0].token_ids == (5, 6, 7, 8)
    assert completion.choices[1].matched_stop == "\n"
    assert completion.choices[1].finish_reason is FinishReason.STOP
    assert completion.seed == 7
    assert stream.usage.completion_tokens == 5
    assert stream.started.kv_format == "int8"
    assert stream.resumes == 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_request_at_fault_is_not_sent_again(asynchronous: bool) -> None:
    detail = pb.Error(
        code=grpc.StatusCode.INTERNAL.value[0],
        reason=pb.ERROR_REASON_REQUEST_FAULT,
        message="this request cannot be served",
    )

    def at_fault(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield started(request)
        yield delta(0, "one ", 11, 12)
        yield from failing(detail)(request, context)

    servicer = ScriptedServicer(at_fault)
    with serving(servicer) as target, pytest.raises(ServerError) as caught:
        collect(target, asynchronous)
    assert caught.value.reason == "REQUEST_FAULT"
    assert len(servicer.requests) == 1


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        aborting(grpc.StatusCode.UNAVAILABLE, "socket closed"),
        aborting(grpc.StatusCode.CANCELLED, "who knows why"),
        aborting(grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"),
        lambda request, context: iter(()),
    ],
    ids=["unavailable", "cancelled", "reset", "ok-without-an-end"],
)
def test_a_lost_stream_is_resumed_where_it_stopped(loss: Action, asynchronous: bool) -> None:
    def first(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield started(request)
        yield delta(0, "one ", 11, 12)
        yield finished(index=1)
        yield from loss(request, context)

    rest = events(delta(2, "two", 13), finished(), usage(completion_tokens=3))
    servicer = ScriptedServicer(first, aborting(grpc.StatusCode.UNAVAILABLE, "not yet"), rest)
    with serving(servicer) as target:
        deltas, stream = collect(target, asynchronous, request_id="same")
    assert [d.text for d in deltas] == ["one ", "", "two", ""]
    assert stream.completion.text == "one two"
    assert stream.resumes == 1
    first_request, *resumed = servicer.requests
    assert not first_request.HasField("resume")
    for request in resumed:
        assert request.request_id == "same"
        assert request.sampling_params.seed == 7
        assert request.resume.model_revision == "r1"
        assert [(c.index, list(c.token_ids), c.text_chars, c.finished) for c in
                request.resume.choices] == [(0, [11, 12], 4, False), (1, [], 0, True)]  # fmt: skip


class WatchedCall:
    """A call of a fake server; those that were made before it must have been ended."""

    def __init__(self, call: Any, before: list[WatchedCall]) -> None:
        self._call = call
        self.ended = False
        assert all(other.ended for other in before)
        before.append(self)

    def read(self) -> Any:
        return self._call.read()

    def cancel(self) -> None:
        self.ended = True
        self._call.cancel()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_lost_call_is_ended_before_the_next_is_made(asynchronous: bool) -> None:
    """Whether or not the transport has noticed that it is over."""
    calls: list[WatchedCall] = []
    fake: Any = (AsyncFakeTransport if asynchronous else FakeTransport)(["a b"])
    make = fake.stream
    fake.stream = lambda *args: WatchedCall(make(*args), calls)
    fake.server.fail(UnavailableError("gone"), after_tokens=1)

    async def read() -> list[str]:
        return [x.text async for x in AsyncClient(transport=fake).generate_stream("hi")]

    if asynchronous:
        texts = asyncio.run(read())
    else:
        texts = [x.text for x in Client(transport=fake).generate_stream("hi")]
    assert texts == ["a", " b", ""]
    assert [call.ended for call in calls] == [True, True]


def test_the_cursor_counts_text_in_code_points() -> None:
    def first(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield started(request)
        yield delta(0, "👩‍🚀é", 1)
        context.abort(grpc.StatusCode.UNAVAILABLE, "lost")

    servicer = ScriptedServicer(first, events(finished(), usage()))
    with serving(servicer) as target:
        collect(target, False)
    assert servicer.requests[1].resume.choices[0].text_chars == len("👩‍🚀é") == 4


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_of_a_killed_server_is_resumed_on_the_next(asynchronous: bool) -> None:
    with reserved_port() as port, killable(str(port)) as (process, target):
        with killed_at_third_token(process, target) as on_delta:
            texts = on_each_delta(target, asynchronous, on_delta)
        assert texts == [*WORDS, ""]


@contextmanager
def killable(port: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.client.killable_server", port],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@contextmanager
def killed_at_third_token(process: subprocess.Popen[str], target: str) -> Iterator[Any]:
    """Yields a callback that kills the server at the third delta and starts another."""
    successors: list[Any] = []
    count = 0

    def on_delta() -> None:
        nonlocal count
        count += 1
        if count == 3:
            process.kill()
            process.wait()
            successor = killable(target.rpartition(":")[2])
            successor.__enter__()
            successors.append(successor)

    try:
        yield on_delta
    finally:
        for successor in successors:
            successor.__exit__(None, None, None)


def on_each_delta(target: str, asynchronous: bool, on_delta: Any) -> list[str]:
    texts = []
    if not asynchronous:
        with Client(target) as client:
            for item in client.generate_stream("hi"):
                texts.append(item.text)
                on_delta()
        return texts

    async def run() -> None:
        async with AsyncClient(target) as client:
            async for item in client.generate_stream("hi"):
                texts.append(item.text)
                await asyncio.to_thread(on_delta)

    asyncio.run(run())
    return texts


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_without_progress_gives_up(asynchronous: bool) -> None:
    servicer = ScriptedServicer(failing(ENGINE_LOST))
    with serving(servicer) as target, pytest.raises(UnavailableError):
        collect(target, asynchronous)
    assert len(servicer.requests) == EAGER.max_attempts


def test_a_stream_that_ends_without_usage_is_lost() -> None:
    servicer = ScriptedServicer(events(delta(0, "a", 1)))
    with (
        serving(servicer) as target,
        Client(target, retry=NO_RETRY) as client,
        pytest.raises(UnavailableError, match="the stream ended early, without usage"),
    ):
        list(client.generate_stream("hi"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_only_output_is_progress(asynchronous: bool) -> None:
    """A stream that is started again and again, and then lost, is not tried forever."""

    def only_started(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield pb.GenerateStreamResponse(queued=pb.Queued())
        yield started(request)
        yield from failing(ENGINE_LOST)(request, context)

    servicer = ScriptedServicer(only_started)
    with serving(servicer) as target, pytest.raises(UnavailableError):
        collect(target, asynchronous)
    assert len(servicer.requests) == EAGER.max_attempts


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_connection_that_is_lost_after_the_usage_was_not_needed(asynchronous: bool) -> None:
    def complete(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield from events(delta(0, "a", 1), finished(), usage())(request, context)
        context.abort(grpc.StatusCode.UNAVAILABLE, "lost")

    servicer = ScriptedServicer(complete)
    with serving(servicer) as target:
        _, stream = collect(target, asynchronous)
    assert stream.completion.text == "a"
    assert (stream.resumes, len(servicer.requests)) == (0, 1)


def test_progress_resets_the_retry_count() -> None:
    def one_token(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        received = len(request.resume.choices[0].token_ids) if request.resume.choices else 0
        yield started(request)
        if received < 9:
            yield delta(received, "x", received)
            context.abort(grpc.StatusCode.UNAVAILABLE, "again")
        yield finished()
        yield usage()

    servicer = ScriptedServicer(one_token)
    with serving(servicer) as target:
        deltas, stream = collect(target, False)
    assert len(deltas) == 10
    assert stream.completion.text == "x" * 9


def test_scores_of_the_prompt_are_progress() -> None:
    def one_score(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        received = request.resume.prompt_logprobs_received
        yield started(request)
        if received < 9:
            yield prompt_logprobs(received)
            yield from failing(ENGINE_LOST)(request, context)
        yield from (delta(0, "a", 1), finished(), usage())

    servicer = ScriptedServicer(one_score)
    with serving(servicer) as target:
        _, stream = collect(target, False, prompt_logprobs=0)
    assert len(stream.completion.prompt_logprobs) == 9


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (events(delta(1, "gap", 5)), "has 0 tokens, but the delta starts at token 1"),
        (events(delta(0, "a", 5), delta(0, "a", 5)), "has 1 tokens, but the delta starts at"),
        (events(finished(), delta(0, "late", 5)), "output of choice 0 after it finished"),
        (events(delta(0, "a", 5), usage()), "usage before choice 0 finished"),
        (events(usage()), "usage before any output"),
        (events(finished(), usage(), delta(0, "later", 5)), "an event after usage"),
        (lambda request, context: iter([delta(0, "unannounced", 5)]), "output before started"),
    ],
    ids=["gap", "repeat", "late", "unfinished", "empty", "after-usage", "not-started"],
)
def test_a_stream_that_violates_the_contract_is_refused(
    broken: Action, what: str, asynchronous: bool
) -> None:
    servicer = ScriptedServicer(broken)
    with serving(servicer) as target, pytest.raises(ProtocolError, match=what):
        collect(target, asynchronous)
    assert servicer.ended.wait(60)


def test_events_of_a_newer_server_are_skipped() -> None:
    unknown = pb.GenerateStreamResponse.FromString(b"\xa2\x06\x00")
    servicer = ScriptedServicer(events(unknown, finished(), usage()))
    with serving(servicer) as target:
        _, stream = collect(target, False)
    assert stream.completion.text == ""


def test_leaving_a_loop_cancels_the_call() -> None:
    servicer = ScriptedServicer(endless)
    with serving(servicer) as target, Client(target) as client:
        stream = client.generate_stream("hi")
        for _ in stream:
            break
        assert servicer.ended.wait(60)
        with pytest.raises(ClosedError):
            iter(stream)
        with pytest.raises(ClosedError):
            _ = stream.completion


def test_an_exception_in_a_with_block_cancels_the_call() -> None:
    servicer = ScriptedServicer(endless)
    with serving(servicer) as target, Client(target) as client:
        with pytest.raises(KeyError), client.generate_stream("hi") as stream:
            iterator = iter(stream)
            next(iterator)
            raise KeyError
        assert servicer.ended.wait(60)
        with pytest.raises(ClosedError):
            list(iterator)


def test_a_blocked_stream_can_be_closed_from_another_thread() -> None:
    servicer = ScriptedServicer(silent)
    with serving(servicer) as target, Client(target) as client:
        stream = client.generate_stream("hi")
        iterator = iter(stream)
        next(iterator)
        next(iterator)
        closer = threading.Timer(0.05, stream.close)
        closer.start()
        with pytest.raises(ClosedError):
            next(iterator)
        closer.join()
        assert servicer.ended.wait(60)


async def seen(servicer: ScriptedServicer) -> bool:
    return await asyncio.to_thread(servicer.ended.wait, 60)


async def test_leaving_an_async_loop_cancels_the_call() -> None:
    servicer = ScriptedServicer(endless)
    with serving(servicer) as target:
        async with AsyncClient(target) as client:
            async for _ in client.generate_stream("hi"):
                break
            assert await seen(servicer)


async def test_closing_an_async_iterator_cancels_the_call() -> None:
    servicer = ScriptedServicer(silent)
    with serving(servicer) as target:
        async with AsyncClient(target) as client:
            iterator = aiter(client.generate_stream("hi"))
            await anext(iterator)
            await iterator.aclose()
            assert await seen(servicer)


async def test_cancelling_a_task_cancels_the_call() -> None:
    servicer = ScriptedServicer(silent)
    with serving(servicer) as target:
        async with AsyncClient(target) as client:
            received: asyncio.Queue[Delta] = asyncio.Queue()

            async def consume() -> None:
                async for item in client.generate_stream("hi"):
                    received.put_nowait(item)

            task = asyncio.create_task(consume())
            await received.get()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await seen(servicer)
    assert len(servicer.requests) == 1, "a cancelled call is not retried"


async def test_cancelling_a_task_that_awaits_a_reply_ends_it() -> None:
    arrived, over = threading.Event(), threading.Event()

    def hold(request: Any, context: grpc.ServicerContext) -> pb.TokenizeResponse:
        arrived.set()
        over.wait(60)
        return pb.TokenizeResponse()

    servicer = ScriptedServicer(hold)
    with serving(servicer) as target:
        async with AsyncClient(target) as client:
            task = asyncio.create_task(client.tokenize("hi"))
            assert await asyncio.to_thread(arrived.wait, 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        over.set()
    assert len(servicer.requests) == 1, "it is not made again"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_silent_server_exceeds_the_deadline(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmesh.client.flows.GRACE_S", 0.0)
    servicer = ScriptedServicer(silent)
    with serving(servicer) as target, pytest.raises(DeadlineExceededError):
        collect(target, asynchronous, timeout_s=0.3)
    # None arrives if the machine is too busy for it.
    assert len(servicer.requests) <= 1
    assert all(0 < request.timeout_s <= 0.3 for request in servicer.requests)


def prompt_logprobs(*token_ids: int) -> pb.GenerateStreamResponse:
    columns = pb.Logprobs(
        chosen=[-float(token) for token in token_ids],
        chosen_bytes=[b"%d" % token for token in token_ids],
        chosen_token_ids=token_ids,
    )
    return pb.GenerateStreamResponse(prompt_logprobs=columns)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_resumed_stream_asks_for_the_prompts_logprobs_that_it_lacks(asynchronous: bool) -> None:
    def broken(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield started(request)
        yield prompt_logprobs(1, 2)
        yield prompt_logprobs(3)
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    servicer = ScriptedServicer(
        broken, events(prompt_logprobs(4, 5), delta(0, "a", 7), finished(), usage())
    )
    with serving(servicer) as target:
        _, stream = collect(target, asynchronous, prompt_logprobs=0)
    assert servicer.requests[1].resume.prompt_logprobs_received == 3
    found = stream.completion.prompt_logprobs
    assert [entry.chosen.token_id for entry in found] == [1, 2, 3, 4, 5]
    assert [entry.chosen.logprob for entry in found] == [-1, -2, -3, -4, -5]
    assert [entry.chosen.text for entry in found] == ["1", "2", "3", "4", "5"]


def test_a_cursor_has_the_prompts_logprobs() -> None:
    servicer = ScriptedServicer(
        events(prompt_logprobs(1, 2), delta(0, "a", 7), delta(1, "b", 8)),
        events(delta(1, "b", 8), finished(), usage()),
    )
    with serving(servicer) as target, Client(target, retry=EAGER) as client:
        with client.generate_stream("hi", prompt_logprobs=0) as stream:
            next(stream)
            cursor = stream.cursor
        with client.resume(cursor) as other:
            received = servicer.requests
            list(other.events())
    assert received[-1].resume.prompt_logprobs_received == 2
    assert [entry.chosen.token_id for entry in other.completion.prompt_logprobs] == [1, 2]
