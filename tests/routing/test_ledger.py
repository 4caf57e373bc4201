from __future__ import annotations

from dataclasses import replace

import pytest

from kvmesh.cluster.routing.errors import LedgerError
from kvmesh.cluster.routing.ledger import Ledger
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.loads import ArenaLoads, EngineLoads, PoolLoads
from kvmesh.workers.sizes import PageNeed
from tests.routing.groups import foreign, grant, make_info, make_ledger


@pytest.fixture
def ledger() -> Ledger:
    return make_ledger("g0", "g1")


def test_a_grant_takes_pages_and_a_release_returns_them_once(ledger: Ledger) -> None:
    lease = grant(ledger, PageNeed(4, 10))
    account = ledger.account("g0")
    assert account.free == PageNeed(60, 90)
    assert account.used == PageNeed(4, 10)
    ledger.release(lease)
    assert account.free == PageNeed(64, 100)
    with pytest.raises(LedgerError, match="is not in the ledger"):
        ledger.release(lease)
    assert account.free == PageNeed(64, 100)
    ledger.check_integrity()


def test_a_grant_beyond_the_free_pages_is_a_fault(ledger: Ledger) -> None:
    grant(ledger, PageNeed(4, 90))
    with pytest.raises(LedgerError, match="does not fit 'g0'"):
        grant(ledger, PageNeed(4, 11))
    with pytest.raises(LedgerError, match="'g2' is not up"):
        grant(ledger, PageNeed(4, 11), group="g2")


def test_growth_needs_room(ledger: Ledger) -> None:
    first = grant(ledger, PageNeed(4, 60))
    second = grant(ledger, PageNeed(4, 30), max_sealed=40)
    with pytest.raises(LedgerError):  # ten pages are free, and reserved for the second's growth
        grant(ledger, PageNeed(4, 1))
    assert ledger.grow(second, PageNeed(4, 40))
    with pytest.raises(LedgerError, match="must grow within"):
        ledger.grow(second, PageNeed(4, 41))
    with pytest.raises(LedgerError, match="must grow within"):
        ledger.grow(first, PageNeed(3, 60))
    ledger.release(first)
    ledger.check_integrity()


def test_the_oldest_lease_can_always_grow_to_its_maximum(ledger: Ledger) -> None:
    old = grant(ledger, PageNeed(4, 30), max_sealed=50)
    young = grant(ledger, PageNeed(4, 40), max_sealed=60)
    # 30 pages are free; the young one may take 10 and leave 20 for the old one's growth
    assert not ledger.grow(young, PageNeed(4, 55))
    assert ledger.grow(young, PageNeed(4, 50))
    assert not ledger.grow(young, PageNeed(4, 51))
    assert ledger.grow(old, PageNeed(4, 50))
    assert ledger.account("g0").free.sealed == 0
    assert not ledger.grow(young, PageNeed(4, 60))
    ledger.release(old)
    assert ledger.grow(young, PageNeed(4, 60))
    ledger.check_integrity()


def test_equal_blocks_of_a_group_are_paid_for_once(ledger: Ledger) -> None:
    blocks = tuple(bytes([i]) for i in range(15))
    need = PageNeed(4, 79)  # 60 pages in blocks of 4, the first page of which is the sink
    first, second = (grant(ledger, need, blocks=blocks) for _ in range(2))
    account = ledger.account("g0")
    assert account.free.sealed == 100 - 158 + 59
    ledger.check_integrity()
    ledger.release(first)
    assert account.free.sealed == 21  # the shared ones are still in use
    ledger.release(second)
    assert account.free.sealed == 100
    assert account.shared_pages(blocks) == 0


def test_terms_say_what_others_paid_for(ledger: Ledger) -> None:
    blocks = (b"a", b"b", b"c", b"d")
    first = grant(ledger, PageNeed(1, 30), blocks=blocks)
    second = grant(ledger, PageNeed(2, 20), blocks=blocks[:3], sequences=2)
    assert first.terms.shared_sealed_pages == 0
    assert second.terms.shared_sealed_pages == 11  # one page of the first block is the sink's
    assert second.terms == LeaseTerms("7-1", 7, 2, 20, 20, 11, sequences=2, number=1)


def test_a_closed_account_voids_its_leases(ledger: Ledger) -> None:
    lease = grant(ledger, PageNeed(4, 10))
    grant(ledger, PageNeed(4, 10), group="g1")
    assert ledger.close("g0") == [lease]
    assert ledger.close("g0") == []
    assert list(ledger.leases) == ["7-1"]
    ledger.open("g0", make_info(epoch="e1"), 4)
    assert ledger.account("g0").used == PageNeed(0, 0)
    ledger.check_integrity()


def test_what_the_engine_holds_is_adopted_even_beyond_the_capacity(ledger: Ledger) -> None:
    lease = ledger.adopt("g0", foreign(9, 4, 120, sequences=2), 1.0)
    account = ledger.account("g0")
    assert (account.free.sealed, account.sequences) == (-20, 2)
    assert (lease.to_grow, lease.arrived) == (0, True)
    with pytest.raises(LedgerError, match="already"):
        ledger.adopt("g0", foreign(9, 4, 120), 1.0)
    ledger.release(lease)
    assert account.free.sealed == 100
    ledger.check_integrity()


def test_leases_are_ordered_by_their_age_wherever_they_were_granted(ledger: Ledger) -> None:
    own = grant(ledger, PageNeed(1, 1), max_sealed=2)
    for number in (11, 9, 10):
        ledger.adopt("g0", foreign(number, 1, 1, 5), 1.0)
    assert [x.lease_id for x in ledger.account("g0").by_age()] == [
        "3-9",
        "3-10",
        "3-11",
        own.lease_id,
    ]


def test_the_oldest_grows_where_adopted_leases_overstate_what_is_used(ledger: Ledger) -> None:
    """Their shared pages are charged to each: the account shows none free, the engine has some."""
    leases = [
        ledger.adopt("g0", foreign(n, 1, 60, 70, shared_sealed_pages=50), 1.0) for n in (0, 1)
    ]
    assert ledger.account("g0").free.sealed == -20
    assert not ledger.grow(leases[1], PageNeed(1, 61))
    assert ledger.grow(leases[0], PageNeed(1, 70))
    ledger.release(leases[0])
    assert ledger.grow(leases[1], PageNeed(1, 70))


def test_leases_that_never_arrived_are_found_once(ledger: Ledger) -> None:
    late = grant(ledger, PageNeed(1, 1), now=0.0)
    used = grant(ledger, PageNeed(1, 1), now=1.0)
    gone = grant(ledger, PageNeed(1, 1), now=2.0)
    young = grant(ledger, PageNeed(1, 1), now=3.0)
    used.arrived = True
    ledger.release(gone)
    assert ledger.never_arrived(-1.0) == []
    assert ledger.never_arrived(2.5) == [late]
    assert ledger.never_arrived(2.5) == []
    assert ledger.never_arrived(3.0) == [young]


def loads(*leases: LeaseTerms, hot: int = 0, sealed: int = 0) -> EngineLoads:
    pool = PoolLoads(ArenaLoads(total=64, used=hot), ArenaLoads(total=100, used=sealed))
    return EngineLoads(pool=pool, leases=leases)


def test_an_audit_finds_what_engine_and_ledger_disagree_about(ledger: Ledger) -> None:
    lease = grant(ledger, PageNeed(4, 10), max_sealed=20)
    assert ledger.audit("g0", loads()) == ()  # it has not arrived
    lease.arrived = True
    before = lease.terms
    assert ledger.audit("g0", loads(before, hot=4, sealed=10)) == ()
    assert ledger.grow(lease, PageNeed(4, 15))
    assert ledger.audit("g0", loads(before)) == ()  # the extension is on its way
    assert ledger.audit("nowhere", loads(before)) == ()
    for wrong, words in (
        (loads(), "does not have it"),
        (loads(replace(before, sealed_pages=16)), "there"),
        (loads(replace(before, max_sealed_pages=21)), "there"),
        (loads(before, foreign(1, 1, 1)), "not in the ledger"),
        (loads(before, hot=5, sealed=10), "cover"),
    ):
        (fault,) = ledger.audit("g0", wrong)
        assert words in fault
