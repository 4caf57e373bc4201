"""A step plan under construction."""

from __future__ import annotations

from kvmesh.workers.plan import Chunk, RowStart, StepPlan, TableUpdate
from kvmesh.workers.prefix_cache import Digest
from kvmesh.workers.sequence import HeldPages, Sequence
from kvmesh.workers.step_budget import StepWork
from kvmesh.workers.step_in_flight import Aboard, StepInFlight


class StepDraft:
    """Kept by sequence, so that one that is preempted can be removed.

    headroom_left: pages of each rank
    """

    def __init__(self, tokens_left: int, headroom_left: list[int]) -> None:
        self.tokens_left = tokens_left
        self.headroom_left = headroom_left
        self.work = StepWork()
        self._on_trial: Sequence | None = None
        self.row_starts: dict[int, RowStart] = {}
        self.chunks: dict[int, Chunk] = {}
        self.aboard: dict[int, Aboard] = {}
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
        self.row_starts[row] = RowStart(row, params, seq.prompt_tokens, history, seq.deal.offset)
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
        return found[1] if found is not None and found[0].arrived_s < seq.arrived_s else None

    def seal(self, seq: Sequence, page: int, digest: Digest | None) -> None:
        """digest: None if others cannot share the page, or not yet"""
        if digest is not None:
            self._being_sealed.setdefault(digest, (seq, seq.sealed[page]))
        self._seals.setdefault(_row(seq), []).append((seq.hot[page], seq.sealed[page], page))

    def takes(self, seq: Sequence) -> bool:
        """Whether the sequence can run, and not only without another one on trial."""
        return seq.prepared and (self._on_trial is None or not seq.on_trial)

    def add_chunk(self, seq: Sequence, start: int, end: int, held: HeldPages | None = None) -> None:
        """held: its pages, if it has got any for this chunk"""
        row = _row(seq)
        if seq.on_trial:
            self._on_trial = seq
        self.tokens_left -= end - start
        sample = end == seq.length
        score_start, score_end = max(start, seq.num_scored), min(end, seq.to_score)
        targets = seq.tokens[score_start + 1 : score_end + 1].tobytes()
        chunk = Chunk(row, start, seq.tokens_of(start, end), sample, targets, score_start)
        self.chunks[row] = chunk
        self.aboard[row] = Aboard(seq, chunk, held)
        self.work.add(start, end)

    def undo(self, seq: Sequence) -> None:
        """Remove a sequence that is about to lose its row and pages."""
        row = _row(seq)
        chunk = self.chunks.pop(row, None)
        if chunk is not None:
            self.tokens_left += chunk.num_tokens
            self.work.add(chunk.start, chunk.end, -1)
        for part in (self.row_starts, self.aboard, self._hot, self._sealed, self._seals):
            part.pop(row, None)
        for digest in [d for d, (sealer, _) in self._being_sealed.items() if sealer is seq]:
            del self._being_sealed[digest]

    def finish(self, step: int) -> StepInFlight:
        seals = [seal for found in self._seals.values() for seal in found]
        plan = StepPlan(
            step=step,
            row_starts=list(self.row_starts.values()),
            chunks=list(self.chunks.values()),
            hot=_table(self._hot),
            sealed=_table(self._sealed),
            seal_hot=[hot for hot, _, _ in seals],
            seal_sealed=[sealed for _, sealed, _ in seals],
            seal_pages=[page for _, _, page in seals],
        )
        return StepInFlight(plan, self.work, list(self.aboard.values()))


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
