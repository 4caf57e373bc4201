"""What a sequence has used so far, as clients see it."""

from __future__ import annotations

from kvmesh.workers.request import SequenceUsage
from kvmesh.workers.sequence import Sequence
from kvmesh.workers.sizes import PageNeed


def usage_of(seq: Sequence, now: float) -> SequenceUsage:
    """now: as the times of the sequence, seconds"""
    started = seq.started_s if seq.started_s is not None else now
    first = seq.first_token_s
    held_bytes = seq.geometry.bytes_held(seq.peak.pages, 1)
    return SequenceUsage(
        prompt_tokens=seq.prompt_tokens,
        completion_tokens=seq.num_output,
        cached_tokens=seq.cached_tokens,
        sealed_pages=seq.peak.on_fullest.sealed,
        hot_pages=seq.peak.on_fullest.hot,
        kv_bytes=held_bytes,
        reserved_bytes=held_bytes if seq.lease is None else _leased_bytes(seq),
        queue_s=started - seq.arrived_s,
        time_to_first_token_s=None if first is None else first - seq.arrived_s,
        total_s=now - seq.arrived_s,
        preemptions=seq.preemptions,
        pinned_tokens=seq.pinned_tokens,
    )


def _leased_bytes(seq: Sequence) -> int:
    """Its share of the lease that it has with the other sequences of its request."""
    lease = seq.lease
    assert lease is not None
    pages = PageNeed(lease.hot_pages, lease.sealed_pages)
    return seq.geometry.bytes_of(pages, lease.sequences) // lease.sequences
