"""Which of those that wait are tried when the queue is read, and what becomes of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmesh.cluster.routing.accepted_formats import AcceptedFormats
from kvmesh.cluster.routing.admission import DRAINS, MAX_PROMISES, NEAR
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.demand import RequestDemand
from kvmesh.cluster.routing.errors import (
    ExceedsEveryGroupError,
    NoAllowedFormatError,
    QueueFullError,
    QuotaExceededError,
)
from kvmesh.cluster.routing.fairness import TenantPolicy
from kvmesh.cluster.routing.live import LiveRequest
from kvmesh.cluster.routing.outcome import Enqueued, Granted, Refused
from kvmesh.cluster.routing.request import Past
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.routing.status import router_status
from kvmesh.cluster.routing.verdict import Reason
from kvmesh.workers.lease import AccountUpdate, LeaseEnd
from tests.routing.groups import (
    SLOW,
    ask,
    emit,
    end,
    granted,
    make_info,
    only,
    place,
    router_with,
)

PAGES = tuple(b"%d" % page for page in range(200))


def waits(
    router: Router, name: str, prompt: int = 160, out: int = 160, now: float = 0.0, **rest: object
) -> None:
    assert isinstance(router.place(ask(name, prompt, out, **rest), now)[0], Enqueued)


def many_wait(router: Router, count: int, **rest: object) -> None:
    """Requests r0, r1, ... that cannot start; where each of them stands is not asked."""
    for number in range(count):
        live = router.admission.arrive(ask(f"r{number}", **rest), 0.0)  # type: ignore[arg-type]
        router.fleet.tenants.enter(live.request.tenant)
        router.admission.queue.put(live)
        router.records.waits(live)
    assert router.tick(0.0) == []


def test_as_many_wait_for_the_group_of_their_prefix_as_that_is_worth() -> None:
    """Each makes the next wait for longer there, until computing the prefix again costs less."""
    infos = {name: make_info(sealed=1000, kv_format=name) for name in ("g0", "g1")}
    router = router_with(pace=SLOW, groups=infos, ahead_s=0.5, balance_s=10.0)
    on = {name: {"accepts": only(name)} for name in infos}
    end(router, place(router, "a", 1600, 16, 0.0, page_hashes=PAGES[:100], **on["g0"]), 5.0)
    emit(router, place(router, "half of g1", 8000, 16, 10.0, **on["g1"]), 19.0)
    computes = place(router, "computes", 2500, 16, 20.0, **on["g0"])
    waits(router, "first in line", 160, 16, now=20.0, **on["g0"])
    # 1.7 s to compute after 2.5 s on g0, or 3.2 s at once on g1, which is fuller: worth 2.5 s.
    for name in ("b", "c"):
        waits(router, name, 3200, 16, now=20.0, page_hashes=PAGES)
    assert place(router, "d", 3200, 16, 20.0, page_hashes=PAGES).group == "g1"
    next_ones = [x.placement for x in emit(router, computes, 22.5) if isinstance(x, Granted)]
    assert {x.group for x in next_ones} == {"g0"}


def test_a_large_request_takes_long_to_make_room_for() -> None:
    router = router_with(groups={"g0": make_info()})
    router.leases.mean_s = 4.0
    live = router.admission.arrive(ask("r", 320, 320), 0.0)
    pages = live.demand.by_kind[0].leased.sealed
    assert live.drain_s == pytest.approx(DRAINS * pages / 100 * 4.0)


def test_only_the_first_in_line_are_tried() -> None:
    for depth, is_tried in ((1, False), (2, True)):
        router = router_with(groups={"g0": make_info()}, backfill_depth=depth)
        place(router, "running", 1120, 16, 0.0)  # which leaves 32 pages
        waits(router, "large", 800, 16)
        own, *_ = router.place(ask("small", 16, 16), 0.0)
        assert isinstance(own, Granted) == is_tried


def test_who_is_too_far_down_does_not_overtake_for_its_prefix_either() -> None:
    infos = {name: make_info(sealed=200, epoch=name, kv_format=name) for name in ("exact", "int4")}
    for depth, group in ((1, "int4"), (2, "exact")):
        router = router_with(pace=SLOW, groups=infos, backfill_depth=depth, balance_s=0.0)
        first = place(router, "a", 320, 16, 0.0, page_hashes=PAGES[:20], accepts=only("exact"))
        end(router, first, 1.0)
        running = place(router, "running", 1120, 1000, 1.0, accepts=only("exact"))
        emit(router, running, 3.0)
        waits(router, "large", 1600, 16, now=3.0, priority=1, accepts=only("exact"))
        small = place(router, "small", 336, 16, 3.0, page_hashes=PAGES[:21])
        assert small.group == group


def test_who_is_over_its_quota_holds_nobody_back() -> None:
    quota = TenantPolicy(quota_bytes=make_info().geometry.bytes_of(make_info().geometry.need(320)))
    router = router_with(groups={"g0": make_info()}, tenants={"x": quota})
    place(router, "a", 160, 100, 0.0, tenant="x")
    waits(router, "b", 160, 100, tenant="x")
    assert place(router, "c", 160, 100, 0.0, tenant="y").group == "g0"


MANY = [32, 1000]  # as many as `backfill_depth`, and almost a full queue
LEASE = 4 * 1000 + 17 * 300  # bytes, of 160 tokens and 160 of output


@pytest.mark.parametrize("left", [0, LEASE - 1])
@pytest.mark.parametrize("many", MANY)
def test_however_many_wait_for_their_quota_others_are_served(many: int, left: int) -> None:
    tenants = {"x": TenantPolicy(quota_bytes=LEASE + left)}
    router = router_with(groups={"g0": make_info()}, tenants=tenants)
    first = place(router, "first", 160, 160, 0.0, tenant="x")
    many_wait(router, many, tenant="x")
    assert place(router, "other", 160, 160, 0.0, tenant="y").group == "g0"
    lost = place(router, "lost", 160, 160, 0.0, tenant="x", past=Past.RAN, priority=-1)
    assert lost.group == "g0", "it may pass the quota"
    end(router, lost, 1.0)
    assert granted(end(router, first, 1.0)).request_id == "r0"


def test_so_many_of_a_tenant_are_tried_within_its_quota() -> None:
    tenants = {"x": TenantPolicy(quota_bytes=2 * LEASE - 1)}
    for depth, is_tried in ((1, False), (2, True)):
        router = router_with(groups={"g0": make_info()}, tenants=tenants, backfill_depth=depth)
        place(router, "first", 160, 160, 0.0, tenant="x")
        waits(router, "large", tenant="x")
        own, *_ = router.place(ask("small", 16, 16, tenant="x"), 0.0)
        assert isinstance(own, Granted) == is_tried


@pytest.mark.parametrize("gone", ["down", "draining"])
@pytest.mark.parametrize("many", MANY)
def test_however_many_wait_for_a_group_that_takes_nothing_others_are_served(
    many: int, gone: str
) -> None:
    infos = {name: make_info(epoch=name, kv_format=name) for name in ("exact", "int4")}
    router = router_with(groups=infos)
    if gone == "down":
        router.group_down("exact", 0.0)
    else:
        router.fleet.drain("exact")
    many_wait(router, many, accepts=only("exact"), priority=1)
    assert place(router, "other", 160, 160, 0.0).group == "int4"
    back = make_info(epoch="again", kv_format="exact")
    assert granted(router.group_up("exact", back, (), 1.0)).request_id == "r0"


def test_however_many_wait_for_a_large_group_that_is_down_others_are_served() -> None:
    infos = {"large": make_info(sealed=1000), "small": make_info(epoch="e1")}
    router = router_with(groups=infos)
    router.group_down("large", 0.0)
    many_wait(router, 32, prompt=3200, priority=1)
    assert place(router, "other", 160, 160, 0.0).group == "small"


def test_however_many_have_lost_a_group_that_the_router_still_has_others_are_served() -> None:
    infos = {name: make_info(epoch=name, kv_format=name) for name in ("exact", "int4")}
    router = router_with(groups=infos)
    lost = frozenset({"exact"})
    many_wait(router, 32, accepts=only("exact"), lost_engines=lost, past=Past.RAN)
    assert place(router, "other", 160, 160, 0.0, accepts=only("int4")).group == "int4"


@pytest.mark.parametrize("many", MANY)
def test_however_many_wait_for_a_full_group_others_are_served_by_another(many: int) -> None:
    infos = {
        name: make_info(epoch=name, kv_format=name, max_sequences=1) for name in ("exact", "int4")
    }
    router = router_with(groups=infos)
    place(router, "runs", 160, 160, 0.0, accepts=only("exact"))
    many_wait(router, many, accepts=only("exact"), priority=1)
    assert place(router, "other", 160, 160, 0.0).group == "int4"


def test_however_many_long_prompts_are_held_back_others_are_served() -> None:
    infos = {name: make_info(sealed=10_000, epoch=name) for name in ("g0", "g1")}
    router = router_with(pace=SLOW, groups=infos, long_s=10.0, max_busy_share=0.1)
    router.admission._chooser._busy_groups = 1.0
    place(router, "long", 20_000, 16, 0.0)
    many_wait(router, 32, prompt=20_000, priority=1)
    place(router, "other", 160, 160, 0.0)


@pytest.mark.parametrize("room", [True, False])
def test_a_full_queue_of_others_refuses_only_what_lacks_room(room: bool) -> None:
    tenants = {"x": TenantPolicy(quota_bytes=LEASE)}
    info = make_info(max_sequences=2 if room else 1)
    router = router_with(groups={"g0": info}, tenants=tenants, queue_limit=1)
    place(router, "first", 160, 160, 0.0, tenant="x")
    many_wait(router, 1, tenant="x")
    own, *others = router.place(ask("other", tenant="y"), 0.0)
    assert not others and len(router.admission.queue) == 1
    assert isinstance(own, Granted if room else Refused)
    router.leases.check_integrity()


def test_who_is_refused_by_a_full_queue_leaves_nothing_in_it() -> None:
    """It could start, but for a promise to one that waits."""
    router = router_with(pace=SLOW, groups={"g0": make_info()}, ahead_s=1e9, queue_limit=1)
    place(router, "running", 1120, 16, 0.0)  # which leaves 32 pages
    waits(router, "large", 1440, 16, priority=1)
    own, *others = router.place(ask("slow", 16, 400, tenant="y"), 0.0)
    assert isinstance(own, Refused) and isinstance(own.error, QueueFullError) and not others
    assert [x.request_id for x in router.admission.queue] == ["large"]
    assert router.fleet.tenants.live("y") == router.admission.queue.count_of("y") == 0


def queue_of(*tenants: str, limit: int, **settings: object) -> Router:
    """One runs, and these tenants' requests r0, r1, ... wait."""
    router = router_with(groups={"g0": make_info(max_sequences=1)}, queue_limit=limit, **settings)
    place(router, "runs", 160, 160, 0.0, tenant="runs")
    for number, tenant in enumerate(tenants):
        waits(router, f"r{number}", tenant=tenant, now=float(number))
    return router


def comes(router: Router, name: str, tenant: str) -> list[str]:
    """The requests that are refused then."""
    outcomes = router.place(ask(name, tenant=tenant), 9.0)
    refused = [x for x in outcomes if isinstance(x, Refused)]
    assert all(type(x.error) is QueueFullError and x.verdicts for x in refused)
    router.leases.check_integrity()
    return [x.request_id for x in refused]


def test_no_tenant_fills_the_queue_alone() -> None:
    router = queue_of("a", "a", "a", "a", limit=4)
    assert comes(router, "b0", "b") == ["r3"], "the youngest of who has most"
    assert comes(router, "b1", "b") == ["r2"]
    assert comes(router, "b2", "b") == ["b2"], "both have as many"
    assert comes(router, "a4", "a") == ["a4"]
    assert comes(router, "c0", "c") in (["b1"], ["r1"])
    assert len(router.admission.queue) == 4 and router_status(router, 9.0).live_requests == 5
    assert router.fleet.tenants.live("a") + router.fleet.tenants.live("b") == 3


def test_who_takes_anothers_place_in_the_queue_starts_in_its_turn() -> None:
    router = queue_of("a", "a", "a", "a", limit=4)
    assert comes(router, "b0", "b") == ["r3"]
    (runs,) = router.leases.values()
    first = granted(router.account("g0", AccountUpdate(ended=(LeaseEnd(runs.lease_id),)), 10.0))
    second = granted(end(router, first, 11.0))
    assert {first.request_id, second.request_id} == {"r0", "b0"}


def test_the_queue_is_shared_by_weight() -> None:
    tenants = {"a": TenantPolicy(weight=3.0)}
    router = queue_of("a", "a", "a", "a", limit=4, tenants=tenants)
    assert comes(router, "b0", "b") == ["r3"]
    assert comes(router, "b1", "b") == ["b1"]


def test_of_a_tenants_requests_those_of_low_priority_give_way() -> None:
    router = queue_of("a", "a", limit=4)
    for number, priority in ((2, -1), (3, 1)):
        waits(router, f"r{number}", tenant="a", priority=priority, now=3.0)
    assert comes(router, "b0", "b") == ["r2"]
    assert comes(router, "b1", "b") == ["r1"]


def test_what_was_accepted_before_does_not_give_way() -> None:
    router = queue_of(limit=2)
    for name in ("a0", "a1"):
        waits(router, name, tenant="a", past=Past.ACCEPTED)
    assert comes(router, "b0", "b") == ["b0"]


def test_as_few_are_tried_however_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    tenants = {"x": TenantPolicy(quota_bytes=2 * LEASE - 1)}
    infos = {name: make_info(epoch=name, kv_format=name) for name in ("exact", "int4")}
    router = router_with(groups=infos, tenants=tenants, backfill_depth=4)
    router.group_down("exact", 0.0)
    place(router, "first", 160, 160, 0.0, tenant="x")
    many_wait(router, 200, accepts=only("exact"), priority=1)
    for number in range(20):
        waits(router, f"x{number}", tenant="x")
    tried: list[str] = []
    refresh = router.admission._refresh

    def count(live: LiveRequest, now: float) -> RequestDemand:
        tried.append(live.request_id)
        return refresh(live, now)

    monkeypatch.setattr(router.admission, "_refresh", count)
    router.admission.admit(1.0)
    assert tried == ["x0", "x1", "x2", "x3"]


def test_what_never_fits_is_refused_and_those_after_it_are_served() -> None:
    router = Router(RouterConfig(), epoch=2, now=0.0, expected_groups=["g0"])
    waits(router, "large", 10_000, priority=1)
    waits(router, "small")
    never, next_one = router.group_up("g0", make_info(), (), 1.0)
    assert isinstance(never, Refused) and isinstance(never.error, ExceedsEveryGroupError)
    assert never.request_id == "large" and len(never.verdicts) == 1
    assert granted([next_one]).request_id == "small"


def test_a_request_keeps_to_its_formats_whichever_groups_come_while_it_waits() -> None:
    exact = replace(make_info(kv_format="exact", max_sequences=1), kv_divergence_nats=0.0)
    router = router_with(groups={"g0": exact})
    running = place(router, "a", 160, 16, 0.0)
    waits(router, "b", accepts=only("exact"))
    waits(router, "c", accepts=AcceptedFormats(max_divergence_nats=0.5))
    coarse = make_info(epoch="e1", kv_format="int2")
    assert router.group_up("g1", replace(coarse, kv_divergence_nats=1.0), (), 1.0) == []
    assert granted(end(router, running, 2.0)).request_id == "b"
    fine = make_info(epoch="e2", kv_format="int8")
    assert router.group_up("g2", fine, (), 3.0) == [], "nobody has measured it"
    outcomes = router.group_up("g2", replace(fine, kv_divergence_nats=0.5), (), 4.0)
    assert granted(outcomes).request_id == "c"


def test_a_request_whose_formats_are_gone_is_refused_while_it_waits() -> None:
    """As after an update of the groups."""
    router = router_with(groups={"g0": make_info(kv_format="exact", max_sequences=1)})
    place(router, "a", 160, 16, 0.0)
    waits(router, "b", accepts=only("exact"))
    (never,) = router.group_up("g0", make_info(epoch="e1"), (), 1.0)
    assert isinstance(never, Refused) and isinstance(never.error, NoAllowedFormatError)
    assert never.error.reasons == {"g0": "its format int4 is not among those allowed"}


def test_a_request_that_lost_its_group_does_not_continue_in_another_format() -> None:
    infos = {name: make_info(epoch=name, kv_format=name) for name in ("exact", "int4")}
    router = router_with(groups=infos)
    place(router, "a", 160, 160, 0.0, accepts=only("exact"))
    router.group_down("exact", 1.0)
    lost = frozenset({"exact"})
    waits(router, "a", now=1.0, accepts=only("exact"), past=Past.RAN, lost_engines=lost)
    back = make_info(epoch="again", kv_format="exact")
    assert granted(router.group_up("exact", back, (), 2.0)).group == "exact"


def test_no_group_of_an_accepted_format_may_be_large_enough() -> None:
    infos = {"g0": make_info(kv_format="exact"), "g1": make_info(epoch="e1", sealed=1000)}
    router = router_with(groups=infos)
    (never,) = router.place(ask("a", 3200, accepts=only("exact")), 0.0)
    assert isinstance(never, Refused) and isinstance(never.error, ExceedsEveryGroupError)
    assert never.error.reasons == {"g0": Reason.PAGES.value, "g1": Reason.FORMAT.value}
    assert not router.admission.estimate(ask("a", 3200, accepts=only("exact")), 0.0).fits_ever


def test_a_request_has_to_fit_its_quota_in_a_format_that_it_accepts() -> None:
    small = make_info().geometry
    large = replace(small, sealed_page_bytes=10 * small.sealed_page_bytes)
    exact = replace(make_info(epoch="e1", kv_format="exact"), geometry=large)
    quota = TenantPolicy(quota_bytes=4 * 1000 + 17 * 300)
    router = router_with(groups={"g0": make_info(), "g1": exact}, tenants={"x": quota})
    (never,) = router.place(ask("a", tenant="x", accepts=only("exact")), 0.0)
    assert isinstance(never, Refused) and isinstance(never.error, QuotaExceededError)
    assert place(router, "b", 160, 160, 0.0, tenant="x", accepts=only("int4")).group == "g0"


def test_a_lease_keeps_to_its_quota_on_the_group_where_it_is() -> None:
    """A format that takes more may pass a quota that another is within."""
    small = make_info(max_sequences=1)
    sizes = replace(small.geometry, sealed_page_bytes=10 * small.geometry.sealed_page_bytes)
    exact = replace(make_info(epoch="e1", kv_format="exact"), geometry=sizes)
    quota = TenantPolicy(quota_bytes=4 * 1000 + 17 * 300)
    router = router_with(groups={"g0": small, "g1": exact}, tenants={"x": quota})
    first = place(router, "a", 160, 160, 0.0, tenant="y")
    assert first.group == "g0"
    waits(router, "b", tenant="x", now=0.1)
    (waiting,) = router.records.explain("b", 0.1)
    reasons = {verdict.group: verdict.reason for verdict in waiting.verdicts}
    assert reasons == {"g0": Reason.BUSY, "g1": Reason.QUOTA}
    assert place(router, "c", 160, 160, 0.2, tenant="y").group == "g1", "which b does not keep"
    assert granted(end(router, first, 1.0)).group == "g0"


def test_no_group_is_promised_to_a_request_that_would_pass_its_quota_there() -> None:
    small = make_info(max_sequences=1)
    sizes = replace(small.geometry, sealed_page_bytes=10 * small.geometry.sealed_page_bytes)
    exact = replace(make_info(epoch="e1", kv_format="exact"), geometry=sizes)
    quota = TenantPolicy(quota_bytes=4 * 1000 + 95 * 300)
    router = router_with(
        pace=SLOW, groups={"g0": small, "g1": exact}, ahead_s=1e9, tenants={"x": quota}
    )
    place(router, "on g0", 160, 1000, 0.0, accepts=only("int4"))
    place(router, "on g1", 1120, 16, 0.0, accepts=only("exact"))  # which leaves 32 pages
    waits(router, "large", 1440, 16, tenant="x", priority=1)
    assert place(router, "slow", 16, 400, 0.0, accepts=only("exact")).group == "g1"


def test_a_group_of_another_kind_is_tried_as_soon_as_it_is_up() -> None:
    router = router_with(groups={"g0": make_info(max_sequences=1)})
    place(router, "a", 160, 16, 0.0)
    waits(router, "b")
    outcomes = router.group_up("g1", make_info(sealed=50, epoch="e1"), (), 0.1)
    assert granted(outcomes).group == "g1"


@pytest.mark.parametrize("late", [False, True])
def test_only_late_ones_are_promised_a_group_besides_the_first(late: bool) -> None:
    infos = {name: make_info() for name in ("g0", "g1")}
    router = router_with(pace=SLOW, groups=infos, ahead_s=1e9, patience_s=1.0, stretch=0.0)
    for number in range(2):
        place(router, f"running-{number}", 480, 160, 0.0)
    now = 8.0 if late else 1.0
    for name in ("large-0", "large-1"):
        waits(router, name, 960, 320, now=1.0)
    own, *_ = router.place(ask("slow", 300, 380), now)
    assert isinstance(own, Enqueued) == late


@pytest.mark.parametrize("spare", [0, 1])
def test_so_many_groups_are_promised_at_a_time(spare: int) -> None:
    """Late requests wait for all groups; one that has no promise takes what is free there."""
    infos = {f"g{number}": make_info() for number in range(MAX_PROMISES + spare)}
    router = router_with(pace=SLOW, groups=infos, ahead_s=1e9, patience_s=1.0, stretch=0.0)
    for number in range(len(infos)):
        place(router, f"running-{number}", 480, 160, 0.0)
    for number in range(MAX_PROMISES + 1):
        waits(router, f"large-{number}", 960, 320, now=1.0)
    own, *_ = router.place(ask("slow", 300, 380), 8.0)
    assert isinstance(own, Granted) == bool(spare)


def test_the_first_in_line_get_a_new_forecast_when_the_queue_is_read() -> None:
    router = router_with(groups={"g0": make_info(max_sequences=1)})
    place(router, "running", 160, 160, 0.0)
    for number in range(NEAR + 1):
        waits(router, f"r{number}")
    last = NEAR - 1
    before = [x.projected_start_s or 0.0 for x in router.admission.standings(0.0)]
    after = [x.projected_start_s or 0.0 for x in router.admission.standings(100.0)]
    ahead_s = [n * router.leases.mean_s for n in range(NEAR + 1)]
    assert before == pytest.approx([before[0] + each for each in ahead_s])
    assert after[last] > ahead_s[last], "the running one is late, and longer than expected"
    assert after[NEAR] == pytest.approx(ahead_s[NEAR]), "still to start at a time that has passed"
