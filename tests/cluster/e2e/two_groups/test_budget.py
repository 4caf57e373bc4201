"""Two groups under a mixed load: every audit of the budget passes, and it ends at zero."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from kvmesh.client import AsyncClient, Client, Completion
from kvmesh.cluster.lifecycle import Endpoint
from tests.cluster.e2e.harness import (
    PAGE_TOKENS,
    processes_named,
    wait_idle,
)
from tests.cluster.e2e.streams import PATIENT
from tests.cluster.e2e.two_groups.config import GROUPS

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("audited"),
    pytest.mark.timeout(1800),
    # Ray's own, at its import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

REQUESTS = 200
SHORT_REQUESTS = 66  # the first of them
VOCAB = 49_152
SHORT_TOKENS = 4
LONG_TOKENS = 40


@pytest.fixture
def audited(client: Client) -> Iterator[None]:
    """Every audit is without a fault, and there are some; nothing is preempted."""
    yield
    wait_idle(client)
    loads = client.loads()
    assert loads.router.audits_total > 0
    assert loads.router.audit_faults_total == 0
    assert sum(group.preemptions_total for group in loads.groups) == 0


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """A request of the load."""

    prompt: list[int]
    max_tokens: int


def mixed_load(sealed_total: int, count: int) -> list[LoadRequest]:
    """Short requests to learn from; then longer output, whose leases must grow, some with a
    common prefix; and a few prompts so large that a group holds only one of them at a time.

    sealed_total: pages of one group
    """
    rng = random.Random(7)
    common = [rng.randrange(VOCAB) for _ in range(9 * PAGE_TOKENS)]
    requests: list[LoadRequest] = []
    for number in range(count):
        own = [rng.randrange(VOCAB) for _ in range(rng.randint(8, 31))]
        if number % 40 == 39:
            large = [rng.randrange(VOCAB) for _ in range(sealed_total * PAGE_TOKENS * 7 // 10)]
            requests.append(LoadRequest(large, SHORT_TOKENS))
        elif number < SHORT_REQUESTS:
            requests.append(LoadRequest(own, SHORT_TOKENS))
        else:
            prompt = common + own[:8] if number % 5 == 0 else own
            long = number % 8 == 0
            requests.append(LoadRequest(prompt, LONG_TOKENS if long else 2 * SHORT_TOKENS))
    return requests


@dataclass(frozen=True, slots=True)
class Served:
    """A completed request. reserved_bytes: when it started"""

    completion: Completion
    reserved_bytes: int


async def run(
    endpoint: Endpoint, requests: list[LoadRequest], first_token: asyncio.Event
) -> list[Served]:
    async with AsyncClient(endpoint.target, api_key=endpoint.api_key, retry=PATIENT) as client:

        async def one(request: LoadRequest) -> Served:
            stream = client.generate_stream(
                request.prompt, max_tokens=request.max_tokens, ignore_eos=True, temperature=0.0
            )
            async for _ in stream:
                first_token.set()
            assert stream.started is not None
            return Served(stream.completion, stream.started.kv_reserved_bytes)

        return list(await asyncio.gather(*(one(request) for request in requests)))


def check_served(requests: list[LoadRequest], served: list[Served]) -> None:
    for request, one in zip(requests, served, strict=True):
        (choice,) = one.completion.choices
        usage = one.completion.usage
        assert len(choice.token_ids) == request.max_tokens
        assert usage.preemptions == 0
        assert usage.kv_used_bytes == usage.kv_freed_bytes > 0


async def test_a_mixed_load_keeps_the_budget(endpoint: Endpoint, client: Client) -> None:
    loads = client.loads()
    requests = mixed_load(loads.groups[0].sealed.total, REQUESTS)
    served = await run(endpoint, requests[:SHORT_REQUESTS], asyncio.Event())
    served += await run(endpoint, requests[SHORT_REQUESTS:], asyncio.Event())
    check_served(requests, served)
    assert any(one.reserved_bytes < one.completion.usage.kv_reserved_bytes for one in served)
    groups = Counter(one.completion.usage.group for one in served)
    assert len(groups) == GROUPS
    assert min(groups.values()) >= REQUESTS // 10
    after = client.loads().router
    assert after.granted_total - loads.router.granted_total == REQUESTS
    assert after.refused_total == loads.router.refused_total


async def test_a_killed_router_loses_and_duplicates_nothing(
    endpoint: Endpoint, client: Client
) -> None:
    before = client.loads().router
    requests = mixed_load(client.loads().groups[0].sealed.total, 60)
    first_token = asyncio.Event()
    running = asyncio.create_task(run(endpoint, requests, first_token))
    await first_token.wait()
    (router,) = processes_named("ray::ServeReplica:kvmesh:router")
    os.kill(router.pid, signal.SIGKILL)
    check_served(requests, await running)
    await asyncio.to_thread(wait_idle, client)
    after = client.loads().router
    assert after.epoch > before.epoch
    assert all(account.leased_bytes == 0 for account in after.ledger)
