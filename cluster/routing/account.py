"""One group's page of the ledger: what is free, and who shares what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sortedcontainers import SortedDict

from kvmesh.cluster.routing.events import Lease
from kvmesh.cluster.routing.group import GroupSpec
from kvmesh.workers.sizes import PageNeed


@dataclass(slots=True)
class Account:
    """One group's page of the ledger.

    epoch: of the router that keeps it
    free_hot, free_sealed: pages no lease covers; negative after adoptions beyond
        the capacity, and nothing is granted then
    sequences: of all leases
    adopted: leases that a former router granted
    reported_at: when its engine last reported to this ledger, or None
    shared: block hash -> leases that hold the block; it is charged once
    growing: sealed pages still to grow, of leases below their most
    reserve: sealed pages that stay free, so that any one lease can grow to its most
    """

    spec: GroupSpec
    epoch: int
    free_hot: int
    free_sealed: int
    sequences: int = 0
    adopted: int = 0
    lease_ids: dict[str, None] = field(default_factory=dict)  # oldest first
    reported_at: float | None = None
    shared: dict[bytes, int] = field(default_factory=dict)
    growing: SortedDict[tuple[int, str], None] = field(default_factory=SortedDict)
    reserve: int = 0

    @classmethod
    def opened(cls, spec: GroupSpec, epoch: int) -> Account:
        return cls(spec, epoch, spec.capacity.hot, spec.capacity.sealed)

    @property
    def used(self) -> PageNeed:
        capacity = self.spec.capacity
        return PageNeed(capacity.hot - self.free_hot, capacity.sealed - self.free_sealed)

    def free_pages(self) -> PageNeed:
        return PageNeed(self.free_hot, self.free_sealed)

    def used_bytes(self) -> int:
        return self.spec.geometry.bytes_of(self.used)

    def block_weight(self, index: int, block_pages: int) -> int:
        """Sealed pages of a prompt's block: pages of the sink have no sealed form."""
        return min(block_pages, max(0, (index + 1) * block_pages - self.spec.geometry.sink_pages))

    def shared_pages(self, blocks: Sequence[bytes], block_pages: int) -> int:
        """How many of the blocks' pages other leases pay for already.

        Block hashes are chained: who holds a block holds those before it, so the
        shared ones are the first so many.
        """
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            if blocks[middle] in self.shared:
                low = middle + 1
            else:
                high = middle
        return max(0, low * block_pages - self.spec.geometry.sink_pages)

    def holds(self, need: PageNeed, to_grow: int, shared: int = 0) -> bool:
        """Whether a new lease fits and leaves the reserve whole."""
        left = self.free_sealed - need.sealed + shared
        return need.hot <= self.free_hot and left >= max(self.reserve, to_grow)

    def owed(self, leases: Iterable[Lease]) -> PageNeed:
        """What the account must have in use if these are its leases: shared blocks count once."""
        held = list(leases)
        return sum((lease.need for lease in held), PageNeed(0, -self._doubled(held)))

    # Changes; the ledger's `_apply` alone makes them

    def enter(self, lease: Lease) -> None:
        self.lease_ids[lease.lease_id] = None
        charged = lease.need.sealed
        for index, block in enumerate(lease.blocks):
            holders = self.shared.get(block, 0)
            if holders:
                charged -= self.block_weight(index, lease.block_pages)
            self.shared[block] = holders + 1
        self.free_sealed -= charged
        self.free_hot -= lease.need.hot
        self.sequences += lease.sequences
        self.adopted += lease.epoch != self.epoch
        self._grows(lease)

    def leave(self, lease: Lease) -> None:
        del self.lease_ids[lease.lease_id]
        freed = lease.need.sealed
        for index, block in enumerate(lease.blocks):
            holders = self.shared.pop(block)
            if holders > 1:
                freed -= self.block_weight(index, lease.block_pages)
                self.shared[block] = holders - 1
        self.free_sealed += freed
        self.free_hot += lease.need.hot
        self.sequences -= lease.sequences
        self.adopted -= lease.epoch != self.epoch
        self._grows_no_more(lease)

    def restate(self, old: Lease, new: Lease) -> None:
        """A lease is of another size; it keeps its age."""
        self.free_sealed -= new.need.sealed - old.need.sealed
        self.free_hot -= new.need.hot - old.need.hot
        self.sequences += new.sequences - old.sequences
        self._grows_no_more(old)
        self._grows(new)

    def _grows(self, lease: Lease) -> None:
        """The lease has yet to grow; keep so much free."""
        if lease.to_grow > 0:
            self.growing[(lease.to_grow, lease.lease_id)] = None
            self._set_reserve()

    def _grows_no_more(self, lease: Lease) -> None:
        if lease.to_grow > 0:
            del self.growing[(lease.to_grow, lease.lease_id)]
            self._set_reserve()

    def _set_reserve(self) -> None:
        self.reserve = self.growing.peekitem(-1)[0][0] if self.growing else 0

    def _doubled(self, held: Iterable[Lease]) -> int:
        """Sealed pages that leases hold together, counted once less than they are held."""
        seen: set[bytes] = set()
        doubled = 0
        for lease in held:
            for index, block in enumerate(lease.blocks):
                if block in seen:
                    doubled += self.block_weight(index, lease.block_pages)
                seen.add(block)
        return doubled
