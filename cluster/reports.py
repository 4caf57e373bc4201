"""Reports of engines, and the router's status of the whole cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmesh.cluster.routing.outcome import RouterStatus
from kvmesh.workers.loads import EngineInfo, EngineLoads


@dataclass(frozen=True, slots=True)
class LatencyStats:
    """Latencies in a recent window, in seconds."""

    count: int = 0
    mean_s: float = 0.0
    p50_s: float = 0.0
    p90_s: float = 0.0
    p99_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineLatencies:
    """time_to_first_token counts from submission to the engine."""

    time_to_first_token: LatencyStats = LatencyStats()
    time_per_output_token: LatencyStats = LatencyStats()
    queue_time: LatencyStats = LatencyStats()


@dataclass(frozen=True, slots=True)
class EngineReport:
    """Everything that an engine reports."""

    info: EngineInfo
    loads: EngineLoads
    latencies: EngineLatencies = EngineLatencies()
    draining: bool = False


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The router's view of the cluster.

    reports: the latest report of each group that has ever sent one, in the order of their names
    healthy: groups that are up
    draining: new requests are refused
    requests: tenant/id of the requests whose sequences the reports name, by lease
    missing: expected groups that have not been up since the router's start
    oldest_wait_s: how long the request that has waited longest has waited, 0 if none waits
    """

    router: RouterStatus
    reports: Mapping[str, EngineReport]
    healthy: frozenset[str]
    draining: bool = False
    audits_total: int = 0
    audit_faults_total: int = 0
    requests: Mapping[str, str] = field(default_factory=dict)
    missing: frozenset[str] = frozenset()
    oldest_wait_s: float = 0.0
