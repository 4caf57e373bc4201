"""Those whose requests wait in the router."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from kvmesh.cluster.messages import CallFailed, Placed, Waiting
from kvmesh.cluster.routing.outcome import Enqueued

# Changes that a caller is informed of: by this share, and of a start also by this time.
NOTICED_SHARE, NOTICED_S = 0.05, 1.0


class Peer(Protocol):
    """The connection that a caller came over."""

    def send(self, message: CallFailed | Placed | Waiting, /) -> None: ...


@dataclass(slots=True, eq=False)
class WaitingCaller:
    """Of a waiting request. since: when it came

    position, start_at: as it was informed last; all on the service's clock
    """

    peer: Peer
    call: int
    since: float
    position: int = -1
    start_at: float = -math.inf  # also if unknown

    def inform(self, standing: Enqueued, now: float) -> None:
        """Send where its request stands, unless it nearly knows that."""
        position, start_s = standing.position, standing.projected_start_s
        start_at = -math.inf if start_s is None else now + start_s
        moved = abs(position - self.position) > NOTICED_SHARE * self.position
        shift_s = abs(start_at - self.start_at)  # NaN if both are unknown
        if moved or shift_s > max(NOTICED_S, NOTICED_SHARE * (self.start_at - now)):
            self.position, self.start_at = position, start_at
            self.peer.send(Waiting(self.call, position, start_s))


class WaitingCallers:
    """By their requests' ids, in the order in which they came."""

    def __init__(self) -> None:
        self._by_request: dict[str, WaitingCaller] = {}
        self._requests: dict[tuple[Peer, int], str] = {}

    def __len__(self) -> int:
        return len(self._by_request)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_request

    def add(self, request_id: str, caller: WaitingCaller) -> None:
        self._by_request[request_id] = caller
        self._requests[caller.peer, caller.call] = request_id

    def take(self, request_id: str) -> WaitingCaller:
        """The caller, who no longer waits: the outcome is there."""
        caller = self._by_request.pop(request_id)
        del self._requests[caller.peer, caller.call]
        return caller

    def leave(self, peer: Peer, call: int) -> str | None:
        """The caller is gone. Returns the request's id, or None if the outcome was there first."""
        request_id = self._requests.pop((peer, call), None)
        if request_id is not None:
            del self._by_request[request_id]
        return request_id

    def calls_of(self, peer: Peer) -> list[int]:
        """The calls over one connection that wait."""
        return [call for other, call in self._requests if other is peer]

    def inform(self, standings: Iterable[Enqueued], now: float) -> None:
        """Tell each one where its request stands."""
        for standing in standings:
            self._by_request[standing.request_id].inform(standing, now)

    def oldest_wait_s(self, now: float) -> float:
        oldest = next(iter(self._by_request.values()), None)
        return 0.0 if oldest is None else now - oldest.since
