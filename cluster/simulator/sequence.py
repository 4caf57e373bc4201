"""A request on its way through a simulated engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvmesh.cluster.simulator.trace import TraceRequest


@dataclass(slots=True, eq=False)
class SimSequence:
    """One request and its progress.

    covered: output tokens its lease covers, or None without a lease
    context: tokens written when it started to decode, at step `since`
    """

    request: TraceRequest
    max_tokens: int
    group: int = -1
    lease_id: str = ""
    covered: int | None = None
    emitted: int = 0
    to_prefill: int = 0
    context: int = 0
    since: int = 0
    own_pages: int = 0
    held_blocks: tuple[int, ...] = ()
    decoding: bool = False
    epoch: int = 0  # times it has started to decode; heap entries of earlier ones are stale
    first_token_at: float = math.nan
    finished_at: float = math.nan
    cached_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    stalls: int = 0
    refused: bool = False
    started_at: float = math.nan

    @property
    def limit(self) -> int:
        """Output tokens after which it ends, or needs a larger lease."""
        wanted = self.request.output_tokens
        return wanted if self.covered is None else min(wanted, self.covered)
