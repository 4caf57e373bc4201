"""The gRPC front over a real connection: who is heard, how much, and what errors look like."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.struct_pb2 import Struct, Value
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from kvmesh.client.status import TRAILER, decode
from kvmesh.cluster import grpc_front, reception
from kvmesh.cluster.contract_methods import ADMIN_SERVICE, METHODS, SERVICE
from kvmesh.cluster.grpc_front import GrpcFront
from kvmesh.cluster.ingress.authenticate import Authenticator, Caller, KnownKey, hash_key
from kvmesh.cluster.ingress.validate import Limits
from kvmesh.cluster.reception import READERS_PER_TENANT, Reception
from kvmesh.cluster.telemetry import table
from kvmesh.cluster.telemetry.meters import IngressMeters
from kvmesh.protos import pb
from tests.cluster.machine import PATIENCE_S, Machine, SeenMeters, answer, machine
from tests.cluster.test_generation import PROMPT
from tests.protos.test_other_versions import old

HEADERS = (("authorization", "Bearer key"),)
OTHER_HEADERS = (("authorization", "Bearer other"),)
OPERATOR = (("authorization", "Bearer operator"),)
ALL_METHODS = [(service, method.name) for service, methods in METHODS.items() for method in methods]
MAX_CALLS = 30
TURN_S = 0.1
MAX_BYTES = 100_000
MANY = 10_000


@dataclass
class Served:
    front: GrpcFront
    machine: Machine
    channel: grpc.aio.Channel
    meters: SeenMeters

    def ended(self, method: str, outcome: str) -> float:
        """Calls that have ended so."""
        return self.meters.of(table.REQUESTS, method, outcome) or 0.0

    def call(self, method: str, body: bytes, headers: Any = HEADERS, service: str = SERVICE) -> Any:
        """A call of any method, to read its replies' bytes from."""
        multi: Any = self.channel.unary_stream(f"/{service}/{method}")
        return multi(body, metadata=headers)

    def open(self, method: str, headers: Any = HEADERS, service: str = SERVICE) -> Any:
        """A call whose request is not sent yet."""
        multi: Any = self.channel.stream_stream(f"/{service}/{method}")
        return multi(metadata=headers)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with machine() as built:
        keys = [
            KnownKey(hash_key(key), Caller(tenant, admin))
            for key, tenant, admin in (
                ("key", "tenant", False),
                ("other", "neighbour", False),
                ("operator", "operator", True),
            )
        ]
        front = GrpcFront(
            built.ingress,
            Reception(Authenticator(keys).authenticate, MAX_CALLS, TURN_S),
            Limits(max_request_bytes=MAX_BYTES),
            IngressMeters(meters := SeenMeters(), ["tenant"]),
        )
        server = grpc.aio.server()
        grpc_front.add_to_server(None, server)
        grpc_front.attach(front)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield Served(front, built, channel, meters)
        finally:
            grpc_front._front = None
            await server.stop(None)


async def failure(call: Any) -> tuple[grpc.StatusCode, pb.Error | None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    trailer: Any = dict(caught.value.trailing_metadata() or ()).get(TRAILER)
    return caught.value.code(), decode(trailer) if trailer else None


def request(max_tokens: int = 5) -> bytes:
    params = pb.SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    prompt = pb.Prompt(token_ids=pb.TokenIds(ids=PROMPT))
    return pb.GenerateRequest(prompt=prompt, sampling_params=params).SerializeToString()


async def test_a_stream_and_a_reply(served: Served) -> None:
    served.machine.allow(MANY)
    tokens: list[int] = []
    async for data in served.call("GenerateStream", request()):
        tokens += pb.GenerateStreamResponse.FromString(data).delta.token_ids
    assert tokens == answer(PROMPT, 5)
    unary: Any = served.channel.unary_unary("/kvmesh.v1.KVMesh/Generate")
    reply = pb.GenerateResponse.FromString(await unary(request(), metadata=HEADERS))
    assert list(reply.choices[0].token_ids) == tokens


async def test_a_client_from_before_the_lock_is_served(served: Served) -> None:
    served.machine.allow(MANY)
    sent = old("GenerateRequest")()
    sent.prompt.token_ids.ids.extend(PROMPT)
    sent.sampling_params.max_tokens = 5
    sent.sampling_params.temperature = 0
    tokens: list[int] = []
    finished = False
    async for data in served.call("GenerateStream", sent.SerializeToString()):
        event = old("GenerateStreamResponse").FromString(data)
        tokens += event.delta.token_ids
        finished |= event.HasField("usage")
    assert tokens == answer(PROMPT, 5) and finished
    sent.min_kv_format = "int8"  # since removed
    code, error = await failure(served.call("GenerateStream", sent.SerializeToString()))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert error is not None and error.reason == pb.ERROR_REASON_UNSUPPORTED


@pytest.mark.parametrize(("service", "method"), ALL_METHODS)
@pytest.mark.parametrize("headers", [(), (("authorization", "Bearer wrong"),)])
async def test_unknown_callers_are_refused_before_they_send(
    served: Served, service: str, method: str, headers: Any
) -> None:
    """Their request never arrives, so nothing of it can be read or parsed."""
    code, error = await failure(served.open(method, headers, service))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert error is not None and not error.request_id


@pytest.mark.parametrize("method", [method.name for method in METHODS[ADMIN_SERVICE]])
async def test_operators_calls_need_an_admin_key(served: Served, method: str) -> None:
    code, error = await failure(served.open(method, HEADERS, ADMIN_SERVICE))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert error is not None and error.reason == pb.ERROR_REASON_NOT_ALLOWED
    replies = [data async for data in served.call(method, b"", OPERATOR, ADMIN_SERVICE)]
    assert len(replies) == 1 and b"g0" in replies[0]


async def test_the_contract_can_be_asked_for_with_a_key(served: Served) -> None:
    def ask(request: reflection_pb2.ServerReflectionRequest, headers: Any = HEADERS) -> Any:
        multi: Any = served.channel.stream_stream(
            f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"
        )
        return multi(iter([request.SerializeToString()]), metadata=headers)

    everything = reflection_pb2.ServerReflectionRequest(list_services="")
    reply = reflection_pb2.ServerReflectionResponse.FromString(await ask(everything).read())
    names = {service.name for service in reply.list_services_response.service}
    assert names == {SERVICE, ADMIN_SERVICE, "grpc.health.v1.Health"}
    symbol = reflection_pb2.ServerReflectionRequest(file_containing_symbol="kvmesh.v1.Usage")
    reply = reflection_pb2.ServerReflectionResponse.FromString(await ask(symbol).read())
    files = map(
        FileDescriptorProto.FromString, reply.file_descriptor_response.file_descriptor_proto
    )
    assert "kvmesh/v1/kvmesh.proto" in {file.name for file in files}
    code, _ = await failure(ask(everything, ()))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    long = reflection_pb2.ServerReflectionRequest(file_by_filename="x" * 10_000)
    code, error = await failure(ask(long))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and error is not None


@pytest.mark.parametrize(
    ("traceparent", "logged"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", True),
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b71-01", False),
        ("forged\nline", False),
    ],
)
async def test_refusals_are_logged_with_their_trace(
    served: Served, caplog: pytest.LogCaptureFixture, traceparent: str, logged: bool
) -> None:
    caplog.set_level("INFO", "ray.serve")
    headers = (*HEADERS, ("traceparent", traceparent))
    with contextlib.suppress(ValueError):  # gRPC itself refuses the last one
        await failure(served.call("Tokenize", b"", headers))
        (line,) = (x for x in caplog.messages if x.startswith("refused request"))
        assert (" of trace 0af7651916cd43dd8448eb211c80319c: " in line) == logged


async def test_a_tenant_sees_what_it_uses_itself(served: Served) -> None:
    served.machine.allow(3)
    running = served.call("GenerateStream", request(400))
    while not pb.GenerateStreamResponse.FromString(await running.read()).HasField("delta"):
        pass
    loads = {}
    for headers in (HEADERS, OTHER_HEADERS):
        (data,) = [data async for data in served.call("GetTenantLoads", b"", headers)]
        loads[headers] = pb.GetTenantLoadsResponse.FromString(data)
    own, other = loads[HEADERS], loads[OTHER_HEADERS]
    assert (own.tenant, own.running, own.queued) == ("tenant", 1, 0)
    assert own.leased_bytes > 0 and not own.HasField("quota_bytes")
    assert other == pb.GetTenantLoadsResponse(tenant="neighbour")
    running.cancel()


NEW_FIELD = b"\xba\x3e\x01x"  # number 999, a string


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (request() + NEW_FIELD, "request"),
        (
            pb.GenerateRequest(
                sampling_params=pb.SamplingParams.FromString(NEW_FIELD)
            ).SerializeToString(),
            "sampling_params",
        ),
        (
            pb.GenerateRequest(
                prompt=pb.Prompt(
                    chat=pb.Chat(messages=[pb.ChatMessage(), pb.ChatMessage.FromString(NEW_FIELD)])
                )
            ).SerializeToString(),
            "prompt.chat.messages[1]",
        ),
        (
            pb.GenerateRequest(
                prompt=pb.Prompt(
                    chat=pb.Chat(
                        chat_template_kwargs=Struct(fields={"a": Value.FromString(NEW_FIELD)})
                    )
                )
            ).SerializeToString(),
            "prompt.chat.chat_template_kwargs.fields['a']",
        ),
    ],
)
async def test_what_a_newer_client_asks_for_is_refused(
    served: Served, body: bytes, path: str
) -> None:
    code, error = await failure(served.call("GenerateStream", body))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert error is not None and error.reason == pb.ERROR_REASON_UNSUPPORTED
    assert error.field_violations[0].field == path
    assert "999" in error.field_violations[0].description


async def test_fields_written_in_an_unusual_way_are_accepted(served: Served) -> None:
    served.machine.allow(MANY)
    # A repeated field unpacked, as proto2 does, and one field twice, of which the last counts.
    ids = b"".join(b"\x08" + bytes([token]) for token in PROMPT)
    unusual = b"\x1a" + bytes([len(ids) + 2]) + b"\x1a" + bytes([len(ids)]) + ids
    first = pb.GenerateRequest(priority=7).SerializeToString()
    unusual = first + first + unusual
    parsed = pb.GenerateRequest.FromString(unusual)
    assert list(parsed.prompt.token_ids.ids) == PROMPT
    assert parsed.ByteSize() != len(unusual)
    params = pb.SamplingParams(max_tokens=3, temperature=0)
    unusual += pb.GenerateRequest(sampling_params=params).SerializeToString()
    tokens: list[int] = []
    async for data in served.call("GenerateStream", unusual):
        tokens += pb.GenerateStreamResponse.FromString(data).delta.token_ids
    assert tokens == answer(PROMPT, 3)


async def test_no_more_calls_than_allowed(served: Served) -> None:
    served.machine.allow(1)
    waiting = [served.call("GenerateStream", request(400)) for _ in range(MAX_CALLS)]
    await served.machine.until(lambda: served.front._reception._calls == MAX_CALLS)
    code, error = await failure(served.call("GetModelInfo", b""))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error is not None and error.retry_after_s > 0
    for call in waiting:
        call.cancel()
    await served.machine.until(lambda: served.front._reception._calls == 0)
    async for _ in served.call("GetModelInfo", b""):
        pass


async def test_a_tenant_that_sends_slowly_keeps_out_nobody_else(served: Served) -> None:
    slow = [served.open("Tokenize") for _ in range(READERS_PER_TENANT + 2)]
    # Those that wait for a turn may have been refused by then.
    await served.machine.until(lambda: served.front._reception._calls >= READERS_PER_TENANT)
    code, _ = await failure(served.call("Abort", b"", OTHER_HEADERS))
    assert code is grpc.StatusCode.INVALID_ARGUMENT, "the other tenant was served"
    code, error = await failure(served.call("Abort", b""))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error is not None and error.retry_after_s > 0
    for call in slow:
        call.cancel()
    await served.machine.until(lambda: served.front._reception._calls == 0)
    code, _ = await failure(served.call("Abort", b""))
    assert code is grpc.StatusCode.INVALID_ARGUMENT, "its turns are free again"


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xff\xff\xff",
        b"\x0a\x7fshort",
        b"\x0a\x02\xc3\x28",  # a request_id that is not UTF-8
        b"\x1a\x04\x0a\x02\xff\xfe",  # a prompt.text that is not UTF-8
        b"\x0a" * (MAX_BYTES + 1),
    ],
)
async def test_a_body_that_is_no_request(served: Served, body: bytes) -> None:
    code, error = await failure(served.call("GenerateStream", body))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert error is not None
    assert [violation.field for violation in error.field_violations] == ["request"]


async def test_a_call_that_sends_two_requests(served: Served) -> None:
    served.machine.allow(MANY)
    call = served.open("GenerateStream")
    for _ in range(2):
        await call.write(request(3))
    await call.done_writing()
    code, error = await failure(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert error is not None and error.message == "request: must be a single message"
    assert served.machine.router.placed == []


async def test_a_call_that_sends_nothing(served: Served) -> None:
    call = served.open("Tokenize")
    await call.done_writing()
    code, error = await failure(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert error is not None and error.field_violations[0].field == "request"


async def test_an_unknown_method(served: Served) -> None:
    code, _ = await failure(served.call("Nothing", b""))
    assert code is grpc.StatusCode.UNIMPLEMENTED


class UnreadContext:
    """A call of a client that reads nothing."""

    def __init__(self) -> None:
        self._messages = [request(400)]
        self.code: grpc.StatusCode | None = None
        self.details = ""

    def invocation_metadata(self) -> Any:
        return HEADERS

    async def read(self) -> Any:
        return self._messages.pop() if self._messages else grpc.aio.EOF

    async def write(self, reply: bytes) -> None:
        await asyncio.get_running_loop().create_future()

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details


async def test_a_client_that_does_not_read_has_its_call_cancelled(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "UNREAD_TIMEOUT_S", 0.0)
    context = UnreadContext()
    (method,) = (x for x in METHODS[SERVICE] if x.name == "GenerateStream")
    await asyncio.wait_for(served.front.serve(method, context), PATIENCE_S)
    assert context.code is grpc.StatusCode.CANCELLED
    assert context.details == "the reply was not read for 0 s"
    assert served.front._reception._calls == 0
    assert served.ended("GenerateStream", "cancelled") == 1
    served.machine.allow(MANY)
    await served.machine.until(lambda: served.machine.leases() == 0)


async def test_a_client_that_leaves_ends_its_request(served: Served) -> None:
    call = served.call("GenerateStream", request(400))
    await call.read()
    await served.machine.until(lambda: served.machine.leases() == 1)
    call.cancel()
    served.machine.allow(MANY)
    await served.machine.until(lambda: served.machine.leases() == 0)
    await served.machine.until(lambda: served.front._reception._calls == 0)


async def test_health_knows_its_services(served: Served) -> None:
    health: Any = health_pb2_grpc.HealthStub(served.channel)
    for name in ("", "kvmesh.v1.KVMesh"):
        reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(health_pb2.HealthCheckRequest(service="kvmesh.v2.KVMesh"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    watched = [x.status async for x in health.Watch(health_pb2.HealthCheckRequest(service="x"))]
    assert watched == [health_pb2.HealthCheckResponse.SERVICE_UNKNOWN]


async def test_who_watches_hears_of_changes_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_front, "HEALTH_POLL_S", 0.0)
    polls = 0
    health = served.front._health

    def counted() -> int:
        nonlocal polls
        polls += 1
        return health()

    monkeypatch.setattr(served.front, "_health", counted)
    stub: Any = health_pb2_grpc.HealthStub(served.channel)
    watching = stub.Watch(health_pb2.HealthCheckRequest())
    statuses = [(await watching.read()).status]
    await served.machine.until(lambda: polls > 5)
    await served.machine.ingress.drain(0.0)
    statuses.append((await watching.read()).status)
    serving = health_pb2.HealthCheckResponse.SERVING
    assert statuses == [serving, health_pb2.HealthCheckResponse.NOT_SERVING]
    watching.cancel()


async def test_calls_are_counted_by_how_they_end(served: Served) -> None:
    served.machine.allow(10)
    async for _ in served.call("GenerateStream", request(3)):
        pass
    await failure(served.call("Abort", b""))
    await failure(served.call("Abort", b"", (("authorization", "Bearer unknown"),)))
    left = served.call("GenerateStream", request(400))
    assert await left.read()
    left.cancel()
    await served.machine.until(lambda: served.front._reception._calls == 0)
    assert served.ended("GenerateStream", "ok") == 1
    assert served.ended("GenerateStream", "cancelled") == 1
    assert served.ended("Abort", "ok") == 0
    assert served.ended("Abort", "invalid_field") == 1
    assert served.ended("Abort", "wrong_key") == 1
    of_tenant = served.meters.of(table.TENANT_REQUESTS, "tenant", "invalid_field")
    assert of_tenant == 1, "the caller of the other was not known"


async def test_a_server_without_an_ingress_says_that_it_is_not_ready(served: Served) -> None:
    """As Serve's own proxy, while there is no replica."""
    grpc_front._front = None
    code, error = await failure(served.call("GetModelInfo", b""))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert error is not None and error.reason == pb.ERROR_REASON_NOT_READY
