"""How much each tenant has used: KV byte-seconds, with weights and quotas.

A virtual counter in the manner of the virtual token counter (Sheng et al., arXiv
2401.00588), over KV byte-seconds instead of tokens: the tenant that used least
goes first, and one of which nothing waited starts level with those that wait: it can
neither save up while it asks for little, nor pay later for what it left unused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TenantPolicy:
    """What one tenant may use.

    weight: share relative to others'
    quota_bytes: limit of KV bytes leased at once, or None. Requests wait for it; those that
        run may pass it as their outputs grow.
    """

    weight: float = 1.0
    quota_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight must be greater than 0, got {self.weight}")
        if self.quota_bytes is not None and self.quota_bytes < 1:
            raise ValueError(f"quota_bytes must be at least 1, got {self.quota_bytes}")


@dataclass(slots=True)
class _Use:
    """counter: weighted byte-seconds; active: requests waiting or leased."""

    counter: float = 0.0
    leased_bytes: int = 0
    active: int = 0


@dataclass(slots=True)
class Tenants:
    """The virtual counters. A lease is charged in advance, and settled when it grows or ends.

    limit: tenants to remember, idle ones included
    _level: the most that any of them has used so far
    """

    policies: Mapping[str, TenantPolicy] = field(default_factory=dict)
    default: TenantPolicy = TenantPolicy()
    limit: int = 4096
    _uses: dict[str, _Use] = field(default_factory=dict)
    _level: float = 0.0

    def policy(self, tenant: str) -> TenantPolicy:
        return self.policies.get(tenant, self.default)

    def counter(self, tenant: str) -> float:
        use = self._uses.get(tenant)
        return self._level if use is None else use.counter

    def leased_bytes(self, tenant: str) -> int:
        use = self._uses.get(tenant)
        return 0 if use is None else use.leased_bytes

    @property
    def leased(self) -> Counter[str]:
        """Bytes leased, by tenant."""
        return Counter({tenant: use.leased_bytes for tenant, use in self._uses.items()})

    def live(self, tenant: str) -> int:
        """Requests that wait or run."""
        use = self._uses.get(tenant)
        return 0 if use is None else use.active

    def quota_left(self, tenant: str) -> float:
        """Bytes that the tenant may lease besides; negative where outputs have grown past it."""
        quota = self.policy(tenant).quota_bytes
        return math.inf if quota is None else quota - self.leased_bytes(tenant)

    def lift(self, tenant: str, waiting: Iterable[str]) -> None:
        """A request comes of a tenant of which none waits, while requests of others may.

        waiting: those others. It starts level with the one of them that used least, without
            those that their quotas stop, or with all tenants if there is none.
        """
        use = self._uses.setdefault(tenant, _Use())
        counters = (self._uses[other].counter for other in waiting if self.quota_left(other) > 0)
        use.counter = max(use.counter, min(counters, default=self._level))

    def enter(self, tenant: str) -> None:
        """A request of the tenant waits or runs."""
        self._uses.setdefault(tenant, _Use()).active += 1

    def leave(self, tenant: str) -> None:
        """The request is over. An idle tenant is remembered while it has used more than others."""
        use = self._uses[tenant]
        use.active -= 1
        if use.active == 0 and len(self._uses) > self.limit:
            self._forget()

    def charge(self, tenant: str, lease_bytes: int, seconds: float) -> None:
        """Projected byte-seconds of a lease that was granted, or has grown."""
        use = self._uses[tenant]
        use.leased_bytes += lease_bytes
        self._count(tenant, lease_bytes * seconds)

    def settle(self, tenant: str, lease_bytes: int, over_s: float) -> None:
        """The lease ended, or grows; `over_s` is its real less its projected time so far."""
        use = self._uses[tenant]
        use.leased_bytes -= lease_bytes
        self._count(tenant, lease_bytes * over_s)

    def _count(self, tenant: str, byte_seconds: float) -> None:
        use = self._uses[tenant]
        use.counter += byte_seconds / self.policy(tenant).weight
        self._level = max(self._level, use.counter)

    def _forget(self) -> None:
        """Drop idle tenants that would start level with the others anyway."""
        active = (use.counter for use in self._uses.values() if use.active)
        level = min(active, default=self._level)
        self._uses = {
            tenant: use for tenant, use in self._uses.items() if use.active or use.counter > level
        }
