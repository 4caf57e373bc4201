"""What an engine has done since it started, and how long its steps take."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection

from kvmesh.workers.loads import (
    OLDEST,
    ArenaLoads,
    EngineLoads,
    PoolLoads,
    SequenceLoad,
    StepTime,
)
from kvmesh.workers.plan import StepResult
from kvmesh.workers.request import EndReason
from kvmesh.workers.scheduler import Scheduler
from kvmesh.workers.sequence import Sequence
from kvmesh.workers.step_budget import StepWork


class EngineStats:
    """Of one engine, which reports every event here.

    rank_host_s: time in which a rank prepared the latest step
    expert_imbalance: how unevenly experts are used, as measured last; see ExpertLoad
    """

    def __init__(self) -> None:
        self.rank_host_s = 0.0
        self.expert_imbalance: float | None = None
        self._totals: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._step_times: list[StepTime] = []
        self._token_gap_s: float | None = None  # the longest of the current step

    def arrived(self, seq: Sequence) -> None:
        self._totals["prompt"] += seq.prompt_tokens

    def started(self, seq: Sequence) -> None:
        """For the first time: not again after a preemption."""
        self._totals["cached"] += seq.cached_tokens

    def sampled(self, seq: Sequence, now: float) -> None:
        """A sequence gets a token; `seq.last_token_s` is still the time of the one before."""
        self._totals["completion"] += 1
        if seq.last_token_s is not None:
            self._token_gap_s = max(self._token_gap_s or 0.0, now - seq.last_token_s)

    def ended(self, reason: EndReason) -> None:
        self._outcomes[reason.value] += 1

    def step_done(self, work: StepWork, whole_s: float, ranks_s: float, result: StepResult) -> None:
        """A step took `whole_s` after the one before, of which the ranks took `ranks_s`."""
        self._totals["steps"] += 1
        self._totals["decode"] += work.decoding
        self._totals["prefill"] += work.prompt_tokens
        if result.expert_imbalance is not None:
            self.expert_imbalance = result.expert_imbalance
        self.rank_host_s = result.host_s
        device_s = max(ranks_s - result.host_s, 0.0)
        host_s = max(whole_s - device_s, 0.0)
        self._step_times.append(StepTime(host_s, device_s, self._token_gap_s))
        self._token_gap_s = None

    def take_step_times(self) -> list[StepTime]:
        """Of the steps since the last call."""
        taken, self._step_times = self._step_times, []
        return taken

    def loads(self, scheduler: Scheduler, live: Collection[Sequence], now: float) -> EngineLoads:
        """A snapshot, except for the leases, which the leader adds.

        live: sequences in order of arrival
        """
        cache = scheduler.cache
        to_compute = (seq.to_compute for seq in live)
        return EngineLoads(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pool=PoolLoads(
                *(
                    ArenaLoads(arena.total, arena.used, arena.cached, arena.free)
                    for arena in (cache.hot.fullest, cache.sealed.fullest)
                )
            ),
            prompt_tokens_total=self._totals["prompt"],
            completion_tokens_total=self._totals["completion"],
            cached_tokens_total=self._totals["cached"],
            prefill_tokens_total=self._totals["prefill"],
            decode_tokens_total=self._totals["decode"],
            prefill_remaining_tokens=sum(count for count in to_compute if count > 1),
            preemptions_total=scheduler.preemptions_total,
            steps_total=self._totals["steps"],
            outcomes_total=dict(self._outcomes),
            oldest=tuple(_load(seq, now) for seq in itertools.islice(live, OLDEST)),
            expert_imbalance=self.expert_imbalance,
            pinned_pages=scheduler.pins.pages.sealed,
            pinned_evictions_total=cache.hot.pinned_evictions + cache.sealed.pinned_evictions,
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
