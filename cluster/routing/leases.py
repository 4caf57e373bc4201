"""All leases of the groups that are up, from their grants to their ends."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping

from kvmesh.cluster.routing.errors import LedgerError
from kvmesh.cluster.routing.fleet import Fleet
from kvmesh.cluster.routing.ledger import Account
from kvmesh.cluster.routing.live import Lease, LiveRequest
from kvmesh.cluster.routing.outcome import Grown, Placement
from kvmesh.cluster.routing.placement import GroupChoice, projected_s
from kvmesh.workers.lease import LeaseTerms, LeaseWant

GROWTH = 1.5  # a lease that turns out too small is extended to this many times the output
SMOOTHING = 0.05


class Leases(Mapping[str, Lease]):
    """By id. Keeps the ledger, backlogs, projected ends and tenants' use in step with them.

    epoch: of this router; stands in the leases that it grants
    mean_s: how long a lease lasts, a moving average
    """

    def __init__(self, fleet: Fleet, epoch: int) -> None:
        self.epoch = epoch
        self.mean_s = 1.0
        self._fleet = fleet
        self._by_id: dict[str, Lease] = {}
        self._grants = 0
        self._wanting: set[Lease] = set()
        self._not_arrived: deque[Lease] = deque()  # earliest grant first; settled ones too

    def __getitem__(self, lease_id: str) -> Lease:
        return self._by_id[lease_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_id)

    def __len__(self) -> int:
        return len(self._by_id)

    def grant(self, live: LiveRequest, choice: GroupChoice, now: float) -> Placement:
        """Reserve what the request needs on the group that was chosen."""
        group, demand, request = choice.group, live.demand, live.request
        assert group is not None and group.account is not None
        here, blocks = demand.by_kind[group.kind], demand.sealed_blocks(group.kind)
        age = (self.epoch, self._grants)
        lease = group.account.grant(age, here.leased, here.max, request, now, blocks)
        self._grants += 1
        self._by_id[lease.lease_id] = lease
        self._not_arrived.append(lease)
        cached = demand.cached_tokens(group.name, group.info.geometry.page_size)
        self._charge(lease, now + projected_s(group, demand, now), now)
        group.backlog.add(lease.lease_id, request.prompt_tokens - cached, cached, now)
        self._fleet.index.add(group.name, demand.blocks)
        return Placement(
            request_id=request.request_id,
            group=group.name,
            engine_epoch=group.info.epoch,
            lease=lease.terms,
            lease_bytes=self._bytes(lease),
            queue_s=now - live.since,
            leased_output_tokens=demand.leased_tokens,
            cached_tokens=cached,
            verdicts=choice.verdicts,
        )

    def adopt(self, group: str, terms: LeaseTerms, now: float) -> Lease:
        """Enter a lease that is not in the ledger and whose sequences the engine has."""
        lease = self._by_id[terms.lease_id] = self._account(group).adopt(terms, now)
        self._fleet.tenants.enter(lease.tenant)
        self._charge(lease, now + self.mean_s, now)
        return lease

    def first_token(self, lease: Lease, now: float) -> None:
        """The lease's first token is out: its prompt, and those before it, are computed."""
        if lease.first_token_at is None:
            lease.first_token_at = now
            self._fleet.groups[lease.group].backlog.first_token(lease.lease_id, now)

    def want(self, lease: Lease, want: LeaseWant) -> None:
        """The lease needs more pages; see `grow_wanting`."""
        lease.want = want
        self._wanting.add(lease)

    def grow_wanting(self, now: float) -> list[Grown]:
        """Extend the leases that want more and may have it, older ones first.

        One pass is enough: what a lease takes makes room for none that is older.
        """
        grown: list[Grown] = []
        for lease in sorted(self._wanting, key=lambda lease: lease.age):
            assert lease.want is not None
            if self._grow(lease, lease.want, now):
                lease.want = None
                self._wanting.discard(lease)
                grown.append(Grown(lease.group, lease.terms))
        return grown

    def end(self, lease: Lease, now: float, output_tokens: int | None) -> None:
        """All sequences of a lease have ended. output_tokens: to learn from, or None"""
        self.mean_s += SMOOTHING * (now - lease.granted_at - self.mean_s)
        if output_tokens and lease.request is not None:
            request, group = lease.request, self._fleet.groups[lease.group]
            self._fleet.lengths.learn(request.tenant, request.prompt_tokens, output_tokens)
            if lease.first_token_at is not None and output_tokens > 1:
                step_s = (now - lease.first_token_at) / (output_tokens - 1)
                group.learn_step(step_s, SMOOTHING)
        self.release(lease, now)

    def release(self, lease: Lease, now: float) -> None:
        """End a lease of which there is nothing to learn."""
        group = self._fleet.groups[lease.group]
        self._account(lease.group).release(lease)
        del self._by_id[lease.lease_id]
        self._settle(lease, self._bytes(lease), now)
        group.backlog.drop(lease.lease_id, now)
        self._wanting.discard(lease)
        self._fleet.tenants.leave(lease.tenant)

    def void(self, group: str, now: float) -> list[Lease]:
        """Release all leases of a group; those that it had."""
        account = self._fleet.account(group)
        voided = [] if account is None else list(account.by_age())
        for lease in voided:
            self.release(lease, now)
        return voided

    def never_arrived(self, granted_by: float) -> list[Lease]:
        """Leases granted until then whose sequences have not arrived; each is returned once."""
        late: list[Lease] = []
        queue = self._not_arrived
        while queue:
            lease = queue[0]
            settled = lease.arrived or self._by_id.get(lease.lease_id) is not lease
            if not settled and lease.granted_at > granted_by:
                break
            queue.popleft()
            if not settled:
                late.append(lease)
        return late

    def check_integrity(self) -> None:
        """Raise LedgerError unless all accounts, and tenants' use, are the sums of their leases."""
        groups = self._fleet.groups.values()
        accounts = [group.account for group in groups if group.account is not None]
        for account in accounts:
            account.check_integrity()
        entered = {lease.lease_id for account in accounts for lease in account.by_age()}
        if entered != self._by_id.keys():
            raise LedgerError(f"leases {entered ^ self._by_id.keys()} are not in both places")
        leased = Counter[str]()
        for lease in self._by_id.values():
            leased[lease.tenant] += self._bytes(lease)
        if leased != (charged := self._fleet.tenants.leased):
            raise LedgerError(f"tenants are charged for {charged}, their leases sum to {leased}")

    def _account(self, group: str) -> Account:
        account = self._fleet.account(group)
        assert account is not None, f"there are no leases on {group}, which is not up"
        return account

    def _bytes(self, lease: Lease) -> int:
        geometry = self._fleet.groups[lease.group].info.geometry
        return geometry.bytes_of(lease.need, lease.sequences)

    def _charge(self, lease: Lease, ends_at: float, now: float) -> None:
        """Expect the lease's end, and charge its tenant until then."""
        self._fleet.groups[lease.group].timeline.add(lease, ends_at)
        self._fleet.tenants.charge(lease.tenant, self._bytes(lease), ends_at - now)

    def _settle(self, lease: Lease, charged_bytes: int, now: float) -> None:
        """Undo `_charge`, but for what the tenant has used until now."""
        self._fleet.groups[lease.group].timeline.remove(lease)
        self._fleet.tenants.settle(lease.tenant, charged_bytes, now - lease.ends_at)

    def _grow(self, lease: Lease, want: LeaseWant, now: float) -> bool:
        """Extend the lease beyond what it wants, else by just that; never past its maximum.

        Its tenant is charged, but not held to its quota, as others' leases need its end.
        """
        group = self._fleet.groups[lease.group]
        geometry = group.info.geometry
        max_tokens = min(
            geometry.tokens_within(lease.max.sealed // lease.sequences), group.info.max_model_len
        )
        output, charged_bytes = want.tokens - want.prompt_tokens, self._bytes(lease)
        for target in (int(output * GROWTH), output):
            tokens = min(want.prompt_tokens + target, max_tokens)
            sealed = geometry.sealed_need(tokens) * lease.sequences
            if self._account(lease.group).grow(lease, max(lease.need.sealed, sealed)):
                more_s = max(tokens - want.tokens, 0) * group.decode_step_s
                self._settle(lease, charged_bytes, now)
                self._charge(lease, now + more_s, now)
                return True
        return False
