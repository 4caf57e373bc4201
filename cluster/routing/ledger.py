"""The ledger, a page for each group: what is free, who holds it, and who shares what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sortedcontainers import SortedDict

from kvmesh.cluster.routing.errors import LedgerError
from kvmesh.cluster.routing.live import Age, Lease
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.loads import EngineInfo, EngineLoads
from kvmesh.workers.sizes import PageNeed


class Account:
    """The leases of a group that is up, and what they leave free, in pages of one rank.

    block_pages: shared blocks are runs of this many pages
    free: pages that no lease covers; negative after adoptions beyond the capacity,
        and nothing is granted then
    sequences: of all leases
    reserve: sealed pages that stay free, so that any one lease can grow to its maximum
    """

    def __init__(self, group: str, info: EngineInfo, block_pages: int) -> None:
        self.free = info.capacity
        self.sequences = 0
        self.reserve = 0
        self._group = group
        self._info = info
        self._block_pages = block_pages
        self._leases: SortedDict[tuple[Age, str], Lease] = SortedDict()  # oldest first
        self._adopted = 0
        self._holders: dict[bytes, int] = {}  # leases that hold a block; it is charged once
        self._growing: SortedDict[tuple[int, str], None] = SortedDict()  # by pages to grow

    @property
    def used(self) -> PageNeed:
        capacity = self._info.capacity
        return PageNeed(capacity.hot - self.free.hot, capacity.sealed - self.free.sealed)

    def rename(self, group: str) -> None:
        """The group has another name from now on, and its leases with it."""
        self._group = group
        for lease in self._leases.values():
            lease.group = group

    def by_age(self) -> Iterable[Lease]:
        """All leases, oldest first."""
        return self._leases.values()

    def shared_pages(self, blocks: Sequence[bytes]) -> int:
        """How many of the blocks' sealed pages other leases pay for already.

        Block hashes are chained: a lease that holds a block holds those before it, so
        the shared ones are at the front.
        """
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            if blocks[middle] in self._holders:
                low = middle + 1
            else:
                high = middle
        return max(0, low * self._block_pages - self._info.geometry.sink_pages)

    def holds(self, need: PageNeed, to_grow: int, shared: int = 0) -> bool:
        """Whether a new lease fits and leaves the reserve whole."""
        left = self.free.sealed - need.sealed + shared
        return need.hot <= self.free.hot and left >= self.reserve and left >= to_grow

    def grant(
        self,
        age: Age,
        need: PageNeed,
        max_need: PageNeed,
        request: PlaceRequest,
        now: float,
        blocks: tuple[bytes, ...] = (),
    ) -> Lease:
        """Reserve pages. Raises LedgerError if they are not free.

        max_need: what the lease may grow to
        blocks: hashes of the prompt's runs of pages, all within what is sealed (or the
            sink), paid for once by all leases that hold them
        """
        shared = self.shared_pages(blocks)
        if not self.holds(need, max_need.sealed - need.sealed, shared):
            raise LedgerError(
                f"{need}, to grow to {max_need}, does not fit {self._group!r}: "
                f"{self.free} are free and {self.reserve} sealed ones are reserved"
            )
        lease = Lease(
            lease_id=f"{age[0]:x}-{age[1]}",
            group=self._group,
            age=age,
            need=need,
            max=max_need,
            sequences=request.sequences,
            granted_at=now,
            request=request,
            blocks=blocks,
            shared=shared,
        )
        self._enter(lease)
        return lease

    def adopt(self, terms: LeaseTerms, now: float) -> Lease:
        """Enter a lease that the engine runs under and the ledger does not know.

        Its pages are in use, so they count, even beyond the capacity.
        """
        need = PageNeed(terms.hot_pages, terms.sealed_pages)
        lease = Lease(
            lease_id=terms.lease_id,
            group=self._group,
            age=(terms.epoch, terms.number),
            need=need,
            max=PageNeed(need.hot, max(need.sealed, terms.max_sealed_pages)),
            sequences=terms.sequences,
            granted_at=now,
            arrived=True,
        )
        self._enter(lease)
        return lease

    def grow(self, lease: Lease, sealed_pages: int) -> bool:
        """Extend a lease to that. Returns False, and changes nothing, if it must wait.

        The oldest growing lease takes any free page. Another may grow if what remains
        free lets every single one still grow to its maximum. So the oldest ends, gives
        back more than it took, and the next is the oldest: the banker's rule, without
        a search.

        Adopted leases are charged for pages that they share, as nothing tells which
        those are, so pages may be free that the account does not show. While there are
        adopted ones, the oldest of all therefore grows regardless: the router that granted
        it kept its pages free. The next one does so only once that one has ended.
        """
        if not lease.need.sealed <= sealed_pages <= lease.max.sealed:
            raise LedgerError(
                f"lease {lease.lease_id!r} must grow within {lease.need} and {lease.max}, "
                f"got {sealed_pages} sealed pages"
            )
        more = sealed_pages - lease.need.sealed
        if more:
            oldest_growing = next((x for x in self._leases.values() if x.to_grow > 0), None)
            left = self.free.sealed - more - (0 if oldest_growing is lease else self.reserve)
            overstated = self._adopted > 0 and self._leases.peekitem(0)[1] is lease
            if left < 0 and not overstated:
                return False
            self._charge(0, more)
            self._set_growing(lease, False)
            lease.need = PageNeed(lease.need.hot, sealed_pages)
            self._set_growing(lease, True)
        return True

    def release(self, lease: Lease) -> None:
        """End a lease. Raises LedgerError if it is not here, because it has ended before."""
        if self._leases.pop((lease.age, lease.lease_id), None) is not lease:
            raise LedgerError(f"lease {lease.lease_id!r} is not in the ledger")
        shared = 0
        for index, block in enumerate(lease.blocks):
            holders = self._holders.pop(block)
            if holders > 1:
                shared += self._sealed_pages_of(index)
                self._holders[block] = holders - 1
        self._charge(-lease.need.hot, shared - lease.need.sealed)
        self.sequences -= lease.sequences
        self._adopted -= lease.adopted
        self._set_growing(lease, False)

    def audit(self, loads: EngineLoads) -> tuple[str, ...]:
        """Where the engine's own account disagrees, in words; nothing if they agree.

        The words name the group, leases, their requests, and pages here and there.

        loads: one moment of the engine's, sent after all updates of its account before it.
            An extension may be on its way there: terms are never larger there than here.
        """
        faults: list[str] = []
        group, covered, leases = self._group, PageNeed(0, 0), dict[str, str]()
        for terms in loads.leases:
            there = PageNeed(terms.hot_pages, terms.sealed_pages)
            covered += there
            lease = self._leases.get(((terms.epoch, terms.number), terms.lease_id))
            leases[terms.lease_id] = f"{_named(terms.lease_id, lease)} {there}"
            if lease is None:
                faults.append(f"{group} has {leases[terms.lease_id]}, and it is not in the ledger")
            elif not _within(terms, lease):
                faults.append(
                    f"{_named(lease.lease_id, lease)} is {lease.terms} in the ledger and {terms} "
                    f"in {group}"
                )
        for lease in self._leases.values():
            if lease.arrived and lease.lease_id not in leases:
                faults.append(
                    f"{_named(lease.lease_id, lease)} has arrived with {lease.need}, and {group} "
                    "does not have it"
                )
        if not loads.pool.used.fits(covered):
            faults.append(
                f"sequences in {group} hold {loads.pool.used}, their leases cover {covered}: "
                + ", ".join(leases.values())
            )
        return tuple(faults)

    def check_integrity(self) -> None:
        """Raise LedgerError unless the account is the sum of its leases."""
        leases = list(self._leases.values())
        twice, seen = 0, set[bytes]()
        for lease in leases:
            for index, block in enumerate(lease.blocks):
                twice += self._sealed_pages_of(index) if block in seen else 0
                seen.add(block)
        kept = (self.used, self.reserve, self.sequences)
        summed = (
            sum((lease.need for lease in leases), PageNeed(0, -twice)),
            max((lease.to_grow for lease in leases), default=0),
            sum(lease.sequences for lease in leases),
        )
        if kept != summed:
            raise LedgerError(f"use, reserve and sequences are {kept}, the leases sum to {summed}")

    def _enter(self, lease: Lease) -> None:
        if self._leases.setdefault((lease.age, lease.lease_id), lease) is not lease:
            raise LedgerError(f"lease {lease.lease_id!r} is in the ledger already")
        shared = 0
        for index, block in enumerate(lease.blocks):
            holders = self._holders.get(block, 0)
            if holders:
                shared += self._sealed_pages_of(index)
            self._holders[block] = holders + 1
        self._charge(lease.need.hot, lease.need.sealed - shared)
        self.sequences += lease.sequences
        self._adopted += lease.adopted
        self._set_growing(lease, True)

    def _charge(self, hot: int, sealed: int) -> None:
        self.free = PageNeed(self.free.hot - hot, self.free.sealed - sealed)

    def _set_growing(self, lease: Lease, growing: bool) -> None:
        """Reserve what the lease has yet to grow, or no longer."""
        if lease.to_grow > 0:
            if growing:
                self._growing[(lease.to_grow, lease.lease_id)] = None
            else:
                del self._growing[(lease.to_grow, lease.lease_id)]
            self.reserve = self._growing.peekitem(-1)[0][0] if self._growing else 0

    def _sealed_pages_of(self, block: int) -> int:
        """Sealed pages of a prompt's block: pages of the sink have no sealed form."""
        end = (block + 1) * self._block_pages
        return min(self._block_pages, max(0, end - self._info.geometry.sink_pages))


def _named(lease_id: str, lease: Lease | None) -> str:
    """lease: None if the ledger does not have it"""
    request = "unknown" if lease is None or lease.request is None else lease.request.request_id
    return f"lease {lease_id} of request {request}"


def _within(terms: LeaseTerms, lease: Lease) -> bool:
    return (
        PageNeed(terms.hot_pages, terms.sealed_pages).fits(lease.need)
        and terms.max_sealed_pages <= lease.max.sealed
        and terms.sequences <= lease.sequences
    )
