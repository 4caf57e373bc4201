"""The sequences of a simulated engine that decode, many steps at a time."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from kvmesh.cluster.simulator.sequence import SimSequence
from kvmesh.cluster.simulator.service_time import ServiceTime


class DecodeBatch:
    """Each sequence in it gets a token per step.

    A step changes nothing in a sequence: progress is computed from the step at which it entered.

    context: tokens, of all sequences together
    """

    def __init__(self, page_size: int, service: ServiceTime) -> None:
        self.size = 0
        self.context = 0
        self._page_size = page_size
        self._service = service
        self._steps = 0  # taken
        self._phases = [0] * page_size  # sequences by the step at which they fill a page
        self._stops: list[tuple[int, int, int, SimSequence]] = []
        self._order = 0

    def enter(self, seq: SimSequence) -> None:
        """Decode until the sequence's limit."""
        seq.decoding, seq.since = True, self._steps
        seq.epoch += 1
        self._order += 1
        stop = self._steps + seq.limit - seq.emitted
        heapq.heappush(self._stops, (stop, self._order, seq.epoch, seq))
        self._phases[(self._steps - seq.context) % self._page_size] += 1
        self.size += 1
        self.context += seq.context

    def leave(self, seq: SimSequence) -> None:
        steps = self._steps - seq.since
        self._phases[(seq.since - seq.context) % self._page_size] -= 1
        self.size -= 1
        before = seq.context // self._page_size
        seq.context += steps
        seq.emitted += steps
        seq.own_pages += seq.context // self._page_size - before
        seq.decoding = False
        self.context -= seq.context

    def advance(self, steps: int) -> None:
        self._steps += steps
        self.context += steps * self.size

    def due(self) -> Iterator[SimSequence]:
        """The sequences that have reached their limit, each after it has left the batch."""
        while self._stops and self._stops[0][0] <= self._steps:
            _, _, epoch, seq = heapq.heappop(self._stops)
            if seq.decoding and seq.epoch == epoch:
                self.leave(seq)
                yield seq

    def next_stop(self) -> int:
        """Steps until the first sequence reaches its limit; 1 if there is none."""
        while self._stops:
            step, _, epoch, seq = self._stops[0]
            if seq.decoding and seq.epoch == epoch:
                return max(step - self._steps, 1)
            heapq.heappop(self._stops)
        return 1

    def fills(self, steps: int, after: int = 0) -> int:
        """Pages that are filled in `steps` steps, starting `after` steps from now."""
        cycles, rest = divmod(steps, self._page_size)
        start = self._steps + after
        partial = sum(self._phases[(start + i) % self._page_size] for i in range(1, rest + 1))
        return cycles * self.size + partial

    def steps_within(self, pages: int, steps: int) -> int:
        """The largest number of steps, at most `steps`, that fill no more than these pages."""
        if self.fills(steps) <= pages:
            return steps
        low, high = 0, steps
        while low < high - 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fills(middle) <= pages else (low, middle)
        return low

    def elapsed(self, steps: int) -> float:
        """Time of `steps` steps: each reads one more token of every context."""
        first, more = self._times()
        return steps * first + more * steps * (steps - 1) / 2

    def steps_after(self, elapsed_s: float) -> int:
        """Whole steps until the one that runs after `elapsed_s` has ended, at least 1."""
        first, more = self._times()
        half = first - more / 2
        root = elapsed_s / first
        if more:
            root = (math.sqrt(half * half + 2 * more * elapsed_s) - half) / more
        return max(1, math.ceil(root - 1e-9))

    def _times(self) -> tuple[float, float]:
        """Time of the next step, and how much longer each further one takes."""
        first = self._service.step(0, 0.0, self.size, self.context)
        return first, self.size * self._service.kv_s
