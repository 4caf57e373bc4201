"""The asyncio client."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from kvmesh.client import requests, responses
from kvmesh.client.core import (
    DEFAULT_SILENCE_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
    Core,
    check_silence_timeout,
    connection,
)
from kvmesh.client.errors import ClosedError
from kvmesh.client.flows import Emit, Now, Open, Read, Send, Sleep, StreamFlow, UnaryFlow
from kvmesh.client.grpc_transport import AsyncGrpcTransport
from kvmesh.client.options import TLS, GenerateOptions, Messages, Prompt, RetryPolicy
from kvmesh.client.stream_state import StreamState
from kvmesh.client.stream_view import StreamView
from kvmesh.client.transport import AsyncStreamCall, AsyncTransport, RpcFailure
from kvmesh.client.types import (
    Completion,
    Delta,
    Estimate,
    Explanation,
    GroupFacts,
    Loads,
    ModelInfo,
    Prefilling,
    Queued,
    Started,
    StreamEvent,
    TenantLoads,
    Tokens,
)
from kvmesh.protos import pb

T = TypeVar("T")
Event = TypeVar("Event", bound=StreamEvent)


class AsyncClient:
    """A client of one kvmesh cluster, for use in one event loop.

        async with AsyncClient() as client:
            print((await client.generate("The capital of France is", max_tokens=8)).text)
            async for delta in client.chat_stream([Message("user", "Hello!")]):
                print(delta.text, end="", flush=True)

    target: host:port; default $KVMESH_TARGET, then localhost:9000
    api_key: default $KVMESH_API_KEY, then the local server's key file; "" sends no key
    tls: True uses the system's root certificates; TLS(...) sets others; False sends the
        key and the text unencrypted
    timeout_s: default for generations that set none; None means no limit
    retry: how many retries to make and how long to wait between them
    silence_timeout_s: a stream that receives nothing for this long is taken for lost, and
        resumed. A server sends something at least every 5 s, except for version 0.1, which is
        silent while it works on a prompt; None means no limit
    transport: replaces gRPC, e.g. AsyncFakeTransport
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        api_key: str | None = None,
        tls: TLS | bool = False,
        timeout_s: float | None = None,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        silence_timeout_s: float | None = DEFAULT_SILENCE_TIMEOUT_S,
        transport: AsyncTransport | None = None,
    ) -> None:
        check_silence_timeout(silence_timeout_s)
        if transport is None:
            where = connection(target, api_key, tls)
            transport = AsyncGrpcTransport(
                where.target, where.api_key, where.tls, silence_timeout_s
            )
        self._transport = transport
        self._core = Core(retry, timeout_s, random.Random())

    async def generate(
        self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Continue a prompt given as text or token ids; returns the whole output."""
        message = requests.prompt_message(prompt)
        return responses.completion(await self._run(self._core.generate(message, options)))

    def generate_stream(
        self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]
    ) -> AsyncStream:
        """Continue a prompt; returns a stream that yields output as it is generated."""
        return self._stream(requests.prompt_message(prompt), options)

    async def chat(self, messages: Messages, **options: Unpack[GenerateOptions]) -> Completion:
        """Answer a chat rendered with the model's template; returns the whole output."""
        message = requests.chat_message(messages)
        return responses.completion(await self._run(self._core.generate(message, options)))

    def chat_stream(self, messages: Messages, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Answer a chat; returns a stream that yields output as it is generated."""
        return self._stream(requests.chat_message(messages), options)

    async def tokenize(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> Tokens:
        """The token ids that a generation would use for this prompt."""
        return responses.mirror(
            Tokens, await self._run(self._core.tokenize(prompt, model, timeout_s))
        )

    async def estimate(
        self,
        prompt: Prompt | None = None,
        *,
        prompt_tokens: int | None = None,
        max_tokens: int | None = None,
        n: int | None = None,
        priority: int | None = None,
        allowed_kv_formats: Sequence[str] | None = None,
        max_kv_divergence_nats: float | None = None,
        model: str | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> Estimate:
        """What a request would need and when it could start, without submitting it.

        Give the prompt itself, or only its length to avoid sending megabytes.
        """
        request = requests.estimate_request(
            prompt,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            n=n,
            priority=priority,
            allowed_kv_formats=allowed_kv_formats,
            max_kv_divergence_nats=max_kv_divergence_nats,
            model=model,
        )
        return responses.mirror(Estimate, await self._run(self._core.estimate(request, timeout_s)))

    async def abort(self, request_id: str, *, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> bool:
        """End a request made with the same key; returns whether it was found."""
        return (await self._run(self._core.abort(request_id, timeout_s))).aborted

    async def explain(
        self, request_id: str, *, timeout_s: float | None = DEFAULT_TIMEOUT_S
    ) -> Explanation:
        """The placement decisions for a request made with the same key, with the reasons.

        The list is empty if the request is not known.
        """
        reply = await self._run(self._core.explain(request_id, timeout_s))
        return responses.mirror(Explanation, reply)

    async def model_info(self, *, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> ModelInfo:
        """The served model and its groups."""
        return responses.mirror(ModelInfo, await self._run(self._core.model_info(timeout_s)))

    async def tenant_loads(self, *, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> TenantLoads:
        """What this key's tenant is using, and may use."""
        return responses.mirror(TenantLoads, await self._run(self._core.tenant_loads(timeout_s)))

    async def groups(
        self, *, timeout_s: float | None = DEFAULT_TIMEOUT_S
    ) -> tuple[GroupFacts, ...]:
        """What each group is made of. Needs an admin key."""
        reply = await self._run(self._core.groups(timeout_s))
        return tuple(responses.mirror(GroupFacts, group) for group in reply.groups)

    async def loads(self, *, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> Loads:
        """The current load of the groups and the router. Needs an admin key."""
        return responses.mirror(Loads, await self._run(self._core.loads(timeout_s)))

    async def close(self) -> None:
        """Close the connection; calls in progress fail."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _stream(self, prompt: pb.Prompt, options: GenerateOptions) -> AsyncStream:
        state, flow = self._core.generate_stream(prompt, options)
        return AsyncStream(self._transport, state, flow)

    async def _run(self, flow: UnaryFlow[T]) -> T:
        """Execute the steps of a unary flow."""
        try:
            step = next(flow)
            while True:
                try:
                    outcome: Any = None
                    match step:
                        case Now():
                            outcome = self._transport.now()
                        case Sleep(seconds):
                            await self._transport.sleep(seconds)
                        case Send(method, request, timeout_s):
                            outcome = await self._transport.unary(method, request, timeout_s)
                except RpcFailure as failure:
                    step = flow.throw(failure)
                else:
                    step = flow.send(outcome)
        except StopIteration as stop:
            result: T = stop.value
            return result


class AsyncStream(StreamView):
    """Output as it is generated; can be iterated over once.

        async with client.generate_stream("Once upon a time") as stream:
            async for delta in stream:
                print(delta.text, end="", flush=True)
        print(stream.completion.usage)

    Leaving the loop or the `async with` block ends the request on the server.
    A lost connection is resumed where it stopped; no token is emitted twice.
    """

    def __init__(self, transport: AsyncTransport, state: StreamState, flow: StreamFlow) -> None:
        super().__init__(state)
        self._transport = transport
        self._flow = flow
        self._iterated = False
        self._call: AsyncStreamCall | None = None
        self._closed = False

    def __aiter__(self) -> AsyncGenerator[Delta]:
        return self._run(Delta)

    def events(self) -> AsyncGenerator[StreamEvent]:
        """Everything that is worth showing, instead of the output alone.

        Queued and Prefilling may come at any time before the output ends, most often before
        its first token, and say the same again when there is nothing new for some seconds.
        """
        return self._run(Queued, Started, Prefilling, Delta)

    async def aclose(self) -> None:
        """End the request on the server."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _run(self, *kinds: type[Event]) -> AsyncGenerator[Event]:
        if self._iterated or self._closed:
            raise ClosedError("a stream can only be iterated over once")
        self._iterated = True
        return self._execute(kinds)

    async def _execute(self, kinds: tuple[type[Event], ...]) -> AsyncGenerator[Event]:
        """Execute the steps of the flow; yields events of these kinds."""
        try:
            step = next(self._flow)
            while True:
                try:
                    outcome: Any = None
                    match step:
                        case Now():
                            outcome = self._transport.now()
                        case Sleep(seconds):
                            await self._transport.sleep(seconds)
                        case Open(request, timeout_s):
                            self._open(request, timeout_s)
                        case Read():
                            outcome = await self._read()
                        case Emit(event):
                            if isinstance(event, kinds):
                                yield event
                    self._check_open()
                except RpcFailure as failure:
                    self._check_open()
                    step = self._flow.throw(failure)
                else:
                    step = self._flow.send(outcome)
        except StopIteration:
            return
        finally:
            await self.aclose()

    def _open(self, request: pb.GenerateRequest, timeout_s: float | None) -> None:
        if self._call is not None:
            self._call.cancel()
        self._call = self._transport.stream(request, timeout_s)

    async def _read(self) -> pb.GenerateStreamResponse | None:
        assert self._call is not None
        return await self._call.read()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the stream has been closed")
