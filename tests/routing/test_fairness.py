from __future__ import annotations

import itertools
from collections import Counter

import pytest

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.errors import OverCapacityError, QuotaExceededError
from kvmesh.cluster.routing.fairness import TenantPolicy, Tenants
from kvmesh.cluster.routing.queue import WaitingQueue
from kvmesh.cluster.routing.request import Granted, PlaceRequest, Queued, Refused
from kvmesh.cluster.routing.router import Router
from tests.routing.groups import make_loads, make_spec


def test_who_comes_back_from_idling_starts_level() -> None:
    tenants = Tenants()
    tenants.enter("busy")
    tenants.charge("busy", 100, 10.0)
    tenants.enter("new")
    assert tenants.counter("new") == tenants.counter("busy") == 1000.0
    tenants.charge("new", 100, 1.0)
    tenants.settle("new", 100, -0.5)
    assert tenants.counter("new") == 1050.0
    tenants.leave("new")
    tenants.charge("busy", 100, 1.0)
    tenants.enter("new")  # it idled while the other worked
    assert tenants.counter("new") == 1100.0


def test_heavy_use_is_not_forgotten_by_a_pause() -> None:
    tenants = Tenants()
    for name in ("a", "b"):
        tenants.enter(name)
    tenants.charge("a", 100, 100.0)
    tenants.leave("a")
    tenants.enter("a")
    assert tenants.counter("a") == 10_000.0
    assert tenants.counter("b") == 0.0


def test_a_queue_orders_by_priority_then_use_then_due_time() -> None:
    queue = WaitingQueue(100, patience_s=50.0)
    used = {"x": 5.0, "y": 1.0}
    for index, (tenant, priority, due) in enumerate(
        [("x", 0, 9.0), ("y", 0, 8.0), ("x", 0, 7.0), ("y", 0, 3.0), ("x", 1, 9.0), ("y", 0, 7.0)]
    ):
        request = PlaceRequest(f"r{index}", 1, 1, tenant=tenant, priority=priority)
        queue.put(request, float(index) / 10, due)
    order = [waiting.request.request_id for waiting in queue.in_order(used.__getitem__, 1.0)]
    assert order == ["r4", "r3", "r5", "r1", "r2", "r0"]
    # at 7.5, r3, r5 and r2 have missed their time and let the others go first
    order = [waiting.request.request_id for waiting in queue.in_order(used.__getitem__, 7.5)]
    assert order == ["r4", "r1", "r3", "r5", "r0", "r2"]
    # at 50.25, those that have waited for fifty seconds go first whoever they are
    order = [waiting.request.request_id for waiting in queue.in_order(used.__getitem__, 50.25)]
    assert order[:4] == ["r4", "r0", "r1", "r2"]
    for index in range(6):
        assert queue.cancel(f"r{index}")
    assert not list(queue.in_order(used.__getitem__, 60.0))


def serve(router: Router, rounds: int) -> Counter[str]:
    """One lease at a time, a second each; every tenant always has requests waiting."""
    served: Counter[str] = Counter()
    numbers = itertools.count()

    def submit(tenant: str, now: float) -> None:
        request = PlaceRequest(f"{tenant}-{next(numbers)}", 160, 160, tenant=tenant)
        decision, changes = router.submit(request, now)
        assert not changes.outcomes
        if isinstance(decision, Granted):
            live.append(decision)

    live: list[Granted] = []
    for tenant in ("heavy", "heavy", "heavy", "light", "light"):
        submit(tenant, 0.0)
    for now in range(1, rounds):
        done = live.pop()
        changes = router.release(done.placement.lease.lease_id, float(now), 160)
        (outcome,) = changes.outcomes
        assert isinstance(outcome, Granted)
        live.append(outcome)
        tenant = outcome.request_id.split("-")[0]
        served[tenant] += 1
        submit(tenant, float(now))
    return served


def one_at_a_time(**config: object) -> Router:
    router = Router(RouterConfig(**config), epoch=1, now=0.0)  # type: ignore[arg-type]
    router.group_up(make_spec("g0", max_sequences=1), 0.0)
    router.report("g0", make_loads(), 0.0)
    return router


def test_tenants_share_by_weight() -> None:
    served = serve(one_at_a_time(patience_most_s=1e9), 61)
    assert abs(served["heavy"] - served["light"]) <= 2
    weights = {"heavy": TenantPolicy(weight=3.0)}
    served = serve(one_at_a_time(tenants=weights, patience_most_s=1e9), 61)
    assert served["heavy"] == pytest.approx(45, abs=3)


def test_a_quota_holds_a_tenant_back_and_nobody_else() -> None:
    bytes_each = 4 * 1000 + 17 * 300
    tenants = {"t": TenantPolicy(quota_bytes=2 * bytes_each)}
    router = Router(RouterConfig(tenants=tenants), epoch=1, now=0.0)
    router.group_up(make_spec("g0"), 0.0)
    router.report("g0", make_loads(), 0.0)
    ask = [PlaceRequest(f"r{i}", 160, 160, tenant="t") for i in range(3)]
    first = router.submit(ask[0], 0.0)[0]
    assert isinstance(router.submit(ask[1], 0.0)[0], Granted)
    assert isinstance(router.submit(ask[2], 0.0)[0], Queued)
    assert isinstance(router.submit(PlaceRequest("other", 160, 160), 0.0)[0], Granted)
    assert isinstance(first, Granted)
    (outcome,) = router.release(first.placement.lease.lease_id, 1.0).outcomes
    assert outcome.request_id == "r2"
    refused = router.submit(PlaceRequest("big", 640, 640, tenant="t"), 1.0)[0]
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, QuotaExceededError)


def test_excluding_all_who_could_is_answered_and_not_queued() -> None:
    router = one_at_a_time()
    request = PlaceRequest("r", 160, 160, excluded_groups=frozenset(["g0"]))
    refused = router.submit(request, 0.0)[0]
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, OverCapacityError)
