"""The model that a cluster serves, of which an ingress knows what the router last said."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import pytest

from kvmesh.cluster.errors import NotReadyError, UnknownModelError
from kvmesh.cluster.ingress import served
from kvmesh.cluster.ingress.served import Served
from kvmesh.cluster.reports import ClusterStatus, EngineReport
from kvmesh.cluster.routing.outcome import RouterStatus
from kvmesh.workers.loads import EngineInfo, EngineLoads
from tests.cluster.machine import PATIENCE_S
from tests.routing.groups import make_info

ROUTER = RouterStatus(1, True, 0, 1, 0, 0, (), 0, 0, 0, {})


def status(infos: Mapping[str, EngineInfo], *, draining: bool = False) -> ClusterStatus:
    reports = {name: EngineReport(info, EngineLoads()) for name, info in infos.items()}
    return ClusterStatus(ROUTER, reports, frozenset(infos), draining=draining)


MIXED = status(
    {
        "short": make_info(max_model_len=100, sealed=1000),
        "long": make_info(max_model_len=5000, sealed=400),
        "middle": make_info(max_model_len=900, sealed=9000),
    }
)


class Scripted:
    """A router that answers with the statuses of a test, when it lets it."""

    def __init__(self, *statuses: ClusterStatus | Exception) -> None:
        self.left = list(statuses)
        self.fresh: list[bool] = []
        self.proceed = asyncio.Event()
        self.proceed.set()

    async def status(self, *, fresh: bool = False) -> ClusterStatus:
        self.fresh.append(fresh)
        await self.proceed.wait()
        answer = self.left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def serving(router: Scripted, *aliases: str) -> Served:
    return Served(router, frozenset(aliases), lambda: None)  # type: ignore[arg-type]


async def test_nothing_is_served_before_a_group_has_reported() -> None:
    made = serving(Scripted(status({}), MIXED))
    for _ in range(2):
        assert not made.healthy
        assert not made.draining
        with pytest.raises(NotReadyError):
            _ = made.status
        if made._status is None:
            await made.refresh()
    await made.refresh()
    assert made.healthy
    assert made.status is MIXED


async def test_a_status_counts_until_the_next_one() -> None:
    made = serving(Scripted(MIXED, replace(MIXED, healthy=frozenset(), draining=True)))
    await made.refresh()
    assert (made.healthy, made.draining) == (True, False)
    await made.refresh()
    assert (made.healthy, made.draining) == (False, True)


async def test_a_model_is_known_by_its_own_name_and_its_aliases() -> None:
    made = serving(Scripted(MIXED), "alias")
    await made.refresh()
    for name in ("", "alias", "m"):
        assert made.status_for(name) is MIXED
    with pytest.raises(UnknownModelError, match="other"):
        made.status_for("other")


async def test_all_who_want_a_fresh_status_at_once_share_one() -> None:
    router = Scripted(status({}), MIXED)
    made = serving(router)
    router.proceed.clear()
    asking = [asyncio.create_task(made.fresh()) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asking[0].cancel()  # the others still wait for it
    router.proceed.set()
    first = await asyncio.wait_for(asyncio.gather(*asking[1:]), PATIENCE_S)
    assert [found.healthy for found in first] == [frozenset()] * 2
    assert await made.fresh() is MIXED, "it was asked for after the others had theirs"
    assert router.fresh == [True, True]


async def test_a_router_that_is_away_is_asked_again_and_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gauges that say so are set while it is away, before it has answered and after."""
    monkeypatch.setattr(served, "REFRESH_PERIOD_S", 0.0)
    away, gone = NotReadyError("away"), replace(MIXED, healthy=frozenset())
    router = Scripted(away, away, MIXED, away, gone, away)
    measured: list[tuple[int, bool]] = []

    def measure() -> None:
        measured.append((len(router.left), made.healthy))
        if not router.left:
            router.proceed.clear()

    made = Served(router, frozenset(), measure)  # type: ignore[arg-type]
    running = asyncio.create_task(made.run())
    async with asyncio.timeout(PATIENCE_S):
        while router.proceed.is_set() and not running.done():
            await asyncio.sleep(0)
    running.cancel()
    assert measured == [(5, False), (4, False), (3, True), (2, True), (1, False), (0, False)]


def test_the_context_is_the_longest_of_all_groups() -> None:
    assert served.max_model_len(MIXED) == 5000
    error = served.context_exceeded(6000, MIXED)
    longest = MIXED.reports["long"].info
    need = longest.geometry.peak_need(6001)
    assert error.needed_bytes == longest.geometry.bytes_of(need)
    assert error.available_bytes == longest.capacity_bytes
    assert "6000" in str(error).replace(",", "")
    assert "5000" in str(error).replace(",", "")


def test_what_known_groups_do_not_hold_is_not_refused_while_one_is_missing() -> None:
    missing = replace(MIXED, missing=frozenset({"longer"}))
    for tokens, known, unknown in ((5000, 5000, 5000), (5001, 5000, served.UNKNOWN_CONTEXT)):
        assert served.longest_context(MIXED, tokens) == known
        assert served.longest_context(missing, tokens) == unknown
