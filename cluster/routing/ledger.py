"""The ledger, a page for each group: what is free, who holds it, and who shares what."""

from __future__ import annotations

from collections.abc import Iterable

from sortedcontainers import SortedDict

from kvmesh.cluster.routing.errors import LedgerError
from kvmesh.cluster.routing.live import Age, Lease
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.cluster.routing.shared_blocks import SharedBlocks
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.sizes import PageNeed


class Account:
    """The leases of a group that is up, and what they leave free, in pages of one rank.

    group: its name
    block_pages: of a run of a prompt's pages that leases may share
    blocks: those runs, each charged once
    free: pages that no lease covers; negative after adoptions beyond the capacity,
        and nothing is granted then
    sequences: of all leases
    reserve: sealed pages that stay free, so that any one lease can grow to its maximum
    """

    def __init__(self, group: str, info: EngineInfo, block_pages: int) -> None:
        self.blocks = SharedBlocks(block_pages, info.geometry.sink_pages, info.geometry.kvp)
        self.free = info.capacity
        self.sequences = 0
        self.reserve = 0
        self.group = group
        self._info = info
        self._leases: SortedDict[tuple[Age, str], Lease] = SortedDict()  # oldest first
        self._growing: SortedDict[tuple[int, str], None] = SortedDict()  # by pages to grow

    @property
    def used(self) -> PageNeed:
        capacity = self._info.capacity
        return PageNeed(capacity.hot - self.free.hot, capacity.sealed - self.free.sealed)

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    def rename(self, group: str) -> None:
        """The group has another name from now on, and its leases with it."""
        self.group = group
        for lease in self._leases.values():
            lease.group = group

    def by_age(self) -> Iterable[Lease]:
        """All leases, oldest first."""
        return self._leases.values()

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
        shared = self.blocks.shared_pages(blocks)
        if not self.holds(need, max_need.sealed - need.sealed, shared):
            raise LedgerError(
                f"{need}, to grow to {max_need}, does not fit {self.group!r}: "
                f"{self.free} are free and {self.reserve} sealed ones are reserved"
            )
        lease = Lease(
            lease_id=f"{age[0]:x}-{age[1]}",
            request_id=request.request_id,
            tenant=request.tenant,
            group=self.group,
            age=age,
            need=need,
            max=max_need,
            sequences=request.sequences,
            granted_at=now,
            incarnation=request.incarnation,
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
            request_id=terms.request_id,
            tenant=terms.tenant,
            group=self.group,
            age=(terms.epoch, terms.number),
            need=need,
            max=PageNeed(need.hot, max(need.sealed, terms.max_sealed_pages)),
            sequences=terms.sequences,
            granted_at=now,
            incarnation=terms.incarnation,
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
        those are, so pages may be free that the account does not show. The oldest of all
        leases therefore grows regardless: the router that granted it kept its pages free.
        The next one does so only once that one has ended. Without adopted leases it never
        has to: then the pages are free.
        """
        if not lease.need.sealed <= sealed_pages <= lease.max.sealed:
            raise LedgerError(
                f"lease {lease.lease_id!r} must grow within {lease.need} and {lease.max}, "
                f"got {sealed_pages} sealed pages"
            )
        more = sealed_pages - lease.need.sealed
        if more:
            oldest_growing = next(x for x in self._leases.values() if x.to_grow > 0)
            left = self.free.sealed - more - (0 if oldest_growing is lease else self.reserve)
            if left < 0 and self._leases.peekitem(0)[1] is not lease:
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
        shared = self.blocks.drop(lease.blocks)
        self._charge(-lease.need.hot, shared - lease.need.sealed)
        self.sequences -= lease.sequences
        self._set_growing(lease, False)

    def check_integrity(self) -> None:
        """Raise LedgerError unless the account is the sum of its leases."""
        leases = list(self._leases.values())
        twice, seen = 0, set[bytes]()
        for lease in leases:
            for index, block in enumerate(lease.blocks):
                twice += self.blocks.sealed_pages(index) if block in seen else 0
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
        shared = self.blocks.hold(lease.blocks)
        self._charge(lease.need.hot, lease.need.sealed - shared)
        self.sequences += lease.sequences
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
