"""The gRPC front over a real connection: who is heard, how much, and what errors look like."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.client.status import decode_details
from kvmesh.cluster import grpc_front
from kvmesh.cluster.grpc_front import METHODS, READERS_PER_TENANT, GrpcFront
from kvmesh.cluster.ingress.authenticate import Authenticator, hash_key
from kvmesh.cluster.ingress.validate import Limits
from kvmesh.cluster.metrics import IngressMeters
from kvmesh.protos import pb
from tests.cluster.machine import Machine, NoMeters, answer, machine
from tests.cluster.test_generation import PROMPT

HEADERS = (("authorization", "Bearer key"),)
OTHER_HEADERS = (("authorization", "Bearer other"),)
MAX_CALLS = 30
TURN_S = 0.1
MAX_BYTES = 100_000
MANY = 10_000


@dataclass
class Served:
    front: GrpcFront
    machine: Machine
    channel: grpc.aio.Channel

    def call(self, method: str, body: bytes, headers: Any = HEADERS) -> Any:
        """A call of any method, to read its replies' bytes from."""
        multi: Any = self.channel.unary_stream(f"/kvmesh.v1.KVMesh/{method}")
        return multi(body, metadata=headers)

    def open(self, method: str, headers: Any = HEADERS) -> Any:
        """A call whose request is not sent yet."""
        multi: Any = self.channel.stream_stream(f"/kvmesh.v1.KVMesh/{method}")
        return multi(metadata=headers)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with machine() as built:
        keys = [(hash_key("key"), "tenant"), (hash_key("other"), "neighbour")]
        front = GrpcFront(
            built.ingress,
            Authenticator(keys).authenticate,
            Limits(max_request_bytes=MAX_BYTES),
            IngressMeters(NoMeters()),
            MAX_CALLS,
            TURN_S,
        )
        server = grpc.aio.server()
        grpc_front.add_to_server(None, server)
        grpc_front.attach(front)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield Served(front, built, channel)
        finally:
            grpc_front._front = None
            await server.stop(None)


async def failure(call: Any) -> tuple[grpc.StatusCode, pb.Error | None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value.code(), decode_details(caught.value.details() or "")[1]


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


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("headers", [(), (("authorization", "Bearer wrong"),)])
async def test_unknown_callers_are_refused_before_they_send(
    served: Served, method: str, headers: Any
) -> None:
    """Their request never arrives, so nothing of it can be read or parsed."""
    code, error = await failure(served.open(method, headers))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert error is not None and not error.request_id


async def test_no_more_calls_than_allowed(served: Served) -> None:
    served.machine.allow(1)
    waiting = [served.call("GenerateStream", request(400)) for _ in range(MAX_CALLS)]
    await served.machine.until(lambda: served.front._calls == MAX_CALLS)
    code, error = await failure(served.call("GetModelInfo", b""))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error is not None and error.retry_after_s > 0
    for call in waiting:
        call.cancel()
    await served.machine.until(lambda: served.front._calls == 0)
    async for _ in served.call("GetModelInfo", b""):
        pass


async def test_a_tenant_that_sends_slowly_keeps_out_nobody_else(served: Served) -> None:
    slow = [served.open("Tokenize") for _ in range(READERS_PER_TENANT + 2)]
    await served.machine.until(lambda: served.front._calls == len(slow))
    code, _ = await failure(served.call("Abort", b"", OTHER_HEADERS))
    assert code is grpc.StatusCode.INVALID_ARGUMENT, "the other tenant was served"
    code, error = await failure(served.call("Abort", b""))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error is not None and error.retry_after_s > 0
    for call in slow:
        call.cancel()
    await served.machine.until(lambda: served.front._calls == 0)
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


async def test_a_call_that_sends_nothing(served: Served) -> None:
    call = served.open("Tokenize")
    await call.done_writing()
    code, error = await failure(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert error is not None and error.field_violations[0].field == "request"


async def test_an_unknown_method(served: Served) -> None:
    code, _ = await failure(served.call("Nothing", b""))
    assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_a_client_that_leaves_ends_its_request(served: Served) -> None:
    call = served.call("GenerateStream", request(400))
    await call.read()
    await served.machine.until(lambda: served.machine.leases() == 1)
    call.cancel()
    served.machine.allow(MANY)
    await served.machine.until(lambda: served.machine.leases() == 0)
    await served.machine.until(lambda: served.front._calls == 0)


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


async def test_a_server_without_an_ingress_says_that_it_is_not_ready(served: Served) -> None:
    """As Serve's own proxy, while there is no replica."""
    grpc_front._front = None
    code, error = await failure(served.call("GetModelInfo", b""))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert error is not None and error.reason == pb.ERROR_REASON_NOT_READY
