"""The engine: sequences in, tokens out, one step at a time.

    add / abort ──► Scheduler.schedule() ──► StepPlan ──► Executor ──► StepResult
                        ▲                                                  │
                        └────────── commit, stop conditions ◄──────────────┘──► SequenceDelta

Not thread-safe: one thread owns it (workers/leader.py).
"""

from __future__ import annotations

import heapq
import itertools
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait

import msgspec

from kvmesh.workers.blame import Blame
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import ConfigError, InvalidFieldError, PoolCapacityError
from kvmesh.workers.executor import Allocation, Executor, RankDescription
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.loads import (
    OLDEST,
    ArenaLoads,
    EngineInfo,
    EngineLoads,
    PoolLoads,
    SequenceLoad,
    StepTime,
)
from kvmesh.workers.plan import SampledToken, StepPlan, StepResult
from kvmesh.workers.pool_plan import plan_pool
from kvmesh.workers.request import (
    EndReason,
    EngineRequest,
    SampledLogprobs,
    SequenceDelta,
)
from kvmesh.workers.sampling_params import RANGES
from kvmesh.workers.scheduler import Scheduler
from kvmesh.workers.sequence import Sequence
from kvmesh.workers.sizes import PageGeometry, PageNeed
from kvmesh.workers.step_budget import DEFAULT_MAX_STEP_S, StepBudget
from kvmesh.workers.structured.grammars import Grammars
from kvmesh.workers.structured.masks import MaskMaker
from kvmesh.workers.structured.state import OutputState

NOT_SOUND = "the prompt's log-probabilities are not finite numbers"
PROGRESS_PERIOD_S = 1.0  # at least, between two reports of a sequence's progress
_PREPARE_S = 0.05  # an idle engine looks for commands while it waits for a grammar


class Engine:
    """Continuous batching over an executor's ranks.

    clock: seconds, monotonic. Raises ConfigError if the memory is too small for one sequence.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._clock = clock
        ranks = executor.describe()
        rank = ranks[0]
        self._eos = frozenset(rank.eos_token_ids)
        max_model_len = _max_model_len(config, rank)
        self.geometry = PageGeometry(
            page_size=config.page_size,
            sink_pages=rank.sink_pages,
            recent_pages=rank.recent_pages,
            hot_page_bytes=rank.hot_page_bytes,
            sealed_page_bytes=rank.sealed_page_bytes,
            ranks=executor.num_ranks,
        )
        pool = plan_pool(
            min(r.kv_budget_bytes for r in ranks),
            self.geometry,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_hot_share=config.max_hot_share,
        )
        executor.allocate(
            Allocation(
                hot_pages=pool.hot_total,
                sealed_pages=pool.sealed_pages,
                max_rows=pool.max_num_seqs,
                max_pages_per_row=-(-max_model_len // config.page_size),
            )
        )
        self._step_budget = _step_budget(config, rank)
        self.scheduler = Scheduler(
            self.geometry,
            pool,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefix_cache=config.prefix_cache,
            step_budget=self._step_budget,
        )
        self.info = EngineInfo(
            epoch=uuid.uuid4().hex,
            model=rank.model,
            model_revision=rank.model_revision,
            kv_format=config.kv_format,
            dtype=rank.dtype,
            tp=config.tp,
            geometry=self.geometry,
            capacity=PageNeed(pool.hot_pages, pool.sealed_pages),
            max_model_len=max_model_len,
            vocab_size=rank.vocab_size,
            max_num_seqs=pool.max_num_seqs,
            prefix_cache=config.prefix_cache,
            rope=rank.rope,
        )
        self._grammars = Grammars(rank)
        self._masks = MaskMaker(rank.vocab_size)
        self._preparing: dict[str, Future[OutputState]] = {}
        self._live: dict[str, Sequence] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._totals: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self.step_host_s = 0.0
        self._expert_imbalance: float | None = None
        # When the current step start, by `clock`; other threads may read it.
        self.step_start_s: float | None = None
        self._step_times: list[StepTime] = []
        # Every live sequence waits for its lease to grow.
        self.stalled = False
        self.blame = Blame()

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def check(self, request: EngineRequest) -> None:
        """Raise if this engine can never serve `request`; does not change any state.

        InvalidFieldError names the field, PoolCapacityError has the bytes."""
        prompt = request.prompt_token_ids
        if len(prompt) == 0:
            raise InvalidFieldError("prompt", "must have at least one token")
        if (bad := prompt[(prompt < 0) | (prompt >= self.info.vocab_size)]).size:
            raise InvalidFieldError(
                "prompt.token_ids",
                self._unknown_token(int(bad[0])),
            )
        for field in ("stop_token_ids", "logit_bias"):
            for token_id in getattr(request.params, field):
                if not 0 <= token_id < self.info.vocab_size:
                    raise InvalidFieldError(field, self._unknown_token(token_id))
        if request.timeout_s is not None:
            RANGES["timeout_s"].check("timeout_s", request.timeout_s)
        resumable = max(min(len(prompt), request.params.max_tokens) - 1, 0)
        if not 0 <= request.resumed_tokens <= resumable:
            raise InvalidFieldError(
                "resumed_tokens",
                f"must be from 0 to {resumable}, less than the prompt's tokens and than "
                f"max_tokens; got {request.resumed_tokens}",
            )
        scorable = len(prompt) - request.resumed_tokens - 1
        if not 0 <= request.scored_tokens <= scorable:
            raise InvalidFieldError(
                "scored_tokens",
                f"must be from 0 to {scorable}, less than the prompt's tokens; "
                f"got {request.scored_tokens}",
            )
        total = len(prompt) - request.resumed_tokens + request.params.max_tokens
        if len(prompt) >= self.info.max_model_len:
            raise InvalidFieldError(
                "prompt",
                f"must have less than {self.info.max_model_len} tokens, the model's context, "
                f"to leave room for output; got {len(prompt)}",
            )
        need = self.geometry.peak_need(min(total, self.info.max_model_len))
        # One sequence's hot pages always fit, and it can have all sealed pages.
        largest = PageNeed(self.geometry.hot_per_sequence(), self.info.capacity.sealed)
        if need.sealed > largest.sealed:
            needed, available = self.geometry.bytes_of(need), self.geometry.bytes_of(largest)
            raise PoolCapacityError(
                f"the request needs {needed:,} bytes of KV cache; this group has {available:,}",
                needed_bytes=needed,
                available_bytes=available,
                retryable=False,
            )

    def add(self, request: EngineRequest) -> None:
        """Queue a request that has passed `check`; its id must not be live."""
        assert request.request_id not in self._live
        self.stalled = False
        seq = Sequence(request, self.geometry, self.info.max_model_len)
        seq.arrived_s = seq.progress_s = self._clock()
        self._live[request.request_id] = seq
        self.scheduler.add(seq)
        if request.constraint is not None:
            output = seq.tokens[seq.prompt_tokens :].tolist()
            self._preparing[request.request_id] = self._grammars.prepare(request.constraint, output)
        self._totals["prompt"] += seq.prompt_tokens
        if request.timeout_s is not None:
            heapq.heappush(self._deadlines, (seq.arrived_s + request.timeout_s, request.request_id))

    def add_all(self, requests: Iterable[EngineRequest]) -> None:
        for request in requests:
            self.add(request)

    def abort(self, request_id: str, reason: EndReason = EndReason.ABORT) -> SequenceDelta | None:
        """End a sequence now and free its pages; None if it is not live."""
        self.stalled = False
        seq = self._live.get(request_id)
        return None if seq is None else self._finish(seq, (), (), reason)

    def extend(self, lease: LeaseTerms) -> None:
        """A lease has grown, for all live sequences under it."""
        for seq in self._live.values():
            if seq.lease is not None and seq.lease.lease_id == lease.lease_id:
                seq.extend(lease)
                self.stalled = False

    def deadline_s(self) -> float | None:
        """Seconds until the earliest deadline, None without one."""
        return max(self._deadlines[0][0] - self._clock(), 0.0) if self._deadlines else None

    def take_page_changes(self) -> dict[bytes, bool]:
        """See PrefixCache.take_changes."""
        return self.scheduler.cache.take_changes()

    def abort_all(self) -> list[SequenceDelta]:
        """End every sequence now."""
        live = list(self._live.values())
        return [self._finish(seq, (), (), EndReason.ABORT) for seq in live]

    def step(self) -> list[SequenceDelta]:
        """Compute one step; deltas of the sequences that got a token, ended or made progress."""
        deltas = self._expire() + self._note_prepared()
        start = self.step_start_s = self._clock()
        plan = self.scheduler.schedule()
        if plan is None and self._preparing:
            self.step_start_s = None
            wait(self._preparing.values(), _PREPARE_S, FIRST_COMPLETED)
            return deltas
        self.stalled = plan is None and self.has_work
        if plan is not None:
            deltas += self._run(plan, start)
        self.step_start_s = None
        return deltas

    def _run(self, plan: StepPlan, start: float) -> list[SequenceDelta]:
        """Carry out a plan. start: when its step began"""
        deltas = []
        now = self._clock()
        for row_start in plan.row_starts:
            self._note_start(row_start.row, now)
        rows = {chunk.row for chunk in plan.chunks}
        self.blame = Blame.of([seq for seq in self.scheduler.running if seq.row in rows])
        result = self._execute(plan)
        done = self._clock()
        if self._step_budget is not None:
            self._step_budget.learn(plan, done - now)
        assert result.step == plan.step, "a rank sent the result of another step"
        self._count(plan)
        self.step_host_s = result.host_s
        self._expert_imbalance = result.expert_imbalance or self._expert_imbalance
        sampled, unfinished = self.scheduler.commit(plan)
        assert len(sampled) == len(result.tokens)
        deltas += self._take_scores(plan, result)
        tokens_before = [seq.last_token_s for seq in sampled if seq.last_token_s is not None]
        for seq, token in zip(sampled, result.tokens, strict=True):
            if seq.row is None:  # its scores were not sound
                continue
            if seq.output_state is not None and (fault := seq.output_state.fault) is not None:
                deltas.append(self._finish(seq, (), (), EndReason.FAULT, error=fault))
                continue
            if (fault := self._fault_of(token)) is None:
                deltas.append(self._accept(seq, token, done))
            elif seq.shares_pages:
                self.scheduler.isolate(seq)
            else:
                deltas.append(self._finish(seq, (), (), EndReason.FAULT, error=fault))
        for seq in unfinished:
            if seq.row is not None and done - seq.progress_s >= PROGRESS_PERIOD_S:
                seq.progress_s = done
                deltas.append(SequenceDelta(seq.request.request_id, (), progress=seq.progress))
        self.blame = Blame()
        device_s = max(done - now - result.host_s, 0.0)
        host_s = max(self._clock() - start - device_s, 0.0)
        gap_s = done - min(tokens_before) if tokens_before else None
        self._step_times.append(StepTime(host_s, device_s, gap_s))
        return deltas

    def _execute(self, plan: StepPlan) -> StepResult:
        """Have the ranks carry out a plan, and the masks for it made meanwhile."""
        by_row = {seq.row: seq for seq in self.scheduler.running if seq.output_state is not None}
        if not by_row:
            return self._executor.execute(plan)
        sampled = (by_row.get(chunk.row) for chunk in plan.chunks if chunk.sample)
        states = [
            (position, seq.output_state)
            for position, seq in enumerate(sampled)
            if seq is not None and seq.output_state is not None and seq.output_state.needs_mask
        ]
        if not states:
            return self._executor.execute(plan)
        masks = self._masks.start(plan.step, states)
        return self._executor.execute(msgspec.structs.replace(plan, masked=True), masks.result)

    def _take_scores(self, plan: StepPlan, result: StepResult) -> list[SequenceDelta]:
        """Deltas with the scores of prompts' tokens; call after `commit`."""
        scored = [chunk for chunk in plan.chunks if chunk.targets]
        by_row = {seq.row: seq for seq in self.scheduler.running} if scored else {}
        deltas = []
        for chunk, scores in zip(scored, result.scores, strict=True):
            seq = by_row[chunk.row]
            if scores.sound:
                deltas.append(SequenceDelta(seq.request.request_id, (), scores=scores))
            elif seq.shares_pages:
                seq.num_scored -= scores.num_tokens
                self.scheduler.isolate(seq)
            else:
                deltas.append(self._finish(seq, (), (), EndReason.FAULT, error=NOT_SOUND))
        return deltas

    def take_step_times(self) -> list[StepTime]:
        """Of the steps since the last call."""
        taken, self._step_times = self._step_times, []
        return taken

    def loads(self) -> EngineLoads:
        """A snapshot, except for the leases, which the leader adds."""
        cache, now = self.scheduler.cache, self._clock()
        to_compute = (seq.to_compute for seq in self._live.values())
        return EngineLoads(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            pool=PoolLoads(
                *(
                    ArenaLoads(arena.total, arena.used, arena.cached, arena.free)
                    for arena in (cache.hot, cache.sealed)
                )
            ),
            prompt_tokens_total=self._totals["prompt"],
            completion_tokens_total=self._totals["completion"],
            cached_tokens_total=self._totals["cached"],
            prefill_tokens_total=self._totals["prefill"],
            decode_tokens_total=self._totals["decode"],
            prefill_remaining_tokens=sum(count for count in to_compute if count > 1),
            preemptions_total=self.scheduler.preemptions_total,
            expert_imbalance=self._expert_imbalance,
            steps_total=self._totals["steps"],
            outcomes_total=dict(self._outcomes),
            oldest=tuple(_load(seq, now) for seq in itertools.islice(self._live.values(), OLDEST)),
        )

    def check_integrity(self) -> None:
        """Audit every page; without live sequences none may be in use."""
        self.scheduler.check()
        if not self._live:
            cache = self.scheduler.cache
            used = PageNeed(cache.hot.used, cache.sealed.used)
            assert used == PageNeed(0, 0), f"{used} are in use without a sequence"

    def _count(self, plan: StepPlan) -> None:
        self._totals["steps"] += 1
        decoding = sum(chunk.num_tokens == 1 for chunk in plan.chunks)
        self._totals["decode"] += decoding
        self._totals["prefill"] += plan.num_tokens - decoding

    def _expire(self) -> list[SequenceDelta]:
        deltas = []
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            due, request_id = heapq.heappop(self._deadlines)
            seq = self._live.get(request_id)
            timeout_s = seq.request.timeout_s if seq else None
            # The id may have been reused since: the new sequence has its own deadline.
            if seq is not None and timeout_s is not None and seq.arrived_s + timeout_s == due:
                deltas.append(self._finish(seq, (), (), EndReason.DEADLINE))
        return deltas

    def _note_prepared(self) -> list[SequenceDelta]:
        """Sequences whose grammars are compiled can run; those without a valid one end."""
        deltas = []
        for request_id in [name for name, found in self._preparing.items() if found.done()]:
            found, seq = self._preparing.pop(request_id), self._live[request_id]
            if (error := found.exception()) is not None:
                deltas.append(self._finish(seq, (), (), EndReason.FAULT, error=str(error)))
                continue
            seq.output_state = found.result()
            seq.prepared = True
        return deltas

    def _unknown_token(self, token_id: int) -> str:
        vocabulary = f"the vocabulary has {self.info.vocab_size:,} tokens"
        return f"{token_id} is not a valid token id; {vocabulary}"

    def _note_start(self, row: int, now: float) -> None:
        seq = next(s for s in self.scheduler.running if s.row == row)
        if seq.started_s is None:
            seq.started_s = now
            self._totals["cached"] += seq.cached_tokens

    def _fault_of(self, token: SampledToken) -> str | None:
        """Why the sequence cannot continue with this token, None if it can."""
        if token.fault is None and not 0 <= token.token_id < self.info.vocab_size:
            return f"the sampled token is not valid: {self._unknown_token(token.token_id)}"
        return token.fault

    def _accept(self, seq: Sequence, token: SampledToken, now: float) -> SequenceDelta:
        params = seq.request.params
        if params.max_tokens == 0:  # only its prompt was wanted
            return self._finish(seq, (), (), EndReason.LENGTH)
        seq.append(token.token_id)
        self._totals["completion"] += 1
        if seq.first_token_s is None:
            seq.first_token_s = now
        seq.last_token_s = now
        ids = (token.token_id,)
        logprobs: tuple[SampledLogprobs, ...] = ()
        if token.logprob is not None:
            logprobs = (SampledLogprobs(token.logprob, tuple((i, p) for i, p in token.top)),)
        state = seq.output_state
        if state is not None:
            state.accept(token.token_id)
        enough = seq.num_output >= params.min_tokens
        # The end of sequence that a grammar allows is the grammar's own end.
        at_end = (state is not None and state.has_grammar) or (enough and not params.ignore_eos)
        if (token.token_id in self._eos and at_end) or (
            token.token_id in params.stop_token_ids and enough
        ):
            return self._finish(seq, ids, logprobs, EndReason.STOP, token.token_id)
        if seq.num_tokens >= seq.max_tokens_total:
            return self._finish(seq, ids, logprobs, EndReason.LENGTH)
        return SequenceDelta(seq.request.request_id, ids, logprobs)

    def _finish(
        self,
        seq: Sequence,
        token_ids: tuple[int, ...],
        logprobs: tuple[SampledLogprobs, ...],
        reason: EndReason,
        matched_stop_token: int | None = None,
        error: str | None = None,
    ) -> SequenceDelta:
        self.scheduler.remove(seq)
        del self._live[seq.request.request_id]
        self._preparing.pop(seq.request.request_id, None)
        self._outcomes[reason.value] += 1
        return SequenceDelta(
            seq.request.request_id,
            token_ids,
            logprobs,
            finish_reason=reason,
            matched_stop_token=matched_stop_token,
            usage=seq.usage(self._clock()),
            error=error,
        )


def _load(seq: Sequence, now: float) -> SequenceLoad:
    return SequenceLoad(
        lease_id="" if seq.lease is None else seq.lease.lease_id,
        age_s=now - seq.arrived_s,
        prompt_tokens=seq.prompt_tokens,
        computed_tokens=seq.num_computed,
        cached_tokens=seq.cached_tokens,
        total_tokens=seq.num_tokens,
    )


def _step_budget(config: EngineConfig, rank: RankDescription) -> StepBudget | None:
    """On CPUs, where decoding alone takes long, smaller chunks cost more than they bring."""
    if config.max_step_s is not None:
        return StepBudget(config.max_step_s)
    return StepBudget(DEFAULT_MAX_STEP_S) if rank.device == "cuda" else None


def _max_model_len(config: EngineConfig, rank: RankDescription) -> int:
    if config.max_model_len is None:
        return rank.max_model_len
    if config.max_model_len > rank.max_model_len:
        raise ConfigError(
            "max_model_len",
            f"must be at most {rank.max_model_len}, the context of {rank.model}; "
            f"got {config.max_model_len}",
        )
    return config.max_model_len
