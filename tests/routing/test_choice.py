"""The choice of a group at a moment: what keeps it from a group, and what each would cost."""

from __future__ import annotations

import math

import pytest

from kvmesh.cluster.routing.group import Group
from kvmesh.cluster.routing.live import Lease
from kvmesh.cluster.routing.outcome import Enqueued
from kvmesh.cluster.routing.pace import Pace
from kvmesh.cluster.routing.placement import (
    GroupChoice,
    PlacementWeights,
    Promise,
    choose,
    projected_s,
)
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.routing.verdict import Reason, Verdict
from kvmesh.workers.sizes import PageNeed
from tests.routing.groups import SLOW, ask, end, make_info, only, place, router_with

NOW = 10.0
PAGES = tuple(b"%d" % page for page in range(100))
CACHED = 96 * 16  # of 1,600 tokens: whole blocks of 8 pages


def two_groups(**settings: object) -> tuple[Router, Group, Group]:
    infos = {name: make_info(sealed=1000, kv_format=name) for name in ("g0", "g1")}
    router = router_with(groups=infos, **{"pace": SLOW, **settings})
    first, second = router.fleet.groups.values()
    return router, first, second


def chosen(
    router: Router,
    request: PlaceRequest,
    weights: PlacementWeights | None = None,
    promise: Promise | None = None,
    deferred_s: dict[str, float] | None = None,
) -> GroupChoice:
    demand = router.fleet.demand(request)
    weights = weights or PlacementWeights(ahead_s=0.5, balance_s=10.0)
    promises = {} if promise is None else {promise.group: promise}
    return choose(router.fleet.groups.values(), demand, NOW, weights, promises, deferred_s)


def verdict(router: Router, request: PlaceRequest, **rest: PlacementWeights | Promise) -> Verdict:
    """Of the first group."""
    return next(iter(chosen(router, request, **rest).verdicts))  # type: ignore[arg-type]


# Costs


def test_a_cost_is_the_time_to_the_first_token_and_the_share_that_is_used_then() -> None:
    router, first, second = two_groups()
    second.backlog.clear_at = NOW + 0.25
    for prompt, free_share in ((960, 1 - 77 / 1000), (10, 1 - 4 / 64)):
        costs = [x.cost_s for x in chosen(router, ask("r", prompt, 320)).verdicts]
        need = router.fleet.demand(ask("r", prompt, 320)).by_kind[0].leased
        assert free_share == min(1 - need.sealed / 1000, 1 - need.hot / 64), "the scarcer kind"
        cost_s = prompt * 1e-3 + 10.0 * (1 - free_share)
        assert costs == [pytest.approx(cost_s), pytest.approx(cost_s + 0.25)]
    assert first.account is not None


def test_of_equal_groups_the_first_is_chosen_and_waited_for() -> None:
    router, first, second = two_groups()
    assert chosen(router, ask("r")).group is first
    for group in (first, second):
        router.fleet.index.add(group.name, PAGES)
        group.backlog.clear_at = NOW + 100.0
    request = ask("r", 1600, 16, page_hashes=PAGES)
    waits = chosen(router, request, deferred_s={})
    assert (waits.group, waits.better_later) == (None, first)
    assert chosen(router, request, deferred_s={"g0": 0.1}).better_later is second
    costs = [x.cost_s for x in waits.verdicts]
    assert costs[0] == costs[1] and costs[0] == pytest.approx(100.0, abs=2.0)


def test_a_verdict_has_what_the_group_holds_of_the_prompt() -> None:
    router, first, _ = two_groups()
    place(router, "a", 1600, 16, NOW, page_hashes=PAGES)
    request = ask("b", 1600, 16, page_hashes=PAGES)
    assert [x.cached_pages for x in chosen(router, request).verdicts] == [96, 0]
    assert first.account is not None and first.account.sequences == 1


def test_a_verdict_has_what_the_lease_takes_unless_the_group_never_holds_the_request() -> None:
    router = router_with(groups={"g0": make_info(), "small": make_info(sealed=20)}, min_samples=1)
    end(router, place(router, "teacher", 160, 160, 0.0), 1.0, 4)  # so that leases are small
    demand = router.fleet.demand(ask("r", 160, 400))
    here = demand.by_kind[0]
    assert here.leased.sealed < 20 < here.max.sealed
    bytes_of = make_info().geometry.bytes_of
    able, never = chosen(router, ask("r", 160, 400)).verdicts
    assert (able.reason, able.needed_bytes) == (Reason.CHOSEN, bytes_of(here.leased))
    assert (never.reason, never.needed_bytes) == (Reason.PAGES, bytes_of(here.max))


# Obstacles


def test_pages_that_are_shared_with_others_need_not_be_free() -> None:
    router = router_with(groups={"g0": make_info()})
    place(router, "a", 1280, 16, 0.0, page_hashes=PAGES[:80])
    assert router.fleet.groups["g0"].account.free.sealed < 25  # type: ignore[union-attr]
    for other in ((), (*PAGES[:40], *(b"other %d" % page for page in range(40)))):
        (waits,) = router.place(ask(f"{len(other)}", 1280, 16, page_hashes=other), 0.0)
        assert isinstance(waits, Enqueued)
        assert [x.reason for x in waits.verdicts] == [Reason.FULL]
        router.cancel([waits.request_id], 0.0)
    assert place(router, "b", 1280, 16, 0.0, page_hashes=PAGES[:80]).group == "g0"


def test_a_group_is_given_prompts_while_little_is_computed_before_them() -> None:
    router, first, _ = two_groups()
    for wait_s, reason in ((0.5, Reason.CHOSEN), (0.6, Reason.BACKLOG)):
        first.backlog.clear_at = NOW + wait_s
        weights = PlacementWeights(ahead_s=0.5, balance_s=0.0)
        request = ask("r", accepts=only("g0"))
        assert verdict(router, request, weights=weights).reason is reason


@pytest.mark.parametrize("correction", [1.0, 2.0])
def test_a_cached_prefix_is_waited_for_as_long_as_it_saves(correction: float) -> None:
    router, first, _ = two_groups(pace=Pace(1e-3, prefill_s_per_pair=1e-7))
    router.fleet.index.add("g0", PAGES)
    first.backlog.correction = correction
    request = ask("r", 1600, 16, page_hashes=PAGES, accepts=only("g0"))
    pace = first.backlog.pace
    saved_s = (pace.prefill_s(1600) - pace.prefill_s(1600 - CACHED, CACHED)) * correction
    for wait_s, reason in ((saved_s + 0.49, Reason.CHOSEN), (saved_s + 0.51, Reason.BACKLOG)):
        first.backlog.clear_at = NOW + wait_s
        assert verdict(router, request).reason is reason


def test_a_prompt_is_long_if_it_takes_more_than_the_longest_time() -> None:
    router, _, _ = two_groups()
    prefill_s = router.fleet.demand(ask("r", 5000)).prefill_s
    for longest_s, reason in (
        (prefill_s, Reason.CHOSEN),
        (math.nextafter(prefill_s, 0.0), Reason.LONG),
    ):
        weights = PlacementWeights(ahead_s=0.5, balance_s=10.0, longest_s=longest_s)
        assert verdict(router, ask("r", 5000), weights=weights).reason is reason


def test_a_promise_is_kept_by_what_ends_before_it() -> None:
    router, first, _ = two_groups()
    request = ask("r")
    ends_at = NOW + projected_s(first, router.fleet.demand(request), NOW)
    need = router.fleet.demand(request).by_kind[0].leased
    for at, spare, reason in (
        (ends_at, PageNeed(0, 0), Reason.CHOSEN),
        (math.nextafter(ends_at, 0.0), PageNeed(0, 0), Reason.PROMISED),
        (NOW, need, Reason.CHOSEN),
        (NOW, need - PageNeed(0, 1), Reason.PROMISED),
    ):
        promise = Promise("other", "g0", at, spare)
        assert verdict(router, request, promise=promise).reason is reason
    own = Promise("r", "g0", NOW, PageNeed(0, 0))
    assert verdict(router, request, promise=own).reason is Reason.CHOSEN


def test_what_ends_after_a_promise_takes_of_what_is_spare() -> None:
    promise = Promise("other", "g0", 50.0, PageNeed(10, 20))
    lease = Lease("l", "r", "t", "g0", (1, 0), PageNeed(4, 5), PageNeed(4, 5), 1, granted_at=0.0)
    for ends_at, spare in ((50.0, PageNeed(10, 20)), (50.1, PageNeed(6, 15))):
        lease.ends_at = ends_at
        assert promise.after_grant(lease) == Promise("other", "g0", 50.0, spare)
