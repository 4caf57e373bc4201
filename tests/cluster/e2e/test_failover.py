"""Streams continue when a rank, an ingress, the router or another part dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import pytest

from kvmesh.client import AsyncClient, Client, KVMeshError, Loads, RetryPolicy
from kvmesh.cluster.lifecycle import Endpoint
from tests.cluster.e2e.harness import (
    PAGE_TOKENS,
    SMALL_ENGINE,
    check_accounts,
    greedy_by_engine,
    processes_named,
    serving,
    small_config,
    wait_for,
    wait_idle,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    # Ray's own, at its import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

GROUPS = 2
TOKENS = 24
CONFIG = small_config(
    engine={**SMALL_ENGINE, "kv_memory_bytes": "24MiB"},
    groups=GROUPS,
    ingress={"port": 0, "replicas": 2},
)
# A dead replica is replaced within seconds, on a busy machine tens of seconds.
PATIENT = RetryPolicy(max_attempts=12, max_backoff_s=5.0)
NO_RETRY = RetryPolicy(max_attempts=1)
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time there was a",
    "Water boils at a temperature of",
)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with serving(CONFIG, tmp_path_factory.mktemp("config")) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def expected(endpoint: Endpoint) -> dict[str, tuple[int, ...]]:
    """The output for each prompt when nothing dies."""
    with Client(endpoint.target, api_key=endpoint.api_key) as client:
        ids = [client.tokenize(prompt).token_ids for prompt in PROMPTS]
    answers = greedy_by_engine(CONFIG, ids, TOKENS)
    assert TOKENS > PAGE_TOKENS, "what is resumed has sealed pages"
    return dict(zip(PROMPTS, answers, strict=True))


@dataclass(frozen=True, slots=True)
class Streamed:
    """What a client saw of one stream."""

    token_ids: tuple[int, ...]
    text: str
    whole_text: str
    failovers: int
    resumes: int


class Streams:
    """Several streams at once, each on its own connection."""

    def __init__(self, endpoint: Endpoint, prompts: Sequence[str]) -> None:
        self._endpoint = endpoint
        self._tokens = 0
        self._progress = asyncio.Condition()
        self._started = [asyncio.Event() for _ in prompts]
        self._tasks = [
            asyncio.create_task(self._one(prompt, started))
            for prompt, started in zip(prompts, self._started, strict=True)
        ]

    async def wait_for_tokens(self) -> None:
        """Wait until each has some tokens."""
        async with asyncio.timeout(60):
            for started in self._started:
                await started.wait()
        assert not any(task.done() for task in self._tasks), (
            "a stream has ended before anything was killed"
        )

    async def received(self, tokens: int) -> None:
        """Wait until all of them together have this many tokens."""
        async with asyncio.timeout(150), self._progress:
            await self._progress.wait_for(lambda: self._tokens >= tokens)

    async def ends(self) -> list[Streamed]:
        async with asyncio.timeout(150):
            return list(await asyncio.gather(*self._tasks))

    async def _one(self, prompt: str, started: asyncio.Event) -> Streamed:
        target, key = self._endpoint.target, self._endpoint.api_key
        token_ids: list[int] = []
        text = ""
        async with AsyncClient(target, api_key=key, retry=PATIENT) as client:
            stream = client.generate_stream(
                prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True
            )
            async for delta in stream:
                token_ids.extend(delta.token_ids)
                text += delta.text
                if len(token_ids) >= 3:
                    started.set()
                async with self._progress:
                    self._tokens += len(delta.token_ids)
                    self._progress.notify_all()
            usage = stream.usage
            assert usage is not None
            return Streamed(
                tuple(token_ids), text, stream.completion.text, usage.failovers, stream.resumes
            )


def check_complete(streamed: list[Streamed], prompts: Sequence[str], expected: object) -> None:
    """Every token once, as if nothing had happened."""
    assert isinstance(expected, dict)
    for prompt, seen in zip(prompts, streamed, strict=True):
        assert seen.token_ids == expected[prompt]
        assert seen.text == seen.whole_text


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)


def loads(endpoint: Endpoint) -> Loads | None:
    """The cluster's loads, or None while they are not available."""
    try:
        with Client(endpoint.target, api_key=endpoint.api_key) as client:
            return client.loads(timeout_s=10.0)
    except KVMeshError:
        return None


def is_complete(endpoint: Endpoint, groups: int = GROUPS) -> bool:
    """Whether every group is up, in the ledger, and every part has its processes."""
    found = loads(endpoint)
    return (
        found is not None
        and sum(group.healthy for group in found.groups) == groups
        and len(found.router.ledger) == groups
        and len(processes_named("ray::ServeReplica:kvmesh:ingress")) == 2
        and len(processes_named("ray::ServeReplica:kvmesh:router")) == 1
    )


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[Client]:
    """The cluster is complete before and after the test."""
    wait_for(lambda: is_complete(endpoint), "every part is up", within_s=120, period_s=0.5)
    with Client(endpoint.target, api_key=endpoint.api_key, retry=PATIENT) as client:
        wait_idle(client)
        yield client
        wait_for(
            lambda: is_complete(endpoint), "every part is up again", within_s=120, period_s=0.5
        )
        wait_idle(client)
        check_accounts(client.loads())


async def test_streams_survive_the_death_of_a_rank(
    endpoint: Endpoint, client: Client, expected: dict[str, tuple[int, ...]]
) -> None:
    prompts = PROMPTS[:GROUPS]
    ranks = processes_named("ray::RankActor")
    assert len(ranks) == GROUPS
    streams = Streams(endpoint, prompts)
    await streams.wait_for_tokens()
    assert sorted(group.running for group in client.loads().groups) == [1, 1]
    kill(ranks[0])
    streamed = await streams.ends()
    check_complete(streamed, prompts, expected)
    # One stream ran on the group that died, and the ingress moved it by itself.
    assert sorted(seen.failovers for seen in streamed) == [0, 1]
    assert [seen.resumes for seen in streamed] == [0, 0]


async def test_streams_survive_the_death_of_an_ingress(
    endpoint: Endpoint, client: Client, expected: dict[str, tuple[int, ...]]
) -> None:
    prompts = PROMPTS
    streams = Streams(endpoint, prompts)
    await streams.wait_for_tokens()
    kill(processes_named("ray::ServeReplica:kvmesh:ingress")[0])
    streamed = await streams.ends()
    check_complete(streamed, prompts, expected)
    assert sum(seen.resumes for seen in streamed) >= 1


async def test_what_an_ingress_and_its_clients_leave_behind_is_freed(
    endpoint: Endpoint, client: Client
) -> None:
    """No client resumes, and no ingress is left to release the leases."""
    async with AsyncClient(endpoint.target, api_key=endpoint.api_key, retry=NO_RETRY) as leaving:
        streams = [
            leaving.generate_stream(prompt, max_tokens=300, ignore_eos=True) for prompt in PROMPTS
        ]
        iterators = [aiter(stream) for stream in streams]
        for iterator in iterators:
            for _ in range(3):
                await anext(iterator)
        for process in processes_named("ray::ServeReplica:kvmesh:ingress"):
            kill(process)
        for iterator in iterators:
            with pytest.raises(KVMeshError):
                async for _ in iterator:
                    pass


async def test_streams_are_not_affected_by_the_death_of_the_router(
    endpoint: Endpoint, client: Client, expected: dict[str, tuple[int, ...]]
) -> None:
    before = client.loads().router.epoch
    prompts = PROMPTS
    streams = Streams(endpoint, prompts)
    await streams.wait_for_tokens()
    kill(processes_named("ray::ServeReplica:kvmesh:router")[0])
    streamed = await streams.ends()
    check_complete(streamed, prompts, expected)
    assert [(seen.failovers, seen.resumes) for seen in streamed] == [(0, 0)] * len(prompts)
    await asyncio.to_thread(
        wait_for, lambda: is_complete(endpoint), "the router is back", within_s=120, period_s=0.5
    )
    assert client.loads().router.epoch > before


async def test_a_new_router_takes_over_the_leases_of_live_streams(
    endpoint: Endpoint, client: Client
) -> None:
    async with AsyncClient(endpoint.target, api_key=endpoint.api_key) as many:
        streams = [
            many.generate_stream("Count:", max_tokens=400, ignore_eos=True) for _ in range(2)
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

        await asyncio.to_thread(
            wait_for, rebuilt, "the ledger has both leases", within_s=60, period_s=0.2
        )
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
    streams = Streams(endpoint, prompts)
    for number, victim in enumerate(VICTIMS):
        share = (number + 1) / (len(VICTIMS) + 1)
        await streams.received(int(share * THIRTY * TOKENS))
        kill(processes_named(victim)[0])
    check_complete(await streams.ends(), prompts, expected)
