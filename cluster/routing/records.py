"""The requests that are live, what was decided of the latest ones, and how many there were."""

from __future__ import annotations

from collections import Counter, OrderedDict

from kvmesh.cluster.routing.live import Lease, LiveRequest
from kvmesh.cluster.routing.outcome import Decision, Explained, Granted, Refused

MAX_VERDICTS = 1 << 16
MAX_PER_REQUEST = 8


class Records:
    """Live requests by id, and totals since the start.

    refused: by the error's class name
    max_verdicts: of decisions that are kept, the latest requests' ones
    """

    def __init__(self, max_verdicts: int = MAX_VERDICTS) -> None:
        # The newest incarnation of each: it waits, or holds a lease.
        self._live: dict[str, LiveRequest | Lease] = {}
        self.granted = 0
        self.released = 0
        self.expired = 0
        self.refused: Counter[str] = Counter()
        self._max_verdicts = max_verdicts
        # By request id, the one decided last at the end; with the router's clock.
        self._decided: OrderedDict[str, list[tuple[float, Decision]]] = OrderedDict()
        self._verdicts = 0

    @property
    def num_live(self) -> int:
        return len(self._live)

    def newest(self, request_id: str) -> LiveRequest | Lease | None:
        """The request's newest incarnation: it waits, or holds a lease."""
        return self._live.get(request_id)

    def waits(self, live: LiveRequest) -> None:
        """The request waits for a lease, and replaces any older incarnation."""
        self._live[live.request_id] = live

    def gave_up(self, live: LiveRequest) -> None:
        """A waiting request is over."""
        if self._live.get(live.request_id) is live:
            del self._live[live.request_id]

    def leased(self, lease: Lease) -> None:
        """The lease's request has it now, and waits no longer."""
        self._live[lease.request_id] = lease

    def lease_over(self, lease: Lease, *, expired: bool = False) -> None:
        """The lease has ended, and its request with it unless it was superseded."""
        if not lease.adopted:
            self.expired += expired
            self.released += not expired
        self.request_over(lease)

    def request_over(self, lease: Lease) -> None:
        """The request of the lease has ended, unless a newer one has its id."""
        if self._live.get(lease.request_id) is lease:
            del self._live[lease.request_id]

    def note(self, decision: Decision, now: float) -> None:
        """Count a decision, and keep it to explain it. A waiting request is over if refused."""
        self.granted += isinstance(decision, Granted)
        if isinstance(decision, Refused):
            self.refused[type(decision.error).__name__] += 1
            if isinstance(live := self._live.get(decision.request_id), LiveRequest):
                self.gave_up(live)  # else of an older incarnation
        entries = self._decided.setdefault(decision.request_id, [])
        self._decided.move_to_end(decision.request_id)
        entries.append((now, decision))
        self._verdicts += len(decision.verdicts)
        if len(entries) > MAX_PER_REQUEST:
            self._verdicts -= len(entries.pop(0)[1].verdicts)
        while self._verdicts > self._max_verdicts and len(self._decided) > 1:
            _, oldest = self._decided.popitem(last=False)
            self._verdicts -= sum(len(old.verdicts) for _, old in oldest)

    def explain(self, request_id: str, now: float) -> tuple[Explained, ...]:
        """Oldest first; nothing of a request that is not known, or no longer."""
        return tuple(
            Explained(now - at, str(decision), _group(decision), tuple(decision.verdicts))
            for at, decision in self._decided.get(request_id, ())
        )


def _group(decision: Decision) -> str:
    return decision.placement.group if isinstance(decision, Granted) else ""
