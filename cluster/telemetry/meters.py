"""What ingresses, the router and engines measure. The metrics are those of table.py.

Nothing is recorded for each token: counters take what has come since the last report of an
engine, and histograms one value for each step or for each request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

from kvmesh.cluster.reports import ClusterStatus, EngineLatencies, LatencyStats
from kvmesh.cluster.routing.outcome import TenantStatus
from kvmesh.cluster.routing.rolling import nearest_rank
from kvmesh.cluster.telemetry import table
from kvmesh.cluster.telemetry.gpus import GpuUse
from kvmesh.cluster.telemetry.table import Kind, Metric
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.loads import EngineInfo, EngineLoads, StepTime
from kvmesh.workers.request import SequenceDelta, SequenceUsage
from kvmesh.workers.sizes import PageNeed

WINDOW = 512  # ended sequences in a latency summary
OTHER_TENANT = "other"


class Instrument(Protocol):
    def record(self, value: float, labels: Mapping[str, str]) -> None:
        """Add to a counter, set a gauge, or observe a value of a histogram."""


# Makes the meter of a metric: Ray's in a cluster (ray_meters.py), others in tests.
InstrumentFactory = Callable[[Metric], Instrument]


class Meters:
    """Records metrics of the table, with labels that all of them have here."""

    def __init__(self, factory: InstrumentFactory, **labels: str) -> None:
        self._factory = factory
        self._labels = labels
        self._meters: dict[str, Instrument] = {}
        self._totals: dict[tuple[str, ...], float] = {}

    def record(self, metric: Metric, value: float, **labels: str) -> None:
        meter = self._meters.get(metric.name)
        if meter is None:
            meter = self._meters[metric.name] = self._factory(metric)
        if value or metric.kind is not Kind.COUNTER:  # Ray's counters refuse 0
            meter.record(value, {**self._labels, **labels})

    def total(self, metric: Metric, total: float, **labels: str) -> None:
        """Count what a total, which only grows, has gained since the last call."""
        key = (metric.name, *labels.values())
        self.record(metric, total - self._totals.get(key, 0.0), **labels)
        self._totals[key] = total


class EngineMeters:
    """One group's tokens, sequences, steps and pools."""

    def __init__(self, factory: InstrumentFactory, group: str) -> None:
        self._meters = Meters(factory, group=group)
        # Its labels do not include a group.
        self._link = Meters(factory, process=group)
        self._windows = {
            name: deque[float](maxlen=WINDOW) for name in ("first_token", "output_token", "queue")
        }

    def deltas(self, deltas: Iterable[SequenceDelta]) -> None:
        """Note the sequences that end with these."""
        for delta in deltas:
            if delta.usage is not None:
                self._usage(delta.usage)

    def _usage(self, usage: SequenceUsage) -> None:
        first_s = usage.time_to_first_token_s
        self._meters.record(table.SEQUENCE_QUEUE, usage.queue_s)
        self._windows["queue"].append(usage.queue_s)
        if first_s is None:
            return
        self._meters.record(table.SEQUENCE_PREFILL, max(first_s - usage.queue_s, 0.0))
        self._windows["first_token"].append(first_s)
        if usage.completion_tokens > 1:
            per_token_s = (usage.total_s - first_s) / (usage.completion_tokens - 1)
            self._windows["output_token"].append(per_token_s)

    def report(
        self,
        info: EngineInfo,
        loads: EngineLoads,
        *,
        step_age_s: float = 0.0,
        connected: bool = True,
    ) -> None:
        """What an engine has done so far, and its state. connected: to the router"""
        self._about(info)
        self._totals(loads)
        self._pools(info, loads)
        record = self._meters.record
        record(table.LIVE_SEQUENCES, loads.running, state="running")
        record(table.LIVE_SEQUENCES, loads.waiting, state="waiting")
        record(table.PREFILL_LEFT, loads.prefill_remaining_tokens)
        record(table.STEP_AGE, step_age_s)
        if loads.expert_imbalance is not None:
            record(table.EXPERT_IMBALANCE, loads.expert_imbalance)
        self._link.record(table.ROUTER_CONNECTED, connected)

    def steps(self, steps: Iterable[StepTime]) -> None:
        """Call it often: a histogram of Ray's takes about 10 µs, and three are due for a step."""
        for step in steps:
            self._meters.record(table.STEP, step.host_s, part="host")
            self._meters.record(table.STEP, step.device_s, part="device")
            if step.token_gap_s is not None:
                self._meters.record(table.INTER_TOKEN, step.token_gap_s)

    def _about(self, info: EngineInfo) -> None:
        self._meters.record(
            table.GROUP_INFO,
            1,
            model=info.model,
            kv_format=info.kv_format,
            dtype=info.dtype,
            tp=str(info.tp),
            kvp=str(info.geometry.kvp),
        )
        if info.kv_divergence_nats is not None:
            self._meters.record(table.DIVERGENCE, info.kv_divergence_nats)

    def _totals(self, loads: EngineLoads) -> None:
        total = self._meters.total
        total(table.PROMPT_TOKENS, loads.prompt_tokens_total)
        total(table.CACHED_TOKENS, loads.cached_tokens_total)
        total(table.COMPLETION_TOKENS, loads.completion_tokens_total)
        total(table.COMPUTED_TOKENS, loads.prefill_tokens_total, phase="prefill")
        total(table.COMPUTED_TOKENS, loads.decode_tokens_total, phase="decode")
        total(table.PREEMPTIONS, loads.preemptions_total)
        total(table.PINNED_EVICTIONS, loads.pinned_evictions_total)
        for outcome, count in loads.outcomes_total.items():
            total(table.SEQUENCES, count, outcome=outcome)

    def _pools(self, info: EngineInfo, loads: EngineLoads) -> None:
        hot, sealed = loads.pool.hot, loads.pool.sealed
        for state in ("used", "cached", "free"):
            need = PageNeed(getattr(hot, state), getattr(sealed, state))
            self._meters.record(table.POOL_PAGES, need.hot, arena="hot", state=state)
            self._meters.record(table.POOL_PAGES, need.sealed, arena="sealed", state=state)
            self._meters.record(table.POOL_BYTES, info.geometry.bytes_of(need), state=state)
        self._meters.record(table.PINNED_PAGES, loads.pinned_pages)

    def gpus(self, uses: Iterable[GpuUse]) -> None:
        for rank, use in enumerate(uses):
            where = {"rank": str(rank)}
            if use.utilization is not None:
                self._meters.record(table.GPU_UTILIZATION, use.utilization, **where)
            for state, count in (("used", use.used_bytes), ("free", use.free_bytes)):
                if count is not None:
                    self._meters.record(table.GPU_MEMORY, count, **where, state=state)

    def latencies(self) -> EngineLatencies:
        return EngineLatencies(
            time_to_first_token=summarise(self._windows["first_token"]),
            time_per_output_token=summarise(self._windows["output_token"]),
            queue_time=summarise(self._windows["queue"]),
        )


class IngressMeters:
    """Calls and their latencies as clients see them.

    tenants: that have a label of their own; if there are none, nothing is said of tenants
    """

    def __init__(self, factory: InstrumentFactory, tenants: Iterable[str] = ()) -> None:
        self._meters = Meters(factory)
        self._tenants = frozenset(tenants)
        self._keys_current = True

    def call(self, method: str, outcome: str, tenant: str | None) -> None:
        """A call has ended. tenant: None if the caller is unknown"""
        self._meters.record(table.REQUESTS, 1, method=method, outcome=outcome)
        if self._tenants and tenant is not None:
            name = self._tenant(tenant)
            self._meters.record(table.TENANT_REQUESTS, 1, tenant=name, outcome=outcome)

    def finished(self, usage: pb.Usage, tenant: str, longest_tokens: int) -> None:
        """A generation has ended with this usage.

        longest_tokens: of its longest choice, that were generated in this time
        """
        record, group = self._meters.record, usage.group
        record(table.REQUEST_QUEUE, usage.queue_s, group=group)
        record(table.REQUEST_DURATION, usage.total_s, group=group)
        if usage.HasField("time_to_first_token_s"):
            first_s = usage.time_to_first_token_s
            record(table.FIRST_TOKEN, first_s, group=group)
            if longest_tokens > 1:
                each_s = (usage.total_s - first_s) / (longest_tokens - 1)
                record(table.OUTPUT_TOKEN, each_s, group=group)
        if self._tenants:
            tokens = {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens}
            for direction, count in tokens.items():
                name = self._tenant(tenant)
                record(table.TENANT_TOKENS, count, tenant=name, direction=direction)

    def failover(self, group: str, cause: str) -> None:
        """A generation has lost its engine."""
        self._meters.record(table.FAILOVERS, 1, group=group, cause=cause)

    def quarantined(self, group: str) -> None:
        """A generation was placed under suspicion."""
        self._meters.record(table.QUARANTINES, 1, group=group)

    def state(self, open_calls: int, connected: bool) -> None:
        """connected: to the router"""
        self._meters.record(table.OPEN_CALLS, open_calls)
        self._meters.record(table.ROUTER_CONNECTED, connected, process="ingress")
        # Ray exports a gauge only after it was set again.
        self._meters.record(table.KEYS_CURRENT, self._keys_current)

    def keys(self, current: bool) -> None:
        """Whether the files of keys could be used when they were read last."""
        self._keys_current = current

    def _tenant(self, tenant: str) -> str:
        return tenant if tenant in self._tenants else OTHER_TENANT


class RouterMeters:
    """The router's queue, leases and ledger.

    tenants: whose use is recorded
    """

    def __init__(self, factory: InstrumentFactory, tenants: Iterable[str] = ()) -> None:
        self._meters = Meters(factory)
        self.tenants = tuple(tenants)

    def decided(self, seconds: float) -> None:
        self._meters.record(table.DECISION, seconds)

    def refused(self, error: pb.Error, reason: str) -> None:
        """reason: the error's, as a label"""
        self._meters.record(table.REFUSALS, 1, reason=reason)
        self._meters.record(table.REFUSED_BYTES, error.needed_bytes, reason=reason)

    def status(
        self,
        status: ClusterStatus,
        groups: Collection[str],
        wanted: Collection[str],
        tenants: Mapping[str, TenantStatus],
    ) -> None:
        """groups: that are configured; wanted: those of them that are to run"""
        record, total, router = self._meters.record, self._meters.total, status.router
        for group in groups:
            record(table.GROUP_WANTED, group in wanted, group=group)
            record(table.GROUP_UP, group in status.healthy, group=group)
        record(table.QUEUE_REQUESTS, router.queue_depth)
        record(table.OLDEST_WAIT, status.oldest_wait_s)
        record(table.LEASES, router.leases)
        total(table.LEASE_EVENTS, router.granted_total, event="granted")
        total(table.LEASE_EVENTS, router.released_total, event="released")
        total(table.LEASE_EVENTS, router.expired_total, event="expired")
        total(table.AUDITS, status.audits_total - status.audit_faults_total, result="agree")
        total(table.AUDITS, status.audit_faults_total, result="differ")
        for account in router.groups:
            if account.group not in groups:
                continue  # it ends under a name that only it has
            free = max(account.capacity_bytes - account.used_bytes, 0)
            record(table.LEDGER, account.used_bytes, group=account.group, state="leased")
            record(table.LEDGER, free, group=account.group, state="free")
        for tenant, use in tenants.items():
            record(table.TENANT_BYTES, use.leased_bytes, tenant=tenant)
            record(table.TENANT_LIVE, use.queued, tenant=tenant, state="queued")
            record(table.TENANT_LIVE, use.running, tenant=tenant, state="running")


def summarise(values: Sequence[float]) -> LatencyStats:
    """Mean and nearest-rank percentiles."""
    if not values:
        return LatencyStats()
    ordered = sorted(values)

    def percentile(share: float) -> float:
        return ordered[nearest_rank(share, len(ordered))]

    return LatencyStats(
        count=len(ordered),
        mean_s=sum(ordered) / len(ordered),
        p50_s=percentile(0.5),
        p90_s=percentile(0.9),
        p99_s=percentile(0.99),
    )
