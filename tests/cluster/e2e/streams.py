"""Streams that a client reads while parts of the cluster die or hang."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import pytest

from kvmesh.client import AsyncClient, Client, KVMeshError, Loads, RetryPolicy
from kvmesh.cluster.lifecycle import Endpoint
from tests.cluster.e2e.harness import processes_named, wait_for

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time there was a",
    "Water boils at a temperature of",
)
PATIENCE_S = 400.0  # on a machine with other work
LENGTHS = (64, 128, 256, 512, 1024)  # of streams, in tokens
# A dead replica is replaced within seconds, on a busy machine tens of seconds.
PATIENT = RetryPolicy(max_attempts=12, max_backoff_s=5.0)


@dataclass(frozen=True, slots=True)
class Streamed:
    """What a client saw of one stream."""

    token_ids: tuple[int, ...]
    text: str
    whole_text: str
    group: str
    failovers: int
    resumes: int


class Streams:
    """Several greedy streams of `tokens` tokens at once, each on its own connection."""

    def __init__(self, endpoint: Endpoint, prompts: Sequence[str], tokens: int) -> None:
        self._max_tokens = tokens
        self._endpoint = endpoint
        self._tokens = 0
        self._progress = asyncio.Condition()
        self._started = [asyncio.Event() for _ in prompts]
        self._tasks = [
            asyncio.create_task(self._one(prompt, started))
            for prompt, started in zip(prompts, self._started, strict=True)
        ]

    async def all_run(self) -> bool:
        """Wait until each has some tokens; whether none has ended by then."""
        async with asyncio.timeout(PATIENCE_S):
            for started in self._started:
                await started.wait()
        return not any(task.done() for task in self._tasks)

    async def received(self, tokens: int) -> None:
        """Wait until all of them together have this many tokens."""
        async with asyncio.timeout(PATIENCE_S), self._progress:
            await self._progress.wait_for(lambda: self._tokens >= tokens)

    async def ends(self) -> list[Streamed]:
        async with asyncio.timeout(PATIENCE_S):
            return list(await asyncio.gather(*self._tasks))

    async def _one(self, prompt: str, started: asyncio.Event) -> Streamed:
        target, key = self._endpoint.target, self._endpoint.api_key
        token_ids: list[int] = []
        text = ""
        async with AsyncClient(target, api_key=key, retry=PATIENT) as client:
            stream = client.generate_stream(
                prompt, max_tokens=self._max_tokens, temperature=0.0, ignore_eos=True
            )
            try:
                async for delta in stream:
                    token_ids.extend(delta.token_ids)
                    text += delta.text
                    if len(token_ids) >= 3:
                        started.set()
                    async with self._progress:
                        self._tokens += len(delta.token_ids)
                        self._progress.notify_all()
            finally:
                started.set()  # a failure is raised in `ends`, not waited for here
            usage = stream.usage
            assert usage is not None
            return Streamed(
                tuple(token_ids),
                text,
                stream.completion.text,
                usage.group,
                usage.failovers,
                stream.resumes,
            )


def check_complete(streamed: list[Streamed], prompts: Sequence[str], expected: object) -> None:
    """Every token once, as if nothing had happened."""
    assert isinstance(expected, dict)
    for prompt, seen in zip(prompts, streamed, strict=True):
        assert seen.token_ids == expected[prompt]
        assert seen.text == seen.whole_text


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)


async def killed_under(
    endpoint: Endpoint,
    prompts: Sequence[str],
    victim: str,
    groups: int,
    noticed: Callable[[list[Streamed]], bool],
) -> tuple[list[Streamed], int]:
    """What streams have seen that ran while the first process named `victim` was killed, and of
    how many tokens they are.

    Nothing can hold a stream back: on a busy machine one may end before the last one starts, or
    before the victim is dead. Then longer ones are tried.

    noticed: whether any stream was affected, as far as clients can know that
    """
    for tokens in LENGTHS:
        await asyncio.to_thread(
            wait_for, lambda: is_complete(endpoint, groups), "every part is up", period_s=0.5
        )
        process = processes_named(victim)[0]
        streams = Streams(endpoint, prompts, tokens)
        if await streams.all_run():
            kill(process)
            streamed = await streams.ends()
            if noticed(streamed):
                return streamed, tokens
        else:
            await streams.ends()
    pytest.fail(f"streams of {tokens} tokens ended before {victim} was killed")


def loads(endpoint: Endpoint) -> Loads | None:
    """The cluster's loads, or None while they are not available."""
    try:
        with Client(endpoint.target, api_key=endpoint.api_key) as client:
            return client.loads(timeout_s=60.0)
    except KVMeshError:
        return None


def is_complete(endpoint: Endpoint, groups: int, ingresses: int = 2) -> bool:
    """Whether every group is up, in the ledger, and every part has its processes."""
    found = loads(endpoint)
    return (
        found is not None
        and sum(group.healthy for group in found.groups) == groups
        and len(found.router.ledger) == groups
        and len(processes_named("ray::ServeReplica:kvmesh:ingress")) == ingresses
        and len(processes_named("ray::ServeReplica:kvmesh:router")) == 1
    )
