"""What the router expects: paces, output lengths, ends of leases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmesh.cluster.routing.config import RouterTuning
from kvmesh.cluster.routing.demand import DemandModel, EngineKind, KindDemand
from kvmesh.cluster.routing.forecast import earliest_start, promise
from kvmesh.cluster.routing.live import Lease
from kvmesh.cluster.routing.output_lengths import OutputLengths
from kvmesh.cluster.routing.pace import Backlog, Pace
from kvmesh.cluster.routing.prefix_index import PrefixIndex
from kvmesh.cluster.routing.request import Past
from kvmesh.cluster.routing.timeline import Timeline
from kvmesh.workers.sizes import PageNeed
from tests.routing.groups import ask, emit, end, make_info, place, router_with


def test_prefill_time_grows_with_context() -> None:
    pace = Pace(prefill_s_per_token=1e-3, prefill_s_per_pair=1e-6)
    assert pace.prefill_s(1000) == pytest.approx(1.0 + 0.5)
    assert pace.prefill_s(500, cached_tokens=500) == pytest.approx(0.5 + 0.5 * 0.75)


def test_a_backlog_without_reports_empties_by_the_clock() -> None:
    backlog = Backlog(Pace(1e-3))
    backlog.add("a", 1000, 0, now=0.0)
    backlog.add("b", 2000, 0, now=0.5)
    assert backlog.seconds(0.5) == pytest.approx(2.5)
    assert backlog.seconds(2.9) == pytest.approx(0.1)
    assert backlog.seconds(5.0) == 0.0
    backlog.add("c", 1000, 0, now=10.0)
    assert backlog.seconds(10.0) == pytest.approx(1.0)


def test_a_backlog_with_reports_waits_for_the_first_prompt_and_learns_its_pace() -> None:
    backlog = Backlog(Pace(1e-3))
    for name in "abc":
        backlog.add(name, 1000, 0, now=0.0)
    backlog.first_token("a", now=2.0)  # took twice as long as predicted
    assert backlog.correction > 1.0
    assert backlog.seconds(2.0) == pytest.approx(2.0 * backlog.correction)
    assert backlog.seconds(60.0) == pytest.approx(1.1 * backlog.correction)
    backlog.drop("c", now=60.0)
    assert backlog.seconds(60.0) == pytest.approx(0.1 * backlog.correction)
    backlog.first_token("b", now=61.0)
    backlog.first_token("b", now=62.0)
    assert len(backlog) == 0


def test_a_backlog_starts_on_the_next_prompt_when_the_first_is_gone() -> None:
    backlog = Backlog(Pace(1e-3))
    for name, tokens in (("a", 5000), ("b", 2000), ("c", 1000)):
        backlog.add(name, tokens, 0, now=0.0)
    backlog.drop("a", now=3.0)
    assert backlog.seconds(3.0) == pytest.approx(3.0)
    backlog.drop("c", now=4.0)  # b is still being computed
    assert backlog.seconds(4.0) == pytest.approx(1.0)
    backlog.drop("unknown", now=4.5)
    assert backlog.seconds(4.5) == pytest.approx(0.5)
    assert backlog.longest_s == pytest.approx(2.0)


def test_medians_are_of_the_tenants_class_then_of_all_tenants_and_roll() -> None:
    lengths = OutputLengths(window=10, min_samples=5)
    assert lengths.median("t", 100) is None
    for length in range(1, 11):
        lengths.learn("t", 100, length)
    assert lengths.median("t", 127) == 5
    assert lengths.median("unknown", 100) == 5
    assert lengths.median("t", 1000) is None
    for _ in range(10):
        lengths.learn("t", 100, 50)
    assert lengths.median("t", 100) == 50


def test_medians_that_were_not_used_for_longest_are_forgotten() -> None:
    lengths = OutputLengths(window=10, min_samples=1, max_keys=3)
    for tenant in ("a", "b", "a", "c"):  # and all of them together are the third
        lengths.learn(tenant, 100, {"a": 10, "b": 20, "c": 30}[tenant])
    assert (lengths.median("a", 100), lengths.median("c", 100)) == (10, 30)
    assert lengths.median("b", 100) == lengths.median("unknown", 100) == 10


def test_the_last_token_of_a_prompt_is_computed_even_if_all_are_cached() -> None:
    index, blocks = PrefixIndex(), (b"0", b"1")
    index.add("g0", blocks[:1])
    index.add("g1", blocks)
    tuning = RouterTuning(block_pages=1)
    model = DemandModel(OutputLengths(), index, tuning)
    demand = model.demand(ask("a", 32, 8, page_hashes=blocks), [EngineKind.of(make_info())])
    cached = [demand.cached_tokens(group, 16) for group in ("g0", "g1", "g2")]
    assert cached == [16, 31, 0]


def test_a_lease_covers_the_usual_output_and_a_resumed_ones_all_of_it() -> None:
    lengths = OutputLengths(window=100, min_samples=10)
    for prompt in (200, 2000):
        for length in range(1, 101):
            lengths.learn("default", prompt, length)
    info = make_info()
    model, kinds = DemandModel(lengths, PrefixIndex(), RouterTuning()), [EngineKind.of(info)]
    short = model.demand(ask("a", 200, 400), kinds)
    assert short.leased_tokens == 50
    assert model.demand(ask("b", 20, 400), kinds).leased_tokens == 400, "nothing is known"
    assert model.demand(ask("c", 200, 400, past=Past.RAN), kinds).leased_tokens == 400
    assert model.demand(ask("d", 200, 40), kinds).leased_tokens == 40
    (here,) = short.by_kind
    assert here.max == info.geometry.peak_need(600)
    assert here.leased == PageNeed(here.max.hot, info.geometry.peak_need(251).sealed)


def test_a_groups_pace_is_learned_from_the_gaps_between_its_tokens() -> None:
    router = router_with(groups={"g0": make_info()})
    group = router.fleet.groups["g0"]
    before_s = group.decode_step_s
    made = place(router, "a", 160, 160, 0.0)
    emit(router, made, 7.0)
    emit(router, made, 8.0)
    end(router, made, 12.0, output_tokens=11)
    assert group.decode_step_s == pytest.approx(before_s + 0.05 * (0.5 - before_s))
    assert router.leases.mean_s == pytest.approx(1.0 + 0.05 * (12.0 - 1.0))
    after_s = group.decode_step_s
    for name, now, output_tokens in (("b", 20.0, 1), ("c", 40.0, None)):
        made = place(router, name, 160, 160, now)
        emit(router, made, now + 1.0)
        end(router, made, now + 2.0, output_tokens)
    assert group.decode_step_s == after_s, "one token has no gap, and one that was cut off lies"


def test_room_comes_with_the_ends_in_their_order() -> None:
    timeline = Timeline()
    leases = {}
    for number, (name, pages, ends_at) in enumerate(
        [("a", 10, 30.0), ("b", 20, 10.0), ("c", 5, 20.0)]
    ):
        need = PageNeed(1, pages)
        leases[name] = Lease(name, "r", "t", "g", (1, number), need, need, 1, granted_at=0.0)
        timeline.add(leases[name], ends_at)
    free = PageNeed(10, 2)
    assert timeline.room_at(PageNeed(1, 2), free, 5.0) == 5.0
    assert timeline.room_at(PageNeed(1, 22), free, 5.0) == 10.0
    assert timeline.room_at(PageNeed(1, 23), free, 5.0) == 20.0
    assert timeline.room_at(PageNeed(1, 37), free, 5.0) == 30.0
    assert timeline.room_at(PageNeed(1, 38), free, 5.0) is None
    assert timeline.freed_by(20.0, 5.0) == PageNeed(2, 25)
    assert timeline.room_at(PageNeed(1, 22), free, 12.0) == pytest.approx(13.2)  # late
    timeline.remove(leases["b"])
    timeline.add(leases["b"], 40.0)
    assert timeline.nth_end(1, 12.0) == 20.0
    timeline.remove(leases["c"])
    assert len(timeline) == 2


def test_a_lease_that_has_run_very_long_may_outlast_those_after_it() -> None:
    timeline = Timeline()
    need = PageNeed(1, 10)
    for number, (granted_at, ends_at) in enumerate([(0.0, 50.0), (99.0, 103.0), (99.0, 104.0)]):
        lease = Lease(
            f"l{number}", "r", "t", "g", (1, number), need, need, 1, granted_at=granted_at
        )
        timeline.add(lease, ends_at)
    free = PageNeed(0, 0)
    # The first is given a tenth of its age again, and no room comes with the second alone.
    assert timeline.room_at(PageNeed(1, 10), free, 100.0) == 110.0
    assert timeline.room_at(PageNeed(1, 20), free, 100.0) == 110.0
    assert timeline.freed_by(103.0, 100.0) == need
    assert timeline.freed_by(109.0, 100.0) == PageNeed(2, 20)
    assert timeline.freed_by(110.0, 100.0) == PageNeed(3, 30)
    assert [timeline.nth_end(count, 100.0) for count in (1, 2, 3, 5)] == [
        103.0,
        104.0,
        110.0,
        110.0,
    ]
    assert Timeline().nth_end(1, 100.0) == 100.0


def test_a_start_is_forecast_with_room_to_grow() -> None:
    """Else a request would be expected to start at once, and be overtaken forever."""
    router = router_with(groups={"g0": make_info(sealed=100)})
    place(router, "holder", 960, 16, 0.0)
    group = router.fleet.groups["g0"]
    assert group.account is not None
    free = group.account.free.sealed
    demand = router.fleet.demand(ask("b", 160, 160))
    for grows, starts_at_once in ((0, True), (free - 20, True), (free - 19, False)):
        needs = KindDemand(PageNeed(4, 20 + grows), PageNeed(4, 20), 0, None)
        found = earliest_start([group], replace(demand, by_kind=(needs,)), 0.0)
        assert found is not None
        assert (found < 1e-3) == starts_at_once, grows
        promised = promise([group], replace(demand, by_kind=(needs,)), 0.0)
        assert (promised is None) == starts_at_once
