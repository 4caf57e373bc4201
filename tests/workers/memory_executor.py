"""An executor that stores tokens in place of keys and values, and checks every read.

A slot holds (position, chain before its token, chain with it), where a chain is a hash
over all tokens so far. So a page that is read in the wrong place, too early, too late or in the
wrong form is always detected, and the sampled token depends only on the whole
sequence and on the request's top_k, so that equal prompts can have different
outputs. For sequences with penalties it also checks that it was given every token of
the sequence once.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from functools import cache
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import tokenizers

from kvmesh.workers.executor import Allocation, MakeMasks, RankDescription, StepByStep
from kvmesh.workers.plan import (
    PENDING,
    Chunk,
    RowStart,
    SampledToken,
    StepPlan,
    StepResult,
    TokenMasks,
    TokenScores,
)

State = int  # the chain over a sequence's first tokens
Slot = tuple[int, State, State]  # position, the chain before its token and with it
Page = list[Slot | None]

TP = 2  # ranks that have equal pages
VOCAB = 50
EOS = 1
NEVER_SAMPLED = VOCAB - 1


START: State = 0


def chain(before: State, token: int) -> State:
    """Knuth's MMIX generator, with the token as its increment."""
    return (before * 6364136223846793005 + 2 * token + 1) % 2**64


def next_token(state: State, top_k: int, allowed: Sequence[int] | None = None) -> int:
    drawn = state >> 32 ^ top_k
    return drawn % NEVER_SAMPLED if allowed is None else allowed[drawn % len(allowed)]


def allowed_tokens(masks: TokenMasks) -> dict[int, list[int]]:
    """The token ids that masks allow, by position."""
    packed = np.frombuffer(masks.bits, np.uint8).reshape(len(masks.positions), -1)
    bits = np.unpackbits(packed, axis=1, bitorder="little")
    return {
        position: np.flatnonzero(row).tolist()
        for position, row in zip(masks.positions, bits, strict=True)
    }


def score(before: State, token: int) -> float:
    """A log-probability that only these tokens have."""
    return -float(chain(before, token) >> 40)


def expected_scores(prompt: Sequence[int]) -> list[float]:
    """What this executor's model scores the prompt's tokens, from the second on."""
    state, scores = START, []
    for token, following in itertools.pairwise(prompt):
        state = chain(state, token)
        scores.append(score(state, following))
    return scores


def expected_output(
    prompt: Sequence[int],
    max_tokens: int,
    ignore_eos: bool = False,
    stop_token_ids: Collection[int] = (),
    min_tokens: int = 0,
    top_k: int = 0,
) -> list[int]:
    """What this executor's model outputs after `prompt`, computed without pages."""
    stops = {*stop_token_ids, *(() if ignore_eos else (EOS,))}
    state = START
    for token in prompt:
        state = chain(state, token)
    output: list[int] = []
    while len(output) < max_tokens:
        token = next_token(state, top_k)
        output.append(token)
        if token in stops and len(output) >= min_tokens:
            break
        state = chain(state, token)
    return output


@cache
def letters() -> str:
    """Directory with a tokenizer for which the tokens are the characters from A on."""
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(_NAMES, []))
    raw.decoder = tokenizers.decoders.Fuse()
    raw.save(f"{_LETTERS.name}/tokenizer.json")
    return _LETTERS.name


_LETTERS = TemporaryDirectory()
_NAMES = {chr(ord("A") + token): token for token in range(VOCAB)}


class MemoryExecutor(StepByStep):
    """model_path: of a tokenizer, for constraints

    With kvp > 1 it holds the pages of all kvp ranks, as many of each, and checks that every page
    that is written, sealed or read belongs to the rank that its sequence's offset says.
    """

    def __init__(
        self,
        page_size: int,
        sink: int,
        recent: int,
        budget_pages: int,
        max_model_len: int = 800,
        model_path: str | None = None,
        kvp: int = 1,
    ) -> None:
        super().__init__()
        self.num_ranks = TP * kvp
        self._kvp = kvp
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
            model_path=letters() if model_path is None else model_path,
            kvp=kvp,
        )
        self.plans: list[StepPlan] = []
        self._top_k: dict[int, int] = {}  # by row
        self._sampled: dict[int, int] = {}  # the token that a row's last step has sampled
        # Of rows with penalties: the chain over the tokens that the sampler was given.
        self._recorded: dict[int, State] = {}
        self.sealed_pages = 0

    def describe(self) -> list[RankDescription]:
        return [self._description] * self.num_ranks

    def divergences(self, kv_formats: list[str]) -> list[float]:
        return [self.kl_nats.get(name, 0.0) for name in kv_formats]

    def allocate(self, allocation: Allocation) -> None:
        kvp = self._kvp
        self._hot: list[Page] = [self._empty() for _ in range(kvp * allocation.hot_pages)]
        self._sealed: list[Page] = [self._empty() for _ in range(kvp * allocation.sealed_pages)]
        shape = (allocation.max_rows, kvp * allocation.max_pages_per_row)
        self._offsets = np.zeros(allocation.max_rows, np.int64)
        self._hot_table = np.full(shape, -1)
        self._sealed_table = np.full(shape, -1)

    def close(self) -> None:
        pass

    def execute(self, plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        self.plans.append(plan)
        chunks = [self._known(chunk) for chunk in plan.chunks]
        plan = msgspec.structs.replace(plan, chunks=chunks)
        for row_start in plan.row_starts:
            self._offsets[row_start.row] = row_start.offset
        for update in (plan.hot, plan.sealed):
            ranks = (self._offsets[update.rows] + np.array(update.pages, np.int64)) % self._kvp
            assert (ranks == np.array(update.ids, np.int64) % self._kvp).all(), "a foreign page"
        for table, update in ((self._hot_table, plan.hot), (self._sealed_table, plan.sealed)):
            table[update.rows, update.pages] = update.ids
        assert len({c.row for c in plan.chunks}) == len(plan.chunks)
        for row_start in plan.row_starts:
            self._start_row(row_start)
        for chunk in plan.chunks:
            self._write(chunk)
            if chunk.row in self._recorded:
                self._record(chunk.row, chunk.tokens)
        for sealed in plan.seal_sealed:
            self._sealed[sealed] = self._empty()
        # A step of one token per sequence may seal after it has read (as ModelRunner does).
        later = all(chunk.num_tokens == 1 for chunk in plan.chunks)
        if not later:
            self._seal(plan)
        states = {chunk.row: self._read(chunk) for chunk in plan.chunks}
        if later:
            self._seal(plan)
        for row in states.keys() & self._recorded:
            assert self._recorded[row] == states[row], "the sampler does not know the sequence"
        rows = [chunk.row for chunk in plan.chunks if chunk.sample]
        assert plan.masked == (masks is not None)
        allowed = {} if masks is None else allowed_tokens(masks())
        tokens = [
            SampledToken(next_token(states[row], self._top_k[row], allowed.get(position)))
            for position, row in enumerate(rows)
        ]
        self._sampled |= {row: x.token_id for row, x in zip(rows, tokens, strict=True)}
        scores = [self._score(chunk) for chunk in plan.chunks if chunk.targets]
        return StepResult(plan.step, tokens, 0.0, scores)

    def _known(self, chunk: Chunk) -> Chunk:
        if chunk.tokens != PENDING:
            return chunk
        token = self._sampled[chunk.row].to_bytes(4, "little")
        return msgspec.structs.replace(chunk, tokens=token)

    def _score(self, chunk: Chunk) -> TokenScores:
        """Scores that depend on all tokens up to and with the target; one alternative each."""
        targets = np.frombuffer(chunk.targets, np.int32)
        assert chunk.start <= chunk.score_start
        assert chunk.score_start + len(targets) <= chunk.end
        within = np.frombuffer(chunk.tokens, np.int32)
        first = chunk.score_start - chunk.start
        inner = within[first + 1 : first + 1 + len(targets)]
        assert (targets[: len(inner)] == inner).all(), "targets are not the tokens that follow"
        state = self._state_before(chunk)
        logprobs = []
        for position, token in enumerate(within, chunk.start):
            state = chain(state, int(token))
            if chunk.score_start <= position < chunk.score_start + len(targets):
                logprobs.append(score(state, int(targets[position - chunk.score_start])))
        values = np.array(logprobs, np.float32)
        return TokenScores(values.tobytes(), targets.tobytes(), values.tobytes())

    def _start_row(self, start: RowStart) -> None:
        params = start.params
        self._top_k[start.row] = params.top_k
        neutral = (1.0, 0.0, 0.0)
        self._recorded.pop(start.row, None)
        if (
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        ) != neutral:
            self._recorded[start.row] = START
            self._record(start.row, start.history)
        else:
            assert not start.history, "tokens are sent twice"

    def _record(self, row: int, tokens: bytes) -> None:
        for token in np.frombuffer(tokens, np.int32):
            self._recorded[row] = chain(self._recorded[row], int(token))

    def _seal(self, plan: StepPlan) -> None:
        for hot, sealed in zip(plan.seal_hot, plan.seal_sealed, strict=True):
            assert None not in self._hot[hot], "a page is sealed before it is full"
            assert hot % self._kvp == sealed % self._kvp, "no rank has both pages"
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
            before, state = state, chain(state, int(token))
            self._hot[self._hot_table[chunk.row, page]][offset] = (position, before, state)

    def _state_before(self, chunk: Chunk) -> State:
        if chunk.start == 0:
            return START
        page, offset = divmod(chunk.start - 1, self._page_size)
        slot = self._form(chunk.row, page, chunk.start // self._page_size)[offset]
        assert slot is not None
        return slot[2]

    def _form(self, row: int, page: int, query_page: int) -> Page:
        """The form in which a query must read a key's page."""
        if page < self._sink or page >= query_page - self._recent:
            return self._hot[self._hot_table[row, page]]
        return self._sealed[self._sealed_table[row, page]]

    def _read(self, chunk: Chunk) -> State:
        """Follow the chain through every key that each query of the chunk may see."""
        first, last = chunk.start // self._page_size, (chunk.end - 1) // self._page_size
        state = START
        for query_page in range(first, last + 1):
            state, position = START, 0
            for page in range(query_page + 1):
                slots = self._form(chunk.row, page, query_page)
                for slot in slots[: chunk.end - position]:
                    assert slot is not None and slot[:2] == (position, state), (position, slot)
                    state = slot[2]
                    position += 1
        return state
