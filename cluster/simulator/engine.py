"""A simulated engine: continuous batching, chunked prefill, prefix cache, preemption.

The rules are those of the project's own scheduler: decoding sequences first, then
prompts in order of arrival, cut to the step's token budget; when pages run out the
youngest is preempted and recomputed. Consecutive steps that only decode are
simulated together.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvmesh.cluster.simulator.cache import SimPool
from kvmesh.cluster.simulator.service_time import EngineShape, ServiceTime
from kvmesh.cluster.simulator.trace import BLOCK_TOKENS, TraceRequest


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
    dispatched_at: float = math.nan
    first_token_at: float = math.nan
    finished_at: float = math.nan
    cached_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    stalls: int = 0
    refused: bool = False
    promised_at: float | None = None
    started_at: float = math.nan


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
        self.page_size = shape.page_size
        self.max_num_seqs = plan.max_num_seqs
        self.pool = SimPool(plan.sealed_pages, BLOCK_TOKENS // shape.page_size)
        self.waiting: deque[SimSequence] = deque()
        self.running: dict[SimSequence, None] = {}  # by admission
        self.prefilling: list[SimSequence] = []
        self.used_page_s = 0.0
        self.busy_s = 0.0
        self._service = service
        self._budget = shape.max_num_batched_tokens
        self._worst_case = worst_case
        self._reserved = 0
        self._on_want = on_want
        self._on_first_token = on_first_token
        self._on_finish = on_finish
        self._steps = 0  # decode steps taken
        self._decoding = 0
        self._context = 0  # tokens, of all decoding sequences
        self._phases = [0] * shape.page_size  # sequences by the step at which they fill a page
        self._stops: list[tuple[int, int, int, SimSequence]] = []
        self._stalled: list[SimSequence] = []
        self._order = 0
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
        return self._pages(request.prompt_tokens + max_tokens) <= self.pool.total_pages

    # Events

    def submit(self, seq: SimSequence, now: float) -> float | None:
        seq.dispatched_at = now
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
        self._advance(self._jump)
        for seq, tokens in self._chunks:
            seq.to_prefill -= tokens
            seq.computed_tokens += tokens
            if seq.to_prefill == 0:
                self._prefilled(seq, now)
        self._stop_due(now)
        self._waking = False
        return self._start_step(now)

    # A step

    def _start_step(self, now: float) -> float | None:
        self._resume_stalled()
        self._admit(now)
        jump = self._room_to_decode(1 if self.prefilling else self._next_stop())
        chunks, tokens, pairs = [], 0, 0.0
        budget = self._budget - self._decoding
        for seq in self.prefilling:
            count = min(budget - tokens, seq.to_prefill)
            if count <= 0:
                break
            done = seq.context - seq.to_prefill
            chunks.append((seq, count))
            tokens += count
            pairs += count * (done + 0.5 * count)
        if not chunks and not self._decoding:
            return None
        self._chunks, self._jump = chunks, jump if self._decoding else 0
        self._step_started_at = now
        self._busy = True
        if chunks:
            duration = self._service.step(tokens, pairs, self._decoding, self._context)
        else:
            duration = self._elapsed(jump)
        self._step_ends_at = now + duration
        return self._step_ends_at

    def _elapsed(self, steps: int) -> float:
        """Time of `steps` decode steps: each reads one more token of every context."""
        first = self._service.step(0, 0.0, self._decoding, self._context)
        more = self._decoding * self._service.kv_s
        return steps * first + more * steps * (steps - 1) / 2

    def _cut_short(self, now: float) -> float | None:
        """On an arrival, end a run of decode steps after the one in flight."""
        if self._chunks or self._jump <= 1:
            return None
        first = self._service.step(0, 0.0, self._decoding, self._context)
        more = self._decoding * self._service.kv_s
        since = now - self._step_started_at
        half = first - more / 2
        root = (math.sqrt(half * half + 2 * more * since) - half) / more if more else since / first
        steps = min(max(1, math.ceil(root - 1e-9)), self._jump)
        if steps == self._jump:
            return None
        self._give_back(self._jump - steps, steps)
        self._jump = steps
        self._step_ends_at = max(self._step_started_at + self._elapsed(steps), now)
        return self._step_ends_at

    def _next_stop(self) -> int:
        while self._stops:
            step, _, epoch, seq = self._stops[0]
            if seq.decoding and seq.epoch == epoch:
                return max(step - self._steps, 1)
            heapq.heappop(self._stops)
        return 1

    def _advance(self, steps: int) -> None:
        self._steps += steps
        self._context += steps * self._decoding

    def _stop_due(self, now: float) -> None:
        while self._stops and self._stops[0][0] <= self._steps:
            _, _, epoch, seq = heapq.heappop(self._stops)
            if seq.decoding and seq.epoch == epoch:
                self._leave_decoding(seq)
                self._continue_or_end(seq, now)

    def _prefilled(self, seq: SimSequence, now: float) -> None:
        self.prefilling.remove(seq)
        blocks = seq.request.blocks
        own = blocks[len(seq.held_blocks) : self._sealed_blocks(seq)]
        self.pool.name(own)
        seq.own_pages -= len(own) * self.pool.block_pages
        seq.held_blocks += own
        seq.emitted += 1
        if math.isnan(seq.first_token_at):
            seq.first_token_at = now
        if self._on_first_token:
            self._on_first_token(seq, now)
        self._continue_or_end(seq, now)

    def _continue_or_end(self, seq: SimSequence, now: float) -> None:
        if seq.emitted >= seq.request.output_tokens:
            self._end(seq, now)
        elif seq.covered is not None and seq.emitted >= seq.covered:
            self._extend(seq, now)
        else:
            self._enter_decoding(seq)

    def _extend(self, seq: SimSequence, now: float) -> None:
        assert self._on_want is not None
        self._on_want(seq, now)
        if self._covers_more(seq):
            self._enter_decoding(seq)
        else:
            seq.stalls += 1
            self._stalled.append(seq)

    def _resume_stalled(self) -> None:
        for seq in [seq for seq in self._stalled if self._covers_more(seq)]:
            self._stalled.remove(seq)
            self._enter_decoding(seq)

    def _covers_more(self, seq: SimSequence) -> bool:
        return seq.covered is not None and seq.emitted < seq.covered

    def _enter_decoding(self, seq: SimSequence) -> None:
        limit = seq.request.output_tokens
        if seq.covered is not None:
            limit = min(limit, seq.covered)
        seq.decoding, seq.since = True, self._steps
        seq.epoch += 1
        self._order += 1
        stop = self._steps + limit - seq.emitted
        heapq.heappush(self._stops, (stop, self._order, seq.epoch, seq))
        self._phases[(self._steps - seq.context) % self.page_size] += 1
        self._decoding += 1
        self._context += seq.context

    def _leave_decoding(self, seq: SimSequence) -> None:
        steps = self._steps - seq.since
        self._phases[(seq.since - seq.context) % self.page_size] -= 1
        self._decoding -= 1
        before = self._pages(seq.context)
        seq.context += steps
        seq.emitted += steps
        seq.own_pages += self._pages(seq.context) - before
        seq.decoding = False
        self._context -= seq.context

    # Pages

    def _pages(self, tokens: int) -> int:
        """Full pages. Those in a format's exact windows are counted too: a slight overestimate."""
        return tokens // self.page_size

    def _sealed_blocks(self, seq: SimSequence) -> int:
        sealed = self._pages(seq.request.prompt_tokens)
        return min(len(seq.request.blocks), sealed // self.pool.block_pages)

    def _fills(self, steps: int, after: int = 0) -> int:
        """Pages that decoding fills in `steps` steps, starting `after` steps from now."""
        cycles, rest = divmod(steps, self.page_size)
        start = self._steps + after
        partial = sum(self._phases[(start + i) % self.page_size] for i in range(1, rest + 1))
        return cycles * self._decoding + partial

    def _room_to_decode(self, steps: int) -> int:
        """Take the pages for up to `steps` decode steps; preempt until there are enough for one."""
        while self._decoding:
            count = steps
            available = self.pool.available_pages
            if self._fills(count) > available:
                low, high = 0, count
                while low < high - 1:
                    middle = (low + high) // 2
                    low, high = (
                        (middle, high) if self._fills(middle) <= available else (low, middle)
                    )
                count = low
            if count:
                self.pool.take(self._fills(count))
                return count
            self._preempt(next(reversed(self.running)))
        return 0

    def _give_back(self, steps: int, after: int) -> None:
        self.pool.give(self._fills(steps, after))

    def _admit(self, now: float) -> None:
        budget = self._budget - self._decoding - sum(seq.to_prefill for seq in self.prefilling)
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if not self._place(seq):
                return
            self.waiting.popleft()
            self.running[seq] = None
            self.prefilling.append(seq)
            if math.isnan(seq.started_at):
                seq.started_at = now
            budget -= seq.to_prefill

    def _place(self, seq: SimSequence) -> bool:
        tokens = seq.request.prompt_tokens + seq.emitted
        sealed = self._sealed_blocks(seq)
        usable = min(sealed, (tokens - 1) // BLOCK_TOKENS)
        hits = seq.request.blocks[: self.pool.match(seq.request.blocks[:usable])]
        if self._worst_case:
            worst = self._pages(seq.request.prompt_tokens + seq.max_tokens)
            if self._reserved + worst > self.pool.total_pages:
                return False
        self.pool.hold(hits)
        own = self._pages(tokens) - len(hits) * self.pool.block_pages
        if not self.pool.take(own):
            self.pool.drop(hits)
            return False
        if self._worst_case:
            self._reserved += worst
        seq.own_pages, seq.held_blocks = own, hits
        seq.context = tokens
        seq.to_prefill = tokens - len(hits) * BLOCK_TOKENS
        if seq.preemptions:
            seq.recomputed_tokens += seq.to_prefill
        else:
            seq.cached_tokens = len(hits) * BLOCK_TOKENS
        return True

    def _preempt(self, seq: SimSequence) -> None:
        if seq.decoding:
            self._leave_decoding(seq)
        elif seq in self.prefilling:
            self.prefilling.remove(seq)
        else:
            self._stalled.remove(seq)
        self._free(seq)
        seq.preemptions += 1
        self.waiting.appendleft(seq)

    def _end(self, seq: SimSequence, now: float) -> None:
        self._free(seq)
        seq.finished_at = now
        if self._on_finish:
            self._on_finish(seq, now)

    def _free(self, seq: SimSequence) -> None:
        del self.running[seq]
        self.pool.give(seq.own_pages)
        self.pool.drop(seq.held_blocks)
        seq.own_pages, seq.held_blocks = 0, ()
        if self._worst_case:
            self._reserved -= self._pages(seq.request.prompt_tokens + seq.max_tokens)
