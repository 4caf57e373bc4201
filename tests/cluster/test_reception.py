"""Whose requests an ingress receives at the same time, without a front."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, ExitStack

import pytest

from kvmesh.cluster import reception
from kvmesh.cluster.errors import IngressBusyError
from kvmesh.cluster.ingress.authenticate import Caller
from kvmesh.cluster.reception import Reception
from tests.cluster.machine import PATIENCE_S


@pytest.fixture(autouse=True)
def few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reception, "READERS", 4)
    monkeypatch.setattr(reception, "READERS_PER_TENANT", 2)


def receiving(turn_timeout_s: float) -> Reception:
    return Reception(lambda _: pytest.fail("nobody is asked for"), 10, turn_timeout_s)


class Call:
    """A call that sends its request until the test ends it."""

    def __init__(self, received: Reception, tenant: str) -> None:
        self.has_turn = False
        self._over = asyncio.Event()
        self._task = asyncio.create_task(self._send(received, tenant))

    async def _send(self, received: Reception, tenant: str) -> None:
        async with received.turn(tenant):
            self.has_turn = True
            await self._over.wait()

    async def end(self) -> None:
        self._over.set()
        await self._task
        await turns()

    async def leave(self) -> None:
        self._task.cancel()
        await turns()


async def turns() -> None:
    """Let all calls run until they wait."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_calls_that_wait_for_their_tenants_turn_take_no_turn_of_others() -> None:
    received = receiving(PATIENCE_S)
    slow = [Call(received, "slow") for _ in range(8)]
    await turns()
    assert [call.has_turn for call in slow] == [True, True] + [False] * 6
    others = [Call(received, name) for name in ("a", "b", "c")]
    await turns()
    assert [call.has_turn for call in others] == [True, True, False], "all turns are taken"
    await slow[2].leave()
    await slow[0].end()
    assert others[2].has_turn, "it waits longer for one of all turns than the tenant's next call"
    assert [call.has_turn for call in slow[3:]] == [False] * 5
    await others[0].end()
    assert [call.has_turn for call in slow[3:]] == [True] + [False] * 4
    for call in (*slow, *others):
        await call.leave()
    async with AsyncExitStack() as held:
        for name in ("a", "a", "b", "b"):
            await held.enter_async_context(received.turn(name))


@pytest.mark.parametrize("taken", [("a", "a"), ("b", "b", "c", "c")])
async def test_who_waits_for_a_turn_too_long_is_refused(taken: tuple[str, ...]) -> None:
    """Whether its tenant or all tenants together have too many; it then leaves none taken."""
    received = receiving(0.0)
    calls = []
    for name in taken:
        calls.append(Call(received, name))
        await turns()
    for _ in range(5):
        with pytest.raises(IngressBusyError, match="too many requests are being received"):
            async with received.turn("a"):
                pass
    for call in calls:
        await call.end()
    first = [Call(received, "a") for _ in range(2)]
    await turns()
    assert all(call.has_turn for call in first)
    for call in first:
        await call.end()


@pytest.mark.parametrize("shared", [False, True])
def test_no_tenant_has_all_calls_where_there_are_others(shared: bool) -> None:
    received = Reception(lambda _: pytest.fail("nobody is asked for"), 4, shared=lambda: shared)
    with ExitStack() as calls:

        def open_call(tenant: str) -> ExitStack:
            at_its_end = calls.enter_context(received.call())
            received.admit(Caller(tenant), at_its_end)
            return at_its_end

        first = [open_call("busy") for _ in range(3)]
        if shared:
            with pytest.raises(IngressBusyError, match="3 calls of your tenant"):
                open_call("busy")
            assert received._calls == 4, "until the refusal is sent"
        else:
            open_call("busy")
        with pytest.raises(IngressBusyError, match="4 calls"):
            open_call("other")
        first[0].close()
        assert received._calls == 4
    assert (received._calls, received._calls_of) == (0, {})
    with ExitStack() as calls:
        for tenant in ("busy", "busy", "busy", "other"):
            open_call(tenant)
    assert (received._calls, received._calls_of) == (0, {})


async def test_nothing_is_kept_of_a_tenant_without_calls() -> None:
    received = receiving(PATIENCE_S)
    async with received.turn("a"), received.turn("a"), received.turn("b"):
        assert {*received._tenants} == {"a", "b"}
    assert len(received._tenants) == 0
