"""The engines' reports, and the status calls that wait for fresh ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from kvmesh.cluster.messages import Status
from kvmesh.cluster.reports import ClusterStatus, EngineReport
from kvmesh.cluster.routing.live import Lease

FRESH_TIMEOUT_S = 2.0  # how long a status waits for the engines' reports


class StatusPeer(Protocol):
    """The connection that a status call came over."""

    def send(self, message: Status, /) -> None: ...


@dataclass(slots=True, eq=False)
class _StatusCall:
    """awaited: groups whose reports it waits for, until a deadline"""

    peer: StatusPeer
    call: int
    awaited: set[str]
    until: float


class ReportBook:
    """latest: of each group that has ever sent one; audits, audit_faults: counts"""

    def __init__(self) -> None:
        self.latest: dict[str, EngineReport] = {}
        self.audits = 0
        self.audit_faults = 0
        self._calls: list[_StatusCall] = []

    def wait(self, peer: StatusPeer, call: int, groups: Collection[str], now: float) -> None:
        """Answer a status call when these groups have reported, or will not in time."""
        self._calls.append(_StatusCall(peer, call, set(groups), now + FRESH_TIMEOUT_S))

    def reported(self, group: str) -> None:
        """The group has sent its report, or never will."""
        for waiting in self._calls:
            waiting.awaited.discard(group)

    def due(self, now: float) -> bool:
        """Whether a status call may be answered."""
        return any(not x.awaited or now >= x.until for x in self._calls)

    def answer(self, status: ClusterStatus, now: float) -> None:
        """Send the status to the calls that are due."""
        done = [x for x in self._calls if not x.awaited or now >= x.until]
        self._calls = [x for x in self._calls if x not in done]
        for waiting in done:
            waiting.peer.send(Status(waiting.call, status))

    def requests(self, leases: Mapping[str, Lease]) -> dict[str, str]:
        """tenant/id by lease, of the sequences that the reports name."""
        found = {}
        for report in self.latest.values():
            for sequence in report.loads.oldest:
                if (lease := leases.get(sequence.lease_id)) is not None:
                    found[sequence.lease_id] = lease.request_id
        return found
