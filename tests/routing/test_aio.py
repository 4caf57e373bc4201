from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count

import pytest

from kvmesh.cluster.routing.aio import AsyncRouter
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.errors import DeadlineUnreachableError, NeverFitsError
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.cluster.routing.router import Router
from tests.routing.groups import make_loads, make_spec

NAMES = count()


def ask(timeout_s: float | None = None, prompt: int = 160) -> PlaceRequest:
    return PlaceRequest(f"r{next(NAMES)}", prompt, 160, timeout_s=timeout_s)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(scenario: Callable[[AsyncRouter, Router, Clock], Awaitable[None]]) -> None:
    clock = Clock()
    core = Router(RouterConfig(), epoch=1, now=0.0)
    core.group_up(make_spec("g0", max_sequences=1), 0.0)
    core.report("g0", make_loads(), 0.0)

    async def main() -> None:
        await scenario(AsyncRouter(core, clock), core, clock)
        await asyncio.sleep(0)
        assert core.queue_depth == 0
        assert not core.ledger.leases

    asyncio.run(main())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_place_waits_for_a_release() -> None:
    async def scenario(router: AsyncRouter, core: Router, clock: Clock) -> None:
        first = await router.place(ask())
        waiting = asyncio.ensure_future(router.place(ask()))
        await settle()
        assert not waiting.done()
        assert router.snapshot().queue_depth == 1
        clock.now = 2.0
        assert await router.release(first.lease.lease_id)
        second = await waiting
        assert second.queue_s == 2.0
        assert not await router.release(first.lease.lease_id)
        assert await router.release(second.lease.lease_id)

    run(scenario)


def test_a_cancelled_waiter_leaves_the_queue() -> None:
    async def scenario(router: AsyncRouter, core: Router, clock: Clock) -> None:
        first = await router.place(ask())
        waiting = asyncio.ensure_future(router.place(ask()))
        await settle()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert core.queue_depth == 0
        await router.release(first.lease.lease_id)

    run(scenario)


@pytest.mark.parametrize("cancel_first", [True, False])
def test_a_grant_and_a_cancellation_in_one_moment_leave_no_lease(cancel_first: bool) -> None:
    async def scenario(router: AsyncRouter, core: Router, clock: Clock) -> None:
        first = await router.place(ask())
        waiting = asyncio.ensure_future(router.place(ask()))
        await settle()
        if cancel_first:
            waiting.cancel()
            await router.release(first.lease.lease_id)
        else:
            await router.release(first.lease.lease_id)
            waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(scenario)


def test_refusals_are_raised() -> None:
    async def scenario(router: AsyncRouter, core: Router, clock: Clock) -> None:
        with pytest.raises(NeverFitsError):
            await router.place(ask(prompt=50_000))
        first = await router.place(ask())
        waiting = asyncio.ensure_future(router.place(ask(timeout_s=3.0)))
        await settle()
        clock.now = 3.0
        await router.sweep()
        with pytest.raises(DeadlineUnreachableError):
            await waiting
        await router.release(first.lease.lease_id)

    run(scenario)
