"""Streams continue when a rank, an ingress, the router or another part dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvmesh.client import NO_RETRY, AsyncClient, Client, KVMeshError
from kvmesh.cluster.lifecycle import Endpoint
from tests.cluster.e2e.harness import (
    POLL_S,
    processes_named,
    wait_for,
    wait_idle,
)
from tests.cluster.e2e.streams import (
    PROMPTS,
    Streams,
    check_complete,
    is_complete,
    kill,
    killed_under,
    loads,
)
from tests.cluster.e2e.two_groups.config import GROUPS, TOKENS, Outputs

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    # Ray's own, at its import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]


LONG = 2500  # tokens: one in each group is all that there is room for


async def test_streams_survive_the_death_of_a_rank(
    endpoint: Endpoint, client: Client, outputs: Outputs
) -> None:
    prompts = PROMPTS[:GROUPS]
    assert len(processes_named("ray::RankActor")) == GROUPS
    streamed, tokens = await killed_under(
        endpoint,
        prompts,
        "ray::RankActor",
        GROUPS,
        lambda streamed: any(seen.failovers for seen in streamed),
    )
    check_complete(streamed, prompts, await asyncio.to_thread(outputs, tokens))
    # One stream ran on the group that died, and the ingress moved it by itself.
    assert sorted(seen.failovers for seen in streamed) == [0, 1]
    assert [seen.resumes for seen in streamed] == [0, 0]


async def test_streams_survive_the_death_of_an_ingress(
    endpoint: Endpoint, client: Client, outputs: Outputs
) -> None:
    streamed, tokens = await killed_under(
        endpoint,
        PROMPTS,
        "ray::ServeReplica:kvmesh:ingress",
        GROUPS,
        lambda streamed: any(seen.resumes for seen in streamed),
    )
    check_complete(streamed, PROMPTS, await asyncio.to_thread(outputs, tokens))


async def test_what_an_ingress_and_its_clients_leave_behind_is_freed(
    endpoint: Endpoint, client: Client
) -> None:
    """No client resumes, and no ingress is left to release the leases."""
    async with AsyncClient(endpoint.target, api_key=endpoint.api_key, retry=NO_RETRY) as leaving:
        streams = [
            leaving.generate_stream(prompt, max_tokens=600, ignore_eos=True) for prompt in PROMPTS
        ]
        iterators = [aiter(stream) for stream in streams]
        for iterator in iterators:
            for _ in range(3):
                await anext(iterator)

        async def read_on(iterator: AsyncIterator[object]) -> None:
            async for _ in iterator:
                pass

        ends = asyncio.gather(*map(read_on, iterators), return_exceptions=True)
        while not ends.done():
            for process in processes_named("ray::ServeReplica:kvmesh:ingress"):
                kill(process)
            await asyncio.sleep(POLL_S)
        assert [isinstance(end, KVMeshError) for end in await ends] == [True] * len(PROMPTS)


async def test_streams_are_not_affected_by_the_death_of_the_router(
    endpoint: Endpoint, client: Client, outputs: Outputs
) -> None:
    before = client.loads().router.epoch
    streamed, tokens = await killed_under(
        endpoint, PROMPTS, "ray::ServeReplica:kvmesh:router", GROUPS, lambda streamed: True
    )
    check_complete(streamed, PROMPTS, await asyncio.to_thread(outputs, tokens))
    assert [(seen.failovers, seen.resumes) for seen in streamed] == [(0, 0)] * len(PROMPTS)
    await asyncio.to_thread(
        wait_for, lambda: is_complete(endpoint, GROUPS), "the router is back", period_s=0.5
    )
    assert client.loads().router.epoch > before


async def test_a_new_router_takes_over_the_leases_of_live_streams(
    endpoint: Endpoint, client: Client
) -> None:
    async with AsyncClient(endpoint.target, api_key=endpoint.api_key) as many:
        streams = [
            many.generate_stream("Count:", max_tokens=LONG, ignore_eos=True) for _ in range(2)
        ]
        iterators = [aiter(stream) for stream in streams]
        for iterator in iterators:
            await anext(iterator)

        async def read_on() -> None:
            for iterator in iterators:
                async for _ in iterator:
                    pass

        reading = asyncio.create_task(read_on())
        held = client.loads().router
        assert held.leases == 2
        kill(processes_named("ray::ServeReplica:kvmesh:router")[0])

        def rebuilt() -> bool:
            found = loads(endpoint)
            return (
                found is not None and found.router.epoch > held.epoch and found.router.leases == 2
            )

        await asyncio.to_thread(wait_for, rebuilt, "the ledger has both leases", period_s=0.2)
        assert not reading.done()
        reading.cancel()
        for stream in streams:
            await stream.aclose()
        await asyncio.gather(reading, return_exceptions=True)
    await asyncio.to_thread(wait_idle, client)


THIRTY = 30
# Killed one after another, each after a further share of all tokens.
VICTIMS = (
    "ray::RankActor",
    "ray::ServeReplica:kvmesh:router",
    "ray::ServeReplica:kvmesh:ingress",
    "ray::ServeController",
    "ray::ServeReplica:kvmesh:engine-0",
)


async def test_thirty_streams_survive_the_death_of_every_part(
    endpoint: Endpoint, client: Client, expected: dict[str, tuple[int, ...]]
) -> None:
    """Each ends with the same tokens as without failures, and none of them twice."""
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(THIRTY)]
    streams = Streams(endpoint, prompts, TOKENS)
    for number, victim in enumerate(VICTIMS):
        share = (number + 1) / (len(VICTIMS) + 1)
        await streams.received(int(share * THIRTY * TOKENS))
        kill(processes_named(victim)[0])
    check_complete(await streams.ends(), prompts, expected)
