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
"""

from __future__ import annotations

import bisect

from kvmesh.workers.plan import Chunk, RowStart, StepPlan, TableUpdate
from kvmesh.workers.pool_plan import PoolPlan
from kvmesh.workers.prefix_cache import Digest, PrefixCache
from kvmesh.workers.sequence import Sequence
from kvmesh.workers.sizes import BLOCK_PAGES, PageGeometry, PageNeed
from kvmesh.workers.step_budget import StepBudget, StepWork


class Scheduler:
    """Owns the sequences and the page ids. `schedule` decides; `commit` records that
    the ranks carried the plan out."""

    def __init__(
        self,
        geometry: PageGeometry,
        pool: PoolPlan,
        *,
        max_num_batched_tokens: int,
        prefix_cache: bool,
        step_budget: StepBudget | None = None,
    ) -> None:
        self.geometry = geometry
        self.pool = pool
        self.cache = PrefixCache(geometry, pool.hot_total, pool.sealed_pages, prefix_cache)
        self.waiting: list[Sequence] = []  # by arrival
        self.running: list[Sequence] = []  # by arrival
        self._max_num_batched_tokens = max_num_batched_tokens
        self._step_budget = step_budget
        self._free_rows = list(range(pool.max_num_seqs - 1, -1, -1))
        self._step = 0
        # The last admission that failed for lack of pages, and how many were available. It
        # is not retried (a whole prompt is hashed and matched) until that number has changed.
        self._failed_admission: tuple[Sequence, int] | None = None
        self.preemptions_total = 0

    def add(self, seq: Sequence) -> None:
        bisect.insort(self.waiting, seq, key=_arrival)

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence that has ended or was cancelled; called between two steps."""
        if seq.row is None:
            self.waiting.remove(seq)
        else:
            self.running.remove(seq)
            self._release(seq)

    def preempt_youngest(self) -> Sequence:
        """Free the pages of the youngest running sequence; it waits and is recomputed."""
        seq = self.running.pop()
        self._release(seq)
        seq.num_computed = 0
        seq.preemptions += 1
        self.preemptions_total += 1
        self.add(seq)
        return seq

    def isolate(self, seq: Sequence) -> None:
        """Compute a running sequence again, without sharing pages; they may hold NaN.

        It may have them from another sequence, or others from it.
        """
        self.cache.withdraw(seq.digests(seq.num_computed // self.geometry.page_size))
        self.remove(seq)
        seq.num_computed = 0
        seq.shares_pages = False
        self.add(seq)

    def schedule(self) -> StepPlan | None:
        """The next step, or None when there is nothing to compute."""
        draft = _Draft(self._max_num_batched_tokens, self.pool.headroom_pages)
        decoding = [seq for seq in self.running if seq.to_compute == 1]
        prefilling = [seq for seq in self.running if seq.to_compute > 1]
        for seq in decoding + prefilling:
            # Still running, not preempted meanwhile.
            if seq.row is not None and draft.tokens_left and draft.takes(seq):
                self._plan_chunk(draft, seq)
        while self._max_chunk(draft, 0) and (admitted := self._admit(draft)):
            self._plan_chunk(draft, admitted)
        if not draft.chunks:
            could_run = [seq for seq in self.waiting if seq.prepared]
            assert self.running or not could_run, "sequences are waiting, but none can run"
            assert all(seq.paused for seq in self.running), "a sequence is missing from the step"
            return None
        self._step += 1
        return draft.plan(self._step)

    def commit(self, plan: StepPlan) -> tuple[list[Sequence], list[Sequence]]:
        """Advance by a plan that was carried out.

        Returns the sampled sequences, and those that have more to compute, in the plan's order.
        Hot pages that have left their windows are released, and full pages enter the prefix
        cache."""
        by_row = {seq.row: seq for seq in self.running}
        sampled: list[Sequence] = []
        unfinished: list[Sequence] = []
        for chunk in plan.chunks:
            seq = by_row[chunk.row]
            first_full = seq.num_computed // self.geometry.page_size
            seq.num_computed = chunk.end
            seq.num_scored += len(chunk.targets) // 4
            self._publish(seq, first_full)
            (sampled if chunk.sample else unfinished).append(seq)
        return sampled, unfinished

    def check(self) -> None:
        """Audit: every page held by a sequence is used, and nothing else is."""
        self.cache.check()
        hot = {page for seq in self.running for page in seq.hot.values()}
        sealed = {page for seq in self.running for page in seq.sealed.values()}
        used = PageNeed(self.cache.hot.used, self.cache.sealed.used)
        held = PageNeed(len(hot), len(sealed))
        assert used == held, f"{used} are in use, {held} held by sequences: {self._holdings()}"
        rows = len(self._free_rows) + len(self.running)
        assert rows == self.pool.max_num_seqs, f"{rows} rows of {self.pool.max_num_seqs} are known"

    def _holdings(self) -> str:
        """What every running sequence holds, in words."""
        holdings = [
            f"{seq.request.request_id} holds {PageNeed(len(seq.hot), len(seq.sealed))}"
            for seq in self.running
        ]
        return ", ".join(holdings) or "no sequence runs"

    def _admit(self, draft: _Draft) -> Sequence | None:
        """Give the first waiting sequence a row and its prefix, if its pages fit."""
        seq = next(filter(draft.takes, self.waiting), None)
        if seq is None or not self._free_rows:
            return None
        worst_case = any(s.preemptions for s in self.waiting + self.running)
        reserved = sum(self._pages_needed(other, worst_case) for other in self.running)
        if self._failed_admission == (seq, self.cache.sealed.available - reserved):
            return None
        # One token must be computed, or the step would lose the row and its tables.
        reusable = min(seq.num_tokens, seq.leased_tokens) - 1
        if seq.num_scored < seq.to_score:  # positions without a score are computed
            reusable = min(reusable, seq.num_scored)
        full_pages = reusable // self.geometry.page_size
        known = seq.digests(full_pages)[:full_pages] if seq.shares_pages else ()
        hit = self.cache.match(known)
        self.cache.share(hit)
        seq.hot.update(hit.hot)
        seq.sealed.update(hit.sealed)
        if self._pages_needed(seq, worst_case) > self.cache.sealed.available - reserved:
            self.cache.unshare(hit)
            seq.hot.clear()
            seq.sealed.clear()
            self._failed_admission = (seq, self.cache.sealed.available - reserved)
            return None
        self.waiting.remove(seq)
        seq.num_computed = hit.num_pages * self.geometry.page_size
        if seq.started_s is None:  # pages that it computed before a preemption do not count
            seq.cached_tokens = min(seq.num_computed, seq.prompt_tokens)
        seq.row = self._free_rows.pop()
        bisect.insort(self.running, seq, key=_arrival)
        draft.start_row(seq)
        return seq

    def _pages_needed(self, seq: Sequence, worst_case: bool) -> int:
        """Sealed pages that the sequence still needs: for its tokens and the next one, or up to
        its maximum length."""
        tokens = seq.max_tokens_total if worst_case else seq.num_tokens + 1
        return len(seq.sealed_missing(tokens))

    def _max_chunk(self, draft: _Draft, start: int) -> int:
        """How many tokens of a prompt the step has left, from there on."""
        if self._step_budget is None:
            return draft.tokens_left
        return min(draft.tokens_left, self._step_budget.chunk_tokens(draft.work, start))

    def _plan_chunk(self, draft: _Draft, seq: Sequence) -> None:
        start = seq.num_computed
        first = start // self.geometry.page_size
        own = self.geometry.hot_per_sequence() - len(seq.hot) + (first in seq.hot)
        last = first + own + draft.headroom_left - 1  # the last page that gets a hot page
        count = draft.tokens_left if seq.to_compute == 1 else self._max_chunk(draft, start)
        end = min(
            start + seq.to_compute,
            start + count,
            (last + 1) * self.geometry.page_size,
            seq.leased_tokens,
        )
        if end <= start:  # paused
            return
        missing = seq.sealed_missing(end)
        while self.cache.sealed.available < len(missing):
            draft.undo(self.running[-1])
            if self.preempt_youngest() is seq:
                return
        touched = range(first, (end - 1) // self.geometry.page_size + 1)
        draft.headroom_left -= max(0, len(touched) - own)
        for page in touched:
            if page not in seq.hot:
                seq.hot[page] = self.cache.hot.take()
                draft.set_hot(seq, page)
        for page in missing:
            self._seal(draft, seq, page)
        seq.note_peak()
        draft.add_chunk(seq, start, end)

    def _seal(self, draft: _Draft, seq: Sequence, page: int) -> None:
        digest = seq.digests(page + 1)[page]
        found = None
        if seq.shares_pages:
            found = self.cache.find_sealed(digest)
            if found is None:
                found = draft.being_sealed(seq, digest)
        if found is not None:
            seq.sealed[page] = self.cache.sealed.share(found)
        else:
            seq.sealed[page] = self.cache.sealed.take()
            draft.seal(seq, page, digest)
        draft.set_sealed(seq, page)

    def _publish(self, seq: Sequence, first_full: int) -> None:
        num_full = seq.num_computed // self.geometry.page_size
        due = self.geometry.sealed_range(seq.num_computed)
        outdated = [page for page in seq.hot if page in due]
        if seq.shares_pages:
            digests = seq.digests(num_full)
            for page in range(first_full, num_full):
                self.cache.name_hot(digests[page], seq.hot[page])
                self._note_block(digests, page)
            for page in outdated:
                self.cache.name_sealed(digests[page], seq.sealed[page])
                self._note_block(digests, page)
        for page in outdated:
            self.cache.release_hot(seq.hot.pop(page), seq.num_computed, at_end=seq.ends_near(page))

    def _note_block(self, digests: list[Digest], page: int) -> None:
        if (page + 1) % BLOCK_PAGES == 0:
            self.cache.note_block(digests[page])

    def _release(self, seq: Sequence) -> None:
        assert seq.row is not None
        self._free_rows.append(seq.row)
        seq.row = None
        self._drop_pages(seq)

    def _drop_pages(self, seq: Sequence) -> None:
        # Last pages first, so that a cached prefix is evicted from its end.
        for page in sorted(seq.hot, reverse=True):
            self.cache.release_hot(seq.hot[page], seq.num_computed, at_end=True)
        for page in sorted(seq.sealed, reverse=True):
            self.cache.release_sealed(seq.sealed[page], seq.num_computed)
        seq.hot.clear()
        seq.sealed.clear()


class _Draft:
    """A step plan under construction, kept by sequence so that a preempted one can be removed."""

    def __init__(self, tokens_left: int, headroom_left: int) -> None:
        self.tokens_left = tokens_left
        self.headroom_left = headroom_left
        self.work = StepWork()
        self._on_trial: Sequence | None = None
        self.row_starts: dict[int, RowStart] = {}
        self.chunks: dict[int, Chunk] = {}
        # Row -> logical page -> page id. No tuples: a million tokens have 16,384 pages.
        self._hot: dict[int, dict[int, int]] = {}
        self._sealed: dict[int, dict[int, int]] = {}
        self._seals: dict[int, list[tuple[int, int, int]]] = {}
        self._being_sealed: dict[Digest, tuple[Sequence, int]] = {}

    def start_row(self, seq: Sequence) -> None:
        row = _row(seq)
        params = seq.request.params
        penalised = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        history = seq.tokens[: seq.num_computed].tobytes() if penalised else b""
        self.row_starts[row] = RowStart(row, params, seq.prompt_tokens, history)
        self._hot[row] = dict(seq.hot)
        self._sealed[row] = dict(seq.sealed)

    def set_hot(self, seq: Sequence, page: int) -> None:
        self._hot.setdefault(_row(seq), {})[page] = seq.hot[page]

    def set_sealed(self, seq: Sequence, page: int) -> None:
        self._sealed.setdefault(_row(seq), {})[page] = seq.sealed[page]

    def being_sealed(self, seq: Sequence, digest: Digest) -> int | None:
        """The page that an older sequence seals with these contents in the same step.

        Not a younger one's: that sequence could be removed, and its page with it.
        """
        found = self._being_sealed.get(digest)
        return found[1] if found is not None and _arrival(found[0]) < _arrival(seq) else None

    def seal(self, seq: Sequence, page: int, digest: Digest) -> None:
        if seq.shares_pages:
            self._being_sealed.setdefault(digest, (seq, seq.sealed[page]))
        self._seals.setdefault(_row(seq), []).append((seq.hot[page], seq.sealed[page], page))

    def takes(self, seq: Sequence) -> bool:
        """Whether the sequence can run, and not only without another one on trial."""
        return seq.prepared and (self._on_trial is None or not seq.on_trial)

    def add_chunk(self, seq: Sequence, start: int, end: int) -> None:
        row = _row(seq)
        if seq.on_trial:
            self._on_trial = seq
        self.tokens_left -= end - start
        sample = end == seq.num_tokens
        score_start, score_end = max(start, seq.num_scored), min(end, seq.to_score)
        targets = seq.tokens[score_start + 1 : score_end + 1].tobytes()
        self.chunks[row] = Chunk(
            row, start, seq.tokens[start:end].tobytes(), sample, targets, score_start
        )
        self.work.add(self.chunks[row])

    def undo(self, seq: Sequence) -> None:
        """Remove a sequence that is about to lose its row and pages."""
        row = _row(seq)
        chunk = self.chunks.pop(row, None)
        if chunk is not None:
            self.tokens_left += chunk.num_tokens
            self.work.add(chunk, -1)
        for part in (self.row_starts, self._hot, self._sealed, self._seals):
            part.pop(row, None)
        for digest in [d for d, (sealer, _) in self._being_sealed.items() if sealer is seq]:
            del self._being_sealed[digest]

    def plan(self, step: int) -> StepPlan:
        seals = [seal for found in self._seals.values() for seal in found]
        return StepPlan(
            step=step,
            row_starts=list(self.row_starts.values()),
            chunks=list(self.chunks.values()),
            hot=_table(self._hot),
            sealed=_table(self._sealed),
            seal_hot=[hot for hot, _, _ in seals],
            seal_sealed=[sealed for _, sealed, _ in seals],
            seal_pages=[page for _, _, page in seals],
        )


def _table(entries: dict[int, dict[int, int]]) -> TableUpdate:
    update = TableUpdate([], [], [])
    for row, ids in entries.items():
        update.rows.extend([row] * len(ids))
        update.pages.extend(ids.keys())
        update.ids.extend(ids.values())
    return update


def _row(seq: Sequence) -> int:
    assert seq.row is not None
    return seq.row


def _arrival(seq: Sequence) -> float:
    return seq.arrived_s
