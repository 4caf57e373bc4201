"""The router's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmesh.cluster.routing.fairness import TenantPolicy
from kvmesh.workers.sizes import BLOCK_PAGES


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How the router waits, forgets, estimates and chooses.

    queue_limit: requests that may wait at once
    lease_ttl_s: a lease is to be handed to its engine within this time
    grace_s: how old an engine's report may be when it arrives
    rebuild_timeout_s: after its start, the router waits this long for the known
        groups' first reports before it admits to those that have reported
    retry_least_s, retry_most_s: bounds of the advice when to come back
    lease_quantile: of the output lengths seen, that a short prompt's lease covers
    least_samples: output lengths to have seen before they are believed
    long_share: a prompt is long, and leased for all of max_tokens, if max_tokens is
        at most this share of it
    ahead_s: a group gets another prompt while it has less than this left to compute
    balance_s, hole_s: see PlacementRules
    stretch: a request is due after this many times its own prefill time; 0 is first
        come, first served
    long_s: a prompt that takes longer than this to compute keeps a group from all others:
        one may at any time, and more while the other groups have less to do than `busy_most`
    busy_most: share of the time that a group may be computing prompts, so that those who
        come do not wait long
    patience_s: ... and after this at least
    patience_most_s: who has waited for longer goes before all others of its priority,
        whenever it is the turn of such requests: at one of `aged_every` grants
    backfill_depth: how far down the queue a request may overtake from
    block_pages: prompts are compared in runs of so many pages
    index_limit: runs the prefix index remembers
    tenants, tenant_default: weights and quotas
    """

    queue_limit: int = 1024
    lease_ttl_s: float = 10.0
    grace_s: float = 5.0
    rebuild_timeout_s: float = 30.0
    retry_least_s: float = 0.25
    retry_most_s: float = 60.0
    lease_quantile: float = 0.9
    least_samples: int = 32
    long_share: float = 0.25
    ahead_s: float = 0.25
    balance_s: float = 0.5
    hole_s: float = 0.25
    stretch: float = 4.0
    long_s: float = 60.0
    busy_most: float = 0.55
    patience_s: float = 1.0
    patience_most_s: float = 60.0
    aged_every: int = 4
    backfill_depth: int = 32
    block_pages: int = BLOCK_PAGES
    index_limit: int = 1_000_000
    tenants: Mapping[str, TenantPolicy] = field(default_factory=dict)
    tenant_default: TenantPolicy = field(default_factory=TenantPolicy)

    def __post_init__(self) -> None:
        for name in ("queue_limit", "ahead_s", "balance_s", "hole_s", "stretch", "patience_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("lease_ttl_s", "grace_s", "rebuild_timeout_s", "retry_least_s", "long_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        for name in ("backfill_depth", "block_pages", "aged_every", "index_limit", "least_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lease_quantile", "busy_most"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be within (0, 1], got {getattr(self, name)}")
        if self.patience_most_s < self.patience_s:
            raise ValueError(
                f"patience_most_s must be at least patience_s, got {self.patience_most_s}"
            )
        if self.retry_most_s < self.retry_least_s:
            raise ValueError(
                f"retry_most_s must be at least retry_least_s, got {self.retry_most_s}"
            )
