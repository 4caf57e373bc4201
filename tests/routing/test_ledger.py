from __future__ import annotations

from dataclasses import replace

import pytest

from kvmesh.cluster.routing.errors import LedgerError
from kvmesh.cluster.routing.events import Event, ReleaseReason
from kvmesh.cluster.routing.ledger import Ledger
from kvmesh.workers.request import LeaseTerms
from kvmesh.workers.sizes import PageNeed
from tests.routing.groups import make_spec


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger(7, ttl_s=30.0, grace_s=5.0)
    ledger.group_up(make_spec("g0"), 0.0)
    ledger.group_up(make_spec("g1"), 0.0)
    return ledger


def test_a_grant_takes_pages_and_a_release_returns_them_once(ledger: Ledger) -> None:
    lease = ledger.grant("g0", PageNeed(4, 10), 0.0, request_id="r")
    assert ledger.accounts["g0"].free_pages() == PageNeed(60, 90)
    assert ledger.accounts["g0"].used_bytes() == 4 * 1000 + 10 * 300
    released = ledger.release(lease.lease_id, 1.0)
    assert released is not None
    assert released.lease_id == lease.lease_id
    assert ledger.release(lease.lease_id, 2.0) is None
    assert ledger.accounts["g0"].free_pages() == PageNeed(64, 100)
    ledger.check_integrity()


def test_a_grant_beyond_the_free_pages_is_a_fault(ledger: Ledger) -> None:
    ledger.grant("g0", PageNeed(4, 90), 0.0, request_id="a")
    with pytest.raises(LedgerError, match="does not fit 'g0'"):
        ledger.grant("g0", PageNeed(4, 11), 0.0, request_id="b")


def test_growth_needs_room_and_shrinking_makes_it(ledger: Ledger) -> None:
    first = ledger.grant("g0", PageNeed(4, 60), 0.0, request_id="a")
    second = ledger.grant("g0", PageNeed(4, 30), 0.0, request_id="b", most=PageNeed(4, 40))
    assert ledger.grow(second.lease_id, PageNeed(4, 40), 1.0)
    ledger.shrink(second.lease_id, PageNeed(4, 35), 1.0)
    with pytest.raises(LedgerError):  # five pages are free, and reserved for the second's growth
        ledger.grant("g0", PageNeed(4, 1), 1.0, request_id="c")
    assert ledger.grow(second.lease_id, PageNeed(4, 40), 1.0)
    with pytest.raises(LedgerError, match="within"):
        ledger.grow(second.lease_id, PageNeed(4, 41), 1.0)
    assert ledger.release(first.lease_id, 1.0)


def test_the_oldest_lease_can_always_grow_to_its_most(ledger: Ledger) -> None:
    old = ledger.grant("g0", PageNeed(4, 30), 0.0, request_id="a", most=PageNeed(4, 50))
    young = ledger.grant("g0", PageNeed(4, 40), 0.0, request_id="b", most=PageNeed(4, 60))
    # 30 pages are free; the young one may take 10 and leave 20 for the old one's growth
    assert not ledger.grow(young.lease_id, PageNeed(4, 55), 1.0)
    assert ledger.grow(young.lease_id, PageNeed(4, 50), 1.0)
    assert not ledger.grow(young.lease_id, PageNeed(4, 51), 1.0)
    assert ledger.grow(old.lease_id, PageNeed(4, 50), 2.0)
    assert ledger.accounts["g0"].free_pages().sealed == 0
    assert not ledger.grow(young.lease_id, PageNeed(4, 60), 3.0)
    ledger.release(old.lease_id, 4.0)
    assert ledger.grow(young.lease_id, PageNeed(4, 60), 4.0)
    ledger.check_integrity()


def test_equal_blocks_of_a_group_are_paid_for_once(ledger: Ledger) -> None:
    blocks = tuple(bytes([i]) for i in range(15))
    need = PageNeed(4, 79)  # 60 pages in blocks of 4, the first of which is the sink
    first = ledger.grant("g0", need, 0.0, request_id="a", blocks=blocks, block_pages=4)
    second = ledger.grant("g0", need, 0.0, request_id="b", blocks=blocks, block_pages=4)
    assert ledger.accounts["g0"].free_pages().sealed == 100 - 158 + 59
    ledger.check_integrity()
    ledger.release(first.lease_id, 1.0)
    assert ledger.accounts["g0"].free_pages().sealed == 21  # the shared ones are still in use
    ledger.release(second.lease_id, 1.0)
    assert ledger.accounts["g0"].free_pages().sealed == 100
    assert not ledger.accounts["g0"].shared


def test_shrinking_below_and_growing_backwards_are_faults(ledger: Ledger) -> None:
    first = ledger.grant("g0", PageNeed(4, 60), 0.0, request_id="a")
    with pytest.raises(LedgerError):
        ledger.shrink(first.lease_id, PageNeed(4, 61), 1.0)
    with pytest.raises(LedgerError):
        ledger.grow(first.lease_id, PageNeed(3, 60), 1.0)


def test_hand_over_moves_the_pages(ledger: Ledger) -> None:
    lease = ledger.grant("g0", PageNeed(4, 60), 0.0, request_id="a")
    ledger.grant("g1", PageNeed(4, 50), 0.0, request_id="b")
    assert not ledger.hand_over(lease.lease_id, "g1", PageNeed(4, 60), 1.0)
    assert ledger.hand_over(lease.lease_id, "g1", PageNeed(4, 50), 1.0)
    assert ledger.accounts["g0"].used == PageNeed(0, 0)
    assert ledger.accounts["g1"].used == PageNeed(8, 100)
    ledger.check_integrity()


def test_a_report_releases_what_the_engine_no_longer_runs(ledger: Ledger) -> None:
    old = ledger.grant("g0", PageNeed(4, 10), 0.0, request_id="a")
    ledger.reconcile("g0", "e0", [old.terms], 1.0)
    young = ledger.grant("g0", PageNeed(4, 10), 1.5, request_id="b")
    result = ledger.reconcile("g0", "e0", [], 2.0)
    assert [lease.lease_id for lease in result.released] == [old.lease_id]
    assert young.lease_id in ledger.leases
    result = ledger.reconcile("g0", "e0", [], 36.5)
    assert [lease.lease_id for lease in result.released] == [young.lease_id]


def test_a_report_of_unknown_leases_is_adopted_even_beyond_capacity(ledger: Ledger) -> None:
    foreign = LeaseTerms("3-9", 3, 4, 120)
    result = ledger.reconcile("g0", "e0", [foreign], 1.0)
    assert [lease.lease_id for lease in result.adopted] == ["3-9"]
    assert ledger.accounts["g0"].free_pages().sealed == -20
    assert ledger.reconcile("g0", "e0", [foreign], 2.0).adopted == ()
    assert ledger.release("3-9", 3.0) is not None


def test_a_report_that_was_on_its_way_does_not_bring_a_lease_back(ledger: Ledger) -> None:
    lease = ledger.grant("g0", PageNeed(4, 10), 0.0, request_id="a")
    ledger.release(lease.lease_id, 10.0)
    assert ledger.reconcile("g0", "e0", [lease.terms], 11.0).adopted == ()
    late = ledger.reconcile("g0", "e0", [lease.terms], 16.0)  # the engine does hold it
    assert len(late.adopted) == 1


def test_a_report_of_another_incarnation_is_ignored(ledger: Ledger) -> None:
    lease = ledger.grant("g0", PageNeed(4, 10), 0.0, request_id="a")
    assert ledger.reconcile("g0", "former", [], 100.0).stale
    assert ledger.reconcile("nowhere", "e0", [], 100.0).stale
    assert lease.lease_id in ledger.leases


def test_a_new_incarnation_voids_the_former_leases(ledger: Ledger) -> None:
    lease = ledger.grant("g0", PageNeed(4, 10), 0.0, request_id="a")
    assert ledger.group_up(make_spec("g0"), 1.0) == ()
    voided = ledger.group_up(make_spec("g0", epoch="e1"), 2.0)
    assert [x.lease_id for x in voided] == [lease.lease_id]
    assert ledger.release(lease.lease_id, 3.0) is None


def test_a_lease_nobody_used_is_freed_by_a_report_and_not_by_a_silent_engine() -> None:
    ledger = Ledger(7, ttl_s=30.0, grace_s=5.0)
    ledger.group_up(make_spec("g0"), 0.0)
    lease = ledger.grant("g0", PageNeed(4, 10), 0.0, request_id="a")
    ledger.forget(1000.0)
    assert ledger.reconcile("g0", "e0", [], 34.9).released == ()
    assert ledger.reconcile("g0", "e0", [], 35.0).released == (lease,)


def test_a_lease_the_engine_is_known_to_have_is_over_when_a_new_report_lacks_it() -> None:
    log: list[Event] = []
    ledger = Ledger(7, ttl_s=30.0, grace_s=5.0, on_event=log.append)
    ledger.group_up(make_spec("g0"), 0.0)
    lease = ledger.grant("g0", PageNeed(4, 10), 0.0, request_id="a")
    ledger.handed(lease.lease_id, 2.0)
    ledger.handed(lease.lease_id, 6.0)  # it was known before
    assert ledger.reconcile("g0", "e0", [], 6.9).released == ()  # may be of before
    assert [x.lease_id for x in ledger.reconcile("g0", "e0", [], 7.0).released] == ["7-0"]
    ledger.handed(lease.lease_id, 8.0)
    assert Ledger.replay(log, 7).state() == ledger.state()


def test_the_log_replays_to_the_same_ledger() -> None:
    log: list[Event] = []
    ledger = Ledger(7, on_event=log.append)
    ledger.group_up(make_spec("g0"), 0.0)
    ledger.group_up(make_spec("g1"), 0.0)
    a = ledger.grant("g0", PageNeed(4, 10), 0.0, request_id="a", most=PageNeed(4, 20))
    b = ledger.grant("g0", PageNeed(4, 10), 0.5, request_id="b", tenant="t", sequences=2)
    ledger.reconcile("g0", "e0", [a.terms, LeaseTerms("x", 1, 2, 3)], 1.0)
    ledger.grow(a.lease_id, PageNeed(4, 20), 2.0)
    ledger.hand_over(b.lease_id, "g1", PageNeed(4, 9), 3.0)
    ledger.release("x", 4.0)
    ledger.group_down("g1", 5.0)
    again = Ledger.replay(log, 7)
    assert again.state() == ledger.state()
    again.check_integrity()
    c = again.grant("g0", PageNeed(1, 1), 6.0, request_id="c")
    assert c.lease_id not in {a.lease_id, b.lease_id}
    assert [e.reason for e in log if hasattr(e, "reason")] == [
        ReleaseReason.ENDED,
        ReleaseReason.VOIDED,
    ]


def test_all_sequences_of_an_adopted_lease_count() -> None:
    ledger = Ledger(7)
    ledger.group_up(make_spec("g0"), 0.0)
    listed = LeaseTerms("3-9", 3, 8, 20, 30, sequences=2)
    ledger.reconcile("g0", "e0", [listed], 1.0)
    account = ledger.accounts["g0"]
    assert (account.sequences, account.used) == (2, PageNeed(8, 20))


def test_an_adopted_lease_follows_the_reports_upward_and_keeps_its_age() -> None:
    log: list[Event] = []
    ledger = Ledger(7, on_event=log.append)
    ledger.group_up(make_spec("g0"), 0.0)
    ledger.reconcile("g0", "e0", [LeaseTerms("3-9", 3, 4, 10, 15)], 1.0)
    young = ledger.grant("g0", PageNeed(4, 10), 1.0, request_id="b")
    more = LeaseTerms("3-9", 3, 8, 24, 30, sequences=2)
    ledger.reconcile("g0", "e0", [more], 2.0)
    assert (ledger.leases["3-9"].need, ledger.leases["3-9"].most.sealed) == (PageNeed(8, 24), 30)
    assert ledger.accounts["g0"].sequences == 3
    assert list(ledger.accounts["g0"].lease_ids) == ["3-9", young.lease_id]
    ledger.grow("3-9", PageNeed(8, 30), 3.0)
    ledger.reconcile("g0", "e0", [more], 4.0)  # written before it had grown
    assert ledger.leases["3-9"].need == PageNeed(8, 30)
    ledger.check_integrity()
    assert Ledger.replay(log, 7).state() == ledger.state()


def test_leases_are_adopted_oldest_first() -> None:
    ledger = Ledger(7)
    ledger.group_up(make_spec("g0"), 0.0)
    listed = [LeaseTerms(f"3-{n}", 3, 1, 1, 5, number=n) for n in (11, 9, 10)]
    ledger.reconcile("g0", "e0", listed, 1.0)
    assert list(ledger.accounts["g0"].lease_ids) == ["3-9", "3-10", "3-11"]


def test_the_oldest_grows_where_adopted_leases_overstate_what_is_used() -> None:
    """Their shared pages are charged to each: the account shows none free, the engine has some."""
    ledger = Ledger(7)
    ledger.group_up(make_spec("g0"), 0.0)
    listed = [LeaseTerms(f"3-{n}", 3, 1, 60, 70, 50, number=n) for n in range(3)]
    ledger.reconcile("g0", "e0", listed, 1.0)
    assert ledger.accounts["g0"].free_pages().sealed == -80
    assert not ledger.grow("3-1", PageNeed(1, 61), 2.0)
    assert ledger.grow("3-0", PageNeed(1, 70), 2.0)
    ledger.release("3-0", 3.0)
    assert ledger.grow("3-1", PageNeed(1, 70), 4.0)


def test_terms_say_what_others_paid_for() -> None:
    ledger = Ledger(7)
    ledger.group_up(make_spec("g0"), 0.0)
    blocks = (b"a", b"b", b"c")
    first = ledger.grant("g0", PageNeed(1, 30), 0.0, request_id="a", blocks=blocks, block_pages=8)
    second = ledger.grant(
        "g0", PageNeed(2, 20), 0.0, request_id="b", blocks=blocks[:2], block_pages=8, sequences=2
    )
    assert first.terms.shared_sealed_pages == 0
    assert second.terms.shared_sealed_pages == 15  # one page of the first block is the sink's
    assert second.terms.share.shared_sealed_pages == 8
    assert second.terms.share + second.terms.share == replace(second.terms, shared_sealed_pages=16)
