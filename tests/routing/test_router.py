from __future__ import annotations

import pickle

import pytest

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.decisions import Decided, DecisionLog
from kvmesh.cluster.routing.errors import (
    DeadlineUnreachableError,
    DuplicateRequestError,
    NeverFitsError,
    NoGroupError,
    QueueFullError,
)
from kvmesh.cluster.routing.explain import explain
from kvmesh.cluster.routing.group import GroupSpec
from kvmesh.cluster.routing.request import Granted, PlaceRequest, Queued, Refused
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.routing.verdict import Reason
from kvmesh.workers.request import LeaseTerms
from tests.routing.groups import make_loads, make_spec


def router_with(*specs: GroupSpec, queue_limit: int = 8) -> Router:
    router = Router(RouterConfig(queue_limit=queue_limit), epoch=1, now=0.0)
    for spec in specs:
        router.group_up(spec, 0.0)
        router.report(spec.group, make_loads(epoch=spec.engine_epoch), 0.0)
    return router


def ask(request_id: str, prompt: int = 160, out: int = 160, **rest: object) -> PlaceRequest:
    return PlaceRequest(request_id, prompt, out, **rest)  # type: ignore[arg-type]


def granted(decision: object) -> Granted:
    assert isinstance(decision, Granted), decision
    return decision


def test_the_least_used_group_gets_the_request_and_says_why() -> None:
    router = router_with(make_spec("g0"), make_spec("g1"))
    first = granted(router.submit(ask("a"), 0.0)[0]).placement
    second = granted(router.submit(ask("b"), 0.0)[0]).placement
    assert {first.group, second.group} == {"g0", "g1"}
    assert {v.reason for v in first.verdicts} == {Reason.CHOSEN, Reason.WORSE}
    # 320 tokens: 20 pages of 16; 4 hot (1 sink, 2 recent, 1 writing), 17 sealed at the end
    assert (first.lease.hot_pages, first.lease.sealed_pages) == (4, 17)
    assert first.lease_bytes == 4 * 1000 + 17 * 300


def test_what_no_group_can_ever_hold_is_refused_with_the_bytes() -> None:
    router = router_with(make_spec("g0", sealed=10), make_spec("g1", max_model_len=64))
    refused = router.submit(ask("a"), 0.0)[0]
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, NeverFitsError)
    assert refused.error.needed_bytes["g0"] == 4 * 1000 + 17 * 300
    assert refused.error.available_bytes["g0"] == 64 * 1000 + 10 * 300
    assert refused.error.reasons["g1"] == Reason.CONTEXT.value
    again = pickle.loads(pickle.dumps(refused.error))
    assert str(again) == str(refused.error)


def test_the_quality_floor_excludes_a_format() -> None:
    router = router_with(make_spec("low", quality=2.5), make_spec("high", quality=8.5))
    for name in "ab":
        placement = granted(router.submit(ask(name, min_quality=8.0), 0.0)[0]).placement
        assert placement.group == "high"
    refused = router.submit(ask("c", min_quality=16.0), 0.0)[0]
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, NeverFitsError)


def test_the_queue_is_served_in_order_as_leases_end() -> None:
    router = router_with(make_spec("g0", max_sequences=1))
    running = granted(router.submit(ask("a"), 0.0)[0]).placement
    assert isinstance(router.submit(ask("b"), 0.0)[0], Queued)
    assert isinstance(router.submit(ask("c", priority=1), 0.0)[0], Queued)
    resumed = router.submit(ask("d", priority=1, resumed=True), 0.0)[0]
    assert isinstance(resumed, Queued)
    assert resumed.position == 0
    order = []
    for step in range(3):
        (outcome,) = router.release(running.lease.lease_id, step + 1.0).outcomes
        running = granted(outcome).placement
        order.append(running.request_id)
    assert order == ["d", "c", "b"]
    assert running.queue_s == 3.0
    assert router.release(running.lease.lease_id, 9.0).outcomes == ()
    assert router.release(running.lease.lease_id, 9.0).outcomes == ()
    assert not router.ledger.leases


def test_a_full_queue_refuses_with_advice() -> None:
    router = router_with(make_spec("g0", max_sequences=1), queue_limit=1)
    router.submit(ask("a"), 0.0)[0]
    router.submit(ask("b"), 0.0)[0]
    refused = router.submit(ask("c"), 0.0)[0]
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, QueueFullError)
    assert refused.error.retry_after_s > 0
    assert refused.error.needed_bytes > 0
    with pytest.raises(DuplicateRequestError):
        router.submit(ask("b"), 0.0)[0]


def test_a_deadline_and_a_cancellation_leave_the_queue() -> None:
    router = router_with(make_spec("g0", max_sequences=1))
    router.submit(ask("a"), 0.0)[0]
    router.submit(ask("b", timeout_s=5.0), 0.0)[0]
    router.submit(ask("c"), 0.0)[0]
    assert router.tick(4.9).outcomes == ()
    (late,) = router.tick(5.0).outcomes
    assert isinstance(late, Refused)
    assert isinstance(late.error, DeadlineUnreachableError)
    router.cancel("c", 6.0)
    router.cancel("c", 6.0)
    assert router.queue_depth == 0


def test_a_lost_group_voids_its_leases_and_its_requests_wait_for_its_return() -> None:
    router = router_with(make_spec("g0"), make_spec("small", sealed=5))
    lease = granted(router.submit(ask("a"), 0.0)[0]).placement.lease
    changes = router.group_down("g0", 1.0)
    assert [x.lease_id for x in changes.voided] == [lease.lease_id]
    waiting = router.submit(ask("a", resumed=True), 1.0)[0]
    assert isinstance(waiting, Queued)
    assert [v.reason for v in waiting.verdicts] == [Reason.DOWN, Reason.PAGES]
    assert router.group_up(make_spec("g0", epoch="e1"), 2.0).outcomes == ()  # not reported yet
    _, changes = router.report("g0", make_loads(epoch="e1"), 2.5)
    assert granted(changes.outcomes[0]).placement.group == "g0"


def test_a_group_gone_for_good_refuses_what_only_it_could_hold() -> None:
    router = router_with(make_spec("g0"), make_spec("small", sealed=5))
    router.group_down("g0", 1.0)
    router.submit(ask("a"), 1.0)[0]
    (outcome,) = router.group_down("g0", 2.0, gone=True).outcomes
    assert isinstance(outcome, Refused)
    assert isinstance(outcome.error, NeverFitsError)


def test_without_any_group_the_answer_is_to_come_back() -> None:
    router = Router(RouterConfig(), epoch=1, now=0.0)
    refused = router.submit(ask("a"), 0.0)[0]
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, NoGroupError)


def test_a_restarted_router_admits_only_after_the_known_groups_have_reported() -> None:
    router = Router(RouterConfig(), epoch=2, now=0.0, expected_groups=["g0", "g1"])
    held = LeaseTerms("1-0", 1, 4, 90)
    router.group_up(make_spec("g0"), 0.0)
    router.report("g0", make_loads([held]), 0.1)
    assert isinstance(router.submit(ask("a"), 0.2)[0], Queued)
    router.group_up(make_spec("g1"), 0.3)
    _, changes = router.report("g1", make_loads(), 0.4)
    assert granted(changes.outcomes[0]).placement.group == "g1"
    assert router.ledger.accounts["g0"].used.sealed == 90


def test_a_restarted_router_does_not_wait_for_ever() -> None:
    router = Router(RouterConfig(rebuild_timeout_s=10.0), 2, 0.0, expected_groups=["g0", "g1"])
    router.group_up(make_spec("g0"), 0.0)
    router.report("g0", make_loads(), 0.1)
    router.submit(ask("a"), 0.2)[0]
    assert router.tick(9.9).outcomes == ()
    assert granted(router.tick(10.0).outcomes[0]).placement.group == "g0"


def test_an_estimate_changes_nothing() -> None:
    router = router_with(make_spec("g0", max_sequences=1))
    before = router.estimate(ask("a"), 0.0)
    assert before.fits_now
    assert before.group == "g0"
    assert before.projected_start_s == 0.0
    router.submit(ask("b"), 0.0)[0]
    after = router.estimate(ask("a"), 0.0)
    assert after.fits_ever
    assert not after.fits_now
    assert after.projected_start_s is not None
    assert after.projected_start_s > 0
    assert router.queue_depth == 0
    never = router.estimate(ask("a", prompt=10_000), 0.0)
    assert not never.fits_ever
    assert never.projected_start_s is None


def test_a_decision_is_told_in_words() -> None:
    router = router_with(make_spec("g0"), make_spec("small", sealed=5))
    decision, _ = router.submit(ask("a"), 0.0)
    decided = Decided(0.0, decision)
    lines = explain(decided.in_words(), decided.verdicts)
    assert lines[0] == "placed after 0.000 s in the queue"
    assert "g0: chosen" in lines[1]
    assert Reason.PAGES.value in lines[2]
    assert decided.group == "g0"
    router.group_down("g0", 1.0)
    waits = Decided(1.0, router.submit(ask("b"), 1.0)[0])
    assert waits.in_words().startswith("queued behind 0 others")
    assert waits.group == ""
    never = Decided(1.0, router.submit(ask("c", prompt=9000), 1.0)[0])
    assert never.in_words().startswith("refused: no group can hold the request")
    assert len(never.verdicts) == 2


def test_the_log_of_decisions_is_bounded_and_keeps_the_latest() -> None:
    router = router_with(make_spec("g0", max_sequences=100), make_spec("small", sealed=5))
    log = DecisionLog(limit=10)
    for number in range(8):
        log.note(router.submit(ask(f"r{number}", prompt=10), 0.0)[0], float(number))
    assert [bool(log.of(f"r{number}")) for number in range(8)] == [False] * 3 + [True] * 5
    again = router.submit(ask("again", prompt=10), 0.0)[0]
    for _ in range(20):
        log.note(again, 9.0)
    assert len(log.of("again")) == 8
    assert not log.of("r7")
