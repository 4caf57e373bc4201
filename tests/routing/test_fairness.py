from __future__ import annotations

import itertools
from collections import Counter

import pytest

from kvmesh.cluster.routing.errors import NoAllowedFormatError, QuotaExceededError
from kvmesh.cluster.routing.fairness import TenantPolicy, Tenants
from kvmesh.cluster.routing.outcome import Enqueued, Granted, Placement, Refused
from kvmesh.cluster.routing.request import Past
from kvmesh.cluster.routing.router import Router
from tests.routing.groups import ask, end, granted, make_info, only, place, router_with


def test_a_tenant_that_returns_after_a_pause_starts_level() -> None:
    tenants = Tenants()
    tenants.enter("busy")
    tenants.charge("busy", 100, 10.0)
    tenants.lift("new", ["busy"])
    assert tenants.counter("new") == tenants.counter("busy") == 1000.0
    tenants.enter("new")
    tenants.charge("new", 100, 1.0)
    tenants.settle("new", 100, -0.5)
    assert tenants.counter("new") == 1050.0
    tenants.leave("new")
    tenants.charge("busy", 100, 1.0)
    tenants.lift("new", ["busy"])  # it was idle while the other worked
    assert tenants.counter("new") == 1100.0


def test_heavy_use_is_not_forgotten_by_a_pause() -> None:
    tenants = Tenants()
    for name in ("a", "b"):
        tenants.enter(name)
    tenants.charge("a", 100, 100.0)
    tenants.leave("a")
    tenants.lift("a", ["b"])
    assert tenants.counter("a") == 10_000.0
    assert tenants.counter("b") == 0.0


@pytest.mark.parametrize("leaves", [True, False])
def test_a_tenant_that_comes_when_none_wait_starts_where_the_others_are(leaves: bool) -> None:
    """Whether they run or have stopped."""
    tenants = Tenants(limit=2)
    for name, seconds in (("most", 9.0), ("less", 5.0)):
        tenants.enter(name)
        tenants.charge(name, 100, seconds)
        tenants.settle(name, 100, 0.0)
        if leaves:
            tenants.leave(name)
    tenants.lift("new", [])
    assert tenants.counter("new") == 900.0, "or it would go first for as long as they have run"
    tenants.lift("less", [])
    assert tenants.counter("less") == 900.0, "it may run all the time, and ask for little"


def test_tenants_that_would_start_level_are_forgotten() -> None:
    tenants = Tenants(limit=2)
    for number, name in enumerate(("first", "second", "third"), 1):
        tenants.enter(name)
        tenants.charge(name, 100, float(number))
        tenants.settle(name, 100, 0.0)
        tenants.leave(name)
    assert (tenants.live("first"), tenants.leased_bytes("first")) == (0, 0)
    assert tenants.counter("first") == tenants.counter("another") == 300.0
    tenants.enter("runs")  # from the start: no request of its waited
    tenants.enter("fourth")
    tenants.charge("fourth", 100, 5.0)
    tenants.leave("fourth")
    tenants.enter("fifth")
    tenants.leave("fifth")  # more than are remembered
    assert tenants.counter("fourth") == 500.0, "it has used more than one that runs"


def test_a_tenant_that_its_quota_stops_does_not_hold_back_what_others_start_with() -> None:
    tenants = Tenants({"stopped": TenantPolicy(quota_bytes=100)})
    for name, lease_bytes in (("stopped", 100), ("busy", 200)):
        tenants.enter(name)
        tenants.charge(name, lease_bytes, 10.0)
    tenants.lift("new", ["stopped", "busy"])
    assert tenants.counter("new") == 2000.0
    tenants.lift("newer", ["stopped"])
    assert tenants.counter("newer") == 2000.0, "level with all"


def test_a_tenant_cannot_save_up_while_a_request_of_it_always_runs() -> None:
    """Nobody waits, so what the other uses takes nothing from it."""
    router = one_at_a_time(3)
    light = place(router, "light", 160, 100, 0.0, tenant="light")
    heavy = place(router, "heavy", 800, 100, 0.0, tenant="heavy")
    for second in range(1, 21):
        before, now = light, float(second)
        light = place(router, f"light-{second}", 160, 100, now, tenant="light")
        assert end(router, before, now) == end(router, heavy, now) == []
        heavy = place(router, f"heavy-{second}", 800, 100, now, tenant="heavy")
    place(router, "other", 160, 100, 20.0, tenant="other")
    for number in range(4):
        for tenant in ("heavy", "light"):
            more = ask(f"{tenant}-more-{number}", 160, 100, tenant=tenant)
            assert isinstance(router.place(more, 20.0)[0], Enqueued)
    served: list[str] = []
    runs = heavy
    for second in range(21, 27):
        runs = granted(end(router, runs, float(second)))
        served.append(runs.request_id.split("-")[0])
    assert served in (["heavy", "light"] * 3, ["light", "heavy"] * 3)


def serve(router: Router, rounds: int) -> Counter[str]:
    """One lease at a time, a second each; every tenant always has requests waiting."""
    served: Counter[str] = Counter()
    numbers = itertools.count()
    running: list[Placement] = []

    def submit(tenant: str, now: float) -> None:
        (own,) = router.place(ask(f"{tenant}-{next(numbers)}", tenant=tenant), now)
        if isinstance(own, Granted):
            running.append(own.placement)

    for tenant in ("heavy", "heavy", "heavy", "light", "light"):
        submit(tenant, 0.0)
    for now in range(1, rounds):
        (outcome,) = end(router, running.pop(), float(now), 160)
        running.append(granted([outcome]))
        tenant = running[0].request_id.split("-")[0]
        served[tenant] += 1
        submit(tenant, float(now))
    return served


def one_at_a_time(sequences: int = 1, **settings: object) -> Router:
    """Or as many."""
    return router_with(groups={"g0": make_info(max_sequences=sequences)}, **settings)


def test_tenants_share_by_weight() -> None:
    served = serve(one_at_a_time(), 61)
    assert abs(served["heavy"] - served["light"]) <= 2
    weights = {"heavy": TenantPolicy(weight=3.0)}
    served = serve(one_at_a_time(tenants=weights), 61)
    assert served["heavy"] == pytest.approx(45, abs=3)


def test_a_quota_holds_back_its_tenant_and_no_other() -> None:
    bytes_each = 4 * 1000 + 17 * 300
    tenants = {"t": TenantPolicy(quota_bytes=2 * bytes_each)}
    router = router_with(groups={"g0": make_info()}, tenants=tenants)
    first = granted(router.place(ask("r0", tenant="t"), 0.0))
    granted(router.place(ask("r1", tenant="t"), 0.0))
    assert isinstance(router.place(ask("r2", tenant="t"), 0.0)[0], Enqueued)
    granted(router.place(ask("other"), 0.0))
    assert granted(end(router, first, 1.0)).request_id == "r2"
    (refused,) = router.place(ask("big", 640, 640, tenant="t"), 1.0)
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, QuotaExceededError)


def test_an_estimate_and_a_forecast_know_the_quota() -> None:
    bytes_each = 4 * 1000 + 17 * 300
    tenants = {"t": TenantPolicy(quota_bytes=bytes_each)}
    router = router_with(groups={"g0": make_info()}, tenants=tenants)
    running = granted(router.place(ask("r0", tenant="t"), 0.0))
    found = router.admission.estimate(ask("r1", tenant="t"), 0.0)
    assert (found.fits_ever, found.fits_now, found.group) == (True, False, None)
    assert found.projected_start_s is None, "what runs may grow until it ends"
    assert router.admission.estimate(ask("r1", tenant="other"), 0.0).fits_now
    (own,) = router.place(ask("r1", tenant="t"), 0.0)
    assert isinstance(own, Enqueued) and own.projected_start_s is None
    granted(end(router, running, 1.0))
    large = router.admission.estimate(ask("large", 640, 640, tenant="t"), 1.0)
    assert (large.fits_ever, large.projected_start_s) == (False, None)


def test_a_request_that_lost_its_group_continues_past_its_tenants_quota() -> None:
    """It is leased in full, for all that it may grow to."""
    tenants = {"t": TenantPolicy(quota_bytes=4 * 1000 + 17 * 300)}
    router = router_with(groups={"g0": make_info()}, tenants=tenants)
    granted(router.place(ask("other", tenant="t"), 0.0))
    lost = ask("lost", 320, 320, tenant="t", past=Past.RAN)
    assert granted(router.place(lost, 0.0)).group == "g0"
    assert isinstance(router.place(ask("next", tenant="t"), 0.0)[0], Enqueued)


def test_a_quota_can_be_used_up() -> None:
    bytes_each = 4 * 1000 + 17 * 300
    for quota_bytes, fits in ((bytes_each - 1, False), (bytes_each, True)):
        tenants = {"t": TenantPolicy(quota_bytes=quota_bytes)}
        router = router_with(groups={"g0": make_info()}, tenants=tenants)
        (own,) = router.place(ask("r", tenant="t"), 0.0)
        assert isinstance(own, Granted) == fits


def test_a_request_that_accepts_no_groups_format_is_refused_and_not_queued() -> None:
    (refused,) = one_at_a_time().place(ask("r", accepts=only("exact")), 0.0)
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, NoAllowedFormatError)
