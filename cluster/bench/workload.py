"""The requests of a run: how long, and when.

Everything is drawn from a seed, so the same options are the same requests for every server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvmesh.cluster.bench.lengths import (
    SHAREGPT_LONGEST,
    SHAREGPT_OUTPUTS,
    SHAREGPT_PROMPTS,
    LengthDistribution,
)
from kvmesh.cluster.simulator.trace import BLOCK_TOKENS, TraceRequest


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """A request to send.

    prompt_tokens: its length, which a prompt of words has only nearly
    arrival_s: since the start of the run; None: when there is a place for it
    blocks: ids of the blocks that the prompt begins with, each of block_tokens; equal ids are
        equal tokens
    text: the prompt, if the workload has texts
    """

    number: int
    prompt_tokens: int
    output_tokens: int
    arrival_s: float | None = None
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0
    text: str | None = None


def random_requests(
    prompts: LengthDistribution, outputs: LengthDistribution, count: int, seed: int
) -> list[BenchRequest]:
    random = np.random.default_rng([seed, 1])
    return _requests(prompts.draw(random, count), outputs.draw(random, count))


def sharegpt_like(count: int, seed: int) -> list[BenchRequest]:
    """Lengths like ShareGPT's, from log-normal distributions.

    A sequence has at most 2,048 tokens and a prompt half of them, as in vLLM's filter of the data,
    so the means of a sample are below the published ones.
    """
    random = np.random.default_rng(seed)
    prompts = SHAREGPT_PROMPTS.draw(random, count)
    outputs = SHAREGPT_OUTPUTS.draw(random, count)
    return _requests(prompts, np.minimum(outputs, SHAREGPT_LONGEST - prompts))


def replayed(trace: Sequence[TraceRequest], speed: float, scale: float) -> list[BenchRequest]:
    """A trace's requests at its own times.

    speed: arrivals are this many times as fast
    scale: lengths are multiplied with it; prompts share as many blocks as before
    Raises ValueError unless both are more than 0.
    """
    for name, value in (("speed", speed), ("scale", scale)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be more than 0, got {value:g}")
    return [
        BenchRequest(
            number,
            max(1, round(request.prompt_tokens * scale)),
            max(1, round(request.output_tokens * scale)),
            request.arrival_s / speed,
            request.blocks,
            int(BLOCK_TOKENS * scale),
        )
        for number, request in enumerate(trace)
    ]


def _requests(prompts: npt.NDArray[np.int64], outputs: npt.NDArray[np.int64]) -> list[BenchRequest]:
    pairs = zip(prompts.tolist(), outputs.tolist(), strict=True)
    return [BenchRequest(number, prompt, output) for number, (prompt, output) in enumerate(pairs)]


def arriving(
    requests: Sequence[BenchRequest], rate_rps: float, burstiness: float, seed: int
) -> list[BenchRequest]:
    """The requests at random times, the first at 0.

    Gaps have a gamma distribution of shape `burstiness` and mean 1 / rate_rps, as in `vllm bench
    serve`: 1 is a Poisson process, less comes in bursts, more is more even. With an infinite rate
    all come at once.
    """
    if not rate_rps > 0:
        raise ValueError(f"rate must be more than 0 requests a second, got {rate_rps:g}")
    if not (burstiness > 0 and math.isfinite(burstiness)):
        raise ValueError(f"burstiness must be more than 0, got {burstiness:g}")
    if math.isinf(rate_rps):
        return [replace(request, arrival_s=0.0) for request in requests]
    random = np.random.default_rng([seed, 2])
    gaps = random.gamma(burstiness, 1.0 / (rate_rps * burstiness), len(requests))
    times = np.concatenate(([0.0], np.cumsum(gaps[:-1]))) if len(requests) else gaps
    return [
        replace(request, arrival_s=time)
        for request, time in zip(requests, times.tolist(), strict=True)
    ]
