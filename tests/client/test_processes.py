"""Clients belong to one process, and those for asyncio to one event loop."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest

from kvmesh import AsyncClient, Client, UsageError
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
