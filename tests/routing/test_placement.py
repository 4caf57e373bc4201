from __future__ import annotations

from random import Random

import pytest

from kvmesh.cluster.routing import placement as rules
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.errors import DeadlineUnreachableError, LedgerError
from kvmesh.cluster.routing.group import GroupSpec
from kvmesh.cluster.routing.pace import Pace
from kvmesh.cluster.routing.request import Granted, Placement, PlaceRequest, Queued, Refused
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.routing.verdict import Reason
from kvmesh.workers.sizes import PageNeed
from tests.routing.groups import make_loads, make_spec

SLOW = Pace(prefill_s_per_token=1e-3, decode_step_s=0.1)


def router_with(*specs: GroupSpec, **config: object) -> Router:
    router = Router(RouterConfig(**config), epoch=1, now=0.0)  # type: ignore[arg-type]
    for spec in specs:
        router.group_up(spec, 0.0)
        router.report(spec.group, make_loads(), 0.0)
    return router


def paced(group: str, sealed: int = 1000) -> GroupSpec:
    spec = make_spec(group, sealed=sealed)
    return GroupSpec(**{name: getattr(spec, name) for name in spec.__slots__} | {"pace": SLOW})


def place(
    router: Router, name: str, prompt: int, out: int, now: float, **rest: object
) -> Placement:
    request = PlaceRequest(name, prompt, out, **rest)  # type: ignore[arg-type]
    decision = router.submit(request, now)[0]
    assert isinstance(decision, Granted), decision
    return decision.placement


def test_a_cached_prefix_attracts() -> None:
    router = router_with(paced("g0"), paced("g1"))
    pages = tuple(b"%d" % page for page in range(100))
    first = place(router, "a", 1600, 16, 0.0, page_hashes=pages)
    router.release(first.lease.lease_id, 5.0)
    for name in "bcd":  # the other group is just as free, but would compute it all
        placement = place(router, name, 1600, 16, 10.0, page_hashes=pages, priority=1)
        assert placement.group == first.group
        assert placement.cached_tokens == 96 * 16
        router.release(placement.lease.lease_id, 10.5)
    router.pages_changed(first.group, (), pages, 11.0)
    placement = place(router, "e", 1600, 16, 20.0, page_hashes=pages)
    assert placement.cached_tokens == 0


def test_prompts_go_where_they_will_be_computed_first() -> None:
    router = router_with(paced("g0"), paced("g1"), ahead_s=10.0)
    first = place(router, "a", 8000, 16, 0.0)
    second = place(router, "b", 160, 16, 0.1)
    third = place(router, "c", 160, 16, 0.1)
    assert {second.group, third.group} == {"g0", "g1"} - {first.group}


def test_a_group_that_is_behind_gets_nothing_more_until_it_has_begun() -> None:
    router = router_with(paced("g0"), ahead_s=0.5)
    first = place(router, "a", 8000, 16, 0.0)
    waiting, _ = router.submit(PlaceRequest("b", 160, 16), 0.0)
    assert isinstance(waiting, Queued)
    assert waiting.verdicts[0].reason is Reason.BACKLOG
    (outcome,) = router.begun(first.lease.lease_id, 8.0).outcomes
    assert outcome.request_id == "b"


def test_the_first_in_line_is_promised_a_start_and_smaller_ones_pass_it_without_harm() -> None:
    router = router_with(paced("g0", sealed=100), ahead_s=1e9, patience_s=1.0)
    running = place(router, "running", 960, 320, 0.0)  # 78 sealed pages, ends at about 33 s
    large, _ = router.submit(PlaceRequest("large", 960, 320), 1.0)
    assert isinstance(large, Queued)
    assert router.promise is not None
    assert router.promise.request_id == "large"
    assert router.promise.at == pytest.approx(32.96, abs=0.1)
    # 22 pages are free. One that ends before the promise may have them:
    quick = place(router, "quick", 160, 160, 2.0)
    assert quick.group == "g0"
    # the next would hold its pages for longer than that, and beyond what is spare:
    slow, _ = router.submit(PlaceRequest("slow", 48, 350), 3.0)
    assert isinstance(slow, Queued)
    outcomes = router.release(running.lease.lease_id, 30.0).outcomes
    assert next(outcome.request_id for outcome in outcomes) == "large"
    assert isinstance(outcomes[0], Granted)
    assert outcomes[0].placement.promised_at == pytest.approx(32.96, abs=0.1)


def test_what_cannot_start_in_time_is_refused_at_once() -> None:
    router = router_with(paced("g0", sealed=100), ahead_s=1e9)
    place(router, "running", 960, 320, 0.0)
    refused, _ = router.submit(PlaceRequest("hasty", 960, 320, timeout_s=10.0), 1.0)
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, DeadlineUnreachableError)
    assert refused.error.projected_start_s == pytest.approx(32.0, abs=0.5)
    patient, _ = router.submit(PlaceRequest("patient", 960, 320, timeout_s=60.0), 1.0)
    assert isinstance(patient, Queued)


def test_small_requests_leave_the_hole_that_large_ones_need() -> None:
    router = router_with(paced("g0", sealed=1000), paced("g1", sealed=1000), balance_s=0.0)
    large = place(router, "large", 12_800, 16, 0.0)
    for index in range(4):
        place(router, f"s{index}", 3200, 16, 100.0 * (index + 1))
    router.release(large.lease.lease_id, 500.0)
    # g0 holds nothing or all of the small ones: a second large one fits at once
    assert any(
        view.account is not None and view.account.free_sealed >= 800 for view in router.views()
    )
    place(router, "large-again", 12_800, 16, 600.0)


def test_growth_past_the_estimate_is_granted_with_new_terms() -> None:
    router = router_with(paced("g0", sealed=100), least_samples=2, long_share=0.0)
    request = PlaceRequest("a", 160, 640)
    for name in ("x", "y", "z"):
        seen = place(router, name, 160, 16, 0.0)
        router.begun(seen.lease.lease_id, 0.2)
        router.release(seen.lease.lease_id, 1.0, 16)
    placement = place(router, "a", 160, 640, 2.0)
    assert placement.leased_output_tokens == 16
    growth = router.grow(placement.lease.lease_id, request, 17, 3.0)
    assert growth is not None
    assert growth.output_tokens == 25
    growth = router.grow(placement.lease.lease_id, request, 600, 3.0)
    assert growth is not None
    assert growth.output_tokens == 640
    assert growth.lease.sealed_pages == growth.lease.most_sealed_pages
    assert router.ledger.accounts["g0"].used == PageNeed(4, growth.lease.sealed_pages)
    with pytest.raises(LedgerError):  # nothing lets it have more than it was admitted for
        router.ledger.grow(placement.lease.lease_id, PageNeed(4, 99), 3.0)
    router.release(placement.lease.lease_id, 4.0)
    assert router.grow(placement.lease.lease_id, request, 600, 5.0) is None


def test_the_short_way_to_a_cost_is_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the groups' state, deciding with and without the short cut is the same."""
    chance = Random(5)
    for _ in range(30):
        specs = [paced(f"g{i}", sealed=chance.choice([60, 200, 1000])) for i in range(6)]
        router = router_with(*specs, ahead_s=chance.choice([0.2, 2.0]), least_samples=2)
        pages = tuple(b"%d" % page for page in range(100))
        for step in range(30):
            prompt = chance.randrange(16, 2400)
            hashes = pages[: prompt // 16] if chance.random() < 0.3 else ()
            request = PlaceRequest(f"r{step}", prompt, 320, page_hashes=hashes)
            short = router.estimate(request, float(step))
            with monkeypatch.context() as patched:
                patched.setattr(rules, "_plain_cost_s", lambda *_: None)
                long = router.estimate(request, float(step))
            assert short == long
            router.submit(request, float(step))
            if step % 7 == 3:
                router.group_down(f"g{step % 6}", float(step))


def test_short_requests_that_hold_no_sealed_page_are_spread() -> None:
    """By sealed pages alone, every group would look as empty as the first."""
    router = router_with(make_spec("g0"), make_spec("g1"), make_spec("g2"))
    groups = [place(router, str(i), 10, 10, 0.0).group for i in range(6)]
    assert sorted(groups) == ["g0", "g0", "g1", "g1", "g2", "g2"]
