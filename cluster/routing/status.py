"""The router's budget at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvmesh.workers.sizes import PageNeed


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """One group's budget; pages of one rank, bytes over all ranks.

    sequences: of all its leases
    """

    group: str
    up: bool
    engine_epoch: str
    kv_format: str
    sequences: int
    max_sequences: int
    capacity: PageNeed
    used: PageNeed
    capacity_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class RouterStatus:
    """ready: requests are admitted
    live_requests: that wait or hold a lease; leases: live ones, adopted ones included
    granted_total: leases; released_total: those of them that ended, or whose group was lost
    expired_total: those that never reached their engine
    refused_total: by the error's class name
    """

    epoch: int
    ready: bool
    queue_depth: int
    queue_limit: int
    live_requests: int
    leases: int
    groups: tuple[GroupStatus, ...]
    granted_total: int
    released_total: int
    expired_total: int
    refused_total: Mapping[str, int]
