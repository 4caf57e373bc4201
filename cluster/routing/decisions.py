"""What was decided of the latest requests, and why: for those who ask afterwards."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from kvmesh.cluster.routing.request import Decision, Granted, Queued, Refused
from kvmesh.cluster.routing.verdict import Verdicts

MOST_VERDICTS = 1 << 16
MOST_OF_ONE = 8


@dataclass(frozen=True, slots=True)
class Decided:
    """at: router's clock; decision: with its verdicts"""

    at: float
    decision: Decision

    @property
    def verdicts(self) -> Verdicts:
        if isinstance(self.decision, Granted):
            return self.decision.placement.verdicts
        return self.decision.verdicts

    @property
    def group(self) -> str:
        """Where it was placed, or nothing."""
        return self.decision.placement.group if isinstance(self.decision, Granted) else ""

    def in_words(self) -> str:
        match self.decision:
            case Granted(placement=placement):
                promised = "" if placement.promised_at is None else ", as it had been promised"
                return f"placed after {placement.queue_s:.3f} s in the queue{promised}"
            case Queued(position=position, projected_start_s=start_s):
                when = "" if start_s is None else f", to start in about {start_s:.1f} s"
                return f"queued behind {position} others{when}"
            case Refused(error=error):
                return f"refused: {error}"


class DecisionLog:
    """The decisions of so many requests as `limit` verdicts allow, the latest of each."""

    def __init__(self, limit: int = MOST_VERDICTS) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self._limit = limit
        self._by_request: OrderedDict[str, list[Decided]] = OrderedDict()  # latest decided last
        self._verdicts = 0

    def note(self, decision: Decision, now: float) -> None:
        decided = Decided(now, decision)
        of_it = self._by_request.setdefault(decision.request_id, [])
        self._by_request.move_to_end(decision.request_id)
        of_it.append(decided)
        self._verdicts += len(decided.verdicts)
        if len(of_it) > MOST_OF_ONE:
            self._verdicts -= len(of_it.pop(0).verdicts)
        while self._verdicts > self._limit and len(self._by_request) > 1:
            _, oldest = self._by_request.popitem(last=False)
            self._verdicts -= sum(len(x.verdicts) for x in oldest)

    def of(self, request_id: str) -> tuple[Decided, ...]:
        """Oldest first; nothing of a request that is not known, or no longer."""
        return tuple(self._by_request.get(request_id, ()))
