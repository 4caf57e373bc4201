"""The ledger: what every group can hold, and who holds what of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from kvmesh.cluster.routing.account import Account
from kvmesh.cluster.routing.errors import LedgerError
from kvmesh.cluster.routing.live import Lease
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.loads import EngineInfo, EngineLoads
from kvmesh.workers.sizes import PageNeed


class Ledger:
    """Accounts of the groups that are up, and all their leases. Every lease is released once.

    epoch: of this router; stands in the leases it grants
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self._accounts: dict[str, Account] = {}
        self._leases: dict[str, Lease] = {}
        self._not_arrived: deque[Lease] = deque()  # earliest grant first; settled ones too
        self._grants = 0

    @property
    def leases(self) -> Mapping[str, Lease]:
        """By id."""
        return self._leases

    @property
    def grants(self) -> int:
        """How many leases were granted so far."""
        return self._grants

    def account(self, group: str) -> Account:
        """Raises LedgerError if the group is not up."""
        account = self._accounts.get(group)
        if account is None:
            raise LedgerError(f"group {group!r} is not up")
        return account

    def open(self, group: str, info: EngineInfo, block_pages: int) -> Account:
        """Begin the account of a group that was not up."""
        if group in self._accounts:
            raise LedgerError(f"group {group!r} is up already")
        account = self._accounts[group] = Account(info, block_pages)
        return account

    def close(self, group: str) -> list[Lease]:
        """End a group's account, if it is up. Its leases are void, and returned."""
        account = self._accounts.pop(group, None)
        if account is None:
            return []
        return [self._leases.pop(lease.lease_id) for lease in account.by_age()]

    def grant(
        self,
        group: str,
        need: PageNeed,
        now: float,
        *,
        max_need: PageNeed,
        request: PlaceRequest,
        blocks: tuple[bytes, ...] = (),
    ) -> Lease:
        """Reserve pages. Raises LedgerError if they are not free.

        max_need: what the lease may grow to
        blocks: hashes of the prompt's runs of pages, all within what is sealed (or the
            sink), paid for once by all leases of the group that hold them
        """
        account = self.account(group)
        shared = account.shared_pages(blocks)
        if not account.holds(need, max_need.sealed - need.sealed, shared):
            raise LedgerError(
                f"{need}, to grow to {max_need}, does not fit {group!r}: "
                f"{account.free} are free and {account.reserve} sealed ones are reserved"
            )
        lease = Lease(
            lease_id=f"{self.epoch:x}-{self._grants}",
            group=group,
            age=(self.epoch, self._grants),
            need=need,
            max=max_need,
            sequences=request.sequences,
            granted_at=now,
            request=request,
            blocks=blocks,
            shared=shared,
        )
        self._grants += 1
        self._not_arrived.append(lease)
        self._enter(lease)
        return lease

    def adopt(self, group: str, terms: LeaseTerms, now: float) -> Lease:
        """Enter a lease that the engine runs under and the ledger does not know.

        Its pages are in use, so they count, even beyond the group's capacity.
        """
        if terms.lease_id in self._leases:
            raise LedgerError(f"lease {terms.lease_id!r} is in the ledger already")
        need = PageNeed(terms.hot_pages, terms.sealed_pages)
        lease = Lease(
            lease_id=terms.lease_id,
            group=group,
            age=(terms.epoch, terms.number),
            need=need,
            max=PageNeed(need.hot, max(need.sealed, terms.max_sealed_pages)),
            sequences=terms.sequences,
            granted_at=now,
            arrived=True,
        )
        self._enter(lease)
        return lease

    def grow(self, lease: Lease, need: PageNeed) -> bool:
        """Extend a lease to `need`. Returns False, and changes nothing, if it must wait."""
        if not (lease.need.fits(need) and need.fits(lease.max)):
            raise LedgerError(
                f"lease {lease.lease_id!r} must grow within {lease.need} and {lease.max}, "
                f"got {need}"
            )
        account = self.account(lease.group)
        if not account.may_grow(lease, need):
            return False
        account.resize(lease, need)
        return True

    def release(self, lease: Lease) -> None:
        """End a lease. Raises LedgerError if it has ended before."""
        if self._leases.get(lease.lease_id) is not lease:
            raise LedgerError(f"lease {lease.lease_id!r} is not in the ledger")
        del self._leases[lease.lease_id]
        self._accounts[lease.group].leave(lease)

    def never_arrived(self, granted_by: float) -> list[Lease]:
        """Leases granted until then whose sequences have not arrived; each is returned once."""
        late: list[Lease] = []
        queue = self._not_arrived
        while queue:
            lease = queue[0]
            settled = lease.arrived or self._leases.get(lease.lease_id) is not lease
            if not settled and lease.granted_at > granted_by:
                break
            queue.popleft()
            if not settled:
                late.append(lease)
        return late

    def audit(self, group: str, loads: EngineLoads) -> tuple[str, ...]:
        """Where the engine's own account and the ledger disagree; nothing if they agree.

        loads: one moment of the engine's, sent after all updates of its account before it.
            An extension may be on its way there: terms are never larger there than here.
        """
        account = self._accounts.get(group)
        if account is None:
            return ()
        faults: list[str] = []
        covered = PageNeed(0, 0)
        listed = {terms.lease_id for terms in loads.leases}
        for terms in loads.leases:
            covered += PageNeed(terms.hot_pages, terms.sealed_pages)
            lease = self._leases.get(terms.lease_id)
            if lease is None or lease.group != group:
                faults.append(f"lease {terms.lease_id} is not in the ledger, the engine has it")
            elif not _within(terms, lease):
                faults.append(f"lease {terms.lease_id} is {lease.terms} here and {terms} there")
        for lease in account.by_age():
            if lease.arrived and lease.lease_id not in listed:
                faults.append(f"lease {lease.lease_id} has arrived, the engine does not have it")
        if not loads.pool.used.fits(covered):
            faults.append(f"sequences hold {loads.pool.used}, their leases cover {covered}")
        return tuple(faults)

    def check_integrity(self) -> None:
        """Raise LedgerError unless every account is the sum of its leases."""
        for account in self._accounts.values():
            account.check_integrity()
        entered = {x.lease_id for account in self._accounts.values() for x in account.by_age()}
        if entered != self._leases.keys():
            raise LedgerError(f"leases {entered ^ self._leases.keys()} are not in both places")

    def _enter(self, lease: Lease) -> None:
        self.account(lease.group).enter(lease)
        self._leases[lease.lease_id] = lease


def _within(terms: LeaseTerms, lease: Lease) -> bool:
    return (
        PageNeed(terms.hot_pages, terms.sealed_pages).fits(lease.need)
        and terms.max_sealed_pages <= lease.max.sealed
        and terms.sequences <= lease.sequences
    )
