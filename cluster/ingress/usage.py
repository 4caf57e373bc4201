"""What a request has cost so far, over all of its placements."""

from __future__ import annotations

from collections.abc import Callable

from kvmesh.cluster.messages import Placed
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.request import SequenceUsage


class RequestUsage:
    """Times are from its arrival, which is now.

    clock: seconds, monotonic
    queue_s: that it has waited for places
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.arrived_s = clock()
        self.queue_s = 0.0
        self._first_token_s: float | None = None
        self._sequences: list[SequenceUsage] = []

    def note_first_token(self) -> None:
        """A placement has brought one; only the very first counts."""
        if self._first_token_s is None:
            self._first_token_s = self._clock() - self.arrived_s

    def add(self, sequence: SequenceUsage) -> None:
        """A sequence has ended, and its pages have been freed."""
        self._sequences.append(sequence)

    def message(
        self, placed: Placed | None, prompt_tokens: int, completion_tokens: int, failovers: int
    ) -> pb.Usage:
        """placed: the latest placement, if any"""
        sequences = self._sequences
        used_bytes = sum(sequence.kv_bytes for sequence in sequences)
        wire = pb.Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cached_tokens=max((sequence.cached_tokens for sequence in sequences), default=0),
            queue_s=self.queue_s + max((sequence.queue_s for sequence in sequences), default=0.0),
            total_s=self._clock() - self.arrived_s,
            time_to_first_token_s=self._first_token_s,
            kv_hot_pages=sum(sequence.hot_pages for sequence in sequences),
            kv_sealed_pages=sum(sequence.sealed_pages for sequence in sequences),
            kv_used_bytes=used_bytes,
            kv_freed_bytes=used_bytes,
            preemptions=sum(sequence.preemptions for sequence in sequences),
            failovers=failovers,
            pinned_tokens=self._sequences[-1].pinned_tokens if sequences else 0,
        )
        if wire.cached_tokens:
            wire.cached_tokens_by_tier["device"] = wire.cached_tokens
        if placed is not None:
            reserved_bytes = sum(sequence.reserved_bytes for sequence in sequences)
            wire.kv_reserved_bytes = max(reserved_bytes, placed.lease_bytes)
            wire.group = placed.group
            wire.kv_format = placed.engine.kv_format
        return wire
