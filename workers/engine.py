"""The engine: sequences in, tokens out, step by step.

    add / abort ──► Scheduler.schedule() ──► StepPlan ──► StepPipeline ──► StepResult
                        ▲                                                      │
                        └── Scheduler.commit(), stop conditions, SequenceDelta ◄

Not thread-safe: one thread owns it (workers/engine_thread.py).
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable

from kvmesh.kernels.formats.registry import format_of_name
from kvmesh.workers.blame import Blame
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.constrained_outputs import ConstrainedOutputs
from kvmesh.workers.deadlines import Deadlines
from kvmesh.workers.device_limits import DeviceLimits
from kvmesh.workers.engine_stats import EngineStats
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.executor import Allocation, Executor, RankDescription
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.loads import EngineInfo, EngineLoads
from kvmesh.workers.plan import SampledToken, StepPlan, StepResult
from kvmesh.workers.pool_plan import PoolPlan, plan_pool
from kvmesh.workers.request import (
    EndReason,
    EngineRequest,
    SampledLogprobs,
    SequenceDelta,
)
from kvmesh.workers.request_check import unknown_token
from kvmesh.workers.scheduler import Scheduler
from kvmesh.workers.scoring.gate import FormatCheck
from kvmesh.workers.sequence import Sequence
from kvmesh.workers.sequence_usage import usage_of
from kvmesh.workers.sizes import PageGeometry, PageNeed
from kvmesh.workers.step_budget import DEFAULT_MAX_STEP_S, StepBudget
from kvmesh.workers.step_pipeline import StepPipeline

logger = logging.getLogger(__name__)

NOT_SOUND = "the prompt's log-probabilities are not finite numbers"
PROGRESS_PERIOD_S = 1.0  # at least, between two reports of a sequence's progress


class Engine:
    """Continuous batching over an executor's ranks.

    clock: seconds, monotonic
    step_start_s: when the current step started, by `clock`; other threads may read it
    stalled: every live sequence waits for its lease to grow
    Raises ConfigError if the memory is too small for one sequence.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        clock: Callable[[], float] = time.monotonic,
        check: FormatCheck = FormatCheck(),  # noqa: B008 - frozen
    ) -> None:
        self._clock = clock
        ranks = executor.describe()
        rank = ranks[0]
        self.geometry = _geometry(config, rank, executor.num_ranks)
        # What a rank decides by its own device, from the one with the least memory.
        limits = config.limits(rank.device, min(r.memory_bytes for r in ranks))
        pool = plan_pool(
            min(r.kv_budget_bytes for r in ranks),
            self.geometry,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_hot_share=config.hot_share(rank.device),
        )
        self.info = _info(config, rank, self.geometry, pool, limits, check)
        executor.allocate(
            Allocation(
                hot_pages=pool.hot_total,
                sealed_pages=pool.sealed_pages,
                max_rows=pool.max_num_seqs,
                max_pages_per_row=self.geometry.on_fullest(
                    -(-self.info.max_model_len // config.page_size)
                ),
            )
        )
        if config.prefix_cache and not self.info.prefix_cache:
            logger.info("%s has recurrent layers: its prefix cache is off", rank.model)
        step_budget = _step_budget(config, rank)
        self.scheduler = Scheduler(
            self.geometry,
            pool,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            prefix_cache=self.info.prefix_cache,
            step_budget=step_budget,
            pinned_shares=(config.max_pinned_share, config.max_pinned_share_per_key),
        )
        self._eos = frozenset(rank.eos_token_ids)
        self._live: dict[str, Sequence] = {}
        self._deadlines = Deadlines()
        self._constrained = ConstrainedOutputs(rank)
        self._suspects: dict[str, Sequence] = {}
        self.stats = EngineStats()
        self._pipeline = StepPipeline(
            executor, self.scheduler, self._constrained, self.stats, step_budget, clock
        )
        self.step_start_s: float | None = None
        self.stalled = False

    # Between steps

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def awaits_result(self) -> bool:
        """Whether a step is in flight, perhaps of sequences all of which have ended."""
        return self._pipeline.busy

    def add(self, *requests: EngineRequest) -> None:
        """Queue requests that have passed `check_request`; their ids must not be live."""
        self.stalled = False
        for request in requests:
            name = request.request_id
            assert name not in self._live
            seq = self._live[name] = Sequence(request, self.geometry, self.info.max_model_len)
            seq.arrived_s = seq.progress_s = self._clock()
            if request.timeout_s is not None:
                self._deadlines.add(name, seq.arrived_s + request.timeout_s)
            if request.suspicion:
                self._suspects[name] = seq
            self.scheduler.add(seq)
            self._constrained.add(seq)
            self.stats.arrived(seq)

    def abort(self, request_id: str, reason: EndReason = EndReason.ABORT) -> SequenceDelta | None:
        """End a sequence now and free its pages; None if it is not live."""
        self.stalled = False
        seq = self._live.get(request_id)
        return None if seq is None else self._finish(seq, reason)

    def abort_all(self) -> list[SequenceDelta]:
        """End every sequence now."""
        return [self._finish(seq, EndReason.ABORT) for seq in list(self._live.values())]

    def extend(self, lease: LeaseTerms) -> None:
        """A lease has grown, for all live sequences under it."""
        for seq in self._live.values():
            if seq.lease is not None and seq.lease.lease_id == lease.lease_id:
                seq.extend(lease)
                self.stalled = False

    @property
    def blame(self) -> Blame:
        """For the steps that are computed now, should one fail."""
        return self._pipeline.blame

    def deadline_s(self) -> float | None:
        """Seconds until the earliest deadline of a sequence or a pin, None without one."""
        now = self._clock()
        left = (self._deadlines.left_s(now), self.scheduler.pins.left_s(now))
        return min((each for each in left if each is not None), default=None)

    def loads(self) -> EngineLoads:
        """A snapshot, except for the leases, which the leader adds."""
        return self.stats.loads(self.scheduler, self._live.values(), self._clock())

    def check_integrity(self) -> None:
        """Audit every page; without live sequences none may be in use."""
        self.scheduler.check()
        if not self._live:
            cache = self.scheduler.cache
            used = PageNeed(cache.hot.used, cache.sealed.used)
            assert used == PageNeed(0, 0), f"{used} are in use without a sequence"

    # A step

    def step(self) -> list[SequenceDelta]:
        """Submit what the ranks can take, and wait for the result of the oldest step in flight;
        deltas of the sequences that got a token, ended or made progress."""
        deltas = self._end_due()
        self.step_start_s = self._clock()
        # While a sequence may be on trial, steps are computed alone: who fails is to blame.
        self._pipeline.fill(alone=any(seq.on_trial for seq in self._suspects.values()))
        idle = not self._pipeline.busy
        self.stalled = idle and self.has_work and not self._constrained.preparing
        if not idle:
            plan, result = self._pipeline.result()
            deltas += self._commit(plan, result)
            self._pipeline.committed(result)
        self.step_start_s = None
        self._pipeline.rest()
        if idle and self._constrained.preparing:
            self._constrained.wait()
        return deltas

    def _end_due(self) -> list[SequenceDelta]:
        """End what cannot continue: sequences whose time is up or whose grammar is not valid, and
        pins that have expired."""
        self.scheduler.pins.expire(self._clock())
        deltas = [
            self._finish(self._live[name], EndReason.DEADLINE)
            for name in self._deadlines.take_due(self._clock())
        ]
        for seq, error in self._constrained.take_prepared():
            deltas.append(self._finish(seq, EndReason.FAULT, error=error))
        return deltas

    def _commit(self, plan: StepPlan, result: StepResult) -> list[SequenceDelta]:
        """Take what a plan has computed, and end the sequences that are complete."""
        now = self._clock()
        tokens, scores = iter(result.tokens), iter(result.scores)
        deltas: list[SequenceDelta | None] = []
        for chunk, seq in self.scheduler.commit(plan):
            found = next(scores) if chunk.targets else None
            token = next(tokens) if chunk.sample else None
            if seq is None:
                continue  # it has ended meanwhile
            if found is not None and not found.sound:
                seq.num_scored = chunk.score_start
                deltas.append(self._fault(seq, NOT_SOUND))
                continue
            if found is not None:
                deltas.append(SequenceDelta(seq.request.request_id, (), scores=found))
            if token is not None:
                deltas.append(self._take_token(seq, token, now))
            elif seq.row is not None and now - seq.progress_s >= PROGRESS_PERIOD_S:
                seq.progress_s = now
                progress = seq.progress(chunk.end)
                deltas.append(SequenceDelta(seq.request.request_id, (), progress=progress))
        left = next(tokens, None), next(scores, None)
        assert left == (None, None), f"the ranks computed what was not planned: {left}"
        return [delta for delta in deltas if delta is not None]

    def _take_token(self, seq: Sequence, token: SampledToken, now: float) -> SequenceDelta | None:
        state = seq.output_state
        if state is not None and state.fault is not None:
            return self._finish(seq, EndReason.FAULT, error=state.fault)
        if token.fault is not None:
            return self._fault(seq, token.fault)
        if not 0 <= token.token_id < self.info.vocab_size:
            unknown = unknown_token(token.token_id, self.info.vocab_size)
            return self._fault(seq, f"the sampled token is not valid: {unknown}")
        if seq.request.params.max_tokens == 0:  # only its prompt was wanted
            return self._finish(seq, EndReason.LENGTH)
        self.stats.sampled(seq, now)
        seq.append(token.token_id)
        if seq.first_token_s is None:
            seq.first_token_s = now
            self._pin(seq, now)
        seq.last_token_s = now
        if state is not None:
            state.accept(token.token_id)
        logprobs: tuple[SampledLogprobs, ...] = ()
        if token.logprob is not None:
            logprobs = (SampledLogprobs(token.logprob, tuple((i, p) for i, p in token.top)),)
        delta = SequenceDelta(seq.request.request_id, (token.token_id,), logprobs)
        if (end := _end_of(seq, token.token_id, self._eos)) is None:
            return delta
        return self._finish(seq, end, delta)

    def _pin(self, seq: Sequence, now: float) -> None:
        """Its prompt is computed, or it ends: keep it for as long as it is wanted from now on."""
        if seq.request.pin is not None:
            self.scheduler.pin(seq, seq.request.pin, now)

    def _fault(self, seq: Sequence, error: str) -> SequenceDelta | None:
        """Something is wrong with what was computed: try again without pages of others, once."""
        if seq.shares_pages:
            self.scheduler.isolate(seq)
            return None
        return self._finish(seq, EndReason.FAULT, error=error)

    def _finish(
        self,
        seq: Sequence,
        reason: EndReason,
        last: SequenceDelta | None = None,
        error: str | None = None,
    ) -> SequenceDelta:
        """Free its pages. last: with its last token, if it got one in this step"""
        name = seq.request.request_id
        only_prompt = reason is EndReason.LENGTH and seq.request.params.max_tokens == 0
        if seq.first_token_s is not None or only_prompt:
            self._pin(seq, self._clock())
        self.scheduler.remove(seq)
        self._deadlines.remove(name)
        self._constrained.remove(seq)
        self._suspects.pop(name, None)
        del self._live[name]
        self.stats.ended(reason)
        ids = last.token_ids if last is not None else ()
        return SequenceDelta(
            name,
            ids,
            last.logprobs if last is not None else (),
            finish_reason=reason,
            matched_stop_token=ids[0] if ids and reason is EndReason.STOP else None,
            usage=usage_of(seq, self._clock()),
            error=error,
        )


def _end_of(seq: Sequence, token_id: int, eos: frozenset[int]) -> EndReason | None:
    """Why a sequence ends with this token, which it has just got; None if it continues."""
    params, state = seq.request.params, seq.output_state
    enough = seq.num_output >= params.min_tokens
    # The end of sequence that a grammar allows is the grammar's own end.
    at_end = (state is not None and state.has_grammar) or (enough and not params.ignore_eos)
    if (token_id in eos and at_end) or (token_id in params.stop_token_ids and enough):
        return EndReason.STOP
    return EndReason.LENGTH if seq.num_tokens >= seq.max_tokens_total else None


def _geometry(config: EngineConfig, rank: RankDescription, ranks: int) -> PageGeometry:
    return PageGeometry(
        page_size=config.page_size,
        sink_pages=rank.sink_pages,
        recent_pages=rank.recent_pages,
        hot_page_bytes=rank.hot_page_bytes,
        sealed_page_bytes=rank.sealed_page_bytes,
        state_bytes=rank.state_bytes,
        ranks=ranks,
        kvp=rank.kvp,
    )


def _info(
    config: EngineConfig,
    rank: RankDescription,
    geometry: PageGeometry,
    pool: PoolPlan,
    limits: DeviceLimits,
    check: FormatCheck,
) -> EngineInfo:
    """What does not change any more. Raises ConfigError(max_model_len)."""
    return EngineInfo(
        epoch=uuid.uuid4().hex,
        model=rank.model,
        model_revision=rank.model_revision,
        kv_format=format_of_name(rank.kv_format or config.kv_format, rank.values_in_keys).name,
        dtype=rank.dtype,
        tp=config.tp,
        geometry=geometry,
        capacity=PageNeed(pool.hot_pages, pool.sealed_pages),
        max_model_len=_max_model_len(config, rank),
        vocab_size=rank.vocab_size,
        max_num_seqs=pool.max_num_seqs,
        # The state before a prefix's end is not kept, so that a prefix cannot be continued.
        prefix_cache=config.prefix_cache and not geometry.state_bytes,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        device=rank.device,
        rope=rank.rope,
        operators=rank.operators,
        max_pinned_pages=_max_pinned_pages(config, geometry, pool),
        kv_divergence_nats=check.divergence_nats,
        kv_format_warning=check.warning,
    )


def _max_pinned_pages(config: EngineConfig, geometry: PageGeometry, pool: PoolPlan) -> int:
    """Of a prompt, that one key's pins can hold."""
    if not config.prefix_cache or geometry.state_bytes:
        return 0
    share = min(config.max_pinned_share, config.max_pinned_share_per_key)
    return int(share * pool.sealed_pages * geometry.kvp)


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
