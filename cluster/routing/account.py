"""One group's page of the ledger: what is free, and who shares what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sortedcontainers import SortedDict

from kvmesh.cluster.routing.errors import LedgerError
from kvmesh.cluster.routing.live import Age, Lease
from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.sizes import PageNeed


class Account:
    """The leases of a group, and what they leave free.

    block_pages: shared blocks are runs of this many pages
    free: pages that no lease covers; negative after adoptions beyond the capacity,
        and nothing is granted then
    sequences: of all leases
    reserve: sealed pages that stay free, so that any one lease can grow to its maximum
    """

    def __init__(self, info: EngineInfo, block_pages: int) -> None:
        self.info = info
        self.free = info.capacity
        self.sequences = 0
        self.reserve = 0
        self._block_pages = block_pages
        self._leases: SortedDict[tuple[Age, str], Lease] = SortedDict()  # oldest first
        self._adopted = 0
        self._holders: dict[bytes, int] = {}  # leases that hold a block; it is charged once
        self._growing: SortedDict[tuple[int, str], None] = SortedDict()  # by pages to grow

    @property
    def used(self) -> PageNeed:
        capacity = self.info.capacity
        return PageNeed(capacity.hot - self.free.hot, capacity.sealed - self.free.sealed)

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
        return max(0, low * self._block_pages - self.info.geometry.sink_pages)

    def holds(self, need: PageNeed, to_grow: int, shared: int = 0) -> bool:
        """Whether a new lease fits and leaves the reserve whole."""
        left = self.free.sealed - need.sealed + shared
        return need.hot <= self.free.hot and left >= max(self.reserve, to_grow)

    def may_grow(self, lease: Lease, need: PageNeed) -> bool:
        """Whether a lease may be extended to `need` now.

        The oldest growing lease takes any free page. Another may grow if what remains
        free lets every single one still grow to its maximum. So the oldest ends, gives
        back more than it took, and the next is the oldest: the banker's rule, without
        a search.

        Adopted leases are charged for pages that they share, as nothing tells which
        those are, so pages may be free that the account does not show. While there are
        adopted ones, the oldest therefore grows regardless: its engine has its own rule
        by which the oldest comes to its end.
        """
        if need == lease.need:
            return True
        hot = self.free.hot - (need.hot - lease.need.hot)
        sealed = self.free.sealed - (need.sealed - lease.need.sealed)
        if lease is self._oldest_growing():
            return hot >= 0 and (sealed >= 0 or self._adopted > 0)
        return hot >= 0 and sealed >= self.reserve

    def check_integrity(self) -> None:
        """Raise LedgerError unless the account is the sum of its leases."""
        leases = list(self._leases.values())
        used = sum((lease.need for lease in leases), PageNeed(0, -self._counted_twice(leases)))
        to_grow = max((lease.to_grow for lease in leases), default=0)
        if (used, to_grow) != (self.used, self.reserve):
            raise LedgerError(
                f"the account has {self.used} in use and {self.reserve} reserved, "
                f"its leases sum to {used} and {to_grow}"
            )
        if sum(lease.sequences for lease in leases) != self.sequences:
            raise LedgerError(f"the account has {self.sequences} sequences, not its leases' sum")

    # Changes, which the ledger makes

    def enter(self, lease: Lease) -> None:
        self._leases[(lease.age, lease.lease_id)] = lease
        shared = 0
        for index, block in enumerate(lease.blocks):
            holders = self._holders.get(block, 0)
            if holders:
                shared += self._sealed_pages_of(index)
            self._holders[block] = holders + 1
        self._take(PageNeed(lease.need.hot, lease.need.sealed - shared))
        self.sequences += lease.sequences
        self._adopted += lease.adopted
        self._note_growing(lease)

    def leave(self, lease: Lease) -> None:
        del self._leases[(lease.age, lease.lease_id)]
        shared = 0
        for index, block in enumerate(lease.blocks):
            holders = self._holders.pop(block)
            if holders > 1:
                shared += self._sealed_pages_of(index)
                self._holders[block] = holders - 1
        self._take(PageNeed(-lease.need.hot, shared - lease.need.sealed))
        self.sequences -= lease.sequences
        self._adopted -= lease.adopted
        self._forget_growing(lease)

    def resize(self, lease: Lease, need: PageNeed) -> None:
        self._take(PageNeed(need.hot - lease.need.hot, need.sealed - lease.need.sealed))
        self._forget_growing(lease)
        lease.need = need
        self._note_growing(lease)

    def _take(self, pages: PageNeed) -> None:
        self.free = PageNeed(self.free.hot - pages.hot, self.free.sealed - pages.sealed)

    def _note_growing(self, lease: Lease) -> None:
        if lease.to_grow > 0:
            self._growing[(lease.to_grow, lease.lease_id)] = None
            self.reserve = self._growing.peekitem(-1)[0][0]

    def _forget_growing(self, lease: Lease) -> None:
        if lease.to_grow > 0:
            del self._growing[(lease.to_grow, lease.lease_id)]
            self.reserve = self._growing.peekitem(-1)[0][0] if self._growing else 0

    def _oldest_growing(self) -> Lease | None:
        return next((lease for lease in self._leases.values() if lease.to_grow > 0), None)

    def _sealed_pages_of(self, block: int) -> int:
        """Sealed pages of a prompt's block: pages of the sink have no sealed form."""
        end = (block + 1) * self._block_pages
        return min(self._block_pages, max(0, end - self.info.geometry.sink_pages))

    def _counted_twice(self, leases: Iterable[Lease]) -> int:
        """Sealed pages of blocks that an earlier lease of these holds as well."""
        seen: set[bytes] = set()
        pages = 0
        for lease in leases:
            for index, block in enumerate(lease.blocks):
                pages += self._sealed_pages_of(index) if block in seen else 0
                seen.add(block)
        return pages
