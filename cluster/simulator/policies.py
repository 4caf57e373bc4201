"""Placement rules of other systems, as their sources describe them.

Each forwards a request on arrival; only engines have queues. The rules read the
engines' current state, which is better than what they have in a deployment:
scraped state is stale.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from kvmesh.cluster.simulator.engine import SimEngine
from kvmesh.cluster.simulator.trace import BLOCK_TOKENS, TraceRequest

Rule = Callable[[TraceRequest, Sequence[SimEngine]], int]


def round_robin(seed: int) -> Rule:
    """Engines in turn."""
    turn = -1

    def place(request: TraceRequest, engines: Sequence[SimEngine]) -> int:
        nonlocal turn
        turn = (turn + 1) % len(engines)
        return turn

    return place


def uniform(seed: int) -> Rule:
    """A random engine."""
    chance = random.Random(seed)
    return lambda request, engines: chance.randrange(len(engines))


def power_of_two(seed: int) -> Rule:
    """Ray Serve's default: of two random replicas, the one with fewer ongoing requests."""
    chance = random.Random(seed)

    def place(request: TraceRequest, engines: Sequence[SimEngine]) -> int:
        if len(engines) == 1:
            return 0
        first, second = chance.sample(range(len(engines)), 2)
        return first if engines[first].in_flight <= engines[second].in_flight else second

    return place


def min_kv_share(seed: int) -> Rule:
    """The lowest share of KV pages in use (the least-kv-cache rules of AIBrix and llm-d)."""
    return lambda request, engines: _index_of_min(engines, lambda engine: engine.kv_share)


def vllm_data_parallel(seed: int) -> Rule:
    """vLLM's internal data-parallel balancer: waiting counts six times over half a full cache.

    score = max(requests sent there, waiting + running) + 6 · waiting · max(0, kv − 0.5)
    """

    def score(engine: SimEngine) -> float:
        waiting = len(engine.waiting)
        return engine.in_flight + waiting * 6 * max(0.0, engine.kv_share - 0.5)

    return lambda request, engines: _index_of_min(engines, score)


def prefix_affinity(seed: int) -> Rule:
    """SGLang's cache-aware router: the best prefix match, unless loads are out of balance.

    Out of balance: max − min in flight > 64 and max > 1.5 · min; then the least
    loaded. A match of less than 0.3 of the prompt goes to the emptiest cache.
    """

    def place(request: TraceRequest, engines: Sequence[SimEngine]) -> int:
        loads = [engine.in_flight for engine in engines]
        if max(loads) - min(loads) > 64 and max(loads) > 1.5 * min(loads):
            return loads.index(min(loads))
        matches = [engine.pool.match(request.blocks) * BLOCK_TOKENS for engine in engines]
        best = max(matches)
        if best > 0.3 * request.prompt_tokens:
            return min((i for i, m in enumerate(matches) if m == best), key=lambda i: loads[i])
        held = [engine.pool.used_pages + engine.pool.cached_pages for engine in engines]
        return min(range(len(engines)), key=lambda i: (held[i], loads[i]))

    return place


def prefix_tree(seed: int) -> Rule:
    """Ray Serve LLM's prefix-aware router: the best match of at least 0.1, else power of two.

    The match is used while the most loaded engine has at most ten requests more than
    the least loaded. Ray's own default threshold is infinite, which overloads the
    engine with the prefix that all requests share.
    """
    fallback = power_of_two(seed)

    def place(request: TraceRequest, engines: Sequence[SimEngine]) -> int:
        loads = [engine.in_flight for engine in engines]
        matches = [engine.pool.match(request.blocks) * BLOCK_TOKENS for engine in engines]
        best = max(matches)
        if best < 0.1 * request.prompt_tokens or max(loads) - min(loads) > 10:
            return fallback(request, engines)
        return min((i for i, m in enumerate(matches) if m == best), key=lambda i: loads[i])

    return place


def dynamo_cost(seed: int) -> Rule:
    """Dynamo's KV router: blocks to prefill, less the overlap, plus blocks being decoded."""

    def cost(request: TraceRequest, engine: SimEngine) -> float:
        overlap = engine.pool.match(request.blocks) * BLOCK_TOKENS
        prefill = engine.queued_tokens() + request.prompt_tokens - overlap
        decode = engine.pool.used_pages * engine.pool.page_size + request.prompt_tokens
        return (prefill + decode) / engine.pool.page_size

    def place(request: TraceRequest, engines: Sequence[SimEngine]) -> int:
        return _index_of_min(engines, lambda engine: cost(request, engine))

    return place


def fewest_in_flight(seed: int) -> Rule:
    """The fewest requests; for engines that reserve the worst case (TGI)."""
    return lambda request, engines: _index_of_min(engines, lambda engine: float(engine.in_flight))


def _index_of_min(engines: Sequence[SimEngine], score: Callable[[SimEngine], float]) -> int:
    return min(range(len(engines)), key=lambda index: score(engines[index]))


PEERS: dict[str, Callable[[int], Rule]] = {
    "round-robin": round_robin,
    "random": uniform,
    "power-of-two": power_of_two,
    "least-kv": min_kv_share,
    "vllm-dp": vllm_data_parallel,
    "prefix-affinity": prefix_affinity,
    "prefix-tree": prefix_tree,
    "dynamo": dynamo_cost,
    "fifo-worst-case": fewest_in_flight,
}
WORST_CASE = frozenset({"fifo-worst-case"})
OWN = ("kvmesh", "clairvoyant")
POLICIES = (*PEERS, *OWN)
