"""A simulated engine: continuous batching, chunked prefill, prefix cache, preemption.

The rules are those of the project's own scheduler: decoding sequences first, then
prompts in order of arrival, cut to the step's token budget; when pages run out the
youngest is preempted and recomputed. Consecutive steps that only decode are
simulated together.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Callable

from kvmesh.cluster.simulator.cache import SimPool
from kvmesh.cluster.simulator.decoding import DecodeBatch
from kvmesh.cluster.simulator.sequence import SimSequence
from kvmesh.cluster.simulator.service_time import EngineShape, ServiceTime
from kvmesh.cluster.simulator.trace import TraceRequest


class SimEngine:
    """One group. `submit` and `wake` return when to wake it next, or None while it idles.

    worst_case: admit only sequences that fit at their maximum length (no preemption)
    on_want: called once when a sequence has used up its lease; the sequence continues when
        `covered` has grown, at once or before a later step
    """

    def __init__(
        self,
        index: int,
        shape: EngineShape,
        service: ServiceTime,
        *,
        worst_case: bool = False,
        on_want: Callable[[SimSequence, float], None] | None = None,
        on_first_token: Callable[[SimSequence, float], None] | None = None,
        on_finish: Callable[[SimSequence, float], None] | None = None,
    ) -> None:
        plan = shape.pool
        self.index = index
        self.max_num_seqs = plan.max_num_seqs
        self.pool = SimPool(plan.sealed_pages, shape.page_size, worst_case=worst_case)
        self.waiting: deque[SimSequence] = deque()
        self.running: dict[SimSequence, None] = {}  # by admission
        self.prefilling: list[SimSequence] = []
        self.used_page_s = 0.0
        self.busy_s = 0.0
        self._service = service
        self._budget = shape.max_num_batched_tokens
        self._max_step_s = shape.max_step_s
        self._on_want = on_want
        self._on_first_token = on_first_token
        self._on_finish = on_finish
        self._batch = DecodeBatch(shape.page_size, service)
        self._stalled: list[SimSequence] = []
        self._chunks: list[tuple[SimSequence, int]] = []
        self._jump = 0  # decode steps of the step in flight
        self._step_started_at = 0.0
        self._step_ends_at = 0.0
        self._busy = False
        self._waking = False

    # Read by policies

    @property
    def in_flight(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def kv_share(self) -> float:
        return self.pool.used_pages / self.pool.total_pages

    def queued_tokens(self) -> int:
        """Prompt tokens that were submitted and are not yet computed."""
        waiting = sum(seq.request.prompt_tokens for seq in self.waiting)
        return waiting + sum(seq.to_prefill for seq in self.prefilling)

    def fits_ever(self, request: TraceRequest, max_tokens: int) -> bool:
        return self.pool.pages(request.prompt_tokens + max_tokens) <= self.pool.total_pages

    def forget_prefixes(self) -> None:
        """It stops, and what it cached is gone. Only when nothing is in flight."""
        assert not self.in_flight
        self.pool = SimPool(self.pool.total_pages, self.pool.page_size)

    # Events

    def submit(self, seq: SimSequence, now: float) -> float | None:
        self.waiting.append(seq)
        if self._waking:  # sent because a sequence ended in this step
            return None
        if not self._busy:
            return self._start_step(now)
        return self._cut_short(now)

    def wake(self, now: float) -> float | None:
        """End the step in flight; does nothing if the step was cut short and has ended before."""
        if not self._busy or now != self._step_ends_at:
            return None
        self._busy, self._waking = False, True
        self.used_page_s += self.pool.used_pages * (now - self._step_started_at)
        self.busy_s += now - self._step_started_at
        self._batch.advance(self._jump)
        for seq, tokens in self._chunks:
            seq.to_prefill -= tokens
            seq.computed_tokens += tokens
            if seq.to_prefill == 0:
                self._prefilled(seq, now)
        for seq in self._batch.due():
            self._continue_or_end(seq, now)
        self._waking = False
        return self._start_step(now)

    # A step

    def _start_step(self, now: float) -> float | None:
        batch = self._batch
        for seq in [seq for seq in self._stalled if seq.emitted < seq.limit]:
            self._stalled.remove(seq)
            batch.enter(seq)
        self._admit(now)
        jump = self._room_to_decode(1 if self.prefilling else batch.next_stop())
        chunks, tokens, pairs = [], 0, 0.0
        budget, limit_s = self._budget - batch.size, self._limit_s()
        for seq in self.prefilling:
            done = seq.context - seq.to_prefill
            most = min(budget - tokens, seq.to_prefill)
            count = self._within(limit_s, most, tokens, pairs, done)
            if count <= 0:
                break
            chunks.append((seq, count))
            tokens += count
            pairs += count * (done + 0.5 * count)
        if not chunks and not batch.size:
            return None
        self._chunks, self._jump = chunks, jump if batch.size else 0
        self._step_started_at = now
        self._busy = True
        if chunks:
            duration = self._service.step(tokens, pairs, batch.size, batch.context)
        else:
            duration = batch.elapsed(jump)
        self._step_ends_at = now + duration
        return self._step_ends_at

    def _limit_s(self) -> float:
        """What a step may take: without limit if nothing decodes, else at least twice that."""
        if self._max_step_s is None or not self._batch.size:
            return math.inf
        return max(self._max_step_s, 2.0 * self._batch.elapsed(1))

    def _within(self, limit_s: float, most: int, tokens: int, pairs: float, done: int) -> int:
        """How many tokens of a prompt, of which `done` are computed, still fit the step.

        tokens, pairs: of the prompts before it
        """
        size, context = self._batch.size, self._batch.context

        def fits(count: int) -> bool:
            more = pairs + count * (done + 0.5 * count)
            return self._service.step(tokens + count, more, size, context) <= limit_s

        if most <= 0 or fits(most):
            return most
        return bisect.bisect_left(range(1, most), True, key=lambda count: not fits(count))

    def _cut_short(self, now: float) -> float | None:
        """On an arrival, end a run of decode steps after the one in flight."""
        if self._chunks or self._jump <= 1:
            return None
        batch = self._batch
        steps = batch.steps_after(now - self._step_started_at)
        if steps >= self._jump:
            return None
        self.pool.give(batch.fills(self._jump - steps, after=steps))
        self._jump = steps
        self._step_ends_at = max(self._step_started_at + batch.elapsed(steps), now)
        return self._step_ends_at

    def _room_to_decode(self, steps: int) -> int:
        """Take the pages for up to `steps` decode steps; preempt until there are enough for one."""
        while self._batch.size:
            if count := self._batch.steps_within(self.pool.available_pages, steps):
                self.pool.take(self._batch.fills(count))
                return count
            self._preempt(next(reversed(self.running)))
        return 0

    # Sequences

    def _admit(self, now: float) -> None:
        budget = self._budget - self._batch.size - sum(seq.to_prefill for seq in self.prefilling)
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if not self.pool.place(seq):
                return
            self.waiting.popleft()
            self.running[seq] = None
            self.prefilling.append(seq)
            if math.isnan(seq.started_at):
                seq.started_at = now
            budget -= seq.to_prefill

    def _prefilled(self, seq: SimSequence, now: float) -> None:
        self.prefilling.remove(seq)
        self.pool.share_prompt(seq)
        seq.emitted += 1
        if math.isnan(seq.first_token_at):
            seq.first_token_at = now
        if self._on_first_token:
            self._on_first_token(seq, now)
        self._continue_or_end(seq, now)

    def _continue_or_end(self, seq: SimSequence, now: float) -> None:
        if seq.emitted >= seq.request.output_tokens:
            self._free(seq)
            seq.finished_at = now
            if self._on_finish:
                self._on_finish(seq, now)
            return
        if seq.emitted >= seq.limit:
            assert self._on_want is not None
            self._on_want(seq, now)
        if seq.emitted < seq.limit:
            self._batch.enter(seq)
        else:
            seq.stalls += 1
            self._stalled.append(seq)

    def _preempt(self, seq: SimSequence) -> None:
        if seq.decoding:
            self._batch.leave(seq)
        elif seq in self.prefilling:
            self.prefilling.remove(seq)
        else:
            self._stalled.remove(seq)
        self._free(seq)
        seq.preemptions += 1
        self.waiting.appendleft(seq)

    def _free(self, seq: SimSequence) -> None:
        del self.running[seq]
        self.pool.free(seq)
