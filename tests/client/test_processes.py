"""Clients belong to one process, and those for asyncio to one event loop."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest

from kvmesh import AsyncClient, Client, ClosedError, UsageError
from kvmesh.client.grpc_transport import AsyncGrpcTransport, GrpcTransport
from kvmesh.protos import pb
from tests.client.servicer import ScriptedServicer, answering, serving

TOKENS = answering(pb.TokenizeResponse(token_ids=[1, 2]))


def test_a_forked_child_makes_clients_of_its_own() -> None:
    with serving(ScriptedServicer(TOKENS)) as target:
        result = subprocess.run(
            [sys.executable, "-m", "tests.client.forking", target],
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert result.stdout.splitlines() == [
        "this client was made before process PID was forked; make another one in it",
        "UsageError",
        "(1, 2)",
        "0",
        "(1, 2)",
        "(1, 2)",
    ], result.stderr


@pytest.mark.parametrize("act", [pickle.dumps, copy.copy])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_client_is_not_pickled_or_copied(kind: type[Client | AsyncClient], act: Any) -> None:
    client = kind("localhost:1", api_key="")
    with pytest.raises(TypeError, match=f"{kind.__name__} holds a connection and cannot be pick"):
        act(client)
    with pytest.raises(TypeError, match="save its `cursor`"):
        act(client.generate_stream("hi"))


def test_a_second_event_loop_needs_a_second_client() -> None:
    async def first(client: AsyncClient) -> None:
        await client.tokenize("hi")

    async def second(client: AsyncClient) -> None:
        for call in (client.tokenize("hi"), anext(client.generate_stream("hi")), client.close()):
            with pytest.raises(UsageError, match="belongs to the event loop in which it was first"):
                await call

    with serving(ScriptedServicer(TOKENS)) as target:
        client = AsyncClient(target)
        asyncio.run(first(client))
        asyncio.run(second(client))


def test_an_async_client_may_be_made_outside_its_loop() -> None:
    async def use(client: AsyncClient) -> None:
        async with client:
            assert (await client.tokenize("hi")).token_ids == (1, 2)

    with serving(ScriptedServicer(TOKENS)) as target:
        asyncio.run(use(AsyncClient(target)))


class KeptChannel:
    """A channel that is not to be closed in a forked process."""

    closed = False

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("forked", [False, True])
async def test_only_the_process_that_connected_closes_the_connection(forked: bool) -> None:
    """In a child, gRPC's threads are gone, and closing would wait for them forever."""

    async def close() -> None:
        kept.closed = True

    blocking, kept = KeptChannel(), KeptChannel()
    first = GrpcTransport(blocking)  # type: ignore[arg-type]
    kept.close = close  # type: ignore[assignment, method-assign]
    second = AsyncGrpcTransport(lambda: kept)  # type: ignore[arg-type, return-value]
    second._open_channel()
    for transport in (first, second):
        transport._process += forked
    first.close()
    await second.close()
    assert (blocking.closed, kept.closed) == (not forked, not forked)
    for transport in (first, second):
        with pytest.raises(ClosedError):
            transport.stream(pb.GenerateRequest(), None, ())
