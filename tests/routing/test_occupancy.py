"""Prompts that would keep a group from everybody else for long."""

from __future__ import annotations

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.occupancy import SAMPLE_EVERY
from kvmesh.cluster.routing.request import Granted, PlaceRequest, Queued
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.routing.verdict import Reason
from tests.routing.groups import make_loads
from tests.routing.test_placement import paced

LONG_TOKENS = 80_000  # 80 s at a millisecond each


def fleet(groups: int) -> Router:
    router = Router(RouterConfig(ahead_s=1.0, busy_most=0.5), epoch=1, now=0.0)
    for index in range(groups):
        spec = paced(f"g{index}", sealed=10_000)
        router.group_up(spec, 0.0)
        router.report(spec.group, make_loads(), 0.0)
    return router


def long(router: Router, name: str, now: float) -> Granted | Queued:
    decision = router.submit(PlaceRequest(name, LONG_TOKENS, 10), now)[0]
    assert isinstance(decision, Granted | Queued)
    return decision


def test_one_long_prompt_may_begin_at_any_time() -> None:
    router = fleet(1)
    assert isinstance(long(router, "a", 0.0), Granted)


def test_idle_groups_take_as_many_long_prompts_as_there_are() -> None:
    router = fleet(3)
    assert all(isinstance(long(router, name, 0.0), Granted) for name in "abc")


def test_where_groups_are_needed_long_prompts_go_one_after_another() -> None:
    router = fleet(4)
    router._occupancy._busy_groups = 2.0  # half of the time
    first = long(router, "a", 0.0)
    assert isinstance(first, Granted)
    second = long(router, "b", 1.0)
    assert isinstance(second, Queued)
    reasons = {verdict.group: verdict.reason for verdict in second.verdicts}
    assert reasons[first.placement.group] is Reason.LONG
    assert set(reasons.values()) == {Reason.LONG}
    assert router.promise is None
    # Those behind it go on.
    short = router.submit(PlaceRequest("short", 100, 10), 2.0)[0]
    assert isinstance(short, Granted)
    # And whoever has lost a group is not held back.
    lost = router.submit(PlaceRequest("lost", LONG_TOKENS, 10, resumed=True), 3.0)[0]
    assert isinstance(lost, Granted)
    router.release(lost.placement.lease.lease_id, 4.0)
    outcomes = router.begun(first.placement.lease.lease_id, 80.0).outcomes
    assert [outcome.request_id for outcome in outcomes] == ["b"]


def test_what_groups_are_needed_for_is_seen_at_arrivals() -> None:
    router = fleet(4)
    assert router._occupancy.spares_one(router.views())
    now = 0.0
    held = [router.submit(PlaceRequest(f"h{i}", 900, 10), now)[0] for i in range(4)]
    for number in range(60 * SAMPLE_EVERY):
        router.submit(PlaceRequest(f"x{number}", 10_000_000, 10), now)  # never fits
    assert len(held) == 4
    assert router._occupancy._busy_groups > 3.5
