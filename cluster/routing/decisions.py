"""What was decided of the latest requests, and why, for people who ask afterwards."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from kvmesh.cluster.routing.outcome import Decision, Granted, Queued, Refused
from kvmesh.cluster.routing.verdict import Verdict

MAX_VERDICTS = 1 << 16
MAX_PER_REQUEST = 8
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Explained:
    """One decision about a request.

    age_s: how long ago; outcome: in words
    group: where it was placed, or empty; verdicts: of every group
    """

    age_s: float
    outcome: str
    group: str
    verdicts: tuple[Verdict, ...]

    def lines(self) -> list[str]:
        """For a log: the outcome first, then every group."""
        return [self.outcome, *(_line(verdict) for verdict in self.verdicts)]


class DecisionLog:
    """The latest requests' decisions, as many as `limit` verdicts allow."""

    def __init__(self, limit: int = MAX_VERDICTS) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self._limit = limit
        # By request id, the one decided last at the end; with the router's clock.
        self._decided: OrderedDict[str, list[tuple[float, Decision]]] = OrderedDict()
        self._verdicts = 0

    def note(self, decision: Decision, now: float) -> None:
        entries = self._decided.setdefault(decision.request_id, [])
        self._decided.move_to_end(decision.request_id)
        entries.append((now, decision))
        self._verdicts += len(decision.verdicts)
        if len(entries) > MAX_PER_REQUEST:
            self._verdicts -= len(entries.pop(0)[1].verdicts)
        while self._verdicts > self._limit and len(self._decided) > 1:
            _, oldest = self._decided.popitem(last=False)
            self._verdicts -= sum(len(old.verdicts) for _, old in oldest)

    def explain(self, request_id: str, now: float) -> tuple[Explained, ...]:
        """Oldest first; nothing of a request that is not known, or no longer."""
        return tuple(
            Explained(now - at, _in_words(decision), _group(decision), tuple(decision.verdicts))
            for at, decision in self._decided.get(request_id, ())
        )


def _in_words(decision: Decision) -> str:
    match decision:
        case Granted(placement=placement):
            promised = "" if placement.promised_at is None else ", as promised"
            return f"placed after {placement.queue_s:.3f} s in the queue{promised}"
        case Queued(position=position, projected_start_s=start_s):
            when = "" if start_s is None else f", to start in about {start_s:.1f} s"
            return f"queued after {position} others{when}"
        case Refused(error=error):
            return f"refused: {error}"


def _group(decision: Decision) -> str:
    return decision.placement.group if isinstance(decision, Granted) else ""


def _line(verdict: Verdict) -> str:
    available, capacity = verdict.available_bytes / MIB, verdict.capacity_bytes / MIB
    parts = [
        f"needs {verdict.needed_bytes / MIB:,.1f} MiB",
        f"{available:,.1f} of {capacity:,.1f} MiB are free",
    ]
    if verdict.cached_pages:
        parts.append(f"holds {verdict.cached_pages} pages of its prompt")
    if verdict.cost_s is not None:
        parts.append(f"cost {verdict.cost_s:.3f} s")
    return f"  {verdict.group}: {verdict.reason.value} ({'; '.join(parts)})"
