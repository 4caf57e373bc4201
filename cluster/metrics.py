"""Metrics and their names; Ray's Prometheus endpoint shows them as ``ray_<name>``."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from kvmesh.cluster.reports import EngineLatencies, LatencyStats
from kvmesh.cluster.routing.outcome import RouterStatus
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.loads import EngineInfo, EngineLoads
from kvmesh.workers.request import SequenceDelta, SequenceUsage
from kvmesh.workers.sizes import PageNeed

WINDOW = 512  # ended sequences in a latency summary
LATENCY_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class CounterMeter(Protocol):
    def inc(self, value: float, tags: Mapping[str, str]) -> None: ...


class GaugeMeter(Protocol):
    def set(self, value: float, tags: Mapping[str, str]) -> None: ...


class HistogramMeter(Protocol):
    def observe(self, value: float, tags: Mapping[str, str]) -> None: ...


class MeterFactory(Protocol):
    """Makes meters: Ray's in a cluster (cluster/ray_meters.py), fakes in tests."""

    def counter(self, name: str, description: str, tags: Sequence[str]) -> CounterMeter: ...

    def gauge(self, name: str, description: str, tags: Sequence[str]) -> GaugeMeter: ...

    def histogram(
        self, name: str, description: str, tags: Sequence[str], buckets: Sequence[float]
    ) -> HistogramMeter: ...


class EngineMeters:
    """One group's counters, pools and latencies."""

    def __init__(self, factory: MeterFactory, group: str) -> None:
        self._tags = {"group": group}
        self._tokens = factory.counter(
            "kvmesh_tokens_total", "Tokens by kind: prompt, completion, cached", ("group", "kind")
        )
        self._sequences = factory.counter(
            "kvmesh_sequences_total", "Ended sequences by outcome", ("group", "outcome")
        )
        self._first_token = self._histogram(
            factory, "kvmesh_time_to_first_token_seconds", "From submission to the first token"
        )
        self._output_token = self._histogram(
            factory, "kvmesh_time_per_output_token_seconds", "Between tokens, mean of a sequence"
        )
        self._queue = self._histogram(
            factory, "kvmesh_engine_queue_seconds", "From submission to the first step"
        )
        self._pages = factory.gauge(
            "kvmesh_pool_pages", "Pages of one rank by kind and state", ("group", "kind", "state")
        )
        self._bytes = factory.gauge(
            "kvmesh_pool_bytes", "KV bytes of all ranks by state", ("group", "state")
        )
        self._running = factory.gauge(
            "kvmesh_sequences", "Live sequences by state: running, waiting", ("group", "state")
        )
        self._preemptions = factory.gauge(
            "kvmesh_preemptions", "Preemptions since the engine started", ("group",)
        )
        self._windows = {
            name: deque[float](maxlen=WINDOW) for name in ("first_token", "output_token", "queue")
        }

    def _histogram(self, factory: MeterFactory, name: str, description: str) -> HistogramMeter:
        return factory.histogram(name, description, ("group",), LATENCY_BUCKETS_S)

    def deltas(self, deltas: Sequence[SequenceDelta]) -> None:
        """Count what a step sends to a client; called once per step, not once per token."""
        tokens = 0
        for delta in deltas:
            tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                self._sequences.inc(1, {**self._tags, "outcome": delta.finish_reason.value})
                if delta.usage is not None:
                    self._usage(delta.usage)
        if tokens:
            self._tokens.inc(tokens, {**self._tags, "kind": "completion"})

    def _usage(self, usage: SequenceUsage) -> None:
        if usage.prompt_tokens:
            self._tokens.inc(usage.prompt_tokens, {**self._tags, "kind": "prompt"})
        if usage.cached_tokens:
            self._tokens.inc(usage.cached_tokens, {**self._tags, "kind": "cached"})
        self._observe(self._queue, "queue", usage.queue_s)
        if usage.time_to_first_token_s is None:
            return
        self._observe(self._first_token, "first_token", usage.time_to_first_token_s)
        if usage.completion_tokens > 1:
            decoding_s = usage.total_s - usage.time_to_first_token_s
            per_token_s = decoding_s / (usage.completion_tokens - 1)
            self._observe(self._output_token, "output_token", per_token_s)

    def _observe(self, meter: HistogramMeter, window: str, seconds: float) -> None:
        meter.observe(seconds, self._tags)
        self._windows[window].append(seconds)

    def loads(self, info: EngineInfo, loads: EngineLoads) -> None:
        """Set the gauges."""
        hot, sealed = loads.pool.hot, loads.pool.sealed
        for state, need in (
            ("used", PageNeed(hot.used, sealed.used)),
            ("cached", PageNeed(hot.cached, sealed.cached)),
            ("free", PageNeed(hot.free, sealed.free)),
        ):
            self._pages.set(need.hot, {**self._tags, "kind": "hot", "state": state})
            self._pages.set(need.sealed, {**self._tags, "kind": "sealed", "state": state})
            self._bytes.set(info.geometry.bytes_of(need), {**self._tags, "state": state})
        self._running.set(loads.running, {**self._tags, "state": "running"})
        self._running.set(loads.waiting, {**self._tags, "state": "waiting"})
        self._preemptions.set(loads.preemptions_total, self._tags)

    def latencies(self) -> EngineLatencies:
        return EngineLatencies(
            time_to_first_token=summarise(self._windows["first_token"]),
            time_per_output_token=summarise(self._windows["output_token"]),
            queue_time=summarise(self._windows["queue"]),
        )


class IngressMeters:
    """Calls and their latencies as clients see them."""

    def __init__(self, factory: MeterFactory) -> None:
        self._requests = factory.counter(
            "kvmesh_requests_total",
            "Calls by method and outcome: ok, cancelled, or the error's reason",
            ("method", "outcome"),
        )
        self._first_token = factory.histogram(
            "kvmesh_request_time_to_first_token_seconds",
            "From arrival at the ingress to the first token, placement included",
            ("group",),
            LATENCY_BUCKETS_S,
        )
        self._queue = factory.histogram(
            "kvmesh_request_queue_seconds",
            "From arrival to admission by an engine",
            ("group",),
            LATENCY_BUCKETS_S,
        )
        self._failovers = factory.counter(
            "kvmesh_failovers_total", "Moves to another engine because one was lost", ("group",)
        )

    def request(self, method: str, outcome: str) -> None:
        self._requests.inc(1, {"method": method, "outcome": outcome})

    def finished(self, usage: pb.Usage) -> None:
        """A request has ended with this usage."""
        tags = {"group": usage.group}
        self._queue.observe(usage.queue_s, tags)
        if usage.HasField("time_to_first_token_s"):
            self._first_token.observe(usage.time_to_first_token_s, tags)
        if usage.failovers:
            self._failovers.inc(usage.failovers, tags)


class RouterMeters:
    """The router's queue and leases."""

    def __init__(self, factory: MeterFactory) -> None:
        self._queue = factory.gauge(
            "kvmesh_router_queue_length", "Requests that wait for pages", ()
        )
        self._leases = factory.gauge("kvmesh_router_leases", "Live leases", ())
        self._leased = factory.gauge(
            "kvmesh_router_leased_bytes", "KV bytes that leases reserve", ("group",)
        )
        self._groups = factory.gauge("kvmesh_groups_healthy", "Groups that are up", ())

    def status(self, status: RouterStatus, healthy: int) -> None:
        """healthy: groups that are up"""
        self._queue.set(status.queue_depth, {})
        self._leases.set(status.leases, {})
        self._groups.set(healthy, {})
        for group in status.groups:
            self._leased.set(group.used_bytes, {"group": group.group})


def summarise(values: Sequence[float]) -> LatencyStats:
    """Mean and nearest-rank percentiles."""
    if not values:
        return LatencyStats()
    ordered = sorted(values)

    def percentile(share: float) -> float:
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    return LatencyStats(
        count=len(ordered),
        mean_s=sum(ordered) / len(ordered),
        p50_s=percentile(0.5),
        p90_s=percentile(0.9),
        p99_s=percentile(0.99),
    )
