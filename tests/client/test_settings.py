"""What a client adds to its calls: timeout, key, model, metadata, trace, and whose connection."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from kvmesh import (
    AsyncClient,
    AsyncFakeTransport,
    Client,
    CredentialsError,
    FakeTransport,
    InvalidRequestError,
    RetryPolicy,
    UnavailableError,
)
from kvmesh.client.transport import AsyncTransport, Transport
from kvmesh.protos import pb
from tests.client.servicer import ScriptedServicer, answering, delta, serving, started

TOKENS = answering(pb.TokenizeResponse(token_ids=[1]))
NO_SECONDS: tuple[Any, ...] = (
    0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, True, False, "5", "", b"5", [5.0], {},
    Decimal(5), 5j, 2_592_001, 1e300, 10**30,
)  # fmt: skip
SECONDS: tuple[Any, ...] = (1, 0.001, 2_592_000, np.float32(2.5), np.int64(3))


def calls(client: Client) -> dict[str, Callable[..., Any]]:
    """Every method that takes a timeout, without it."""
    return {
        "generate": lambda **timeout: client.generate("hi", **timeout),
        "generate_stream": lambda **timeout: client.generate_stream("hi", **timeout),
        "chat": lambda **timeout: client.chat([], **timeout),
        "chat_stream": lambda **timeout: client.chat_stream([], **timeout),
        "resume": lambda **timeout: client.resume(client.generate_stream("").cursor, **timeout),
        "tokenize": lambda **timeout: client.tokenize("hi", **timeout),
        "estimate": lambda **timeout: client.estimate("hi", **timeout),
        "abort": lambda **timeout: client.abort("id", **timeout),
        "explain": lambda **timeout: client.explain("id", **timeout),
        "model_info": client.model_info,
        "loads": client.loads,
        "with_options": client.with_options,
        "Client": lambda **timeout: Client("localhost:1", api_key="", **timeout),
        "AsyncClient": lambda **timeout: AsyncClient("localhost:1", api_key="", **timeout),
    }


NAMES = sorted(calls(Client(transport=FakeTransport())))


@pytest.mark.parametrize("name", NAMES)
def test_every_timeout_is_checked(name: str) -> None:
    fake = FakeTransport()
    call = calls(Client(transport=fake))[name]
    for value in NO_SECONDS:
        with pytest.raises(
            InvalidRequestError, match=r"^timeout_s: expected a number of sec"
        ) as bad:
            call(timeout_s=value)
        assert bad.value.field == "timeout_s"
    assert not fake.server.requests
    for value in (*SECONDS, None):
        call(timeout_s=value)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_the_silence_timeout_is_checked(kind: Any) -> None:
    for value in NO_SECONDS:
        with pytest.raises(InvalidRequestError, match=r"^silence_timeout_s: expected a number"):
            kind("localhost:1", api_key="", silence_timeout_s=value)
    kind("localhost:1", api_key="", silence_timeout_s=None)


@pytest.mark.parametrize(
    "name",
    ["initial_backoff_s", "max_backoff_s", "max_retry_after_s", "max_outage_s", "max_connect_s"],
)
def test_the_seconds_of_a_retry_policy_are_checked(name: str) -> None:
    for value in (*NO_SECONDS, None):
        policy: dict[str, Any] = {name: value}
        if value is not False and value is not True and value == 0:
            RetryPolicy(**policy)
            continue
        with pytest.raises(InvalidRequestError, match=f"^{name}: expected a number") as bad:
            RetryPolicy(**policy)
        assert bad.value.field == name


@pytest.mark.parametrize("attempts", [0, -1, True, 1.5, 2.0, "3", None, math.nan])
def test_the_attempts_of_a_retry_policy_are_checked(attempts: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^max_attempts: expected a whole number"):
        RetryPolicy(max_attempts=attempts)


class Recording:
    """A transport that records the timeout of each call, in seconds."""

    def __init__(self) -> None:
        self.timeouts: list[float | None] = []

    def wrap(self) -> FakeTransport:
        fake = FakeTransport()
        unary, stream = fake.unary, fake.stream

        def record_unary(method: Any, request: Any, timeout_s: float | None, metadata: Any) -> Any:
            self.timeouts.append(timeout_s)
            return unary(method, request, timeout_s, metadata)

        def record_stream(request: Any, timeout_s: float | None, metadata: Any) -> Any:
            self.timeouts.append(timeout_s)
            return stream(request, timeout_s, metadata)

        fake.unary, fake.stream = record_unary, record_stream  # type: ignore[method-assign]
        return fake


def test_the_timeout_of_a_call_goes_before_the_clients() -> None:
    found = Recording()
    client = Client(transport=found.wrap())
    client.loads()
    client.loads(timeout_s=None)
    patient = client.with_options(timeout_s=300)
    patient.loads()
    patient.loads(timeout_s=2)
    patient.loads(timeout_s=None)
    patient.with_options(timeout_s=None).loads()
    patient.with_options(model="m").loads()
    assert found.timeouts == [60.0, None, 300, 2, None, None, 300]


def test_a_generation_leaves_the_server_time_to_end_it_at_its_timeout() -> None:
    """The deadline of the call is 5 s later than the one in the request."""
    found = Recording()
    fake = found.wrap()
    client = Client(transport=fake)
    client.generate("hi", timeout_s=20)
    list(client.generate_stream("hi", timeout_s=20))
    list(client.chat_stream([], timeout_s=20))
    assert [request.timeout_s for request in fake.server.requests] == [20.0] * 3
    assert found.timeouts == [25.0] * 3


def test_options_of_a_derived_client() -> None:
    fake = FakeTransport()
    client = Client(transport=fake, api_key="k1", model="m1", metadata={"a": "1", "b": "2"})
    other = client.with_options(
        api_key="k2", model="m2", metadata={"b": "3", "c-bin": b"\0"}, timeout_s=9.0
    )
    for each in (other, client):
        each.generate("hi")
        each.tokenize("hi")
        each.estimate("hi")
        each.generate("hi", model="mine", timeout_s=1)
        each.model_info()
    for number, request in enumerate(fake.server.requests):
        named = "m2" if number < 5 else "m1"
        assert getattr(request, "model", named) == ("mine" if number % 5 == 3 else named)
    sent = fake.server.metadata
    theirs = {"authorization": "Bearer k2", "a": "1", "b": "3", "c-bin": b"\0"}
    assert sent == [theirs] * 5 + [{"authorization": "Bearer k1", "a": "1", "b": "2"}] * 5
    assert fake.server.requests[0].timeout_s == 9.0
    assert not fake.server.requests[5].HasField("timeout_s")
    assert "authorization" not in sent_by(fake, client.with_options(api_key=""))
    assert fake.server.requests[-1].model == "m1"


def test_streams_name_the_clients_model_as_other_calls_do() -> None:
    fake = FakeTransport()
    client = Client(transport=fake, model="m1")
    list(client.generate_stream("hi"))
    list(client.chat_stream([]))
    list(client.generate_stream("hi", model="mine"))
    assert [request.model for request in fake.server.requests] == ["m1", "m1", "mine"]


def sent_by(fake: FakeTransport, client: Client) -> dict[str, str | bytes]:
    client.tokenize("hi")
    return fake.server.metadata[-1]


def test_a_derived_client_has_a_retry_policy_of_its_own() -> None:
    fake = FakeTransport()
    client = Client(transport=fake)
    fake.server.fail(UnavailableError("gone"))
    with pytest.raises(UnavailableError):
        client.with_options(retry=RetryPolicy(max_attempts=1)).loads()
    fake.server.fail(UnavailableError("gone"))
    client.loads()


def test_a_derived_client_shares_the_connection_and_does_not_close_it() -> None:
    servicer = ScriptedServicer(TOKENS)
    peers = set()
    answer = servicer._act

    def act(request: Any, context: grpc.ServicerContext) -> Any:
        peers.add(context.peer())
        return answer(request, context)

    servicer.Tokenize = act  # type: ignore[method-assign]
    with serving(servicer) as target, Client(target, api_key="k") as client:
        with client.with_options(api_key="other") as other:
            other.tokenize("hi")
        client.tokenize("hi")
    assert [found["authorization"] for found in servicer.metadata] == ["Bearer other", "Bearer k"]
    assert len(peers) == 1


async def test_an_async_client_derives_too() -> None:
    fake = AsyncFakeTransport()
    async with AsyncClient(transport=fake, model="m") as client:
        async with client.with_options(api_key="k", timeout_s=4.0) as other:
            await other.generate("hi")
        await client.generate("hi")
    assert fake.server.metadata == [{"authorization": "Bearer k"}, {}]
    assert [request.timeout_s for request in fake.server.requests] == [4.0, 0.0]
    assert [request.model for request in fake.server.requests] == ["m", "m"]


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"Traceparent": "x"}, "metadata"),
        ({"a b": "x"}, "metadata"),
        ({"": "x"}, "metadata"),
        ({5: "x"}, "metadata"),
        ([("a", "b")], "metadata"),
        ("a", "metadata"),
        ({"authorization": "Bearer x"}, "metadata.authorization"),
        ({"grpc-timeout": "1S"}, "metadata.grpc-timeout"),
        ({"a": b"x"}, "metadata.a"),
        ({"a": "é"}, "metadata.a"),
        ({"a": "x\n"}, "metadata.a"),
        ({"a": 5}, "metadata.a"),
        ({"a": None}, "metadata.a"),
        ({"a-bin": "x"}, "metadata.a-bin"),
    ],
)
def test_metadata_that_cannot_be_sent_is_refused(metadata: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Client(transport=FakeTransport(), metadata=metadata)
    assert caught.value.field == field
    with pytest.raises(InvalidRequestError) as caught:
        Client(transport=FakeTransport()).with_options(metadata=metadata)
    assert caught.value.field == field


@pytest.mark.parametrize("key", ["a b", "é", "x" * 5000, 5, b"key"])
def test_keys_that_cannot_be_sent_are_refused(key: Any) -> None:
    with pytest.raises(CredentialsError, match="api_key"):
        Client(transport=FakeTransport()).with_options(api_key=key)


def test_what_is_no_retry_policy_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="retry: expected a RetryPolicy"):
        Client(transport=FakeTransport(), retry=3)  # type: ignore[arg-type]


# Connections of one's own


class Noting(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    def __init__(self) -> None:
        self.methods: list[str] = []

    def intercept_unary_unary(self, proceed: Any, details: Any, request: Any) -> Any:
        self.methods.append(details.method)
        return proceed(details, request)

    def intercept_unary_stream(self, proceed: Any, details: Any, request: Any) -> Any:
        return self.intercept_unary_unary(proceed, details, request)


class AsyncNoting(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, methods: list[str]) -> None:
        self.methods = methods

    async def intercept_unary_unary(self, proceed: Any, details: Any, request: Any) -> Any:
        self.methods.append(details.method.decode())
        return await proceed(details, request)


class AsyncStreamNoting(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, methods: list[str]) -> None:
        self.methods = methods

    async def intercept_unary_stream(self, proceed: Any, details: Any, request: Any) -> Any:
        self.methods.append(details.method.decode())
        return await proceed(details, request)


METHODS = ["/kvmesh.v1.KVMesh/Tokenize", "/kvmesh.v1.KVMesh/GenerateStream"]


def tokens_then_a_stream() -> ScriptedServicer:
    return ScriptedServicer(
        TOKENS, lambda request, context: iter([started(request), delta(0, "a", 1)])
    )


def test_interceptors_see_every_call() -> None:
    noting = Noting()
    with (
        serving(tokens_then_a_stream()) as target,
        Client(target, interceptors=[noting]) as client,
    ):
        client.tokenize("x" * 5_000_000)
        with client.generate_stream("hi") as stream:
            assert next(stream).text == "a"
    assert noting.methods == METHODS


async def test_interceptors_of_an_async_client() -> None:
    methods: list[str] = []
    noting = [AsyncNoting(methods), AsyncStreamNoting(methods)]
    with serving(tokens_then_a_stream()) as target:
        async with AsyncClient(target, interceptors=noting) as client:
            await client.tokenize("hi")
            async with client.generate_stream("hi") as stream:
                assert (await anext(stream)).text == "a"
    assert methods == METHODS


def test_a_channel_of_ones_own_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMESH_TARGET", "elsewhere:1")
    monkeypatch.setenv("KVMESH_API_KEY", "from-the-environment")
    servicer = ScriptedServicer(TOKENS)
    with serving(servicer) as target, grpc.insecure_channel(target) as channel:
        for _ in range(2):
            with Client(channel=channel) as client:
                client.tokenize("hi")
    assert servicer.metadata[0]["authorization"] == "Bearer from-the-environment"


async def test_an_async_channel_of_ones_own_stays_open() -> None:
    with serving(ScriptedServicer(TOKENS)) as target:
        async with grpc.aio.insecure_channel(target) as channel:
            for _ in range(2):
                async with AsyncClient(channel=channel) as client:
                    await client.tokenize("hi")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("excluded", ["target", "tls", "interceptors"])
def test_arguments_that_exclude_each_other(kind: Any, excluded: str) -> None:
    value: Any = {"target": "localhost:1", "tls": True, "interceptors": [Noting()]}[excluded]
    transport: Transport | AsyncTransport = FakeTransport()
    with pytest.raises(InvalidRequestError, match=f"^{excluded}: cannot be combined with transp"):
        kind(transport=transport, **{excluded: value})
    with pytest.raises(InvalidRequestError, match=f"^{excluded}: cannot be combined with channel"):
        kind(channel=object(), **{excluded: value})


# Traces

SPAN = SpanContext(
    trace_id=0x0AF7651916CD43DD8448EB211C80319C,
    span_id=0xB7AD6B7169203331,
    is_remote=False,
    trace_flags=TraceFlags(TraceFlags.SAMPLED),
)
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def active_span() -> Iterator[None]:
    with trace.use_span(NonRecordingSpan(SPAN)):
        yield


@pytest.mark.usefixtures("active_span")
def test_the_current_span_is_sent() -> None:
    fake = FakeTransport()
    client = Client(transport=fake)
    client.generate("hi")
    stream = client.generate_stream("hi")
    with trace.use_span(trace.INVALID_SPAN):
        list(stream)  # the call was made in the span
        client.loads()
    sent = [metadata.get("traceparent") for metadata in fake.server.metadata]
    assert sent == [TRACEPARENT, TRACEPARENT, None]


@pytest.mark.usefixtures("active_span")
def test_a_traceparent_of_the_caller_goes_before_the_current_span() -> None:
    fake = FakeTransport()
    given = TRACEPARENT.replace("b7ad", "1111")
    Client(transport=fake, metadata={"traceparent": given}).loads()
    assert fake.server.metadata == [{"traceparent": given}]


def test_the_span_of_an_async_task_is_sent() -> None:
    async def run() -> list[dict[str, str | bytes]]:
        fake = AsyncFakeTransport()
        client = AsyncClient(transport=fake)

        async def traced() -> None:
            with trace.use_span(NonRecordingSpan(SPAN)):
                await client.loads()

        await asyncio.gather(traced(), client.model_info())
        return fake.server.metadata

    assert sorted(asyncio.run(run()), key=len) == [{}, {"traceparent": TRACEPARENT}]
