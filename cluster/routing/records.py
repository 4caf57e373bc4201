"""The requests that are live, what was decided of the latest ones, and how many there were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from kvmesh.cluster.routing.decisions import DecisionLog, Explained
from kvmesh.cluster.routing.live import Lease, LiveRequest
from kvmesh.cluster.routing.outcome import Decision, Granted, Refused


class Records:
    """Live requests by id, the newest incarnation of each, and totals since the start.

    Every lease that was granted is counted once more when it is over.
    """

    def __init__(self) -> None:
        self.granted = 0
        self.released = 0
        self.expired = 0
        self._live: dict[str, LiveRequest] = {}
        self._decisions = DecisionLog()
        self._refused: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._live)

    def get(self, request_id: str) -> LiveRequest | None:
        return self._live.get(request_id)

    def add(self, live: LiveRequest) -> None:
        """Replaces an older incarnation, whose lease may still be in the ledger."""
        self._live[live.request_id] = live

    def remove(self, live: LiveRequest) -> None:
        """A request that waited will not be served."""
        del self._live[live.request_id]

    def lease_over(self, lease: Lease, *, expired: bool = False) -> None:
        """The lease has ended, and its request with it unless it was superseded."""
        if lease.request is None:
            return
        self.expired += expired
        self.released += not expired
        self.request_over(lease)

    def request_over(self, lease: Lease) -> None:
        """The request that the lease is for has ended, unless a newer one has its id."""
        if lease.request is None:
            return
        live = self._live.get(lease.request.request_id)
        if live is not None and live.lease is lease:
            del self._live[live.request_id]

    def note(self, decisions: Iterable[Decision], now: float) -> None:
        for decision in decisions:
            self._decisions.note(decision, now)
            self.granted += isinstance(decision, Granted)
            if isinstance(decision, Refused):
                self.note_refusal(decision)

    def note_refusal(self, refused: Refused) -> None:
        """Count it alone: it says nothing about the live request with its id."""
        self._refused[type(refused.error).__name__] += 1

    def explain(self, request_id: str, now: float) -> tuple[Explained, ...]:
        return self._decisions.explain(request_id, now)

    @property
    def refused(self) -> Mapping[str, int]:
        """By the error's class name."""
        return dict(self._refused)
