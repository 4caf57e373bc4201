from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from kvmesh.cluster.routing import errors
from kvmesh.cluster.routing.admission import LOST_ENGINE_S
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.errors import (
    DeadlineUnreachableError,
    ExceedsEveryGroupError,
    NoGroupError,
    QueueFullError,
    QuotaExceededError,
    RequestAbortedError,
    RequestIdInUseError,
    RoutingError,
)
from kvmesh.cluster.routing.fairness import TenantPolicy
from kvmesh.cluster.routing.outcome import Decision, Enqueued, Granted, Outcome, Refused, Withdrawn
from kvmesh.cluster.routing.records import Records
from kvmesh.cluster.routing.request import Past
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.routing.status import router_status, tenant_status
from kvmesh.cluster.routing.verdict import Reason
from kvmesh.workers.lease import AccountUpdate, LeaseEnd
from kvmesh.workers.sizes import PageNeed
from tests.routing.groups import (
    arrive,
    ask,
    end,
    foreign,
    granted,
    info_like,
    make_info,
    make_router,
    place,
    router_with,
)


def one_at_a_time(**settings: object) -> Router:
    return router_with(groups={"g0": make_info(max_sequences=1)}, **settings)


def refused(outcome: Outcome, error: type[RoutingError]) -> RoutingError:
    assert isinstance(outcome, Refused)
    assert type(outcome.error) is error
    return outcome.error


def decide(router: Router, *args: object, **rest: object) -> Decision:
    decision = router.place(ask(*args, **rest), 0.0)[0]  # type: ignore[arg-type]
    assert isinstance(decision, Granted | Enqueued | Refused)
    return decision


def test_the_least_used_group_gets_the_request_and_says_why() -> None:
    router = router_with(groups={"g0": make_info(), "g1": make_info(epoch="e1")})
    first = granted(router.place(ask("a"), 0.0))
    second = granted(router.place(ask("b"), 0.0))
    assert {(x.group, x.engine_epoch) for x in (first, second)} == {("g0", "e0"), ("g1", "e1")}
    assert {v.reason for v in first.verdicts} == {Reason.CHOSEN, Reason.WORSE}
    # 320 tokens: 20 pages of 16; 4 hot (1 sink, 2 recent, 1 writing), 17 sealed at the end
    assert (first.lease.hot_pages, first.lease.sealed_pages) == (4, 17)
    assert first.lease_bytes == 4 * 1000 + 17 * 300


def test_what_a_tenant_uses_is_what_runs_and_what_waits() -> None:
    router = one_at_a_time(tenants={"x": TenantPolicy(quota_bytes=10**6)})
    first = place(router, "a", 160, 160, 0.0, tenant="x")
    router.place(ask("b", tenant="x"), 0.0)
    router.place(ask("c", tenant="x"), 0.0)
    router.place(ask("d", tenant="y"), 0.0)
    used = tenant_status(router, "x")
    assert (used.running, used.queued, used.quota_bytes) == (1, 2, 10**6)
    assert used.leased_bytes == first.lease_bytes
    nothing = tenant_status(router, "z")
    assert (nothing.running, nothing.queued, nothing.leased_bytes) == (0, 0, 0)


def test_what_no_group_can_ever_hold_is_refused_with_the_bytes() -> None:
    infos = {"g0": make_info(sealed=10), "g1": make_info(max_model_len=64)}
    (outcome,) = router_with(groups=infos).place(ask("a"), 0.0)
    error = refused(outcome, ExceedsEveryGroupError)
    assert isinstance(error, ExceedsEveryGroupError)
    assert error.needed_bytes["g0"] == 4 * 1000 + 17 * 300
    assert error.available_bytes["g0"] == 64 * 1000 + 10 * 300
    assert error.reasons["g1"] == Reason.CONTEXT.value


@pytest.mark.parametrize(
    "error",
    [
        RequestIdInUseError("r"),
        RequestAbortedError(),
        ExceedsEveryGroupError({"g": 2}, {"g": 1}, {"g": "why"}),
        DeadlineUnreachableError(1.0, 2.0),
        QueueFullError("full", 1.0, 2, 1),
        errors.LedgerError("fault"),
    ],
)
def test_errors_can_be_rebuilt_from_their_arguments(error: RoutingError) -> None:
    for again in (type(error)(*error.args), pickle.loads(pickle.dumps(error))):
        assert (type(again), str(again), again.args) == (type(error), str(error), error.args)


def test_the_queue_is_served_in_order_as_leases_end() -> None:
    router = one_at_a_time()
    running = granted(router.place(ask("a"), 0.0))
    for later in (ask("b"), ask("c", priority=1)):
        assert isinstance(router.place(later, 0.0)[0], Enqueued)
    (resumed,) = router.place(ask("d", priority=1, past=Past.RAN), 0.0)
    assert isinstance(resumed, Enqueued)
    assert resumed.position == 0
    order = []
    for step in range(3):
        running = granted(end(router, running, step + 1.0))
        order.append(running.request_id)
    assert order == ["d", "c", "b"]
    assert running.queue_s == 3.0
    assert end(router, running, 9.0) == []
    assert end(router, running, 9.0) == []
    status = router_status(router, 9.0)
    assert (status.leases, status.live_requests, status.queue_depth) == (0, 0, 0)
    assert (status.granted_total, status.released_total) == (4, 4)


def test_a_request_that_was_to_replace_another_and_is_refused_leaves_that_one_known() -> None:
    router = router_with(groups={"g0": make_info()})
    first = granted(router.place(ask("a"), 0.0))
    own, withdrawn = router.place(ask("a", prompt=10_000, past=Past.AGAIN), 1.0)
    refused(own, ExceedsEveryGroupError)
    assert withdrawn == Withdrawn("g0", first.lease.lease_id)
    assert router_status(router, 1.0).live_requests == 1
    assert router.abort("a", 2.0) == [withdrawn], "it still runs, until its engine has ended it"
    assert end(router, first, 3.0) == []
    assert router_status(router, 3.0).live_requests == 0


def test_a_full_queue_refuses_with_advice() -> None:
    router = one_at_a_time(queue_limit=1)
    for name in "ab":
        router.place(ask(name), 0.0)
    (outcome,) = router.place(ask("c"), 0.0)
    error = refused(outcome, QueueFullError)
    assert isinstance(outcome, Refused) and isinstance(error, QueueFullError)
    assert (outcome.request_id, len(outcome.verdicts)) == ("c", 1)
    assert error.retry_after_s > 0
    assert error.needed_bytes is not None and error.needed_bytes > 0
    assert router_status(router, 0.0).refused_total == {"QueueFullError": 1}


@pytest.mark.parametrize("names", [("far", "near", "never"), ("never", "near", "far")])
def test_a_full_queue_names_the_bytes_of_the_group_that_is_nearest_to_having_room(
    names: tuple[str, ...],
) -> None:
    """Not of one that could not hold the request even when empty, whatever it has free."""
    infos = {
        "far": make_info(hot=6, sealed=20, epoch="far"),
        "near": make_info(hot=6, sealed=30, epoch="near"),
        "never": make_info(hot=64, sealed=10, epoch="never"),
    }
    router = router_with(groups={name: infos[name] for name in names}, queue_limit=0)
    holding = [granted(router.place(ask(name), 0.0)).group for name in "ab"]
    assert sorted(holding) == ["far", "near"]
    error = refused(router.place(ask("c"), 0.0)[0], QueueFullError)
    assert isinstance(error, QueueFullError)
    needed = 4 * 1000 + 17 * 300
    assert (error.needed_bytes, error.available_bytes) == (needed, 2 * 1000 + 13 * 300)


def test_deadlines_and_cancellations_leave_the_queue() -> None:
    router = one_at_a_time()
    running = granted(router.place(ask("a"), 0.0))
    arrive(router, running, 0.0)
    router.place(ask("b", timeout_s=5.0), 0.0)
    router.place(ask("c"), 0.0)
    assert router.tick(4.9) == []
    (late,) = router.tick(5.0)
    refused(late, DeadlineUnreachableError)
    for name in "cca":  # twice, and one that runs
        assert router.cancel([name], 6.0) == []
    status = router_status(router, 6.0)
    assert (status.queue_depth, status.leases, status.live_requests) == (0, 1, 1)


def test_of_those_that_are_cancelled_together_none_is_granted() -> None:
    router = router_with(groups={"g0": make_info()})
    place(router, "runs", 800, 16, 0.0)
    for name, prompt in (("large", 1500), ("a", 320), ("b", 320), ("other", 320)):
        waits = ask(name, prompt, 16, priority=int(name == "large"))
        assert isinstance(router.place(waits, 0.0)[0], Enqueued), name
    assert router.cancel(["runs", "unknown"], 1.0) == []
    (outcome,) = router.cancel(["large", "a", "b"], 1.0)
    assert granted([outcome]).request_id == "other"
    assert router_status(router, 1.0).granted_total == 2


def test_waiting_requests_know_where_they_stand() -> None:
    router = one_at_a_time()
    running = granted(router.place(ask("a"), 0.0))
    arrive(router, running, 0.0)
    assert list(router.admission.standings(0.0)) == []
    queued = [router.place(ask(name), 0.0)[0] for name in "bcd"]
    read = list(router.admission.standings(0.0))
    assert [(x.request_id, x.position) for x in read] == [("b", 0), ("c", 1), ("d", 2)]
    for standing, enqueued in zip(read, queued, strict=True):
        assert isinstance(enqueued, Enqueued)
        assert standing.position == enqueued.position
        assert standing.projected_start_s == pytest.approx(enqueued.projected_start_s)
    starts = [x.projected_start_s for x in router.admission.standings(0.5)]
    assert None not in starts
    assert starts == sorted(starts)  # type: ignore[type-var]
    assert 0.0 < starts[0] < read[0].projected_start_s  # type: ignore[operator]
    (urgent,) = router.place(ask("e", priority=1), 1.0)
    assert isinstance(urgent, Enqueued)
    assert urgent.position == 0
    end(router, running, 2.0)
    router.cancel(["c"], 2.0)
    read = list(router.admission.standings(2.0))
    assert [(x.request_id, x.position) for x in read] == [("b", 0), ("d", 1)]


def test_a_start_is_forecast_again_once_there_is_a_group_for_it() -> None:
    router = router_with(groups={"g0": make_info(max_sequences=1)})
    router.group_down("g0", 0.0)
    (waiting,) = router.place(ask("a"), 0.0)
    assert isinstance(waiting, Enqueued)
    assert waiting.projected_start_s is None
    router.place(ask("b"), 0.0)
    router.group_up("g0", make_info(epoch="e1", max_sequences=1), (), 1.0)
    (standing,) = router.admission.standings(1.0)
    assert (standing.request_id, standing.position) == ("b", 0)
    assert standing.projected_start_s is not None


def test_a_live_id_is_in_use_until_its_lease_ends() -> None:
    router = one_at_a_time()
    running = granted(router.place(ask("a"), 0.0))
    router.place(ask("b"), 0.0)
    for name in "ab":
        error = refused(router.place(ask(name), 1.0)[0], RequestIdInUseError)
        assert str(error) == f"request id {name!r} is already in use by a live request"
    assert len(router.records.explain("b", 1.0)) == 1
    running = granted(end(router, running, 2.0))
    assert isinstance(router.place(ask("a"), 3.0)[0], Enqueued)


@pytest.mark.parametrize("past", [Past.AGAIN, Past.ACCEPTED, Past.RAN])
def test_a_newer_incarnation_ends_the_older_one(past: Past) -> None:
    router = one_at_a_time()
    first = granted(router.place(ask("a"), 0.0))
    arrive(router, first, 0.0)
    queued, withdrawn = router.place(ask("a", past=past), 1.0)
    assert isinstance(queued, Enqueued)
    assert withdrawn == Withdrawn("g0", first.lease.lease_id)
    queued, older = router.place(ask("a", past=past), 2.0)
    assert isinstance(queued, Enqueued)
    refused(older, RequestAbortedError)
    assert router_status(router, 2.0).live_requests == 1
    # The older lease ends through its engine, and what it held goes to the newest.
    newest = granted(end(router, first, 3.0))
    assert (newest.request_id, newest.queue_s) == ("a", 1.0)
    assert router.abort("a", 4.0) == [Withdrawn("g0", newest.lease.lease_id)]


def test_an_abort_refuses_what_waits_and_withdraws_what_runs() -> None:
    router = one_at_a_time()
    running = granted(router.place(ask("a"), 0.0))
    arrive(router, running, 0.0)
    for name in "bc":
        router.place(ask(name), 0.0)
    (aborted,) = router.abort("b", 1.0)
    assert str(refused(aborted, RequestAbortedError)) == "the request was aborted"
    assert router.abort("b", 1.0) == []
    for _ in range(2):  # the lease stays until the engine says that it has ended
        assert router.abort("a", 2.0) == [Withdrawn("g0", running.lease.lease_id)]
    assert router_status(router, 2.0).leases == 1
    assert granted(end(router, running, 3.0)).request_id == "c"
    assert router.abort("a", 4.0) == []


def test_an_ingress_gives_back_a_lease_once_and_only_if_it_was_not_used() -> None:
    router = one_at_a_time()
    first = granted(router.place(ask("a"), 0.0))
    router.place(ask("b"), 0.0)
    second = granted(router.release(first.lease.lease_id, 1.0))
    assert second.request_id == "b"
    assert router.release(first.lease.lease_id, 1.0) == []
    arrive(router, second, 1.0)
    assert router.release(second.lease.lease_id, 2.0) == [Withdrawn("g0", second.lease.lease_id)]
    assert router_status(router, 2.0).leases == 1


def test_a_lease_that_never_arrives_is_released_and_withdrawn() -> None:
    router = router_with(groups={"g0": make_info(max_sequences=2)}, lease_ttl_s=10.0)
    unused = granted(router.place(ask("a"), 0.0))
    arrive(router, granted(router.place(ask("b"), 0.0)), 9.0)
    router.place(ask("c"), 1.0)
    assert router.tick(9.9) == []
    withdrawn, next_one = router.tick(10.0)
    assert withdrawn == Withdrawn("g0", unused.lease.lease_id)
    assert granted([next_one]).request_id == "c"
    status = router_status(router, 10.0)
    assert (status.expired_total, status.leases, status.live_requests) == (1, 2, 2)
    # It had been on its way: until the engine has ended it, its pages count.
    arrive(router, unused, 10.1)
    assert router_status(router, 10.1).leases == 3
    end(router, unused, 10.2)
    assert router_status(router, 10.2).leases == 2
    router.leases.check_integrity()


def test_a_lost_group_voids_its_leases_and_its_requests_wait_for_its_return() -> None:
    router = router_with(groups={"g0": make_info(), "small": make_info(sealed=5)})
    lease = granted(router.place(ask("a"), 0.0)).lease
    assert router.group_down("g0", 1.0) == []
    assert router.group_down("g0", 1.0) == []
    assert router.release(lease.lease_id, 1.0) == []
    (waiting,) = router.place(ask("a", past=Past.RAN), 1.0)
    assert isinstance(waiting, Enqueued)
    assert [v.reason for v in waiting.verdicts] == [Reason.DOWN, Reason.PAGES]
    outcomes = router.group_up("g0", make_info(epoch="e1"), (), 2.0)
    assert granted(outcomes).engine_epoch == "e1"
    assert router_status(router, 2.0).released_total == 1


def test_a_request_that_lost_an_engine_waits_for_another_incarnation_of_it() -> None:
    """Its ingress sees a lost engine before the router does."""
    info = make_info(epoch="e1")
    router = router_with(groups={"g0": info})
    (waiting,) = router.place(ask("a", lost_engines=frozenset(["e1"])), 0.0)
    assert isinstance(waiting, Enqueued)
    assert waiting.projected_start_s is None
    assert next(iter(waiting.verdicts)).reason is Reason.DOWN
    granted(router.place(ask("other"), 0.0))
    assert router.tick(5.0) == []
    router.group_down("g0", 6.0)
    outcomes = router.group_up("g0", info_like(info, "e2"), (), 7.0)
    assert granted(outcomes).request_id == "a"


def test_an_engine_that_only_the_ingress_lost_is_used_again_after_a_while() -> None:
    """As after it hung for a moment; were it dead, the router would have lost it by then."""
    router = router_with(groups={"g0": make_info(epoch="e1")})
    router.place(ask("a", lost_engines=frozenset(["e1"])), 100.0)
    assert router.tick(100.0 + LOST_ENGINE_S) == []
    assert granted(router.tick(100.0 + LOST_ENGINE_S + 1.0)).request_id == "a"


def test_a_group_that_connects_again_has_the_leases_that_it_lists() -> None:
    router = router_with(groups={"g0": make_info(max_sequences=3)})
    kept, lost, on_its_way = (granted(router.place(ask(name), 0.0)) for name in "abc")
    for placement in (kept, lost):
        arrive(router, placement, 0.0)
    router.place(ask("d"), 0.5)
    assert router.group_down("g0", 1.0) == []
    next_one = granted(router.group_up("g0", make_info(max_sequences=3), [kept.lease], 2.0))
    assert next_one.request_id == "d"
    assert list(router.leases) == [kept.lease.lease_id, next_one.lease.lease_id]
    # Granted before the connection broke, submitted to the engine in the meantime:
    arrive(router, on_its_way, 3.0)
    assert router_status(router, 3.0).groups[0].sequences == 3
    for placement in (kept, on_its_way, next_one):
        end(router, placement, 4.0, 10)
    status = router_status(router, 4.0)
    assert (status.leases, status.groups[0].used) == (0, PageNeed(0, 0))
    assert (status.granted_total, status.released_total) == (4, 4)


def test_an_engine_that_connects_twice_voids_what_it_does_not_list() -> None:
    """The router may hear of the new connection before it hears of the end of the old one."""
    router = router_with(groups={"g0": make_info()})
    placements = [granted(router.place(ask(name), 0.0)) for name in "ab"]
    for placement in placements:
        arrive(router, placement, 0.0)
    router.group_up("g0", make_info(), [placements[1].lease], 1.0)
    assert list(router.leases) == [placements[1].lease.lease_id]
    router.group_up("g0", make_info(epoch="e1"), (), 2.0)
    status = router_status(router, 2.0)
    assert (status.leases, status.groups[0].used) == (0, PageNeed(0, 0))
    router.leases.check_integrity()


def test_without_any_group_the_answer_is_to_come_back() -> None:
    error = refused(make_router().place(ask("a"), 0.0)[0], NoGroupError)
    assert isinstance(error, NoGroupError) and error.needed_bytes is None, "not known"


def test_a_lease_is_released_once_even_if_its_ingress_sees_its_end_first() -> None:
    router = one_at_a_time()
    first = granted(router.place(ask("a"), 0.0))
    router.finished(first.lease.lease_id)
    assert router_status(router, 1.0).released_total == 0, "its pages are not free yet"
    end(router, first, 1.0)
    router.finished(first.lease.lease_id)
    assert router_status(router, 1.0).released_total == 1


def test_without_any_group_nobody_knows_what_would_fit() -> None:
    found = make_router().admission.estimate(ask("a"), 0.0)
    assert (found.fits_ever, found.fits_now, found.projected_start_s) == (True, False, None)


def test_a_restarted_router_admits_only_after_the_expected_groups_are_up() -> None:
    router = Router(RouterConfig(), epoch=4, now=0.0, expected_groups=["g0", "g1"])
    assert router.group_up("g0", make_info(), [foreign(0, 4, 90)], 0.0) == []
    assert isinstance(router.place(ask("a"), 0.2)[0], Enqueued)
    assert not router_status(router, 0.2).ready
    assert granted(router.group_up("g1", make_info(), (), 0.4)).group == "g1"
    assert router_status(router, 0.4).groups[0].used.sealed == 90


def test_a_restarted_router_does_not_wait_indefinitely() -> None:
    router = Router(RouterConfig(rebuild_timeout_s=10.0), 2, 0.0, expected_groups=["g0", "g1"])
    router.group_up("g0", make_info(), (), 0.0)
    found = router.admission.estimate(ask("a"), 0.2)
    assert (found.fits_ever, found.fits_now, found.group) == (True, False, None)
    assert router.admission.estimate(ask("a"), 10.0).group == "g0"
    router.place(ask("a"), 0.2)
    assert router.tick(9.9) == []
    assert granted(router.tick(10.0)).group == "g0"


def test_what_never_fits_is_refused_when_the_groups_are_known() -> None:
    router = Router(RouterConfig(), epoch=2, now=0.0, expected_groups=["g0"])
    assert isinstance(router.place(ask("large", prompt=10_000), 0.0)[0], Enqueued)
    assert isinstance(router.place(ask("a"), 0.0)[0], Enqueued)
    next_one, never = router.group_up("g0", make_info(), (), 1.0)
    refused(never, ExceedsEveryGroupError)
    assert granted([next_one]).request_id == "a"
    assert router_status(router, 1.0).live_requests == 1


def test_requests_of_a_former_router_are_live_until_their_leases_end() -> None:
    """A drain waits for them, too."""
    router = Router(RouterConfig(), epoch=9, now=0.0, expected_groups=["g0"])
    router.group_up("g0", make_info(), (foreign(1, 4, 9), foreign(2, 4, 9)), 0.0)
    assert isinstance(router.place(ask("own"), 0.0)[0], Granted)
    router.leases.check_integrity()
    assert router_status(router, 1.0).live_requests == 3
    router.account("g0", AccountUpdate(ended=(LeaseEnd("3-1"),)), 1.0)
    assert router_status(router, 1.0).live_requests == 2
    router.group_down("g0", 2.0)
    router.leases.check_integrity()
    assert router_status(router, 2.0).live_requests == 0


def adopted(policy: TenantPolicy = TenantPolicy()) -> Router:  # noqa: B008
    """A router whose group runs f1 and f2 of tenant `before`, granted by a former one."""
    config = RouterConfig(tenants={"before": policy})
    router = Router(config, epoch=9, now=0.0, expected_groups=["g0"])
    router.group_up("g0", make_info(), (foreign(1, 4, 9), foreign(2, 4, 9)), 0.0)
    return router


def test_requests_of_a_former_router_are_known_by_their_ids() -> None:
    router = adopted()
    refused(router.place(ask("f1"), 1.0)[0], RequestIdInUseError)
    assert router.cancel(["f1"], 1.0) == [], "it does not wait"
    assert router.abort("f1", 1.0) == [Withdrawn("g0", "3-1")]
    own, older = router.place(ask("f2", past=Past.RAN), 2.0)
    assert (granted([own]).request_id, older) == ("f2", Withdrawn("g0", "3-2"))
    router.account("g0", AccountUpdate(ended=(LeaseEnd("3-1"), LeaseEnd("3-2"))), 3.0)
    assert router_status(router, 3.0).live_requests == 1
    assert router.abort("f1", 4.0) == []
    assert router.abort("f2", 4.0) == [Withdrawn("g0", granted([own]).lease.lease_id)]


def test_of_two_adopted_leases_of_a_request_the_newer_is_its_own() -> None:
    """The older one was withdrawn, which its engine does not know yet."""
    newer = replace(foreign(5, 4, 9), request_id="f1")
    for leases in ([foreign(1, 4, 9), newer], [newer, foreign(1, 4, 9)]):
        router = Router(RouterConfig(), epoch=9, now=0.0, expected_groups=["g0"])
        router.group_up("g0", make_info(), leases, 0.0)
        assert router.abort("f1", 1.0) == [Withdrawn("g0", "3-5")]


def test_beyond_a_groups_capacity_nothing_is_available_and_not_less() -> None:
    """The contract's numbers of bytes have no sign."""
    router = Router(RouterConfig(), epoch=9, now=0.0, expected_groups=["g0"])
    router.group_up("g0", make_info(), [foreign(1, 4, 5000)], 0.0)
    found = router.admission.estimate(ask("a"), 0.0)
    assert [verdict.available_bytes >= 0 for verdict in found.verdicts] == [True]
    assert not found.fits_now and found.fits_ever
    own, *_ = router.place(ask("a"), 0.0)
    assert isinstance(own, Enqueued)
    assert all(verdict.available_bytes >= 0 for verdict in own.verdicts)


def test_the_id_of_a_former_routers_request_is_free_when_its_ingress_has_seen_its_end() -> None:
    router = adopted()
    router.finished("3-1")
    assert granted([router.place(ask("f1"), 1.0)[0]]).request_id == "f1"
    assert router_status(router, 1.0).live_requests == 2
    router.account("g0", AccountUpdate(ended=(LeaseEnd("3-1"),)), 2.0)
    assert router_status(router, 2.0).live_requests == 2, "the newer one has the id"


def test_leases_of_a_former_router_count_in_their_tenants_quota() -> None:
    each = 4 * 1000 + 9 * 300
    router = adopted(TenantPolicy(quota_bytes=2 * each + 4 * 1000 + 17 * 300))
    use = tenant_status(router, "before")
    assert (use.running, use.queued, use.leased_bytes) == (2, 0, 2 * each)
    assert granted(router.place(ask("a", tenant="before"), 1.0)[:1]).request_id == "a"
    assert isinstance(router.place(ask("b", tenant="before"), 1.0)[0], Enqueued)
    for name in ("3-1", "3-2"):
        assert isinstance(next(router.admission.standings(2.0)), Enqueued)
        ended = router.account("g0", AccountUpdate(ended=(LeaseEnd(name),)), 2.0)
    assert granted(ended).request_id == "b", "one alone leaves too little"
    router.leases.check_integrity()


def test_what_only_a_missing_group_can_hold_waits_for_it() -> None:
    router = Router(RouterConfig(rebuild_timeout_s=10.0), 2, 0.0, expected_groups=["g0", "large"])
    router.group_up("g0", make_info(), (), 0.0)
    router.place(ask("a", prompt=10_000), 0.2)
    assert router.tick(10.0) == []
    (late,) = router.place(ask("b", prompt=10_000), 15.0)
    assert isinstance(late, Enqueued)
    assert router.admission.estimate(ask("c", prompt=10_000), 15.0).fits_ever
    large = make_info(sealed=1000)
    assert granted(router.group_up("large", large, (), 20.0)).group == "large"
    assert not router.admission.estimate(ask("c", prompt=100_000), 20.0).fits_ever


def test_what_exceeds_its_quota_is_refused_when_the_groups_are_known() -> None:
    config = RouterConfig(tenants={"x": TenantPolicy(quota_bytes=1000)})
    router = Router(config, epoch=2, now=0.0, expected_groups=["g0"])
    assert isinstance(router.place(ask("a", tenant="x"), 0.0)[0], Enqueued)
    (never,) = router.group_up("g0", make_info(), (), 1.0)
    refused(never, QuotaExceededError)


@pytest.mark.parametrize(
    ("now", "retry_after_s"),
    [
        (0.0, 1.6),  # its 160 tokens take this long
        (1.0, 0.6),
        (1.599, 0.25),
        (2.0, 0.25),  # it should be over by now
        (100.0, 5.0),  # it lasts ever longer
    ],
)
def test_the_advice_when_to_come_back_is_neither_at_once_nor_never(
    now: float, retry_after_s: float
) -> None:
    router = one_at_a_time(queue_limit=0, min_retry_s=0.25, max_retry_s=5.0)
    router.place(ask("a"), 0.0)
    error = refused(router.place(ask("b"), now)[0], QueueFullError)
    assert isinstance(error, QueueFullError)
    assert error.retry_after_s == pytest.approx(retry_after_s, rel=1e-3)


def test_requests_that_lost_their_group_wait_even_where_the_queue_is_full() -> None:
    router = one_at_a_time(queue_limit=1)
    router.place(ask("runs"), 0.0)
    router.place(ask("waits"), 0.0)
    lost = ask("runs", past=Past.RAN, lost_engines=frozenset({"e0"}))
    router.group_down("g0", 1.0)
    assert isinstance(router.place(lost, 1.0)[0], Enqueued)
    refused(router.place(ask("new"), 1.0)[0], QueueFullError)
    assert router_status(router, 1.0).queue_depth == 2
    (next_one,) = router.group_up("g0", make_info(max_sequences=1, epoch="e1"), (), 2.0)
    assert granted([next_one]).request_id == "runs"
    refused(router.place(ask("new"), 2.0)[0], QueueFullError)


def test_requests_that_their_engine_did_not_take_keep_their_place() -> None:
    """But they have not run, so they are held to their tenants' quotas as before."""
    tenants = {"t": TenantPolicy(quota_bytes=4 * 1000 + 17 * 300)}
    router = router_with(groups={"g0": make_info(max_sequences=2)}, queue_limit=2, tenants=tenants)
    running = [granted(router.place(ask(name), 0.0)) for name in ("r1", "r2")]
    for name in ("new", "newer"):
        router.place(ask(name), 1.0)
    refused(router.place(ask("newest"), 2.0)[0], QueueFullError)
    for name in ("t1", "t2"):
        again = router.place(ask(name, tenant="t", past=Past.ACCEPTED), 2.0)[0]
        assert isinstance(again, Enqueued), "although the queue is full"
    assert granted(end(router, running[0], 3.0)).request_id == "t1", "before newer ones"
    assert granted(end(router, running[1], 4.0)).request_id == "new", "t2 is over the quota"


def test_an_estimate_changes_nothing() -> None:
    router = one_at_a_time()
    before = router.admission.estimate(ask("a"), 0.0)
    assert (before.fits_now, before.group, before.projected_start_s) == (True, "g0", 0.0)
    assert [verdict.reason for verdict in before.verdicts] == [Reason.CHOSEN]
    router.place(ask("b"), 0.0)
    after = router.admission.estimate(ask("a"), 0.0)
    assert (after.fits_ever, after.fits_now, after.group) == (True, False, None)
    assert after.projected_start_s is not None
    assert after.projected_start_s > 0
    assert router_status(router, 0.0).queue_depth == 0
    never = router.admission.estimate(ask("a", prompt=10_000), 0.0)
    assert (never.fits_ever, never.projected_start_s) == (False, None)


def test_decisions_are_explained_in_words() -> None:
    router = router_with(groups={"g0": make_info(), "small": make_info(sealed=5)})
    router.place(ask("a"), 0.0)
    (placed,) = router.records.explain("a", 2.0)
    assert (placed.age_s, placed.group) == (2.0, "g0")
    outcome, chosen, too_small = placed.lines()
    assert outcome == "placed after 0.000 s in the queue"
    assert "g0: chosen" in chosen
    assert Reason.PAGES.value in too_small
    router.group_down("g0", 1.0)
    router.place(ask("b"), 1.0)
    (waits,) = router.records.explain("b", 1.0)
    assert waits.outcome.startswith("queued after 0 others")
    assert waits.group == ""
    router.place(ask("c", prompt=9000), 1.0)
    (never,) = router.records.explain("c", 1.0)
    assert never.outcome.startswith("refused: no group can hold the request")
    assert len(never.verdicts) == 2
    router.group_up("g0", make_info(epoch="e1"), (), 3.0)
    assert [x.group for x in router.records.explain("b", 3.0)] == ["", "g0"]
    assert router.records.explain("unknown", 3.0) == ()


def test_the_log_of_decisions_is_bounded_and_keeps_the_latest() -> None:
    infos = {"g0": make_info(max_sequences=100), "small": make_info(sealed=5)}
    router, records = router_with(groups=infos), Records(max_verdicts=10)
    for number in range(8):
        records.note(decide(router, f"r{number}", 10), float(number))
    kept = [bool(records.explain(f"r{number}", 9.0)) for number in range(8)]
    assert kept == [False] * 3 + [True] * 5
    again = decide(router, "again", 10)
    for _ in range(20):
        records.note(again, 9.0)
    assert len(records.explain("again", 9.0)) == 8
    assert not records.explain("r7", 9.0)
    roomy = Records(max_verdicts=20)
    roomy.note(decide(router, "first", 10), 0.0)
    for _ in range(20):
        roomy.note(again, 9.0)
    assert len(roomy.explain("again", 9.0)) == 8
    assert roomy.explain("first", 9.0), "only what is kept counts"


def test_an_estimate_is_of_the_end_of_the_queue() -> None:
    """Those that wait go first, even where the request would have room."""
    router = router_with(groups={"g0": make_info(sealed=30)})
    granted(router.place(ask("running", prompt=300), 0.0))
    alone = router.admission.estimate(ask("small", prompt=16, out=16), 0.0)
    assert (alone.fits_now, alone.projected_start_s) == (True, 0.0)
    starts: list[float] = []
    for number in range(3):
        assert isinstance(router.place(ask(f"large-{number}", prompt=300), 0.0)[0], Enqueued)
        found = router.admission.estimate(ask("small", prompt=16, out=16), 0.0)
        assert (found.fits_ever, found.fits_now, found.group) == (True, False, None)
        assert found.projected_start_s is not None
        starts.append(found.projected_start_s)
    assert starts[0] < starts[1] < starts[2]
