"""What a stream says while it has no tokens to send."""

from __future__ import annotations

from collections.abc import Callable

from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.request import PrefillProgress


class StreamStatus:
    """Where a request is before its next tokens: in the queue, or at its prompt.

    clock: seconds, monotonic
    """

    def __init__(self, request_id: str, clock: Callable[[], float]) -> None:
        self._request_id = request_id
        self._clock = clock
        self._leader: str | None = None  # the sequence whose progress it is
        self.queued()

    def queued(self, position: int = 0, start_s: float | None = None) -> None:
        """It waits for a place. start_s: from now until its projected start, if known"""
        self._position = position
        self._start_at = None if start_s is None else self._clock() + start_s
        self._progress: PrefillProgress | None = None

    def placed(self, total_tokens: int) -> None:
        """It has a place. total_tokens: to compute before its next token"""
        self._progress = PrefillProgress(0, 0, total_tokens)
        self._leader = None

    def computed(self, sequence: str, progress: PrefillProgress) -> bool:
        """Note a sequence's progress. Returns whether it leads those of the request."""
        now = self._progress
        if now is None:
            return False  # of a placement that was lost
        if self._leader not in (None, sequence) and progress.computed_tokens <= now.computed_tokens:
            return False
        self._leader, self._progress = sequence, progress
        return True

    def generating(self) -> None:
        """It has tokens; whatever it computes next is news."""
        if self._progress is not None:
            total = self._progress.total_tokens
            self._progress = PrefillProgress(total, self._progress.cached_tokens, total)
            self._leader = None

    def event(self) -> pb.GenerateStreamResponse:
        """The status now."""
        if self._progress is None:
            queued = pb.Queued(position=self._position, request_id=self._request_id)
            if self._start_at is not None:
                queued.projected_wait_s = max(self._start_at - self._clock(), 0.0)
            return pb.GenerateStreamResponse(queued=queued)
        prefilling = pb.Prefilling(
            computed_tokens=self._progress.computed_tokens,
            cached_tokens=self._progress.cached_tokens,
            total_tokens=self._progress.total_tokens,
        )
        return pb.GenerateStreamResponse(prefilling=prefilling)
