"""How streams are read: in a loop, one by one, all events, with both clients."""

from __future__ import annotations

import itertools

import pytest

from kvmesh import (
    AsyncClient,
    AsyncFakeTransport,
    Client,
    ClosedError,
    Delta,
    FakeTransport,
    FinishReason,
    Prefilling,
    Queued,
    ServerError,
    Started,
    Stream,
    Usage,
)

WAITS = (Queued(2, 8.0), Prefilling(512, 0, 2048))


def stream_of(fake: FakeTransport) -> Stream:
    return Client(transport=fake).generate_stream("hi")


def test_deltas_can_be_taken_one_by_one() -> None:
    fake = FakeTransport(["a b"])
    stream = stream_of(fake)
    assert next(stream) == Delta(0, "a", (0,))
    assert fake.server.open_streams == 1, "taking one delta leaves the request running"
    assert next(stream) == Delta(0, " b", (1,))
    assert next(stream) == Delta(0, "", finish_reason=FinishReason.STOP, finish_reason_number=1)
    assert next(stream, None) is None
    assert next(stream, None) is None
    assert stream.completion.text == "a b"
    assert fake.server.open_streams == 0


async def test_deltas_can_be_awaited_one_by_one() -> None:
    fake = AsyncFakeTransport(["a b"])
    stream = AsyncClient(transport=fake).generate_stream("hi")
    assert await anext(stream) == Delta(0, "a", (0,))
    assert fake.server.open_streams == 1
    assert [delta.text async for delta in stream] == [" b", ""]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert stream.completion.text == "a b"


def test_a_stream_that_nothing_refers_to_ends() -> None:
    fake = FakeTransport(["a b"])
    stream = stream_of(fake)
    next(stream)
    del stream
    assert fake.server.open_streams == 0
    left = iter(stream_of(fake))
    next(left)
    assert fake.server.open_streams == 1, "a loop refers to its stream"
    del left
    assert fake.server.open_streams == 0
    list(stream_of(fake))
    assert fake.server.open_streams == 0, "it has ended before"


async def test_a_stream_of_the_asyncio_client_that_nothing_refers_to_ends() -> None:
    fake = AsyncFakeTransport(["a b"])
    stream = AsyncClient(transport=fake).generate_stream("hi")
    await anext(stream)
    assert fake.server.open_streams == 1
    del stream
    assert fake.server.open_streams == 0


def test_a_loop_continues_after_what_was_taken() -> None:
    fake = FakeTransport(["a b c d"])
    stream = stream_of(fake)
    assert next(stream).text == "a"
    with stream:
        texts = [delta.text for delta in itertools.islice(stream, 2)]
    assert texts == [" b", " c"]
    assert fake.server.open_streams == 0, "a loop that is left ends the request"
    with pytest.raises(ClosedError):
        next(stream)


def test_events_are_everything_in_order() -> None:
    fake = FakeTransport(["a b"])
    fake.server.wait(*WAITS)
    with stream_of(fake) as stream:
        events = list(stream.events())
    assert [type(event) for event in events] == [
        Queued, Started, Prefilling, Delta, Delta, Delta, Usage,
    ]  # fmt: skip
    assert (events[0], events[2]) == WAITS
    assert events[1] == stream.started
    assert events[-1] == stream.usage


async def test_async_events_are_everything_in_order() -> None:
    fake = AsyncFakeTransport(["a"])
    fake.server.wait(*WAITS)
    async with AsyncClient(transport=fake).generate_stream("hi") as stream:
        kinds = [type(event) async for event in stream.events()]
    assert kinds == [Queued, Started, Prefilling, Delta, Delta, Usage]


def test_leaving_at_the_usage_loses_nothing() -> None:
    stream = stream_of(FakeTransport(["a"]))
    usage = next(event for event in stream.events() if isinstance(event, Usage))
    assert stream.completion.usage == usage


def test_a_stream_is_read_once() -> None:
    stream = stream_of(FakeTransport(["a"]))
    list(stream)
    for read in (lambda: iter(stream), stream.events):
        with pytest.raises(ClosedError, match="can be iterated over once"):
            read()


def test_a_failed_stream_does_not_look_finished() -> None:
    fake = FakeTransport(["a b"])
    fake.server.fail(ServerError("broken"), after_tokens=1)
    stream = stream_of(fake)
    assert next(stream).text == "a"
    with pytest.raises(ServerError):
        next(stream)
    with pytest.raises(ClosedError):
        next(stream)
    assert fake.server.open_streams == 0


def test_a_stream_that_is_never_read_sends_nothing() -> None:
    fake = FakeTransport()
    with stream_of(fake):
        pass
    assert not fake.server.requests
