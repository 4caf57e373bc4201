"""All groups and what runs on them: the ledger, and what the router expects of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.demand import DemandModel, EngineKind, RequestDemand
from kvmesh.cluster.routing.errors import LedgerError
from kvmesh.cluster.routing.fairness import Tenants
from kvmesh.cluster.routing.group import Group
from kvmesh.cluster.routing.ledger import Account
from kvmesh.cluster.routing.live import Lease, LiveRequest
from kvmesh.cluster.routing.outcome import Grown, Placement
from kvmesh.cluster.routing.output_lengths import OutputLengths
from kvmesh.cluster.routing.pace import Backlog
from kvmesh.cluster.routing.placement import GroupChoice, projected_s
from kvmesh.cluster.routing.prefix_index import PrefixIndex
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.workers.lease import LeaseTerms, LeaseWant
from kvmesh.workers.loads import EngineInfo

GROWTH = 1.5  # a lease that turns out too small is extended to this many times the output
SMOOTHING = 0.05


class Fleet:
    """Keeps ledger, backlogs, projected ends, prefix index and tenants' use in step.

    epoch: of this router; stands in the leases that it grants
    groups: by name; those that are down stay known
    kinds: of the groups' engines
    leases: by id, of the groups that are up
    grants: how many leases were granted so far
    mean_lease_s: how long a lease lasts, a moving average
    """

    def __init__(self, config: RouterConfig, epoch: int) -> None:
        tuning = config.tuning
        self.epoch = epoch
        self.leases: dict[str, Lease] = {}
        self.grants = 0
        self.tenants = Tenants(config.tenants, config.tenant_default)
        self.index = PrefixIndex(tuning.index_limit)
        self.lengths = OutputLengths(min_samples=tuning.min_samples)
        self.groups: dict[str, Group] = {}
        self.kinds: tuple[EngineKind, ...] = ()
        self.mean_lease_s = 1.0
        self._tuning = tuning
        self._model = DemandModel(self.lengths, self.index, tuning)
        self._wanting: set[Lease] = set()
        self._not_arrived: deque[Lease] = deque()  # earliest grant first; settled ones too

    def demand(self, request: PlaceRequest) -> RequestDemand:
        """The request in terms of pages, at this moment's knowledge."""
        return self._model.demand(request, self.kinds)

    # Groups

    def group_up(
        self, name: str, info: EngineInfo, leases: Iterable[LeaseTerms], now: float
    ) -> None:
        """A group that was not up is there, and runs under these leases."""
        pace = self._tuning.pace
        account = Account(name, info, self._tuning.block_pages)
        self.groups[name] = Group(name, info, 0, account, Backlog(pace), pace.decode_step_s)
        kinds = {EngineKind.of(group.info): 0 for group in self.groups.values()}
        self.kinds = tuple(kinds)
        for group in self.groups.values():
            group.kind = self.kinds.index(EngineKind.of(group.info))
        for terms in leases:
            self.adopt(name, terms, now)

    def group_down(self, name: str, now: float) -> list[Lease]:
        """A group is lost, if it was up. Its leases are void, and returned."""
        group = self.groups.get(name)
        if group is None or group.account is None:
            return []
        voided = list(group.account.by_age())
        for lease in voided:
            self.release(lease, now)
        group.account = None
        self.index.clear(name)
        return voided

    def retire(self, name: str, as_name: str) -> None:
        """A draining group leaves its name to another, and ends its leases under `as_name`."""
        group = self.groups.pop(name)
        assert group.draining and group.account is not None
        group.name = as_name
        group.account.rename(as_name)
        self.groups[as_name] = group
        self.index.clear(name)  # it gets no more prompts, so nothing is to be found there

    def forget(self, name: str) -> None:
        """A group that is down will not return."""
        group = self.groups.pop(name)
        assert group.account is None

    def pages_changed(self, name: str, held: Iterable[bytes], dropped: Iterable[bytes]) -> None:
        """A group's prefix cache gained and lost pages with these hashes."""
        group = self.groups.get(name)
        if group is not None and group.account is not None:
            self.index.add(name, held)
            self.index.remove(name, dropped)

    # Leases

    def grant(self, live: LiveRequest, choice: GroupChoice, now: float) -> Placement:
        """Reserve what the request needs on the group that was chosen."""
        group, demand, request = choice.group, live.demand, live.request
        assert group is not None
        assert group.account is not None
        here, blocks = demand.by_kind[group.kind], demand.sealed_blocks(group.kind)
        age = (self.epoch, self.grants)
        lease = group.account.grant(age, here.leased, here.max, request, now, blocks)
        self.grants += 1
        self.leases[lease.lease_id] = live.lease = lease
        self._not_arrived.append(lease)
        cached = demand.cached_tokens(group.name, group.info.geometry.page_size)
        lease.charged_s = projected_s(group, demand, now)
        lease.charged_bytes = group.info.geometry.bytes_of(here.leased)
        group.timeline.add(lease, now + lease.charged_s)
        group.backlog.add(lease.lease_id, request.prompt_tokens - cached, cached, now)
        self.tenants.charge(request.tenant, lease.charged_bytes, lease.charged_s)
        self.index.add(group.name, demand.blocks)
        return Placement(
            request_id=request.request_id,
            group=group.name,
            engine_epoch=group.info.epoch,
            lease=lease.terms,
            lease_bytes=lease.charged_bytes,
            queue_s=now - live.since,
            leased_output_tokens=demand.leased_tokens,
            cached_tokens=cached,
            verdicts=choice.verdicts,
        )

    def adopt(self, group: str, terms: LeaseTerms, now: float) -> None:
        """Enter a lease that is not in the ledger and whose sequences the engine has."""
        account = self.groups[group].account
        assert account is not None
        lease = self.leases[terms.lease_id] = account.adopt(terms, now)
        self.groups[group].timeline.add(lease, now + self.mean_lease_s)

    def first_token(self, lease: Lease, now: float) -> None:
        """The lease's first token is out: its prompt, and those before it, are computed."""
        if lease.first_token_at is None:
            lease.first_token_at = now
            self.groups[lease.group].backlog.first_token(lease.lease_id, now)

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
        self.mean_lease_s += SMOOTHING * (now - lease.granted_at - self.mean_lease_s)
        if output_tokens and lease.request is not None:
            request, group = lease.request, self.groups[lease.group]
            self.lengths.learn(request.tenant, request.prompt_tokens, output_tokens)
            if lease.first_token_at is not None and output_tokens > 1:
                step_s = (now - lease.first_token_at) / (output_tokens - 1)
                group.learn_step(step_s, SMOOTHING)
        self.release(lease, now)

    def release(self, lease: Lease, now: float) -> None:
        """End a lease of which there is nothing to learn."""
        group = self.groups[lease.group]
        assert group.account is not None
        group.account.release(lease)
        del self.leases[lease.lease_id]
        group.timeline.remove(lease)
        group.backlog.drop(lease.lease_id, now)
        self._wanting.discard(lease)
        if lease.request is not None:
            over_s = now - lease.granted_at - lease.charged_s
            self.tenants.settle(lease.request.tenant, lease.charged_bytes, over_s)
            self.tenants.leave(lease.request.tenant)

    def never_arrived(self, granted_by: float) -> list[Lease]:
        """Leases granted until then whose sequences have not arrived; each is returned once."""
        late: list[Lease] = []
        queue = self._not_arrived
        while queue:
            lease = queue[0]
            settled = lease.arrived or self.leases.get(lease.lease_id) is not lease
            if not settled and lease.granted_at > granted_by:
                break
            queue.popleft()
            if not settled:
                late.append(lease)
        return late

    def check_integrity(self) -> None:
        """Raise LedgerError unless all accounts are the sums of their leases."""
        accounts = [x.account for x in self.groups.values() if x.account is not None]
        for account in accounts:
            account.check_integrity()
        entered = {lease.lease_id for account in accounts for lease in account.by_age()}
        if entered != self.leases.keys():
            raise LedgerError(f"leases {entered ^ self.leases.keys()} are not in both places")

    def _grow(self, lease: Lease, want: LeaseWant, now: float) -> bool:
        """Extend the lease beyond what it wants, else by just that; never past its maximum."""
        group = self.groups[lease.group]
        assert group.account is not None
        geometry = group.info.geometry
        max_tokens = min(
            geometry.tokens_within(lease.max.sealed // lease.sequences), group.info.max_model_len
        )
        output = want.tokens - want.prompt_tokens
        for target in (int(output * GROWTH), output):
            tokens = min(want.prompt_tokens + target, max_tokens)
            sealed = len(geometry.sealed_range(tokens)) * lease.sequences
            if group.account.grow(lease, max(lease.need.sealed, sealed)):
                more_s = max(tokens - want.tokens, 0) * group.decode_step_s
                group.timeline.remove(lease)
                group.timeline.add(lease, now + more_s)
                return True
        return False
