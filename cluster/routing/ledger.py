"""The ledger: what every group can hold, and who holds what of it.

Every public method decides, and says what it decided as events; `_apply` alone
changes the state. So a log of events replays to the same ledger.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from kvmesh.cluster.routing import events as ev
from kvmesh.cluster.routing.account import Account
from kvmesh.cluster.routing.errors import LedgerError
from kvmesh.cluster.routing.events import Event, Lease, ReleaseReason
from kvmesh.cluster.routing.group import GroupSpec
from kvmesh.workers.request import LeaseTerms
from kvmesh.workers.sizes import PageNeed


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """What a report changed.

    stale: it came from another incarnation and was ignored
    faults: where the engine's account and the ledger disagree all the same; see audit.py
    """

    released: tuple[Lease, ...] = ()
    adopted: tuple[Lease, ...] = ()
    stale: bool = False
    faults: tuple[str, ...] = ()


class Ledger:
    """Capacity and leases of all groups, in pages of one rank.

    epoch: of this router; stands in the leases it grants
    ttl_s: a lease is to be handed to its engine within this time
    grace_s: how old a report may be when it is reconciled
    on_event: called with every transition after it was applied
    """

    def __init__(
        self,
        epoch: int,
        *,
        ttl_s: float = 30.0,
        grace_s: float = 5.0,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        for name, value in (("ttl_s", ttl_s), ("grace_s", grace_s)):
            if not value > 0:
                raise ValueError(f"{name} must be greater than 0, got {value}")
        self.epoch = epoch
        self.ttl_s = ttl_s
        self.grace_s = grace_s
        self._on_event = on_event
        self._accounts: dict[str, Account] = {}
        self._leases: dict[str, Lease] = {}
        self._released_at: OrderedDict[str, float] = OrderedDict()  # earliest first
        self._granted = 0

    # Reading

    @property
    def accounts(self) -> Mapping[str, Account]:
        return self._accounts

    @property
    def leases(self) -> Mapping[str, Lease]:
        return self._leases

    def state(self) -> tuple[dict[str, Account], dict[str, Lease]]:
        """Everything that events determine, for comparison."""
        return dict(self._accounts), dict(self._leases)

    def check_integrity(self) -> None:
        """Raise LedgerError unless every account is the sum of its leases."""
        for group, account in self._accounts.items():
            held = [lease for lease in self._leases.values() if lease.group == group]
            used = account.owed(held)
            if (
                used != account.used
                or {lease.lease_id for lease in held} != account.lease_ids.keys()
                or sum(lease.sequences for lease in held) != account.sequences
            ):
                raise LedgerError(f"account of {group!r} says {account.used}, leases sum to {used}")
        strays = [x for x in self._leases.values() if x.group not in self._accounts]
        if strays:
            raise LedgerError(f"lease {strays[0].lease_id!r} is on a group that is not up")

    # Groups

    def group_up(self, spec: GroupSpec, now: float) -> tuple[Lease, ...]:
        """Open an account. A former incarnation's leases are void, and returned."""
        account = self._accounts.get(spec.group)
        if account is not None and account.spec == spec:
            return ()
        voided = self.group_down(spec.group, now)
        self._do(ev.GroupUp(spec, now))
        return voided

    def group_down(self, group: str, now: float) -> tuple[Lease, ...]:
        """Close an account; its leases are void, and returned."""
        account = self._accounts.get(group)
        if account is None:
            return ()
        voided = tuple(self._leases[lease_id] for lease_id in account.lease_ids)
        for lease in voided:
            self._do(ev.LeaseReleased(lease.lease_id, ReleaseReason.VOIDED, now))
        self._do(ev.GroupDown(group, now))
        return voided

    # Leases

    def grant(
        self,
        group: str,
        need: PageNeed,
        now: float,
        *,
        request_id: str,
        tenant: str = "default",
        sequences: int = 1,
        most: PageNeed | None = None,
        blocks: tuple[bytes, ...] = (),
        block_pages: int = 0,
    ) -> Lease:
        """Reserve pages. Raises LedgerError if they are not free.

        most: what the lease may grow to; `need` if not given. So much as any lease
            has yet to grow stays free: the oldest can always go on to its end.
        blocks: hashes of the prompt's runs of `block_pages` pages, all within what is
            sealed (or the sink), paid for once by all leases of the group that hold them
        """
        account = self._account(group)
        most = most or need
        shared = account.shared_pages(blocks, block_pages)
        if not account.holds(need, most.sealed - need.sealed, shared):
            raise LedgerError(
                f"{need}, to grow to {most}, does not fit {group!r}: "
                f"{account.free_pages()} are free and {account.reserve} sealed ones reserved"
            )
        lease = Lease(
            lease_id=f"{self.epoch:x}-{self._granted}",
            request_id=request_id,
            tenant=tenant,
            group=group,
            epoch=self.epoch,
            need=need,
            most=most,
            sequences=sequences,
            granted_at=now,
            expires_at=now + self.ttl_s,
            blocks=blocks,
            block_pages=block_pages,
            shared=shared,
            number=self._granted,
        )
        self._do(ev.LeaseGranted(lease, now))
        return lease

    def grow(self, lease_id: str, need: PageNeed, now: float) -> bool:
        """Extend a lease to `need`. Returns False, and changes nothing, if it must wait.

        The oldest growing lease of a group takes any free page. Another may, if what
        remains free lets every single one still grow to its most. So whoever is
        oldest ends, gives back more than it took, and the next is the oldest: the
        banker's rule, without a search.

        Adopted leases are charged for pages that they share, as no report tells which
        those are, so pages may be free that the account does not show. While there are
        adopted ones, the oldest therefore grows regardless: its engine has its own rule
        by which the oldest comes to its end.
        """
        lease = self._lease(lease_id)
        if need.hot < lease.need.hot or need.sealed < lease.need.sealed:
            raise LedgerError(f"need of {lease_id!r} must not fall below {lease.need}, got {need}")
        if not need.fits(lease.most):
            raise LedgerError(f"need of {lease_id!r} must be within {lease.most}, got {need}")
        if need == lease.need:
            return True
        account = self._account(lease.group)
        left = PageNeed(
            account.free_hot - (need.hot - lease.need.hot),
            account.free_sealed - (need.sealed - lease.need.sealed),
        )
        oldest = self._oldest_growing(account) == lease_id
        reserve = 0 if oldest else account.reserve
        overstated = oldest and account.adopted > 0
        if left.hot < 0 or (left.sealed < reserve and not overstated):
            return False
        self._do(ev.LeaseResized(lease_id, need, now))
        return True

    def shrink(self, lease_id: str, need: PageNeed, now: float) -> None:
        """Give back what a lease holds beyond `need`."""
        lease = self._lease(lease_id)
        if not need.fits(lease.need) or min(need.hot, need.sealed) < 0:
            raise LedgerError(f"need of {lease_id!r} must lie within {lease.need}, got {need}")
        if need != lease.need:
            self._do(ev.LeaseResized(lease_id, need, now))

    def hand_over(self, lease_id: str, group: str, need: PageNeed, now: float) -> bool:
        """Move a lease to another group, or leave it where it is and return False."""
        self._lease(lease_id)
        if not self._account(group).holds(need, 0):
            return False
        self._do(ev.LeaseHandedOver(lease_id, group, need, now + self.ttl_s, now))
        return True

    def handed(self, lease_id: str, now: float) -> None:
        """Note that the engine has the lease, before a report has listed it.

        A report made from now on lists it, or it is over: a holder that dies within
        the time between two reports does not keep its pages until `ttl_s` has passed.
        """
        lease = self._leases.get(lease_id)
        if lease is not None and not lease.confirmed and now < lease.expires_at:
            self._do(ev.LeaseHanded(lease_id, now))

    def release(
        self, lease_id: str, now: float, reason: ReleaseReason = ReleaseReason.ENDED
    ) -> Lease | None:
        """End a lease. Returns it, or None where it has ended before or never was."""
        lease = self._leases.get(lease_id)
        if lease is not None:
            self._do(ev.LeaseReleased(lease_id, reason, now))
        return lease

    # Truth from outside

    def reconcile(
        self, group: str, engine_epoch: str, listed: Iterable[LeaseTerms], now: float
    ) -> Reconciliation:
        """Bring the account in line with what the engine says it runs.

        Leases that it listed before and no longer lists are over. Those it has never
        listed are over when their time to be used, and `grace_s`, has passed. Leases
        the ledger does not know are adopted, unless it released them within `grace_s`:
        the report may have been on its way. An adopted lease follows the reports upward:
        more of its sequences may arrive, or a growth of the former router's. What a
        silent engine holds is not known to be free; the group's end frees it, not the clock.
        """
        account = self._accounts.get(group)
        if account is None or account.spec.engine_epoch != engine_epoch:
            return Reconciliation(stale=True)
        by_age = sorted(listed, key=lambda terms: (terms.epoch, terms.number))
        terms_by_id = {terms.lease_id: terms for terms in by_age}
        missing = [
            self._leases[lease_id] for lease_id in account.lease_ids if lease_id not in terms_by_id
        ]
        released = tuple(
            lease for lease in missing if lease.confirmed or now >= lease.expires_at + self.grace_s
        )
        for lease in released:
            reason = ReleaseReason.VANISHED if lease.confirmed else ReleaseReason.EXPIRED
            self._do(ev.LeaseReleased(lease.lease_id, reason, now))
        adopted = tuple(
            self._foreign(group, terms, now)
            for lease_id, terms in terms_by_id.items()
            if lease_id not in self._leases and not self._just(self._released_at.get(lease_id), now)
        )
        for lease in adopted:
            self._do(ev.LeaseAdopted(lease, now))
        for lease in self._restated(terms_by_id.values()):
            self._do(ev.LeaseRestated(lease, now))
        confirmed = tuple(lease_id for lease_id in terms_by_id if lease_id in account.lease_ids)
        self._do(ev.GroupReported(group, confirmed, now))
        return Reconciliation(released, adopted)

    def forget(self, now: float) -> None:
        """Drop the memory of leases released so long ago that no report can be about them."""
        while self._released_at and not self._just(next(iter(self._released_at.values())), now):
            self._released_at.popitem(last=False)

    # Replay

    @classmethod
    def replay(
        cls, log: Iterable[Event], epoch: int, *, ttl_s: float = 30.0, grace_s: float = 5.0
    ) -> Ledger:
        """The ledger that a log of events describes."""
        ledger = cls(epoch, ttl_s=ttl_s, grace_s=grace_s)
        for event in log:
            ledger._apply(event)
        return ledger

    # Within

    def _account(self, group: str) -> Account:
        account = self._accounts.get(group)
        if account is None:
            raise LedgerError(f"group {group!r} is not up")
        return account

    def _lease(self, lease_id: str) -> Lease:
        lease = self._leases.get(lease_id)
        if lease is None:
            raise LedgerError(f"there is no lease {lease_id!r}")
        return lease

    def _oldest_growing(self, account: Account) -> str | None:
        growing = (x for x in account.lease_ids if self._leases[x].to_grow > 0)
        return next(growing, None)

    def _foreign(self, group: str, terms: LeaseTerms, now: float) -> Lease:
        return Lease(
            lease_id=terms.lease_id,
            request_id=terms.lease_id,
            tenant="",
            group=group,
            epoch=terms.epoch,
            need=PageNeed(terms.hot_pages, terms.sealed_pages),
            most=PageNeed(terms.hot_pages, max(terms.sealed_pages, terms.most_sealed_pages)),
            sequences=terms.sequences,
            number=terms.number,
            granted_at=now,
            expires_at=now + self.ttl_s,
            confirmed=True,
        )

    def _restated(self, listed: Iterable[LeaseTerms]) -> list[Lease]:
        """Adopted leases that are listed with more than is known of them, as they are now."""
        restated: list[Lease] = []
        for terms in listed:
            known = self._leases.get(terms.lease_id)
            if known is None or known.epoch == self.epoch:
                continue
            most = max(terms.sealed_pages, terms.most_sealed_pages, known.most.sealed)
            hot = max(terms.hot_pages, known.need.hot)
            now_known = replace(
                known,
                need=PageNeed(hot, max(terms.sealed_pages, known.need.sealed)),
                most=PageNeed(hot, most),
                sequences=max(terms.sequences, known.sequences),
            )
            if now_known != known:
                restated.append(now_known)
        return restated

    def _just(self, at: float | None, now: float) -> bool:
        return at is not None and now - at < self.grace_s

    def _do(self, event: Event) -> None:
        self._apply(event)
        if self._on_event is not None:
            self._on_event(event)

    def _apply(self, event: Event) -> None:
        match event:
            case ev.GroupUp(spec=spec):
                self._accounts[spec.group] = Account.opened(spec, self.epoch)
            case ev.GroupDown(group=group):
                del self._accounts[group]
            case ev.GroupReported(lease_ids=lease_ids, at=at):
                self._accounts[event.group].reported_at = at
                for lease_id in lease_ids:
                    if not (lease := self._leases[lease_id]).confirmed:
                        self._leases[lease_id] = replace(lease, confirmed=True)
            case ev.LeaseGranted(lease=lease):
                self._granted += 1
                self._enter(lease)
            case ev.LeaseAdopted(lease=lease):
                self._enter(lease)
            case ev.LeaseRestated(lease=lease):
                self._restate(lease)
            case ev.LeaseResized(lease_id=lease_id, need=need):
                self._restate(replace(self._leases[lease_id], need=need))
            case ev.LeaseHanded(lease_id=lease_id, at=at):
                self._leases[lease_id] = replace(self._leases[lease_id], expires_at=at)
            case ev.LeaseHandedOver(
                lease_id=lease_id, group=group, need=need, expires_at=expires_at
            ):
                moved = replace(
                    self._leave(lease_id),
                    group=group,
                    need=need,
                    most=need,
                    granted_at=event.at,
                    expires_at=expires_at,
                    confirmed=False,
                )
                self._enter(moved)
            case ev.LeaseReleased(lease_id=lease_id, at=at):
                self._leave(lease_id)
                self._released_at[lease_id] = at
                self._released_at.move_to_end(lease_id)

    def _enter(self, lease: Lease) -> None:
        self._leases[lease.lease_id] = lease
        self._accounts[lease.group].enter(lease)

    def _leave(self, lease_id: str) -> Lease:
        lease = self._leases.pop(lease_id)
        self._accounts[lease.group].leave(lease)
        return lease

    def _restate(self, new: Lease) -> None:
        old = self._leases[new.lease_id]
        self._leases[new.lease_id] = new
        self._accounts[old.group].restate(old, new)
