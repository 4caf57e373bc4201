"""Families of made-up traces: what binds, bursts or not, shared prefixes or not.

A family's name says all three, as in `prefill-bursty-shared`. Traces are drawn from a seed, so
anyone can draw the same ones.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from kvmesh.cluster.simulator.hardware import GPUS, MODELS
from kvmesh.cluster.simulator.service_time import EngineShape
from kvmesh.cluster.simulator.trace import BLOCK_TOKENS, TraceRequest
from kvmesh.kernels.formats.registry import get_format

BURST_SHARE = 0.25  # of the time, in bursts
BURST_RATE = 2.5  # times the mean rate, in bursts
BURST_REQUESTS = 60  # of a burst and the lull after it, mean
RETURN_SHARE = 0.75  # of requests that continue one of the last CONVERSATIONS
CONVERSATIONS = 64


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths in tokens, from the shortest to the longest (evenly over their logarithm).

    shape: an engine that these requests bring to its limit
    rate_rps: at load 1, for one such engine and prompts without shared prefixes
    """

    prompts: tuple[int, int]
    outputs: tuple[int, int]
    shape: EngineShape
    rate_rps: float


_LLAMA = MODELS["llama-3-8b"]
WORKLOADS = {
    "prefill": Workload(
        (2_000, 7_000), (8, 30), EngineShape(GPUS["h100"], _LLAMA, get_format("int4")), 7.0
    ),
    "decode": Workload(
        (100, 1_000),
        (400, 1_600),
        EngineShape(GPUS["l40s"], _LLAMA, get_format("int4"), max_num_seqs=32),
        1.1,
    ),
    "kv": Workload(
        (4_000, 24_000),
        (300, 1_500),
        EngineShape(GPUS["a100-40g"], _LLAMA, get_format("exact")),
        0.2,
    ),
}
FAMILIES = tuple(
    "-".join(parts)
    for parts in itertools.product(WORKLOADS, ("smooth", "bursty"), ("private", "shared"))
)


def workload_of(family: str) -> Workload:
    """Raises ValueError for a name that is not in FAMILIES."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    return WORKLOADS[family.split("-")[0]]


def synthetic_trace(family: str, count: int, seed: int = 0, groups: int = 8) -> list[TraceRequest]:
    """`count` requests of a family, at load 1 of `groups` engines.

    Raises ValueError for an unknown name.
    """
    workload, chance = workload_of(family), random.Random(f"{family} {seed}")
    _, arrivals, sharing = family.split("-")
    times = _arrivals(chance, workload.rate_rps * groups, bursty=arrivals == "bursty")
    prompts = _prompts(chance, workload.prompts, shared=sharing == "shared")
    return [
        TraceRequest(f"r{index}", at, tokens, _length(chance, workload.outputs), blocks)
        for index, at, (tokens, blocks) in zip(range(count), times, prompts, strict=False)
    ]


def _arrivals(chance: random.Random, rate_rps: float, *, bursty: bool) -> Iterator[float]:
    """Poisson arrivals; in bursts and lulls of random length, if bursty."""
    now, ends_at, burst = 0.0, 0.0 if bursty else math.inf, False
    lull_rate = (1.0 - BURST_SHARE * BURST_RATE) / (1.0 - BURST_SHARE)
    while True:
        factor = 1.0 if not bursty else BURST_RATE if burst else lull_rate
        at = now + chance.expovariate(rate_rps * factor)
        if at < ends_at:
            now = at
            yield now
        else:  # memoryless: draw again at the new rate
            now, burst = ends_at, not burst
            share = BURST_SHARE if burst else 1.0 - BURST_SHARE
            ends_at = now + chance.expovariate(rate_rps / (BURST_REQUESTS * share))


def _prompts(
    chance: random.Random, lengths: tuple[int, int], *, shared: bool
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Tokens and blocks; if shared, most continue a conversation up to the longest prompt."""
    fresh = itertools.count()
    open_: list[tuple[int, ...]] = []
    while True:
        history: tuple[int, ...] = ()
        if shared and open_ and chance.random() < RETURN_SHARE:
            history = open_.pop(chance.randrange(len(open_)))
        tokens = len(history) * BLOCK_TOKENS + _length(chance, (lengths[0] // 4, lengths[0]))
        if not history or tokens > lengths[1]:
            history, tokens = (), _length(chance, lengths)
        blocks = history + tuple(next(fresh) for _ in range(tokens // BLOCK_TOKENS - len(history)))
        open_ = [*open_[-CONVERSATIONS + 1 :], blocks]
        yield tokens, blocks


def _length(chance: random.Random, bounds: tuple[int, int]) -> int:
    low, high = bounds
    return round(math.exp(chance.uniform(math.log(low), math.log(high))))
