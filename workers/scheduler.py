"""Decides what the next step computes, and in which pages.

Decoding sequences come first, then prompts in order of arrival, chunked to what
is left of the step's tokens, and of its time (step_budget.py). When sealed pages run out the
youngest running sequence is preempted: its pages are freed and it is recomputed later.

Why preemption cannot livelock: while a preempted sequence is waiting or running,
sequences are admitted only if all running ones and the new one fit at their
maximum length. So a preempted sequence is never preempted again, the oldest
sequence never is, and every sequence that fits in the pool alone completes.

A step has at most one sequence on trial (blame.py). The others wait, in the order in which they
came, and sequences that are not on trial overtake them.

Steps are decided before the results of earlier ones are known: what is in flight counts as
computed, and a sequence whose next token is still being sampled continues with that token,
whatever it is. Only to be admitted again, after a preemption, it waits until its tokens are known.
"""

from __future__ import annotations

import bisect
from collections import deque

from kvmesh.workers.deal import fits
from kvmesh.workers.page_tables import PageTables
from kvmesh.workers.pins import PinBounds, Pins
from kvmesh.workers.plan import Chunk, StepPlan
from kvmesh.workers.pool_plan import PoolPlan
from kvmesh.workers.prefix_cache import Digest, PrefixCache
from kvmesh.workers.request import PinTerms
from kvmesh.workers.sequence import Sequence
from kvmesh.workers.sizes import PageGeometry
from kvmesh.workers.step_budget import StepBudget
from kvmesh.workers.step_draft import StepDraft
from kvmesh.workers.step_in_flight import StepInFlight


class Scheduler:
    """Owns the sequences and the page ids. `schedule` decides; `commit` records that
    the ranks carried the oldest plan out.

    in_flight: steps that were decided and not committed, oldest first
    pinned_shares: of the pages, that pins may hold, all together and of one owner
    """

    def __init__(
        self,
        geometry: PageGeometry,
        pool: PoolPlan,
        *,
        max_num_batched_tokens: int,
        prefix_cache: bool,
        step_budget: StepBudget | None = None,
        pinned_shares: tuple[float, float] = (0.5, 0.25),
    ) -> None:
        self.geometry = geometry
        self.pool = pool
        self.cache = PrefixCache(geometry, pool.hot_total, pool.sealed_pages, prefix_cache)
        self._pages = PageTables(geometry, self.cache)
        bounds = PinBounds.of(
            pool.hot_total * geometry.kvp, pool.sealed_pages * geometry.kvp, *pinned_shares
        )
        self.pins = Pins(self.cache, bounds)
        self.waiting: list[Sequence] = []  # by arrival
        self.running: list[Sequence] = []  # by arrival
        self.in_flight: deque[StepInFlight] = deque()
        self._max_num_batched_tokens = max_num_batched_tokens
        self._step_budget = step_budget
        self._free_rows = list(range(pool.max_num_seqs - 1, -1, -1))
        self._step = 0
        # The last admission that failed for lack of pages, how many each rank had, and the first
        # page of the prompt that was not cached. It is not retried (a whole prompt is hashed and
        # matched) until these numbers have changed, or that page is cached.
        self._failed_admission: tuple[Sequence, list[int], Digest | None] | None = None
        self.preemptions_total = 0

    def add(self, seq: Sequence) -> None:
        bisect.insort(self.waiting, seq, key=_arrival)

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence that has ended, was cancelled, or will be computed again: nothing that
        is in flight for it counts."""
        for step in self.in_flight:
            step.forget(seq)
        seq.pending = 0
        if seq.row is None:
            self.waiting.remove(seq)
        else:
            self.running.remove(seq)
            self._release(seq)

    def preempt_youngest(self) -> Sequence:
        """Free the pages of the youngest running sequence; it waits and is recomputed.

        It still gets the tokens that are being sampled for it.
        """
        seq = self.running.pop()
        self._release(seq)
        seq.num_computed = 0
        seq.preemptions += 1
        self.preemptions_total += 1
        self.add(seq)
        return seq

    def pin(self, seq: Sequence, terms: PinTerms, now: float) -> None:
        """Its prompt is computed, or it ends: its full pages stay cached from now on.

        `Sequence.pinned_tokens` says of how many tokens; of none if a bound is reached.
        """
        pages = seq.prompt_tokens // self.geometry.page_size
        if not pages or not seq.is_findable or not self.cache.enabled:
            return
        digests = seq.digests(pages)[:pages]
        if not terms.keep_s:
            self.pins.end(terms.owner, digests[-1])
            return
        windows = self.geometry.sink_pages + self.geometry.recent_pages > 0
        exact = [
            digest
            for page, digest in enumerate(digests)
            if windows and (page < self.geometry.sink_pages or self._pages.ends_near(seq, page))
        ]
        held = self.pins.hold(terms.owner, digests, exact, now + terms.keep_s)
        seq.pinned_tokens = pages * self.geometry.page_size if held else 0

    def isolate(self, seq: Sequence) -> None:
        """Compute a running sequence again, without sharing pages; they may hold NaN.

        It may have them from another sequence, or others from it.
        """
        self._pages.withdraw(seq)
        seq.shares_pages = False
        self.remove(seq)
        seq.num_computed = 0
        self.add(seq)

    def schedule(self) -> StepPlan | None:
        """The next step, or None when there is nothing to compute."""
        draft = StepDraft(
            self._max_num_batched_tokens, [self.pool.headroom_pages] * self.geometry.kvp
        )
        left = [(seq, seq.to_compute) for seq in self.running]
        decoding = [seq for seq, count in left if count == 1]
        prefilling = [seq for seq, count in left if count > 1]
        for seq in decoding + prefilling:
            # Still running, not preempted meanwhile.
            if seq.row is not None and draft.tokens_left and draft.takes(seq):
                self._plan_chunk(draft, seq)
        while self._max_chunk(draft, 0) and (admitted := self._admit(draft)):
            self._plan_chunk(draft, admitted)
        if not draft.chunks:
            if not self.in_flight:
                could_run = [seq for seq in self.waiting if seq.prepared]
                assert self.running or not could_run, "sequences are waiting, but none can run"
                assert all(seq.paused for seq in self.running), "a sequence is missing in the step"
            return None
        self._step += 1
        step = draft.finish(self._step)
        for chunk, seq in zip(step.plan.chunks, step.sequences, strict=True):
            seq.num_computed = chunk.end
            seq.pending += chunk.sample
            seq.num_scored += len(chunk.targets) // 4
            self._pages.publish(seq)
        self.in_flight.append(step)
        return step.plan

    def commit(self, plan: StepPlan) -> list[tuple[Chunk, Sequence | None]]:
        """The oldest plan in flight was carried out; its chunks with their sequences, None in place
        of those for which it does not count."""
        step = self.in_flight.popleft()
        assert step.plan.step == plan.step, "steps are committed in order"
        for one in step.aboard:
            if one is not None:
                one.seq.pending -= one.chunk.sample
                if one.held is not None:
                    one.seq.note_held(one.held)
        sequences = (None if one is None else one.seq for one in step.aboard)
        return list(zip(plan.chunks, sequences, strict=True))

    def check(self) -> None:
        """Audit: every page held by a sequence is used, every row by one, and nothing else is."""
        self._pages.check(self.running)
        self.pins.check()
        rows = len(self._free_rows) + len(self.running)
        assert rows == self.pool.max_num_seqs, f"{rows} rows of {self.pool.max_num_seqs} are known"

    def _admit(self, draft: StepDraft) -> Sequence | None:
        """Give the first waiting sequence a row and its prefix, if its pages fit."""
        seq = next(filter(draft.takes, self.waiting), None)
        if seq is None or seq.pending or not self._free_rows:
            return None
        worst_case = any(s.preemptions for s in self.waiting + self.running)
        reserved = [self._pages_needed(other, worst_case) for other in self.running]
        if self._fails_again(seq, reserved):
            return None
        # One token must be computed, or the step would lose the row and its tables.
        reusable = min(seq.num_tokens, seq.leased_tokens) - 1
        if seq.num_scored < seq.to_score:  # positions without a score are computed
            reusable = min(reusable, seq.num_scored)
        max_pages = reusable // self.geometry.page_size
        hit = self._pages.reuse(seq, max_pages)
        if not fits(self._pages_needed(seq, worst_case), self._room(reserved)):
            self._pages.give_back(seq, hit)
            missing = self._pages.first_missing(seq, hit.num_pages, max_pages)
            self._failed_admission = (seq, self._room(reserved), missing)
            return None
        self.waiting.remove(seq)
        seq.num_computed = hit.num_pages * self.geometry.page_size
        if seq.started_s is None:  # pages that it computed before a preemption do not count
            seq.cached_tokens = min(seq.num_computed, seq.prompt_tokens)
        self._pages.start(seq)
        seq.row = self._free_rows.pop()
        bisect.insort(self.running, seq, key=_arrival)
        draft.start_row(seq)
        return seq

    def _fails_again(self, seq: Sequence, reserved: list[list[int]]) -> bool:
        if self._failed_admission is None:
            return False
        failed, room, missing = self._failed_admission
        if failed is not seq or room != self._room(reserved):
            return False
        return missing is None or missing not in self.cache

    def _pages_needed(self, seq: Sequence, worst_case: bool) -> list[int]:
        """Sealed pages of each rank that the sequence still needs: for its tokens and the next
        one, or up to its maximum length."""
        tokens = seq.max_tokens_total if worst_case else seq.length + 1
        return seq.deal.counts(seq.sealed_missing(tokens))

    def _room(self, reserved: list[list[int]]) -> list[int]:
        """Sealed pages that each rank has besides those reserved for running sequences."""
        taken = map(sum, zip(*reserved, strict=True)) if reserved else [0] * self.geometry.kvp
        available = self.cache.sealed.available
        return [count - other for count, other in zip(available, taken, strict=True)]

    def _max_chunk(self, draft: StepDraft, start: int) -> int:
        """How many tokens of a prompt the step has left, from there on."""
        if self._step_budget is None:
            return draft.tokens_left
        return min(draft.tokens_left, self._step_budget.chunk_tokens(draft.work, start))

    def _plan_chunk(self, draft: StepDraft, seq: Sequence) -> None:
        start, to_compute = seq.num_computed, seq.to_compute
        first = start // self.geometry.page_size
        held = first in seq.hot
        if held and to_compute == 1 and (start + 1) % self.geometry.page_size:
            # Most steps of most sequences: a token more in a page that stays open.
            if start < seq.leased_tokens:
                draft.add_chunk(seq, start, start + 1)
            return
        first_new = first + held
        # Hot pages of each rank that are the sequence's own; more are from the headroom.
        own = [self.geometry.hot_per_sequence() - held for held in seq.hot_by_rank()]
        kvp = seq.deal.kvp
        last = -1 + min(  # the last page that gets a hot page
            seq.deal.first_from(first_new, rank) + kvp * (own[rank] + draft.headroom_left[rank])
            for rank in range(kvp)
        )
        count = draft.tokens_left if to_compute == 1 else self._max_chunk(draft, start)
        end = min(
            start + to_compute,
            start + count,
            (last + 1) * self.geometry.page_size,
            seq.leased_tokens,
        )
        if end <= start:  # paused
            return
        missing = seq.sealed_missing(end)
        while not fits(seq.deal.counts(missing), self.cache.sealed.available):
            if any(other.about_to_end for other in self.running):
                return  # there will be pages after the next result
            draft.undo(self.running[-1])
            if self.preempt_youngest() is seq:
                return
        touched = range(first, (end - 1) // self.geometry.page_size + 1)
        for rank, count in enumerate(seq.deal.counts(range(first_new, touched.stop))):
            draft.headroom_left[rank] -= max(0, count - own[rank])
        self._pages.write(seq, touched, draft)
        self._pages.seal(seq, missing, draft)
        draft.add_chunk(seq, start, end, seq.held_pages())

    def _release(self, seq: Sequence) -> None:
        assert seq.row is not None
        self._free_rows.append(seq.row)
        seq.row = None
        self._pages.free(seq)


def _arrival(seq: Sequence) -> float:
    return seq.arrived_s
