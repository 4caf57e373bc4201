"""Figures of a run, and the objective that they are measured against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvmesh.cluster.simulator.sequence import SimSequence
from kvmesh.cluster.simulator.service_time import ServiceTime
from kvmesh.cluster.simulator.simulation import Run


@dataclass(frozen=True, slots=True)
class Objective:
    """A request counts as good if its first token and its further ones arrive in time.

    ttft_s: for any prompt; ttft_stretch: or this many times what an idle engine
        takes for it, if that is more
    tpot_s: mean time of a further token
    """

    ttft_s: float = 2.0
    ttft_stretch: float = 5.0
    tpot_s: float = 0.1

    def allows_s(self, prompt_tokens: int, service: ServiceTime, chunk_tokens: int) -> float:
        return max(self.ttft_s, self.ttft_stretch * service.alone(prompt_tokens, chunk_tokens))


@dataclass(frozen=True, slots=True)
class Summary:
    """One policy's figures; times in seconds, percentiles over finished requests.

    goodput_rps: requests within the objective, a second of the trace's arrivals
    attainment: their share of all that arrived
    kv_used_share: of all pools' pages, mean over the run
    fairness: Jain's index of the tenants' mean times to first token
    long_wait_s: from arrival to the first computation, of each injected request
    group_s: the time in which groups held GPUs, summed
    """

    policy: str
    requests: int
    refused: int
    goodput_rps: float
    attainment: float
    ttft_s: dict[str, float]
    short_ttft_p99_s: float
    tpot_s: dict[str, float]
    e2e_s: dict[str, float]
    preemptions: int
    recomputed_tokens: int
    stalls: int
    prefix_hit_share: float
    kv_used_share: float
    fairness: float
    long_wait_s: tuple[float, ...]
    long_ttft_s: tuple[float, ...]
    makespan_s: float
    group_s: float


SHORT_TOKENS = 32_768


def summarize(run: Run, service: ServiceTime, chunk_tokens: int, objective: Objective) -> Summary:
    """Figures of a run over all requests of the trace; injected ones are reported separately."""
    own = [seq for seq in run.sequences if not seq.request.injected]
    long = [seq for seq in run.sequences if seq.request.injected]
    done = [seq for seq in own if not math.isnan(seq.finished_at)]
    good = sum(_is_good(seq, service, chunk_tokens, objective) for seq in done)
    span_s = own[-1].request.arrival_s - own[0].request.arrival_s
    prompt_tokens = sum(seq.request.prompt_tokens for seq in done)
    total_pages = sum(engine.pool.total_pages for engine in run.engines)
    short = [seq for seq in done if seq.request.prompt_tokens <= SHORT_TOKENS]
    return Summary(
        policy=run.policy,
        requests=len(run.sequences),
        refused=sum(seq.refused for seq in run.sequences),
        goodput_rps=good / span_s,
        attainment=good / len(own),
        ttft_s=_percentiles([_ttft_s(seq) for seq in done]),
        short_ttft_p99_s=_percentiles([_ttft_s(seq) for seq in short])["p99"],
        tpot_s=_percentiles([_tpot_s(seq) for seq in done if seq.request.output_tokens > 1]),
        e2e_s=_percentiles([seq.finished_at - seq.request.arrival_s for seq in done]),
        preemptions=sum(seq.preemptions for seq in run.sequences),
        recomputed_tokens=sum(seq.recomputed_tokens for seq in run.sequences),
        stalls=sum(seq.stalls for seq in run.sequences),
        prefix_hit_share=sum(seq.cached_tokens for seq in done) / max(prompt_tokens, 1),
        kv_used_share=sum(x.used_page_s for x in run.engines) / (total_pages * run.ended_at),
        fairness=_jain(done),
        long_wait_s=tuple(seq.started_at - seq.request.arrival_s for seq in long),
        long_ttft_s=tuple(_ttft_s(seq) for seq in long),
        makespan_s=run.ended_at,
        group_s=run.group_s,
    )


def _ttft_s(seq: SimSequence) -> float:
    return seq.first_token_at - seq.request.arrival_s


def _tpot_s(seq: SimSequence) -> float:
    return (seq.finished_at - seq.first_token_at) / (seq.request.output_tokens - 1)


def _is_good(
    seq: SimSequence, service: ServiceTime, chunk_tokens: int, objective: Objective
) -> bool:
    allowed_s = objective.allows_s(seq.request.prompt_tokens, service, chunk_tokens)
    if _ttft_s(seq) > allowed_s:
        return False
    return seq.request.output_tokens == 1 or _tpot_s(seq) <= objective.tpot_s


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"p50": math.nan, "p90": math.nan, "p99": math.nan}
    points = np.percentile(np.asarray(values), [50, 90, 99])
    return {name: float(value) for name, value in zip(("p50", "p90", "p99"), points, strict=True)}


def _jain(done: Sequence[SimSequence]) -> float:
    """1 if all tenants wait equally long; 1 / tenants if only one waits."""
    by_tenant: dict[str, list[float]] = {}
    for seq in done:
        by_tenant.setdefault(seq.request.tenant, []).append(_ttft_s(seq))
    means = [sum(values) / len(values) for values in by_tenant.values()]
    squares = sum(value * value for value in means)
    return sum(means) ** 2 / (len(means) * squares) if squares else 1.0
