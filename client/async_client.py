"""The asyncio client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

from kvmesh.client import requests, responses
from kvmesh.client.async_generations import AsyncGenerations
from kvmesh.client.async_stream import AsyncStream
from kvmesh.client.checks import check_metadata, check_seconds
from kvmesh.client.core import DEFAULT_SILENCE_TIMEOUT_S, CallSettings, Core, connection
from kvmesh.client.flows import Now, Send, Sleep, UnaryFlow
from kvmesh.client.grpc_transport import AsyncChannel, AsyncGrpcTransport, AsyncInterceptor
from kvmesh.client.options import TLS, UNSET, Prompt, RetryPolicy, Timeout
from kvmesh.client.transport import (
    ABORT,
    DETOKENIZE,
    ESTIMATE_BUDGET,
    EXPLAIN,
    GET_LOADS,
    GET_MODEL_INFO,
    GET_TENANT_LOADS,
    LIST_GROUPS,
    TOKENIZE,
    AsyncTransport,
    Method,
    Reply,
    Request,
    RpcFailure,
)
from kvmesh.client.types import (
    Completion,
    Estimate,
    Explanation,
    GroupFacts,
    Loads,
    ModelInfo,
    TenantLoads,
    Tokens,
)
from kvmesh.protos import admin, pb

T = TypeVar("T")


class AsyncClient(AsyncGenerations):
    """A client of one kvmesh cluster, for use in one event loop.

        async with AsyncClient() as client:
            completion = await client.generate("The capital of France is", max_tokens=8)
            print(completion.text)
            async for delta in client.chat_stream([Message("user", "Hello!")]):
                print(delta.text, end="", flush=True)

    target: host:port; default $KVMESH_TARGET, then localhost:9000
    api_key: default $KVMESH_API_KEY, then the local server's key file; "" sends no key
    tls: True uses the system's root certificates; TLS(...) sets others; False sends the
        key and the text unencrypted
    timeout_s: for calls that set none; None means no limit. Unless it is given, generations
        have no limit, and other calls have 60 s
    model: for calls that name none
    metadata: sent with every call, e.g. {"traceparent": ...}. Without a traceparent, that of
        OpenTelemetry's current span is sent, if there is one
    retry: what is tried again, and how long to wait before
    silence_timeout_s: a stream that receives nothing for this long is taken for lost, and
        resumed. A server sends something at least every 5 s, except for version 0.1, which is
        silent while it works on a prompt; None means no limit
    interceptors: gRPC's, for each call
    channel: a gRPC channel of your own instead of target, tls and interceptors. You close it,
        and its options should not limit the size of messages
    transport: replaces gRPC, e.g. AsyncFakeTransport
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        api_key: str | None = None,
        tls: TLS | bool = False,
        timeout_s: Timeout = UNSET,
        model: str | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        silence_timeout_s: float | None = DEFAULT_SILENCE_TIMEOUT_S,
        interceptors: Sequence[AsyncInterceptor] = (),
        channel: AsyncChannel | None = None,
        transport: AsyncTransport | None = None,
    ) -> None:
        check_seconds("silence_timeout_s", silence_timeout_s, none=True)
        where = connection(
            target, api_key, tls, interceptors=interceptors, channel=channel, transport=transport
        )
        settings = CallSettings(
            where.api_key, timeout_s, model, check_metadata(metadata or {}), retry
        )
        if transport is None:
            transport = (
                AsyncGrpcTransport.connect(where.target, where.tls, interceptors, silence_timeout_s)
                if channel is None
                else AsyncGrpcTransport(channel, silence_timeout_s)
            )
        self._transport = transport
        self._owns_connection = channel is None
        self._core = Core(settings)

    def with_options(
        self,
        *,
        timeout_s: Timeout = UNSET,
        api_key: str | None = None,
        model: str | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
        retry: RetryPolicy | None = None,
    ) -> Self:
        """A client with other settings, over the same connection.

        What is left out stays as it is; metadata is added to this client's. Closing the new
        client does not close the connection.
        """
        other = type(self).__new__(type(self))
        vars(other).update(vars(self))
        other._owns_connection = False
        other._core = self._core.with_options(
            timeout_s=timeout_s, api_key=api_key, model=model, metadata=metadata, retry=retry
        )
        return other

    def resume(self, cursor: str, *, timeout_s: Timeout = UNSET) -> AsyncStream:
        """Continue the stream that had this `cursor`, e.g. in another process.

        The new stream yields the output that follows, and its completion has all of it. A first
        stream that is still running ends. Raises InvalidRequestError for a text that is no
        cursor, and ResumeError, when it is read, if the server now serves another model.
        """
        return AsyncStream(self._transport, *self._core.resume(cursor, timeout_s))

    async def tokenize(
        self, prompt: Prompt, *, model: str | None = None, timeout_s: Timeout = UNSET
    ) -> Tokens:
        """The token ids that a generation would use for this prompt."""
        reply = await self._call(TOKENIZE, requests.tokenize_request(prompt, model), timeout_s)
        return responses.mirror(Tokens, reply)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        model: str | None = None,
        timeout_s: Timeout = UNSET,
    ) -> str:
        """The text of token ids; bytes that are not valid UTF-8 become U+FFFD."""
        request = requests.detokenize_request(token_ids, model, skip_special_tokens)
        return (await self._call(DETOKENIZE, request, timeout_s)).text

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
        timeout_s: Timeout = UNSET,
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
        reply = await self._call(ESTIMATE_BUDGET, request, timeout_s)
        return responses.mirror(Estimate, reply)

    async def abort(self, request_id: str, *, timeout_s: Timeout = UNSET) -> bool:
        """End a request made with the same key; returns whether it was found."""
        request = requests.of_request_id(pb.AbortRequest, request_id)
        return (await self._call(ABORT, request, timeout_s)).aborted

    async def explain(self, request_id: str, *, timeout_s: Timeout = UNSET) -> Explanation:
        """The placement decisions for a request made with the same key, with the reasons.

        The list is empty if the request is not known.
        """
        request = requests.of_request_id(pb.ExplainRequest, request_id)
        reply = await self._call(EXPLAIN, request, timeout_s)
        return responses.mirror(Explanation, reply)

    async def model_info(self, *, timeout_s: Timeout = UNSET) -> ModelInfo:
        """The served model and its groups."""
        reply = await self._call(GET_MODEL_INFO, pb.GetModelInfoRequest(), timeout_s)
        return responses.mirror(ModelInfo, reply)

    async def tenant_loads(self, *, timeout_s: Timeout = UNSET) -> TenantLoads:
        """What this key's tenant is using, and may use."""
        reply = await self._call(GET_TENANT_LOADS, pb.GetTenantLoadsRequest(), timeout_s)
        return responses.mirror(TenantLoads, reply)

    async def groups(self, *, timeout_s: Timeout = UNSET) -> tuple[GroupFacts, ...]:
        """What each group is made of. Needs an admin key."""
        reply = await self._call(LIST_GROUPS, admin.ListGroupsRequest(), timeout_s)
        return tuple(responses.mirror(GroupFacts, group) for group in reply.groups)

    async def loads(self, *, timeout_s: Timeout = UNSET) -> Loads:
        """The current load of the groups and the router. Needs an admin key."""
        reply = await self._call(GET_LOADS, admin.GetLoadsRequest(), timeout_s)
        return responses.mirror(Loads, reply)

    async def close(self) -> None:
        """Close the connection; calls in progress fail."""
        if self._owns_connection:
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

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an AsyncClient holds a connection and cannot be pickled; make one in each process"
        )

    async def _complete(self, prompt: pb.Prompt, options: dict[str, Any]) -> Completion:
        return responses.completion(await self._run(self._core.generate(prompt, options)))

    def _stream(self, prompt: pb.Prompt, options: dict[str, Any]) -> AsyncStream:
        return AsyncStream(self._transport, *self._core.generate_stream(prompt, options))

    async def _call(
        self, method: Method[Request, Reply], request: Request, timeout_s: Timeout
    ) -> Reply:
        return await self._run(self._core.unary(method, request, timeout_s))

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
                        case Send(method, request, timeout_s, metadata):
                            outcome = await self._transport.unary(
                                method, request, timeout_s, metadata
                            )
                except RpcFailure as failure:
                    step = flow.throw(failure)
                else:
                    step = flow.send(outcome)
        except StopIteration as stop:
            result: T = stop.value
            return result
