"""An executor that stores tokens in place of keys and values, and checks every read.

A slot holds (position, chain before it, token), where a chain is a hash over all
tokens so far. So a page that is read in the wrong place, too early, too late or in the
wrong form is always detected, and the sampled token depends only on the whole
sequence.
"""

from __future__ import annotations

import hashlib

import numpy as np

from kvmesh.workers.executor import Allocation, RankDescription
from kvmesh.workers.plan import Chunk, SampledToken, StepPlan, StepResult

Slot = tuple[int, bytes, int]
Page = list[Slot | None]

VOCAB = 50
EOS = 1


def chain(before: bytes, token: int) -> bytes:
    return hashlib.blake2b(before + token.to_bytes(4, "little"), digest_size=8).digest()


def next_token(state: bytes) -> int:
    return int.from_bytes(state, "little") % VOCAB


def expected_output(prompt: list[int], max_tokens: int, ignore_eos: bool = False) -> list[int]:
    """What this executor's model outputs after `prompt`, computed without pages."""
    state = b""
    for token in prompt:
        state = chain(state, token)
    output: list[int] = []
    while len(output) < max_tokens:
        token = next_token(state)
        output.append(token)
        if token == EOS and not ignore_eos:
            break
        state = chain(state, token)
    return output


class MemoryExecutor:
    num_ranks = 2

    def __init__(
        self, page_size: int, sink: int, recent: int, budget_pages: int, max_model_len: int = 800
    ) -> None:
        self._page_size, self._sink, self._recent = page_size, sink, recent
        self.kl_nats: dict[str, float] = {}
        self._description = RankDescription(
            model="memory",
            model_revision="0",
            dtype="float32",
            vocab_size=VOCAB,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
            sink_pages=sink,
            recent_pages=recent,
            hot_page_bytes=4,
            sealed_page_bytes=1,
            kv_budget_bytes=budget_pages,
            head_dim=8,
        )
        self.plans: list[StepPlan] = []
        self.sealed_pages = 0

    def describe(self) -> list[RankDescription]:
        return [self._description, self._description]

    def divergences(self, kv_formats: list[str]) -> list[float]:
        return [self.kl_nats.get(name, 0.0) for name in kv_formats]

    def allocate(self, allocation: Allocation) -> None:
        self._hot: list[Page] = [self._empty() for _ in range(allocation.hot_pages)]
        self._sealed: list[Page] = [self._empty() for _ in range(allocation.sealed_pages)]
        shape = (allocation.max_rows, allocation.max_pages_per_row)
        self._hot_table = np.full(shape, -1)
        self._sealed_table = np.full(shape, -1)

    def close(self) -> None:
        pass

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        for table, update in ((self._hot_table, plan.hot), (self._sealed_table, plan.sealed)):
            table[update.rows, update.pages] = update.ids
        assert len({c.row for c in plan.chunks}) == len(plan.chunks)
        for chunk in plan.chunks:
            self._write(chunk)
        for sealed in plan.seal_sealed:
            self._sealed[sealed] = self._empty()
        # A step of one token per sequence may seal after it has read (as ModelRunner does).
        later = all(chunk.num_tokens == 1 for chunk in plan.chunks)
        if not later:
            self._seal(plan)
        states = {chunk.row: self._read(chunk) for chunk in plan.chunks}
        if later:
            self._seal(plan)
        tokens = [SampledToken(next_token(states[c.row])) for c in plan.chunks if c.sample]
        return StepResult(plan.step, tokens, 0.0)

    def _seal(self, plan: StepPlan) -> None:
        for hot, sealed in zip(plan.seal_hot, plan.seal_sealed, strict=True):
            assert None not in self._hot[hot], "a page is sealed before it is full"
            self._sealed[sealed] = list(self._hot[hot])
            self.sealed_pages += 1

    def _empty(self) -> Page:
        return [None] * self._page_size

    def _write(self, chunk: Chunk) -> None:
        state = self._state_before(chunk)
        for position, token in enumerate(np.frombuffer(chunk.tokens, np.int32), chunk.start):
            page, offset = divmod(position, self._page_size)
            if offset == 0:
                self._hot[self._hot_table[chunk.row, page]] = self._empty()
            self._hot[self._hot_table[chunk.row, page]][offset] = (position, state, int(token))
            state = chain(state, int(token))

    def _state_before(self, chunk: Chunk) -> bytes:
        if chunk.start == 0:
            return b""
        page, offset = divmod(chunk.start - 1, self._page_size)
        slot = self._form(chunk.row, page, chunk.start // self._page_size)[offset]
        assert slot is not None
        return chain(slot[1], slot[2])

    def _form(self, row: int, page: int, query_page: int) -> Page:
        """The form in which a query must read a key's page."""
        if page < self._sink or page >= query_page - self._recent:
            return self._hot[self._hot_table[row, page]]
        return self._sealed[self._sealed_table[row, page]]

    def _read(self, chunk: Chunk) -> bytes:
        """Follow the chain through every key that each query of the chunk may see."""
        first, last = chunk.start // self._page_size, (chunk.end - 1) // self._page_size
        state = b""
        for query_page in range(first, last + 1):
            state = b""
            end = min(chunk.end, (query_page + 1) * self._page_size)
            for position in range(end):
                page, offset = divmod(position, self._page_size)
                slot = self._form(chunk.row, page, query_page)[offset]
                assert slot is not None and slot[:2] == (position, state), (position, slot)
                state = chain(state, slot[2])
        return state
