"""Figures of a run.

The definitions are those of `vllm bench serve`, so that figures compare:

    TTFT  from when a request is due to its first output
    E2E   from when it is due to its last output
    TPOT  (E2E − TTFT) / (output tokens − 1), of a request with 2 output tokens or more
    ITL   between one chunk with output and the next; a chunk may have several tokens
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from kvmesh.cluster.bench.load import ReplyRecord

PERCENTILES: Final = (50, 90, 99)
MEASURES: Final[Mapping[str, str]] = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between chunks",
    "e2e": "whole request",
}
# Of an objective, besides: what other tools call it.
_ALIASES: Final = {"e2el": "e2e"}


@dataclass(frozen=True, slots=True)
class Timings:
    """One measure over all complete requests, in seconds. count: of its samples"""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timings:
        if not samples:
            return cls(0, *(math.nan,) * 4)
        values = np.asarray(samples)
        p50, p90, p99 = (float(x) for x in np.percentile(values, PERCENTILES))
        return cls(len(samples), float(values.mean()), p50, p90, p99)


@dataclass(frozen=True, slots=True)
class FailureKind:
    """Failures that have the same cause. example: the message of the first"""

    count: int
    example: str


@dataclass(frozen=True, slots=True)
class GoodputFigure:
    """Requests that met every objective. objectives_ms: by measure; rps: of them, a second"""

    objectives_ms: dict[str, float]
    requests: int
    rps: float
    share: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """All figures. Times in seconds, rates per second, over `duration_s`.

    duration_s: from the first request to the end of the last one
    unfinished: requests that were running when the run was stopped
    short_outputs: complete, with fewer tokens than were asked for
    send_lag_p99_s: how late the sender itself was; it is part of the latencies
    tokens_per_chunk: where more than 1, ITL is not the time of a token
    """

    requests: int
    complete: int
    failed: int
    unfinished: int
    short_outputs: int
    duration_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    request_rps: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    max_running: int
    mean_running: float
    tokens_per_chunk: float
    send_lag_p99_s: float
    timings: dict[str, Timings]
    failures: dict[str, FailureKind] = field(default_factory=dict)
    goodput: GoodputFigure | None = None


def read_objectives(texts: Sequence[str]) -> dict[str, float]:
    """By measure, in milliseconds. texts: such as `ttft:500`, or several with commas

    Raises ValueError.
    """
    objectives: dict[str, float] = {}
    for text in itertools.chain.from_iterable(text.split(",") for text in texts):
        name, _, limit = text.strip().partition(":")
        name = _ALIASES.get(name.lower(), name.lower())
        try:
            limit_ms = float(limit)
        except ValueError:
            limit_ms = math.nan
        if name not in ("ttft", "tpot", "e2e") or not limit_ms > 0:
            raise ValueError(
                f"must be ttft:MS, tpot:MS or e2e:MS, in milliseconds; got {text.strip()!r}"
            )
        objectives[name] = limit_ms
    return objectives


def times_of(record: ReplyRecord) -> dict[str, float]:
    """The measures of one complete request but ITL, in seconds; without TPOT for one token."""
    first_s, last_s = record.chunk_s[0], record.chunk_s[-1]
    times = {"ttft": first_s - record.due_s, "e2e": last_s - record.due_s}
    if record.output_tokens > 1:
        times["tpot"] = (last_s - first_s) / (record.output_tokens - 1)
    return times


def samples_of(records: Sequence[ReplyRecord]) -> dict[str, list[float]]:
    """All samples of each measure, of complete requests."""
    samples: dict[str, list[float]] = {name: [] for name in MEASURES}
    for record in records:
        if record.complete:
            for name, seconds in times_of(record).items():
                samples[name].append(seconds)
            samples["itl"] += [later - one for one, later in itertools.pairwise(record.chunk_s)]
    return samples


def report_of(
    records: Sequence[ReplyRecord], ended_s: float, objectives_ms: Mapping[str, float]
) -> LoadReport:
    """The figures of a run. ended_s: when it ended, or was stopped"""
    complete = [record for record in records if record.complete]
    failed = [record for record in records if record.error is not None]
    starts_s = min((record.due_s for record in records), default=0.0)
    duration_s = max(ended_s - starts_s, 1e-9)
    prompt_tokens = sum(record.prompt_tokens for record in complete)
    # What an unfinished request has produced was work of the server as well.
    output_tokens = sum(record.output_tokens for record in records)
    chunks = sum(len(record.chunk_s) for record in records)
    lags_s = [record.sent_s - record.due_s for record in records]
    busy_s = sum((ended_s if x.ended_s is None else x.ended_s) - x.due_s for x in records)
    return LoadReport(
        requests=len(records),
        complete=len(complete),
        failed=len(failed),
        unfinished=len(records) - len(complete) - len(failed),
        short_outputs=sum(x.output_tokens < x.request.output_tokens for x in complete),
        duration_s=duration_s,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(record.cached_tokens for record in complete),
        output_tokens=output_tokens,
        request_rps=len(complete) / duration_s,
        output_tokens_per_s=output_tokens / duration_s,
        total_tokens_per_s=(prompt_tokens + output_tokens) / duration_s,
        max_running=_max_running(records, ended_s),
        mean_running=busy_s / duration_s,
        tokens_per_chunk=output_tokens / chunks if chunks else math.nan,
        send_lag_p99_s=float(np.percentile(lags_s, 99)) if lags_s else 0.0,
        timings={name: Timings.of(samples) for name, samples in samples_of(records).items()},
        failures=_failures(failed),
        goodput=_goodput(complete, len(records), duration_s, objectives_ms),
    )


def _failures(failed: Sequence[ReplyRecord]) -> dict[str, FailureKind]:
    """By kind, the most frequent first."""
    messages: dict[str, list[str]] = {}
    for record in failed:
        assert record.error is not None
        messages.setdefault(record.error.kind, []).append(str(record.error))
    found = {kind: FailureKind(len(texts), texts[0]) for kind, texts in messages.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1].count))


def _goodput(
    complete: Sequence[ReplyRecord],
    requests: int,
    duration_s: float,
    objectives_ms: Mapping[str, float],
) -> GoodputFigure | None:
    """A request without a complete reply is not good; nor is TPOT of one token missed."""
    if not objectives_ms:
        return None
    good = 0
    for record in complete:
        times = times_of(record)
        good += all(times.get(x, 0.0) * 1e3 <= limit for x, limit in objectives_ms.items())
    share = good / requests if requests else math.nan
    return GoodputFigure(dict(objectives_ms), good, good / duration_s, share)


def _max_running(records: Sequence[ReplyRecord], ended_s: float) -> int:
    steps = [(record.due_s, 1) for record in records]
    steps += [(ended_s if x.ended_s is None else x.ended_s, -1) for x in records]
    steps.sort()
    return max(itertools.accumulate(change for _, change in steps), default=0)
