from __future__ import annotations

import pytest

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.errors import (
    DeadlineUnreachableError,
    NoRoomError,
    QuotaUsedUpError,
)
from kvmesh.cluster.routing.fairness import TenantPolicy
from kvmesh.cluster.routing.outcome import Enqueued, Grown, Outcome, Refused
from kvmesh.cluster.routing.placement import GroupChoice, PlacementWeights, choose, prefill_s
from kvmesh.cluster.routing.request import Past
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.routing.status import router_status
from kvmesh.cluster.routing.verdict import Reason
from kvmesh.workers.lease import AccountUpdate, LeaseEnd
from kvmesh.workers.sizes import PageNeed
from tests.routing.groups import (
    SLOW,
    arrive,
    ask,
    emit,
    end,
    granted,
    make_info,
    only,
    place,
    router_with,
    want,
)


def test_a_cached_prefix_attracts() -> None:
    router = router_with(
        pace=SLOW, groups={"g0": make_info(sealed=1000), "g1": make_info(sealed=1000)}
    )
    pages = tuple(b"%d" % page for page in range(100))
    first = place(router, "a", 1600, 16, 0.0, page_hashes=pages)
    end(router, first, 5.0)
    for name in "bcd":  # the other group is just as free, but would compute it all
        placement = place(router, name, 1600, 16, 10.0, page_hashes=pages, priority=1)
        assert placement.group == first.group
        assert placement.cached_tokens == 96 * 16
        end(router, placement, 10.5)
    router.fleet.pages_changed(first.group, (), pages)
    assert place(router, "e", 1600, 16, 20.0, page_hashes=pages).cached_tokens == 0


def test_an_engine_that_returns_has_nothing_cached() -> None:
    router = router_with(groups={"g0": make_info(sealed=1000)})
    pages = tuple(b"%d" % page for page in range(100))
    place(router, "a", 1600, 16, 0.0, page_hashes=pages)
    assert place(router, "b", 1600, 16, 1.0, page_hashes=pages).cached_tokens == 96 * 16
    router.group_down("g0", 2.0)
    router.group_up("g0", make_info(sealed=1000, epoch="e1"), (), 3.0)
    assert place(router, "c", 1600, 16, 4.0, page_hashes=pages).cached_tokens == 0


def test_the_group_of_a_cached_prefix_is_worth_waiting_for_until_others_wait_for_it() -> None:
    infos = {name: make_info(sealed=1000, kv_format=name) for name in ("g0", "g1")}
    router = router_with(pace=SLOW, groups=infos, ahead_s=10.0)
    on = {name: {"accepts": only(name)} for name in infos}
    pages = tuple(b"%d" % page for page in range(100))
    end(router, place(router, "a", 1600, 16, 0.0, page_hashes=pages, **on["g0"]), 5.0)
    emit(router, place(router, "full", 8000, 16, 10.0, **on["g1"]), 19.0)
    place(router, "computes", 2500, 16, 20.0, **on["g0"])
    demand = router.fleet.demand(ask("b", 1600, 16, page_hashes=pages))
    weights = PlacementWeights(ahead_s=0.5, balance_s=10.0)

    def chosen(deferred_s: dict[str, float] | None) -> GroupChoice:
        groups = router.fleet.groups.values()
        return choose(groups, demand, 20.0, weights, deferred_s=deferred_s)

    waits = chosen({})
    assert waits.group is None and waits.better_later is router.fleet.groups["g0"]
    assert [verdict.reason for verdict in waits.verdicts] == [Reason.BACKLOG, Reason.WORSE]
    for deferred_s in ({"g0": 5.0}, None):  # None: it must be placed now
        assert chosen(deferred_s).group is router.fleet.groups["g1"]
    assert chosen({"g1": 5.0}).better_later is router.fleet.groups["g0"]


def test_what_is_left_of_a_cached_prompt_takes_as_long_as_others_have_taken() -> None:
    router = router_with(pace=SLOW, groups={"g0": make_info(sealed=1000)})
    pages = tuple(b"%d" % page for page in range(100))
    first = place(router, "a", 1600, 16, 0.0, page_hashes=pages)
    emit(router, first, 3.2)  # twice as long as predicted
    end(router, first, 5.0)
    group = router.fleet.groups["g0"]
    assert group.backlog.correction > 1.0
    for hashes, cached in ((pages, 96 * 16), ((), 0)):
        demand = router.fleet.demand(ask("b", 1600, 16, page_hashes=hashes))
        predicted_s = group.backlog.pace.prefill_s(1600 - cached, cached)
        assert prefill_s(group, demand) == pytest.approx(predicted_s * group.backlog.correction)


def test_a_group_has_room_for_every_sequence_of_a_request_or_none() -> None:
    router = router_with(groups={"g0": make_info(max_sequences=4, sealed=1000)})
    first = place(router, "a", 160, 16, 0.0, sequences=2)
    (waiting,) = router.place(ask("b", 160, 16, sequences=3), 0.0)
    assert isinstance(waiting, Enqueued)
    assert [verdict.reason for verdict in waiting.verdicts] == [Reason.BUSY]
    assert granted(end(router, first, 1.0)).request_id == "b"


def test_a_request_is_due_after_a_multiple_of_its_prefill_and_not_at_once() -> None:
    router = router_with(
        pace=SLOW, groups={"g0": make_info(sealed=1000)}, stretch=4.0, patience_s=1.5
    )
    for prompt_tokens, due in ((100, 11.5), (1000, 14.0)):
        live = router.admission.arrive(ask(str(prompt_tokens), prompt_tokens, 16), 10.0)
        assert live.due == pytest.approx(due, rel=1e-3)


def test_prompts_go_where_they_will_be_computed_first() -> None:
    infos = {name: make_info(sealed=1000, kv_format=name) for name in ("g0", "g1")}
    router = router_with(pace=SLOW, groups=infos, ahead_s=10.0)
    first = place(router, "a", 8000, 16, 0.0)
    second = place(router, "b", 160, 16, 0.1)
    third = place(router, "c", 160, 16, 0.1)
    assert {second.group, third.group} == {"g0", "g1"} - {first.group}


def test_a_group_with_a_backlog_gets_nothing_more_until_its_first_token() -> None:
    router = router_with(pace=SLOW, groups={"g0": make_info(sealed=1000)}, ahead_s=0.5)
    first = place(router, "a", 8000, 16, 0.0)
    (waiting,) = router.place(ask("b", 160, 16), 0.0)
    assert isinstance(waiting, Enqueued)
    assert next(iter(waiting.verdicts)).reason is Reason.BACKLOG
    assert granted(emit(router, first, 8.0)).request_id == "b"


def test_the_first_in_line_is_promised_a_start_and_smaller_ones_pass_it_without_harm() -> None:
    router = router_with(pace=SLOW, groups={"g0": make_info()}, ahead_s=1e9, patience_s=1.0)
    running = place(router, "running", 960, 320, 0.0)  # 78 sealed pages, ends at about 33 s
    assert isinstance(router.place(ask("large", 960, 320), 1.0)[0], Enqueued)
    # It is promised the group for when it is expected to be free, at about 33 s.
    # 22 pages are free. One that ends before the promise may have them:
    assert place(router, "quick", 160, 160, 2.0).group == "g0"
    # the next would hold its pages for longer than that, and beyond what is spare:
    assert isinstance(router.place(ask("slow", 48, 350), 3.0)[0], Enqueued)
    outcomes = end(router, running, 30.0)
    large = granted(outcomes)
    assert large.request_id == "large"


@pytest.mark.parametrize("cancels", [True, False])
def test_a_request_that_gives_up_no_longer_holds_others_back(cancels: bool) -> None:
    router = router_with(pace=SLOW, groups={"g0": make_info()}, ahead_s=1e9, patience_s=1.0)
    place(router, "running", 688, 320, 0.0)  # 60 sealed pages, ends at about 33 s
    assert isinstance(router.place(ask("large", 16, 1264), 1.0)[0], Enqueued)
    # It fits next to what runs, but not next to what is promised.
    assert isinstance(router.place(ask("slow", 16, 600), 1.0)[0], Enqueued)
    outcomes = router.cancel(["large"], 2.0) if cancels else router.abort("large", 2.0)
    assert granted(outcomes[-1:]).request_id == "slow"


def test_what_is_spare_besides_a_promise_is_given_away_once() -> None:
    router = router_with(
        pace=SLOW, groups={"g0": make_info(max_sequences=3)}, ahead_s=1e9, patience_s=1.0
    )
    running = place(router, "running", 688, 320, 0.0)  # 60 sealed pages, ends at about 33 s
    busy = [place(router, f"busy-{i}", 16, 16, 0.5) for i in range(2)]
    # At 33 s the first of these is to have 77 pages of 100, so that 23 are spare: enough for one
    # of the others, which would hold 19 each for longer than that. 40 are free now.
    assert isinstance(router.place(ask("large", 16, 1264), 1.0)[0], Enqueued)
    for name in ("slow", "slower"):
        assert isinstance(router.place(ask(name, 16, 350), 1.0)[0], Enqueued)
    together = AccountUpdate(ended=tuple(LeaseEnd(x.lease.lease_id) for x in busy))
    outcomes = router.account("g0", together, 2.0)
    assert granted(outcomes).request_id == "slow" and len(outcomes) == 1
    assert granted(end(router, running, 30.0)).request_id == "large"


def test_what_cannot_start_in_time_is_refused_at_once() -> None:
    router = router_with(pace=SLOW, groups={"g0": make_info()}, ahead_s=1e9)
    place(router, "running", 960, 320, 0.0)
    (refused,) = router.place(ask("hasty", 960, 320, timeout_s=10.0), 1.0)
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, DeadlineUnreachableError)
    assert refused.error.projected_start_s == pytest.approx(32.0, abs=0.5)
    assert isinstance(router.place(ask("patient", 960, 320, timeout_s=60.0), 1.0)[0], Enqueued)


def test_what_the_queue_limits_is_refused_for_lack_of_room() -> None:
    """At once where the forecast says so, and when its time is over; with figures."""
    router = router_with(pace=SLOW, groups={"g0": make_info()}, ahead_s=1e9)
    place(router, "running", 960, 320, 0.0)
    large = 4 * 1000 + 77 * 300
    (own,) = router.place(ask("hasty", 960, 320, timeout_s=10.0, own_deadline=False), 1.0)
    assert isinstance(own, Refused) and type(own.error) is NoRoomError
    assert own.error.message == "no room within 10 s"
    assert own.error.retry_after_s == pytest.approx(32.0, abs=0.5)
    assert (own.error.needed_bytes, own.error.available_bytes) == (large, 60 * 1000 + 23 * 300)
    router.place(ask("patient", 960, 320, timeout_s=57.31, own_deadline=False), 1.0)
    late, *_ = router.tick(60.0)
    assert isinstance(late, Refused) and type(late.error) is NoRoomError
    assert late.error.message == "no room within 57.3 s" and late.error.needed_bytes == large
    assert len(late.verdicts) == 1
    assert router_status(router, 60.0).refused_total == {"NoRoomError": 2}


def test_what_waits_for_its_quota_in_vain_is_refused_for_its_quota() -> None:
    tenants = {"x": TenantPolicy(quota_bytes=4 * 1000 + 17 * 300)}
    router = router_with(groups={"g0": make_info()}, tenants=tenants)
    arrive(router, place(router, "runs", 160, 160, 0.0, tenant="x"), 0.0)
    router.place(ask("waits", tenant="x", timeout_s=10.0, own_deadline=False), 0.0)
    (late,) = router.tick(10.0)
    assert isinstance(late, Refused) and isinstance(late.error, QuotaUsedUpError)
    assert late.error.message.startswith("no room within 10 s; ")


def test_a_full_queue_refuses_for_its_quota_what_that_would_stop_too() -> None:
    tenants = {"x": TenantPolicy(quota_bytes=4 * 1000 + 17 * 300)}
    info = make_info(max_sequences=2)
    router = router_with(groups={"g0": info}, tenants=tenants, queue_limit=1)
    place(router, "runs", 160, 160, 0.0, tenant="x")
    router.place(ask("waits", tenant="x"), 0.0)
    (own,) = router.place(ask("r", tenant="x"), 0.0)
    assert isinstance(own, Refused) and isinstance(own.error, QuotaUsedUpError)
    assert own.error.message.startswith("the queue is full: 1 requests wait; ")


def busy_and_down(past: Past) -> tuple[Router, Outcome]:
    """Of two groups the one that is up has no room in time; what is said of a request."""
    infos = {"g0": make_info(), "g1": make_info(epoch="e1")}
    router = router_with(pace=SLOW, groups=infos, ahead_s=1e9)
    router.group_down("g1", 0.0)
    place(router, "running", 960, 320, 0.0)
    (own,) = router.place(ask("r", 960, 320, past=past, timeout_s=10.0), 1.0)
    return router, own


@pytest.mark.parametrize("past", [Past.NEW, Past.RAN])
def test_what_a_group_that_comes_back_may_start_in_time_waits_for_it(past: Past) -> None:
    router, own = busy_and_down(past)
    assert isinstance(own, Enqueued)
    up = router.group_up("g1", make_info(epoch="e2"), (), 5.0)
    assert (granted(up).request_id, granted(up).group) == ("r", "g1")
    router, _ = busy_and_down(past)
    late, *_ = router.tick(11.0)
    assert isinstance(late, Refused), "its deadline is what it was"


def test_a_group_that_comes_back_but_is_too_small_is_no_reason_to_wait() -> None:
    router = router_with(pace=SLOW, groups={"g0": make_info(), "g1": make_info(sealed=50)})
    router.group_down("g1", 0.0)
    place(router, "running", 960, 320, 0.0)
    (own,) = router.place(ask("r", 960, 320, timeout_s=10.0), 1.0)
    assert isinstance(own, Refused) and isinstance(own.error, DeadlineUnreachableError)


def test_what_was_accepted_before_is_not_refused_by_a_forecast() -> None:
    """A stream that lost its group ends at its deadline, if nothing comes before."""
    router = router_with(pace=SLOW, groups={"g0": make_info()}, ahead_s=1e9)
    running = place(router, "running", 960, 320, 0.0)
    for past in (Past.ACCEPTED, Past.RAN):
        lost = ask(past.name, 960, 320, past=past, timeout_s=10.0)
        assert isinstance(router.place(lost, 1.0)[0], Enqueued)
    assert granted(end(router, running, 5.0)).request_id == "RAN"


def test_a_stream_that_lost_its_group_waits_where_no_group_is_known_yet() -> None:
    config = RouterConfig(rebuild_timeout_s=1.0)
    router = Router(config, epoch=2, now=0.0, expected_groups=["g0"])
    lost = ask("lost", past=Past.RAN, timeout_s=100.0)
    assert isinstance(router.place(lost, 5.0)[0], Enqueued)
    assert granted(router.group_up("g0", make_info(), (), 9.0)).request_id == "lost"


def test_a_group_that_was_never_up_may_have_room_in_time() -> None:
    """One that the autoscaler has just added, say."""
    router = router_with(pace=SLOW, groups={"g0": make_info()}, ahead_s=1e9)
    place(router, "running", 960, 320, 0.0)
    hasty = ask("hasty", 960, 320, timeout_s=10.0)
    router.fleet.expected = frozenset({"g0", "g1"})
    assert isinstance(router.place(hasty, 1.0)[0], Enqueued)
    assert granted(router.group_up("g1", make_info(epoch="e1"), (), 5.0)).group == "g1"


def test_late_requests_are_promised_groups_of_their_own() -> None:
    infos = {name: make_info() for name in ("g0", "g1", "g2")}
    router = router_with(pace=SLOW, groups=infos, ahead_s=1e9, patience_s=1.0)
    running = [place(router, f"running-{i}", 480, 160, 0.0) for i in range(3)]
    for name in ("large-0", "large-1"):
        assert isinstance(router.place(ask(name, 960, 320), 1.0)[0], Enqueued)
    # Both are late now, and have a group each. One is left for what would delay them:
    third = place(router, "slow", 300, 380, 8.0).group
    assert isinstance(router.place(ask("slower", 300, 380), 8.0)[0], Enqueued)
    for ended in (x for x in running if x.group != third):
        assert granted(end(router, ended, 9.0)).request_id.startswith("large")


def test_growth_past_the_estimate_is_granted_with_new_terms() -> None:
    router = router_with(pace=SLOW, groups={"g0": make_info()}, min_samples=2)
    for name in ("x", "y", "z"):
        seen = place(router, name, 160, 16, 0.0)
        emit(router, seen, 0.2)
        end(router, seen, 1.0, 16)
    placement = place(router, "a", 160, 640, 2.0)
    assert placement.leased_output_tokens == 16
    (grown,) = want(router, placement, 160, 17, 3.0)
    assert isinstance(grown, Grown)
    # 185 tokens, half as much output again: 11 pages, of which one is the sink's and two recent
    assert (grown.group, grown.lease.sealed_pages) == ("g0", 8)
    (grown,) = want(router, placement, 160, 600, 3.0)
    assert isinstance(grown, Grown)
    assert grown.lease.sealed_pages == grown.lease.max_sealed_pages
    assert router_status(router, 3.0).groups[0].used == PageNeed(4, grown.lease.sealed_pages)
    (again,) = want(router, placement, 160, 9000, 3.0)  # nothing beyond what it was admitted for
    assert again == grown
    end(router, placement, 4.0)
    assert want(router, placement, 160, 600, 5.0) == []


def test_growth_that_a_lease_covers_already_leaves_it_as_it_is() -> None:
    """A want may be older than the last extension, when a router and an engine meet again."""
    router = router_with(groups={"g0": make_info()})
    made = place(router, "a", 160, 160, 0.0)
    (grown,) = want(router, made, 160, 10, 1.0)
    assert grown == Grown("g0", made.lease)


def test_a_request_goes_where_it_takes_the_smaller_share_of_the_pages() -> None:
    router = router_with(groups={"g0": make_info(sealed=100), "g1": make_info(sealed=1000)})
    assert place(router, "a", 960, 16, 0.0).group == "g1"


def test_short_requests_that_hold_no_sealed_page_are_spread() -> None:
    """By sealed pages alone, every group would look as empty as the first."""
    router = router_with(groups={f"g{index}": make_info() for index in range(3)})
    groups = [place(router, str(i), 10, 10, 0.0).group for i in range(6)]
    assert sorted(groups) == ["g0", "g0", "g1", "g1", "g2", "g2"]
