"""Streams that wait: what callers see of it, and how a lost server differs from a slow one."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from kvmesh import (
    NO_RETRY,
    AsyncClient,
    AsyncFakeTransport,
    Client,
    Delta,
    FakeTransport,
    InvalidRequestError,
    Prefilling,
    Queued,
    RetryPolicy,
    Started,
    StreamEvent,
    UnavailableError,
    Usage,
)
from kvmesh.client import grpc_transport
from kvmesh.protos import pb
from tests.client.servicer import (
    Action,
    ScriptedServicer,
    delta,
    finished,
    serving,
    started,
    usage,
)

WAITS = (Queued(2, 8.0), Queued(0, None), Prefilling(512, 0, 2048), Prefilling(1024, 512, 2048))
EAGER = RetryPolicy(max_attempts=3, initial_backoff_s=0.001, max_backoff_s=0.002)


def as_events(request: Any, context: grpc.ServicerContext) -> Iterator[pb.GenerateStreamResponse]:
    yield pb.GenerateStreamResponse()
    yield pb.GenerateStreamResponse(queued=pb.Queued(position=2, projected_wait_s=8.0))
    yield pb.GenerateStreamResponse(queued=pb.Queued())
    yield started(request)
    for computed, cached in ((512, 0), (1024, 512)):
        yield pb.GenerateStreamResponse(
            prefilling=pb.Prefilling(
                computed_tokens=computed, cached_tokens=cached, total_tokens=2048
            )
        )
    yield delta(0, "a", 1)
    yield finished()
    yield usage()


def read_events(client: Client) -> tuple[list[StreamEvent], Any]:
    with client.generate_stream("hi") as stream:
        return list(stream.events()), stream


async def read_async_events(client: AsyncClient) -> tuple[list[StreamEvent], Any]:
    async with client, client.generate_stream("hi") as stream:
        return [event async for event in stream.events()], stream


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_tells_why_it_waits(asynchronous: bool) -> None:
    with serving(ScriptedServicer(as_events)) as target:
        if asynchronous:
            events, stream = asyncio.run(read_async_events(AsyncClient(target)))
        else:
            with Client(target) as client:
                events, stream = read_events(client)
    assert isinstance(events[2], Started)
    assert (*events[:2], *events[3:5]) == WAITS
    assert [type(event) for event in events[5:]] == [Delta, Delta, Usage]
    assert events[-1] == stream.usage
    assert (stream.queued, stream.prefilling) == (WAITS[1], WAITS[3])
    assert stream.completion.text == "a"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_fake_server_can_make_its_client_wait(asynchronous: bool) -> None:
    if asynchronous:
        fake: Any = AsyncFakeTransport(["Paris"])
        fake.server.wait(*WAITS)
        events, stream = asyncio.run(read_async_events(AsyncClient(transport=fake)))
    else:
        fake = FakeTransport(["Paris"])
        fake.server.wait(*WAITS)
        events, stream = read_events(Client(transport=fake))
    assert [event for event in events if isinstance(event, Queued | Prefilling)] == list(WAITS)
    assert stream.completion.text == "Paris"
    assert stream.resumes == 0


def test_who_reads_only_output_sees_only_output() -> None:
    fake = FakeTransport(["Paris", "Rome"])
    fake.server.wait(*WAITS)
    client = Client(transport=fake)
    assert [item.text for item in client.generate_stream("hi")] == ["Paris", ""]
    assert not [x for x in read_events(client)[0] if isinstance(x, Queued | Prefilling)]


# Silence


class Silent:
    """Streams that end with silence; `heard` is set when one's call has ended."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def __call__(
        self, request: Any, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateStreamResponse]:
        yield started(request)
        yield delta(0, "a", 1)
        assert context.add_callback(self.cancelled.set)
        assert self.cancelled.wait(60)


def rest(request: Any, context: grpc.ServicerContext) -> Iterator[pb.GenerateStreamResponse]:
    assert list(request.resume.choices[0].token_ids) == [1]
    yield started(request)
    yield delta(1, "b", 2)
    yield finished()
    yield usage()


def limit_silence(stream: Any, seconds: float) -> None:
    """From now on, and for this call alone: not until the server has answered it."""
    call = stream._call
    call._silence_timeout_s = seconds
    if isinstance(call, grpc_transport.GrpcStreamCall):
        call._ended.put(None)
        call._ended = queue.SimpleQueue()
        call._watch(seconds)


def read_silent(target: str, asynchronous: bool, retry: RetryPolicy) -> Any:
    """A stream whose silence counts from its first token."""

    async def read() -> Any:
        async with (
            AsyncClient(target, retry=retry, silence_timeout_s=1000.0) as client,
            client.generate_stream("hi") as stream,
        ):
            async for event in stream.events():
                if isinstance(event, Delta) and event.token_ids == (1,):
                    limit_silence(stream, 0.1)
            return stream

    if asynchronous:
        return asyncio.run(read())
    with (
        Client(target, retry=retry, silence_timeout_s=1000.0) as client,
        client.generate_stream("hi") as stream,
    ):
        for event in stream.events():
            if isinstance(event, Delta) and event.token_ids == (1,):
                limit_silence(stream, 0.1)
        return stream


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_silent_stream_is_lost_and_resumed(asynchronous: bool) -> None:
    silent = Silent()
    with serving(ScriptedServicer(silent, rest)) as target:
        stream = read_silent(target, asynchronous, EAGER)
        assert silent.cancelled.wait(60)
    assert stream.completion.text == "ab"
    assert stream.resumes == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_silent_stream_that_is_not_resumed_says_so(asynchronous: bool) -> None:
    with (
        serving(ScriptedServicer(Silent())) as target,
        pytest.raises(UnavailableError, match=r"the server has sent nothing for 0\.1 s"),
    ):
        read_silent(target, asynchronous, NO_RETRY)


def test_a_reader_that_pauses_is_not_a_silent_server() -> None:
    """The limit is on how long a read waits."""
    with (
        serving(ScriptedServicer(as_events)) as target,
        Client(target, retry=NO_RETRY, silence_timeout_s=1000.0) as client,
        client.generate_stream("hi") as stream,
    ):
        for event in stream.events():
            if isinstance(event, Started):
                limit_silence(stream, 0.1)
                threading.Event().wait(0.3)
                limit_silence(stream, 1000.0)
        assert stream.completion.text == "a"


def held() -> ScriptedServicer:
    """Its streams begin, and then stay open until their readers end them."""

    def act(request: Any, context: grpc.ServicerContext) -> Iterator[pb.GenerateStreamResponse]:
        yield started(request)
        yield delta(0, "a", 1)
        assert servicer.ended.wait(60)

    servicer = ScriptedServicer(act)
    return servicer


@pytest.mark.parametrize("silence_timeout_s", [None, 1000.0])
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_stream_that_nothing_refers_to_ends_its_call(
    in_thread: bool, silence_timeout_s: float | None
) -> None:
    """Whether its silence is watched or not; garbage is collected in any thread."""
    servicer = held()
    with (
        serving(servicer) as target,
        Client(target, silence_timeout_s=silence_timeout_s) as client,
    ):
        streams = [client.generate_stream("hi")]
        next(streams[0])
        if in_thread:
            thread = threading.Thread(target=streams.clear)
            thread.start()
            thread.join()
        streams.clear()
        assert servicer.ended.wait(60)


@pytest.mark.parametrize("in_thread", [False, True])
async def test_a_stream_of_the_asyncio_client_that_nothing_refers_to_ends_its_call(
    in_thread: bool,
) -> None:
    servicer = held()
    with serving(servicer) as target:
        async with AsyncClient(target) as client:
            streams = [client.generate_stream("hi")]
            await anext(streams[0])
            if in_thread:
                await asyncio.to_thread(streams.clear)
            streams.clear()
            assert await asyncio.to_thread(servicer.ended.wait, 60)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_limit_must_be_positive(kind: Any, seconds: float) -> None:
    with pytest.raises(InvalidRequestError, match="silence_timeout_s"):
        kind("localhost:1", api_key="", silence_timeout_s=seconds)


# Pings. Times are scaled down by FACTOR; gRPC sends at most one ping a second.

FACTOR = 150
PINGS = 4  # one more than a server lets pass if they come too soon


def scaled(options: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (name, value // FACTOR if name == "grpc.keepalive_time_ms" else value)
        for name, value in options
    )


def after_silence(seconds: float, action: Action) -> Action:
    """`action`, once its call has ended or this time is over."""

    def act(request: Any, context: grpc.ServicerContext) -> Any:
        gone = threading.Event()
        assert context.add_callback(gone.set)
        gone.wait(seconds)
        return action(request, context)

    return act


@pytest.mark.slow
def test_a_long_silence_does_not_end_a_connection_with_too_many_pings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With servers' default, at most one ping in 5 minutes without data."""
    options = dict(grpc_transport._CHANNEL_OPTIONS)
    keepalive_ms = options["grpc.keepalive_time_ms"]
    assert isinstance(keepalive_ms, int)
    silence_s = (PINGS + 0.5) * keepalive_ms / 1000 / FACTOR
    server = ("grpc.http2.min_ping_interval_without_data_ms", 300_000 // FACTOR)

    def attempt() -> None:
        servicer = ScriptedServicer(after_silence(silence_s, as_events))
        with serving(servicer, options=(server,)) as target:
            transport = grpc_transport.GrpcTransport.connect(target, None)
            with Client(retry=NO_RETRY, transport=transport) as client:
                assert len(read_events(client)[0]) == 8

    monkeypatch.setattr(grpc_transport, "_CHANNEL_OPTIONS", scaled(tuple(options.items())))
    attempt()
    often = {**options, "grpc.keepalive_time_ms": 60_000}
    monkeypatch.setattr(grpc_transport, "_CHANNEL_OPTIONS", scaled(tuple(often.items())))
    with pytest.raises(UnavailableError, match="Too many pings"):
        attempt()


def test_a_call_that_its_reader_ends_is_watched_no_longer() -> None:
    before = set(threading.enumerate())
    call = grpc_transport.GrpcStreamCall(SimpleNamespace(cancel=lambda: None), 1000.0)
    (watch,) = [x for x in {*threading.enumerate()} - before if x.name == "kvmesh-silence"]
    call.cancel()
    watch.join(60)
    assert not watch.is_alive()
