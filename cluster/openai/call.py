"""One call over HTTP: what the front knows of it, and the replies that end it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import msgspec
from starlette.responses import Response, StreamingResponse

from kvmesh.cluster.ingress.error_table import http_status, reason_label
from kvmesh.cluster.openai import sse
from kvmesh.cluster.openai.failures import error_headers, error_reply
from kvmesh.cluster.openai.names import Renames, openai_names, prompt_names
from kvmesh.v1 import kvmesh_pb2 as pb

LONG_BODY_BYTES = 1 << 16  # parsing more would delay every stream
HOLD_S = 4.0  # until a stream that only waits begins its reply, without knowing how it ends
KV_BYTES = "x-kvmesh-kv-bytes"

T = TypeVar("T")
Event = pb.GenerateStreamResponse
_parsers = ThreadPoolExecutor(2, "kvmesh-json")


class ContractQuestions(Protocol):
    """The calls of the wire contract that generate nothing, as far as this API needs them."""

    async def tokenize(self, request: pb.TokenizeRequest, tenant: str) -> pb.TokenizeResponse: ...

    async def detokenize(
        self, request: pb.DetokenizeRequest, tenant: str
    ) -> pb.DetokenizeResponse: ...

    async def get_model_info(
        self, request: pb.GetModelInfoRequest, tenant: str
    ) -> pb.GetModelInfoResponse: ...


class Contract(Protocol):
    """The calls of the wire contract that this API is made of."""

    @property
    def ready(self) -> bool: ...

    @property
    def questions(self) -> ContractQuestions: ...

    def generate_stream(
        self, request: pb.GenerateRequest, tenant: str
    ) -> AsyncGenerator[Event, None]: ...


@dataclass(slots=True)
class HttpCall:
    """A call whose caller is known and whose body has arrived.

    headers: with lower-case names
    report: logs an error, and returns it as clients see it
    opened: closed when the call ends, however it ends
    outcome: for metrics
    """

    tenant: str
    request_id: str
    headers: Mapping[str, str]
    report: Callable[[Exception], pb.Error]
    body: bytes = b""
    opened: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    outcome: str = "ok"

    async def read(self, parse: Callable[[bytes], T]) -> T:
        """What `parse` makes of the body, which is dropped; in a thread if it is long."""
        body, self.body = self.body, b""
        if len(body) <= LONG_BODY_BYTES:
            return parse(body)
        return await asyncio.get_running_loop().run_in_executor(_parsers, parse, body)

    def fail(self, error: Exception) -> tuple[pb.Error, int]:
        """The error as clients see it, and its status."""
        wire = self.report(error)
        self.outcome = reason_label(wire)
        return wire, http_status(error)

    def failed(self, error: Exception) -> Response:
        wire, status = self.fail(error)
        return reply(error_reply(wire, status), status, error_headers(wire, status))

    async def events(
        self,
        contract: Contract,
        requests: Sequence[pb.GenerateRequest],
        places: Sequence[str] = (),
    ) -> EventSource:
        """Begin to generate; the events of all requests, each with its request's index.

        places: of the requests' prompts in the body, which errors name
        """
        streams = [contract.generate_stream(request, self.tenant) for request in requests]
        if places:
            streams = [_placed(*pair) for pair in zip(streams, places, strict=True)]
        merged = await self.opened.enter_async_context(contextlib.aclosing(_merged(streams)))
        return EventSource(merged, len(requests))

    def stream(
        self, source: EventSource, chunks: AsyncIterator[bytes], renames: Renames
    ) -> StreamingResponse:
        """The reply that sends these chunks as they come, and an error if they end with one.

        renames: of fields that an error names
        """

        async def guarded() -> AsyncIterator[bytes]:
            try:
                with openai_names(renames):
                    async for chunk in chunks:
                        yield chunk
            except Exception as error:
                yield sse.data(error_reply(*self.fail(error)))

        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        if source.kv_bytes is not None:
            headers[KV_BYTES] = str(source.kv_bytes)
        return StreamingResponse(guarded(), media_type="text/event-stream", headers=headers)


class EventSource:
    """The events of one or more generations, as (index, event).

    kv_bytes: reserved for the generation, if there is only one and it has a place
    """

    def __init__(self, events: AsyncGenerator[tuple[int, Event], None], number: int) -> None:
        self._number = number
        self._events = events
        self._seen: list[tuple[int, Event]] = []
        self.kv_bytes: int | None = None

    async def begin(self) -> None:
        """Wait until there is output to come, so that a refusal still gets its own status.

        A request that waits for long begins its reply all the same, to keep proxies awake.
        Raises what the generation raises.
        """
        loop = asyncio.get_running_loop()
        arrived_s = loop.time()
        async for index, event in self._events:
            self._seen.append((index, event))
            if event.WhichOneof("event") == "started":
                if self._number == 1:
                    self.kv_bytes = event.started.kv_reserved_bytes
                return
            if sse.comment(event) is None or loop.time() - arrived_s >= HOLD_S:
                return

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        for pair in self._seen:
            yield pair
        self._seen.clear()
        async for pair in self._events:
            yield pair


async def _placed(stream: AsyncGenerator[Event, None], place: str) -> AsyncGenerator[Event, None]:
    """A stream whose errors name the place of its prompt."""
    with openai_names(prompt_names(place)):
        async with contextlib.aclosing(stream):
            async for event in stream:
                yield event


async def _merged(
    streams: Sequence[AsyncGenerator[Event, None]], at_once: int = 16
) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of several streams as they come, `at_once` of them at a time.

    The first error ends all of them.
    """
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as only:
            async for event in only:
                yield 0, event
        return
    ready: asyncio.Queue[tuple[int, Event] | Exception | None] = asyncio.Queue(maxsize=1)
    turns = asyncio.Semaphore(at_once)

    async def pump(index: int, stream: AsyncGenerator[Event, None]) -> None:
        try:
            async with turns, contextlib.aclosing(stream):
                async for event in stream:
                    await ready.put((index, event))
            await ready.put(None)
        except Exception as error:
            await ready.put(error)

    pumps = [asyncio.create_task(pump(index, x)) for index, x in enumerate(streams)]
    try:
        running = len(pumps)
        while running:
            match await ready.get():
                case None:
                    running -= 1
                case Exception() as error:
                    raise error
                case pair:
                    yield pair
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def reply(
    payload: msgspec.Struct, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(msgspec.json.encode(payload), status, headers, media_type="application/json")
