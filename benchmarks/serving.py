"""The whole path (SDK → gRPC → ingress → engine) compared with the engine alone, in one run.

    python -m benchmarks.serving [--streams N] [--tokens N] [--rounds R] [--json FILE]

A cluster of one group and one rank is started and, with the same settings, an engine whose
rank is a child process of this one. They alternate, one idle while the other works: N
streams at once for throughput, one stream at a time for the time to first token. Prompts
differ, so no prefix is shared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from kvmesh.client import AsyncClient
from kvmesh.cluster.config import ClusterConfig, build
from kvmesh.cluster.lifecycle import Cluster, Endpoint
from kvmesh.workers.leader import EngineLeader
from kvmesh.workers.local import LocalProcesses
from kvmesh.workers.request import EngineRequest, SequenceDelta
from kvmesh.workers.sampling_params import SamplingParams

console = Console(stderr=True)
PROMPT_TOKENS = 64


class Prompts:
    """Prompts of random ordinary tokens, without repetition."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def take(self, count: int) -> list[list[int]]:
        drawn = self._random.integers(100, 40_000, (count, PROMPT_TOKENS))
        return [[int(token) for token in prompt] for prompt in drawn]


class EngineAlone:
    """The engine through its leader's own interface."""

    def __init__(self, leader: EngineLeader) -> None:
        self._leader = leader
        self._params: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
        self._count = 0
        self._arrived: asyncio.Queue[list[SequenceDelta]] = asyncio.Queue()

    async def run(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        """Seconds to the first token of any, and to the last of all."""
        params = SamplingParams(max_tokens=tokens, **self._params)
        start_s = time.perf_counter()
        live = set()
        for prompt in prompts:
            self._count += 1
            live.add(str(self._count))
            ids = np.array(prompt, np.int32)
            request = EngineRequest(str(self._count), ids, params)
            self._leader.submit([request], self._arrived.put_nowait)
        first = 0.0
        while live:
            deltas = await self._arrived.get()
            first = first or time.perf_counter()
            live -= {delta.request_id for delta in deltas if delta.finish_reason}
        return first - start_s, time.perf_counter() - start_s


class WholePath:
    """The cluster through the SDK."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def run(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        start_s = time.perf_counter()
        firsts: list[float] = []

        async def one(prompt: list[int]) -> None:
            stream = self._client.generate_stream(
                prompt, max_tokens=tokens, temperature=0.0, ignore_eos=True
            )
            seen = 0
            async for delta in stream:
                if not seen:
                    firsts.append(time.perf_counter())
                seen += len(delta.token_ids)
            assert seen == tokens, f"received {seen} tokens, expected {tokens}"

        await asyncio.gather(*(one(prompt) for prompt in prompts))
        return min(firsts) - start_s, time.perf_counter() - start_s


async def measure(
    config: ClusterConfig, endpoint: Endpoint, streams: int, tokens: int, rounds: int
) -> dict[str, Any]:
    engine_config = config.engine_config()
    leader = EngineLeader(engine_config, LocalProcesses(engine_config))
    console.log("loading the engine without a cluster")
    await leader.start()
    prompts = Prompts()
    async with AsyncClient(endpoint.target, api_key=endpoint.api_key) as client:
        sides: dict[str, EngineAlone | WholePath] = {
            "engine": EngineAlone(leader),
            "path": WholePath(client),
        }
        for side in sides.values():
            await side.run(prompts.take(streams), 8)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        firsts: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            for name, side in sides.items():
                console.log(f"round {number + 1} of {rounds}: {streams} streams, {name}")
                _, total = await side.run(prompts.take(streams), tokens)
                rates[name].append(streams * tokens / total)
            for _ in range(4):
                for name, side in sides.items():
                    first, _ = await side.run(prompts.take(1), 2)
                    firsts[name].append(first)
    await leader.stop()
    differences = [a - b for a, b in zip(firsts["path"], firsts["engine"], strict=True)]
    shares = [a / b for a, b in zip(rates["path"], rates["engine"], strict=True)]
    return {
        "streams": streams,
        "tokens": tokens,
        "kv_format": engine_config.kv_format,
        "tp": engine_config.tp,
        "engine_tokens_per_s": statistics.median(rates["engine"]),
        "path_tokens_per_s": statistics.median(rates["path"]),
        "path_share": statistics.median(shares),
        "path_share_min": min(shares),
        "path_share_max": max(shares),
        "engine_first_token_ms": statistics.median(firsts["engine"]) * 1e3,
        "path_first_token_ms": statistics.median(firsts["path"]) * 1e3,
        "first_token_added_ms": statistics.median(differences) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console.log("starting a cluster")
    config = build({"ingress": {"port": 0, "http_port": 0}, "engine": {"tp": 1}})
    with Cluster(config) as endpoint:
        results = asyncio.run(measure(config, endpoint, args.streams, args.tokens, args.rounds))
    Console().print(
        f"{args.streams} streams: {results['path_tokens_per_s']:.1f} tokens/s on the whole path, "
        f"{results['engine_tokens_per_s']:.1f} with the engine alone: "
        f"{results['path_share']:.2f} of it "
        f"({results['path_share_min']:.2f} … {results['path_share_max']:.2f})\n"
        f"first token: {results['path_first_token_ms']:.0f} ms and "
        f"{results['engine_first_token_ms']:.0f} ms: {results['first_token_added_ms']:+.0f} ms"
    )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
