from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from kvmesh.cluster.routing.audit import audit
from kvmesh.cluster.routing.errors import LedgerError
from kvmesh.cluster.routing.ledger import Account
from kvmesh.cluster.routing.shared_blocks import SharedBlocks
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.loads import ArenaLoads, EngineLoads, PoolLoads
from kvmesh.workers.sizes import PageNeed
from tests.routing.groups import (
    arrive,
    foreign,
    grant,
    make_account,
    make_info,
    place,
    router_with,
)


@pytest.fixture
def account() -> Account:
    return make_account()


def test_a_grant_takes_pages_and_a_release_returns_them_once(account: Account) -> None:
    lease = grant(account, PageNeed(4, 10))
    assert account.free == PageNeed(60, 90)
    assert account.used == PageNeed(4, 10)
    account.release(lease)
    assert account.free == PageNeed(64, 100)
    with pytest.raises(LedgerError, match="is not in the ledger"):
        account.release(lease)
    assert account.free == PageNeed(64, 100)
    account.check_integrity()


def test_a_grant_beyond_the_free_pages_is_a_fault(account: Account) -> None:
    grant(account, PageNeed(4, 90))
    with pytest.raises(LedgerError, match="does not fit 'g0'"):
        grant(account, PageNeed(4, 11), number=1)


def test_what_a_lease_needs_to_fit(account: Account) -> None:
    assert account.holds(PageNeed(64, 100), 0)
    assert not account.holds(PageNeed(65, 1), 0)
    assert not account.holds(PageNeed(1, 101), 0)
    assert account.holds(PageNeed(1, 60), 40) and not account.holds(PageNeed(1, 60), 41)
    grant(account, PageNeed(4, 10), max_sealed=30)  # 90 are free, 20 reserved
    assert account.holds(PageNeed(60, 70), 20) and not account.holds(PageNeed(60, 71), 19)
    assert account.holds(PageNeed(1, 75), 0, shared=5)
    assert not account.holds(PageNeed(1, 76), 0, shared=5)


def test_growth_needs_room(account: Account) -> None:
    first = grant(account, PageNeed(4, 60))
    second = grant(account, PageNeed(4, 30), number=1, max_sealed=40)
    with pytest.raises(LedgerError):  # ten pages are free, and reserved for the second's growth
        grant(account, PageNeed(4, 1), number=2)
    assert account.grow(second, 40)
    with pytest.raises(LedgerError, match="must grow within"):
        account.grow(second, 41)
    with pytest.raises(LedgerError, match="must grow within"):
        account.grow(first, 59)
    account.release(first)
    account.check_integrity()


def test_a_grant_needs_room_for_the_growth_of_its_own_lease(account: Account) -> None:
    grant(account, PageNeed(4, 20))
    with pytest.raises(LedgerError, match="to grow to"):
        grant(account, PageNeed(4, 40), number=1, max_sealed=81)
    assert grant(account, PageNeed(4, 40), number=1, max_sealed=80).to_grow == account.reserve == 40
    account.check_integrity()


def test_the_oldest_lease_can_always_grow_to_its_maximum(account: Account) -> None:
    old = grant(account, PageNeed(4, 30), max_sealed=50)
    young = grant(account, PageNeed(4, 40), number=1, max_sealed=60)
    # 30 pages are free; the young one may take 10 and leave 20 for the old one's growth
    assert not account.grow(young, 55)
    assert account.grow(young, 50)
    assert not account.grow(young, 51)
    assert account.grow(old, 50)
    assert account.free.sealed == 0
    assert not account.grow(young, 60)
    account.release(old)
    assert account.grow(young, 60)
    account.check_integrity()


def test_the_last_page_that_a_lease_may_grow_is_kept_for_it(account: Account) -> None:
    young = grant(account, PageNeed(4, 20), number=2, max_sealed=40)
    middle = grant(account, PageNeed(4, 20), number=1, max_sealed=21)
    oldest = grant(account, PageNeed(4, 20), max_sealed=40)
    assert account.grow(oldest, 40)
    assert not account.grow(young, 21)
    assert account.grow(middle, 21), "it is the oldest that grows now"
    account.release(young)
    account.release(middle)
    grant(account, PageNeed(4, 20), number=3, max_sealed=21)
    assert account.reserve == 1
    account.check_integrity()


def test_a_group_that_is_renamed_takes_its_leases_along(account: Account) -> None:
    lease = grant(account, PageNeed(4, 10))
    account.rename("g0 that leaves")
    assert account.group == lease.group == "g0 that leaves"


@pytest.mark.parametrize("damaged", ["free", "reserve", "sequences"])
def test_an_account_that_is_not_the_sum_of_its_leases_is_found(
    account: Account, damaged: str
) -> None:
    grant(account, PageNeed(4, 10), max_sealed=20)
    account.check_integrity()
    setattr(account, damaged, PageNeed(60, 91) if damaged == "free" else 3)
    with pytest.raises(LedgerError, match=r"use, reserve and sequences are .* the leases sum to"):
        account.check_integrity()


def test_equal_blocks_are_paid_for_once(account: Account) -> None:
    blocks = tuple(bytes([i]) for i in range(15))
    need = PageNeed(4, 79)  # 60 pages in blocks of 4, the first page of which is the sink
    first, second = (grant(account, need, number=n, blocks=blocks) for n in range(2))
    assert account.free.sealed == 100 - 158 + 59
    account.check_integrity()
    account.release(first)
    assert account.free.sealed == 21  # the shared ones are still in use
    account.release(second)
    assert account.free.sealed == 100
    assert account.blocks.shared_pages(blocks) == 0


def test_shared_pages_of_an_account_are_counted_by_its_groups_geometry() -> None:
    info = make_info()
    dealt = replace(info, geometry=replace(info.geometry, sink_pages=2, kvp=2))
    blocks = Account("g0", dealt, 4).blocks
    assert [blocks.sealed_pages(index) for index in range(2)] == [1, 2]


def test_terms_say_what_others_paid_for(account: Account) -> None:
    blocks = (b"a", b"b", b"c", b"d")
    first = grant(account, PageNeed(1, 30), blocks=blocks)
    second = grant(account, PageNeed(2, 20), number=1, blocks=blocks[:3], sequences=2)
    assert first.terms.shared_sealed_pages == 0
    # one page of the first block is the sink's
    assert second.terms == LeaseTerms("7-1", 7, 2, 20, 20, 11, 2, 1, "r", "default")
    account.check_integrity()


def test_what_the_engine_holds_is_adopted_even_beyond_the_capacity(account: Account) -> None:
    lease = account.adopt(foreign(9, 4, 120, sequences=2), 1.0)
    assert (account.free.sealed, account.sequences) == (-20, 2)
    assert (lease.max, lease.to_grow, lease.arrived) == (PageNeed(4, 120), 0, True)
    with pytest.raises(LedgerError, match="already"):
        account.adopt(foreign(9, 4, 120), 1.0)
    account.release(lease)
    assert account.free.sealed == 100
    account.check_integrity()


def test_leases_are_ordered_by_their_age_whichever_router_granted_them(account: Account) -> None:
    grant(account, PageNeed(1, 1), max_sealed=2)
    for number in (11, 9, 10):
        account.adopt(foreign(number, 1, 1, 5), 1.0)
    assert [x.lease_id for x in account.by_age()] == ["3-9", "3-10", "3-11", "7-0"]


def test_the_oldest_grows_where_adopted_leases_overstate_what_is_used(account: Account) -> None:
    """Their shared pages are charged to each: the account shows none free, the engine has some."""
    old, young = (account.adopt(foreign(n, 1, 60, 70, shared_sealed_pages=50), 1.0) for n in (0, 1))
    assert account.free.sealed == -20
    assert not account.grow(young, 61)
    assert account.grow(old, 70)
    assert not account.grow(young, 61)  # the old one has yet to end
    account.release(old)
    assert account.grow(young, 70)


def test_leases_that_never_arrived_are_found_once() -> None:
    router = router_with(groups={"g0": make_info()})
    late, used, gone, young = (place(router, f"r{n}", 10, 10, float(n)) for n in range(4))
    arrive(router, used, 3.0)
    router.release(gone.lease.lease_id, 3.0)
    leases = router.leases
    assert leases.never_arrived(-1.0) == []
    assert [x.lease_id for x in leases.never_arrived(2.5)] == [late.lease.lease_id]
    assert leases.never_arrived(2.5) == []
    assert [x.lease_id for x in leases.never_arrived(3.0)] == [young.lease.lease_id]


def loads(*leases: LeaseTerms, hot: int = 0, sealed: int = 0) -> EngineLoads:
    pool = PoolLoads(ArenaLoads(total=64, used=hot), ArenaLoads(total=100, used=sealed))
    return EngineLoads(pool=pool, leases=leases)


def test_an_audit_finds_what_engine_and_ledger_disagree_about(account: Account) -> None:
    lease = grant(account, PageNeed(4, 10), max_sealed=20)
    assert audit(account, loads()) == ()  # it has not arrived
    lease.arrived = True
    before = lease.terms
    assert audit(account, loads(before, hot=4, sealed=10)) == ()
    assert account.grow(lease, 15)
    assert audit(account, loads(before)) == ()  # the extension is on its way
    for wrong, words in (
        (loads(), "g0 does not have it"),
        (loads(replace(before, sealed_pages=16)), "sealed_pages=16"),
        (loads(replace(before, max_sealed_pages=21)), "max_sealed_pages=21"),
        (loads(replace(before, sequences=2)), "sequences=2"),
        (loads(before, hot=5, sealed=10), "hold 5 hot and 10 sealed pages"),
        (loads(before, hot=4, sealed=11), "hold 4 hot and 11 sealed pages"),
    ):
        (fault,) = audit(account, wrong)
        assert words in fault
        assert all(part in fault for part in ("lease 7-0 of request r", "g0", "4", "1"))
    second = grant(account, PageNeed(2, 30), number=1)
    assert audit(account, loads(second.terms, before, hot=6, sealed=40)) == ()
    (fault,) = audit(account, loads(before, foreign(1, 1, 2)))
    assert fault == (
        "g0 has lease 3-1 of request f1 1 hot and 2 sealed pages, and it is not in the ledger"
    )


@pytest.mark.parametrize("kvp", [1, 2, 3, 8])
@pytest.mark.parametrize("sink", [0, 1, 8, 11])
def test_shared_pages_are_those_that_every_rank_has(kvp: int, sink: int) -> None:
    """Counted for whole prefixes and block by block alike, never more than a rank has of them."""
    block_pages, names = 8, [bytes([number]) for number in range(6)]
    blocks = SharedBlocks(block_pages, sink, kvp)
    assert blocks.hold(names[:4]) == 0
    shared = blocks.shared_pages(names)
    assert shared == blocks.hold(names[:4]) == blocks.hold(names[:4])
    assert [blocks.drop(names[:4]) for _ in range(3)] == [shared, shared, 0]
    for offset in range(kvp):
        sealed = Counter((page + offset) % kvp for page in range(sink, 4 * block_pages))
        assert shared <= min(sealed[rank] for rank in range(kvp))
    assert shared >= (4 * block_pages - sink) // kvp - 4
