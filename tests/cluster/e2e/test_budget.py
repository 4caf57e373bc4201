"""Two groups under a mixed load: the budget is true at every audit, and at zero in the end."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from kvmesh.client import AsyncClient, Client, Completion, RetryPolicy
from kvmesh.cluster.lifecycle import Endpoint
from tests.cluster.e2e.harness import (
    PAGE_TOKENS,
    SMALL_ENGINE,
    check_accounts,
    processes_named,
    serving,
    small_config,
    wait_for,
    wait_idle,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    # Ray's own, at its import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

GROUPS = 2
REQUESTS = 200
BRIEF = 66  # of them, at first
CONFIG = small_config(
    groups=GROUPS,
    engine=SMALL_ENGINE,
    # Half a minute's load on an idle machine; nobody is refused on a busy one either.
    router={"report_period_s": 0.1, "max_queued": REQUESTS, "queue_timeout_s": 900.0},
)
PATIENT = RetryPolicy(max_attempts=12, max_backoff_s=5.0)
VOCAB = 49_152
BRIEF_TOKENS = 4
WORDY_TOKENS = 40


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with serving(CONFIG, tmp_path_factory.mktemp("config")) as endpoint:
        yield endpoint


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[Client]:
    """At rest before and after, and every audit on the way without a fault."""
    with Client(endpoint.target, api_key=endpoint.api_key, retry=PATIENT) as client:
        wait_for(lambda: len(client.loads().router.ledger) == GROUPS, "both groups are up")
        wait_idle(client)
        yield client
        wait_idle(client)
        loads = client.loads()
        check_accounts(loads)
        assert loads.router.audits_total > 0
        assert loads.router.audit_faults_total == 0
        assert sum(group.preemptions_total for group in loads.groups) == 0


@dataclass(frozen=True, slots=True)
class Order:
    """One request of the load."""

    prompt: list[int]
    max_tokens: int


def mixed_load(sealed_total: int, count: int) -> list[Order]:
    """Brief ones to learn from; then wordy ones, whose leases must grow, some with a prompt in
    common; and a few that leave no room for a second one of their kind in a group.

    sealed_total: pages of one group
    """
    dice = random.Random(7)
    common = [dice.randrange(VOCAB) for _ in range(9 * PAGE_TOKENS)]
    orders: list[Order] = []
    for number in range(count):
        own = [dice.randrange(VOCAB) for _ in range(dice.randint(8, 31))]
        if number % 40 == 39:
            large = [dice.randrange(VOCAB) for _ in range(sealed_total * PAGE_TOKENS * 7 // 10)]
            orders.append(Order(large, BRIEF_TOKENS))
        elif number < BRIEF:
            orders.append(Order(own, BRIEF_TOKENS))
        else:
            prompt = common + own[:8] if number % 5 == 0 else own
            wordy = number % 8 == 0
            orders.append(Order(prompt, WORDY_TOKENS if wordy else 2 * BRIEF_TOKENS))
    return orders


@dataclass(frozen=True, slots=True)
class Served:
    """What became of a request. reserved_bytes: at first"""

    completion: Completion
    reserved_bytes: int


async def run(endpoint: Endpoint, orders: list[Order], begun: asyncio.Event) -> list[Served]:
    async with AsyncClient(endpoint.target, api_key=endpoint.api_key, retry=PATIENT) as client:

        async def one(order: Order) -> Served:
            stream = client.generate_stream(
                order.prompt, max_tokens=order.max_tokens, ignore_eos=True, temperature=0.0
            )
            async for _ in stream:
                begun.set()
            assert stream.started is not None
            return Served(stream.completion, stream.started.kv_reserved_bytes)

        return list(await asyncio.gather(*(one(order) for order in orders)))


def check_served(orders: list[Order], served: list[Served]) -> None:
    for order, one in zip(orders, served, strict=True):
        (choice,) = one.completion.choices
        usage = one.completion.usage
        assert len(choice.token_ids) == order.max_tokens
        assert usage.preemptions == 0
        assert usage.kv_used_bytes == usage.kv_freed_bytes > 0


async def test_a_mixed_load_keeps_the_budget(endpoint: Endpoint, client: Client) -> None:
    loads = client.loads()
    orders = mixed_load(loads.groups[0].sealed.total, REQUESTS)
    served = await run(endpoint, orders[:BRIEF], asyncio.Event())
    served += await run(endpoint, orders[BRIEF:], asyncio.Event())
    check_served(orders, served)
    assert any(one.reserved_bytes < one.completion.usage.kv_reserved_bytes for one in served)
    groups = Counter(one.completion.usage.group for one in served)
    assert len(groups) == GROUPS
    assert min(groups.values()) >= REQUESTS // 10
    after = client.loads().router
    assert after.granted_total - loads.router.granted_total == REQUESTS
    assert after.refused_total == loads.router.refused_total


async def test_a_killed_router_loses_and_doubles_nothing(
    endpoint: Endpoint, client: Client
) -> None:
    before = client.loads().router
    orders = mixed_load(client.loads().groups[0].sealed.total, 60)
    begun = asyncio.Event()
    running = asyncio.create_task(run(endpoint, orders, begun))
    await begun.wait()
    (router,) = processes_named("ray::ServeReplica:kvmesh:router")
    os.kill(router.pid, signal.SIGKILL)
    check_served(orders, await running)
    await asyncio.to_thread(wait_idle, client)
    after = client.loads().router
    assert after.epoch > before.epoch
    assert all(account.leased_bytes == 0 for account in after.ledger)
