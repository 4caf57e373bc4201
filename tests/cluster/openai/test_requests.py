"""The HTTP front over a real ingress, router and engine: output, ends, the ledger's refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvmesh.cluster.routing.config import RouterConfig
from tests.cluster.machine import Machine, answer, machine, text_of
from tests.cluster.openai.server import HttpServer, http_server
from tests.cluster.test_generation import PROMPT

MANY = 10_000
GREEDY: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True}


@pytest.fixture
async def built() -> AsyncIterator[Machine]:
    async with machine(config=RouterConfig(queue_limit=0)) as running:
        yield running


@pytest.fixture
async def server(built: Machine) -> AsyncIterator[HttpServer]:
    async with http_server(built.ingress) as running:
        yield running


async def test_both_fronts_give_the_same_output(built: Machine, server: HttpServer) -> None:
    built.allow(MANY)
    expected = text_of(answer(PROMPT, 6))
    reply = await server.post("/v1/completions", {**GREEDY, "max_tokens": 6})
    assert reply.json()["choices"][0]["text"] == expected
    assert int(reply.headers["x-kvmesh-kv-bytes"]) > 0
    async with server.client() as client:
        stream = await client.completions.create(
            model="", stream=True, max_tokens=6, extra_body={"ignore_eos": True}, prompt=PROMPT
        )
        assert "".join([chunk.choices[0].text async for chunk in stream])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_pages(
    built: Machine, server: HttpServer, stream: bool
) -> None:
    built.allow(3)
    body = {**GREEDY, "max_tokens": 300, "stream": stream}
    async with asyncio.TaskGroup() as group:
        call = group.create_task(server.post("/v1/completions", body))
        await built.until(lambda: built.leases() == 1)
        call.cancel()
    await built.until(lambda: built.leases() == 0)


async def test_what_never_fits_and_what_does_not_fit_now(
    built: Machine, server: HttpServer
) -> None:
    never = await server.post("/v1/completions", {**GREEDY, "prompt": PROMPT * 500})
    assert never.status_code == 400
    assert never.json()["error"]["code"] == "context_length_exceeded"
    built.allow(3)
    body = {**GREEDY, "max_tokens": 300}
    calls: list[asyncio.Task[Any]] = []
    while built.leases() == len(calls):
        call = asyncio.create_task(server.post("/v1/completions", body))
        calls.append(call)
        await built.until(lambda: call.done() or built.leases() == len(calls))  # noqa: B023
    refused = await calls.pop()
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    built.allow(MANY)
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    assert error["kvmesh"]["needed_bytes"] > 0
    await built.until(lambda: built.leases() == 0)
