"""The router's settings, and the constants of its algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmesh.cluster.routing.fairness import TenantPolicy
from kvmesh.cluster.routing.pace import Pace
from kvmesh.workers.sizes import BLOCK_PAGES

# Between what CPUs and large GPUs do, within reach of what the router learns by itself.
TYPICAL_PACE = Pace(prefill_s_per_token=1e-4)


def _check(config: object, name: str, valid: bool, rule: str) -> None:
    """NaN compares as false, so it is never valid."""
    if not valid:
        raise ValueError(f"{name} {rule}, got {getattr(config, name)}")


@dataclass(frozen=True, slots=True)
class RouterTuning:
    """Constants of the algorithm, for the simulator and benchmarks to vary.

    pace: service times of an engine, until the router has seen its own
    min_samples: output lengths to have seen before they are believed
    ahead_s: a group gets another prompt while it has less than this left to compute
    balance_s: see PlacementWeights
    stretch: a request is due after this many times its own prefill time; 0 is first
        come, first served
    patience_s: the earliest that a request is due after its arrival
    long_s: a prompt that takes longer than this to compute keeps a group from all others:
        one may at any time, and more while the other groups are busy for at most
        `max_busy_share` of the time
    backfill_depth: how far down the queue a request may overtake from; counted for each group,
        and of what waits for its room only
    block_pages: prompts are compared in runs of this many pages
    index_limit: runs that the prefix index remembers
    """

    pace: Pace = TYPICAL_PACE
    min_samples: int = 32
    ahead_s: float = 0.25
    balance_s: float = 0.5
    stretch: float = 4.0
    patience_s: float = 1.5
    long_s: float = 60.0
    max_busy_share: float = 0.55
    backfill_depth: int = 32
    block_pages: int = BLOCK_PAGES
    index_limit: int = 1_000_000

    def __post_init__(self) -> None:
        for name in ("ahead_s", "balance_s", "stretch", "patience_s"):
            _check(self, name, getattr(self, name) >= 0, "must be at least 0")
        for name in ("min_samples", "backfill_depth", "block_pages", "index_limit"):
            _check(self, name, getattr(self, name) >= 1, "must be at least 1")
        in_range = 0 < self.max_busy_share <= 1
        _check(self, "max_busy_share", in_range, "must be within (0, 1]")
        _check(self, "long_s", self.long_s > 0, "must be greater than 0")


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """What operators set.

    queue_limit: requests that may wait at once, besides those that lost their group
    lease_ttl_s: a lease's sequences must reach the engine within this time of the grant
    rebuild_timeout_s: after its start, the router waits at most this long for the expected
        groups before it admits to those that are up
    min_retry_s, max_retry_s: bounds of the advice when to come back
    tenants, tenant_default: weights and quotas, by tenant and of all others
    """

    queue_limit: int = 1024
    lease_ttl_s: float = 10.0
    rebuild_timeout_s: float = 30.0
    min_retry_s: float = 0.25
    max_retry_s: float = 60.0
    tenants: Mapping[str, TenantPolicy] = field(default_factory=dict)
    tenant_default: TenantPolicy = field(default_factory=TenantPolicy)
    tuning: RouterTuning = RouterTuning()

    def __post_init__(self) -> None:
        _check(self, "queue_limit", self.queue_limit >= 0, "must be at least 0")
        for name in ("lease_ttl_s", "rebuild_timeout_s", "min_retry_s"):
            _check(self, name, getattr(self, name) > 0, "must be greater than 0")
        enough = self.max_retry_s >= self.min_retry_s
        _check(self, "max_retry_s", enough, f"must be at least min_retry_s ({self.min_retry_s})")
