"""All groups and what runs on them: the ledger, and what the router expects of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from kvmesh.cluster.routing.audit import audit
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.demand import DemandModel, OutputEstimate, never_fits
from kvmesh.cluster.routing.events import Event, Lease
from kvmesh.cluster.routing.fairness import Tenants
from kvmesh.cluster.routing.group import GroupSpec, Kind
from kvmesh.cluster.routing.ledger import Ledger, Reconciliation
from kvmesh.cluster.routing.output_lengths import OutputLengths
from kvmesh.cluster.routing.pace import Backlog
from kvmesh.cluster.routing.placement import Asked, GroupView, Plan, projected_s
from kvmesh.cluster.routing.prefix_index import PrefixIndex
from kvmesh.cluster.routing.request import Growth, Placement, PlaceRequest
from kvmesh.cluster.routing.timeline import Timeline
from kvmesh.cluster.routing.verdict import Verdicts
from kvmesh.workers.request import EngineLoads
from kvmesh.workers.sizes import PageNeed

GROWTH = 1.5  # a lease that turns out too small is extended to this many times the output
SMOOTHING = 0.05


@dataclass(slots=True)
class Live:
    """What the router knows of a lease beyond the ledger.

    request: None for a lease that was adopted
    output_tokens: of one sequence, that the lease covers
    """

    request: PlaceRequest | None
    lease_bytes: int
    granted_at: float
    projected_s: float
    output_tokens: int
    begun_at: float | None = None


class Fleet:
    """Keeps ledger, backlog, projected ends, prefix index and tenants' use in step."""

    def __init__(
        self, config: RouterConfig, epoch: int, on_event: Callable[[Event], None] | None
    ) -> None:
        self.ledger = Ledger(
            epoch, ttl_s=config.lease_ttl_s, grace_s=config.grace_s, on_event=on_event
        )
        self.tenants = Tenants(config.tenants, config.tenant_default)
        self.index = PrefixIndex(config.index_limit)
        self.lengths = OutputLengths(least=config.least_samples)
        self.model = DemandModel(self.lengths, config.lease_quantile, config.long_share)
        self.mean_lease_s = 1.0
        self._views: dict[str, GroupView] = {}
        self._kinds: dict[Kind, int] = {}
        self._block_pages = config.block_pages
        self._live: dict[str, Live] = {}

    # Reading

    @property
    def views(self) -> Mapping[str, GroupView]:
        return self._views

    def in_use(self) -> Iterator[GroupView]:
        return (view for view in self._views.values() if view.reported)

    def ask(self, request: PlaceRequest) -> Asked:
        """The request in terms of pages, at this moment's knowledge."""
        output = self.model.output(request)
        blocks = request.page_hashes[self._block_pages - 1 :: self._block_pages]
        return Asked(
            request_id=request.request_id,
            plans=[self._plan(request, output, kind) for kind in self._kinds],
            prompt_tokens=request.prompt_tokens,
            decode_tokens=output.expected,
            leased_tokens=output.leased,
            sequences=request.sequences,
            resumed=request.resumed,
            excluded_groups=request.excluded_groups,
            blocks=blocks,
            block_pages=self._block_pages,
            cached_blocks=self.index.match(blocks),
        )

    def least_prefill_s(self, request: PlaceRequest) -> float:
        """Time to compute the whole prompt where that is fastest."""
        tokens = request.prompt_tokens
        return min((v.backlog.pace.prefill_s(tokens) for v in self._views.values()), default=0.0)

    # Groups

    def group_up(self, spec: GroupSpec, now: float) -> tuple[Lease, ...]:
        voided = self.ledger.group_up(spec, now)
        account = self.ledger.accounts[spec.group]
        known = self._views.get(spec.group)
        if known is None or known.account is not account:
            kind = self._kinds.setdefault(spec.kind, len(self._kinds))
            self._views[spec.group] = GroupView(spec, kind, account, Backlog(spec.pace), Timeline())
            self.index.clear(spec.group)
        self._drop(voided, now)
        return voided

    def group_down(self, group: str, now: float, gone: bool) -> tuple[Lease, ...]:
        voided = self.ledger.group_down(group, now)
        self._drop(voided, now)
        if group in self._views:
            self._views[group].account = None
            self.index.clear(group)
        if gone:
            self._views.pop(group, None)
        return voided

    def report(self, group: str, loads: EngineLoads, now: float) -> Reconciliation:
        reconciled = self.ledger.reconcile(group, loads.epoch, loads.leases, now)
        self._drop(reconciled.released, now)
        for lease in reconciled.adopted:
            self._live[lease.lease_id] = Live(None, 0, now, self.mean_lease_s, 0)
            self._views[group].timeline.put(lease.lease_id, now, now + self.mean_lease_s)
        if reconciled.stale:
            return reconciled
        return replace(reconciled, faults=audit(loads, self.ledger.leases))

    # Leases

    def grant(
        self, request: PlaceRequest, asked: Asked, verdicts: Verdicts, group: str, now: float
    ) -> Placement:
        """Reserve what is asked on the group that was chosen."""
        view = self._views[group]
        demand = asked.plans[view.kind].demand
        lease = self.ledger.grant(
            group,
            demand.leased,
            now,
            request_id=request.request_id,
            tenant=request.tenant,
            sequences=request.sequences,
            most=demand.most,
            blocks=asked.sealed_blocks(view),
            block_pages=asked.block_pages,
        )
        hold_s = projected_s(view, asked, now)
        lease_bytes = view.spec.geometry.bytes_of(demand.leased)
        cached = asked.cached_tokens(view)
        self._live[lease.lease_id] = Live(request, lease_bytes, now, hold_s, asked.leased_tokens)
        view.timeline.put(lease.lease_id, now, now + hold_s)
        view.backlog.add(lease.lease_id, request.prompt_tokens - cached, cached, now)
        self.tenants.enter(request.tenant)
        self.tenants.charge(request.tenant, lease_bytes, hold_s)
        self.index.add(group, asked.blocks)
        return Placement(
            request_id=request.request_id,
            group=group,
            lease=lease.terms,
            lease_bytes=lease_bytes,
            expires_at=lease.expires_at,
            queue_s=0.0,
            leased_output_tokens=asked.leased_tokens,
            cached_tokens=cached,
            verdicts=verdicts,
        )

    def begun(self, lease_id: str, now: float) -> None:
        """The lease's first token is out: its prompt, and those before it, are computed."""
        lease, live = self.ledger.leases.get(lease_id), self._live.get(lease_id)
        if lease is not None and live is not None and live.begun_at is None:
            live.begun_at = now
            self.ledger.handed(lease_id, now)
            self._views[lease.group].backlog.begun(lease_id, now)

    def grow(
        self, lease_id: str, request: PlaceRequest, output_tokens: int, now: float
    ) -> Growth | None:
        """Extend a lease so that each sequence may reach `output_tokens`, or further."""
        live = self._live.get(lease_id)
        if live is None:
            return None
        most = request.max_tokens
        for target in (min(int(output_tokens * GROWTH), most), min(output_tokens, most)):
            if self._grow_to(lease_id, live, request, target, now):
                return Growth(target, self.ledger.leases[lease_id].terms)
        return None

    def release(self, lease_id: str, now: float, output_tokens: int | None) -> Lease | None:
        lease = self.ledger.release(lease_id, now)
        if lease is None:
            return None
        live = self._live[lease_id]
        self.mean_lease_s += SMOOTHING * (now - lease.granted_at - self.mean_lease_s)
        if output_tokens and live.request is not None:
            self._learn(lease, live, live.request, output_tokens, now)
        self._drop((lease,), now)
        return lease

    # Within

    def _plan(self, request: PlaceRequest, output: OutputEstimate, kind: Kind) -> Plan:
        demand = self.model.demand(request, output, kind.shape)
        sealed = kind.shape.geometry.sealed_range(request.prompt_tokens)
        return Plan(
            demand,
            never_fits(request, demand, kind),
            num_blocks=sealed.stop // self._block_pages,
            prefill_s=kind.pace.prefill_s(request.prompt_tokens),
        )

    def _grow_to(
        self, lease_id: str, live: Live, request: PlaceRequest, output_tokens: int, now: float
    ) -> bool:
        lease = self.ledger.leases[lease_id]
        view = self._views[lease.group]
        tokens = min(request.prompt_tokens + output_tokens, view.spec.max_model_len)
        sealed = len(view.spec.geometry.sealed_range(tokens)) * request.sequences
        need = PageNeed(lease.need.hot, max(lease.need.sealed, sealed))
        if not need.fits(lease.most):
            return False  # an adopted lease, not all of whose sequences are known yet
        if not self.ledger.grow(lease_id, need, now):
            return False
        more_s = max(output_tokens - live.output_tokens, 0) * view.decode_step_s
        view.timeline.put(lease_id, live.granted_at, now + more_s)
        live.output_tokens = max(live.output_tokens, output_tokens)
        return True

    def _learn(
        self, lease: Lease, live: Live, request: PlaceRequest, output_tokens: int, now: float
    ) -> None:
        self.lengths.learn(request.tenant, request.prompt_tokens, output_tokens)
        view = self._views[lease.group]
        if live.begun_at is not None and output_tokens > 1:
            step_s = (now - live.begun_at) / (output_tokens - 1)
            view.learn_step(step_s, SMOOTHING)

    def _drop(self, leases: Iterable[Lease], now: float) -> None:
        """Forget leases that the ledger has released."""
        for lease in leases:
            live = self._live.pop(lease.lease_id)
            view = self._views.get(lease.group)
            if view is not None:
                view.timeline.remove(lease.lease_id)
                view.backlog.drop(lease.lease_id, now)
            if live.request is not None:
                over_s = now - live.granted_at - live.projected_s
                self.tenants.settle(live.request.tenant, live.lease_bytes, over_s)
                self.tenants.leave(live.request.tenant)
