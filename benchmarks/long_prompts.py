"""What a prompt of a million tokens costs the processes on its way, besides computing it.

    python -m benchmarks.long_prompts [--rounds N] [--json FILE]

Everything is real but the ranks, which answer at once (benchmarks/control_plane). Prompts of
1,048,576 token ids, of 4 MiB of text, and the ids again with another end, one at a time:

  peak       the largest resident memory of each kind of process, over that before the prompt
  health     the longest of the health checks, one every 10 ms, that run meanwhile; each passes
             through the ingress's event loop, so nothing blocks that for longer
  seconds    from the request to the first token, and how many tokens the cache had

The first round has the costs of first use as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.control_plane.__main__ import HERE, commit_of, conditions
from benchmarks.control_plane.processes import KINDS, ClusterProcesses
from benchmarks.control_plane.side import install_engine
from benchmarks.control_plane.tokens import FIRST_ID, NUM_IDS
from kvmesh.cluster.config import build
from kvmesh.cluster.lifecycle import Cluster
from kvmesh.protos import pb
from kvmesh.workers.model.embedded import EMBEDDED_NAME
from kvmesh.workers.model.source import resolve_model

RESULTS = HERE / "benchmarks" / "results" / "long_prompts.json"
METHOD = "/kvmesh.v1.KVMesh/GenerateStream"
PROMPT_TOKENS = 1 << 20
TEXT_BYTES = 4 << 20
CONTEXT = 1 << 21
HEALTH_PERIOD_S = 0.01
CALL_TIMEOUT_S = 300.0
MIB = 1 << 20


@contextmanager
def model_with_context(tokens: int) -> Iterator[Path]:
    """A directory with the embedded model, whose configuration has that many positions."""
    source = resolve_model(EMBEDDED_NAME).path
    with tempfile.TemporaryDirectory(prefix="kvmesh-long-") as name:
        target = Path(name) / "long"
        shutil.copytree(source, target, copy_function=_link)
        file = target / "config.json"
        config = json.loads(file.read_text()) | {"max_position_embeddings": tokens}
        file.unlink()
        file.write_text(json.dumps(config))
        yield target


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(source)


def prompts() -> dict[str, bytes]:
    """Requests on the wire."""
    ids = np.random.default_rng(0).integers(FIRST_ID, FIRST_ID + NUM_IDS, PROMPT_TOKENS)
    ids[0] = 0  # the ranks' time of a step
    sentence = "The ledger of the long journey has {} pages, and page {} is the last but one. "
    count = TEXT_BYTES // (len(sentence) - 4)
    text = "".join(sentence.format(number * 7919 % 104_729, number) for number in range(count))
    again = ids.copy()
    again[-1000:] = FIRST_ID
    return {
        "ids": _request(pb.Prompt(token_ids=pb.TokenIds(ids=ids.tolist()))),
        # A first token of 0 again, and a last one from which the ranks' output continues.
        "text": _request(pb.Prompt(text=f"<|endoftext|>{text[:TEXT_BYTES]}, said the ledger")),
        "ids with another end": _request(pb.Prompt(token_ids=pb.TokenIds(ids=again.tolist()))),
    }


def _request(prompt: pb.Prompt) -> bytes:
    params = pb.SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    return pb.GenerateRequest(prompt=prompt, sampling_params=params).SerializeToString()


class LongPrompts:
    """Sends requests to a cluster, and watches its processes and its health meanwhile."""

    def __init__(self, target: str, api_key: str | None) -> None:
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._channel = grpc.aio.insecure_channel(target)
        own = (("grpc.use_local_subchannel_pool", 1),)
        self._health: Any = health_pb2_grpc.HealthStub(
            grpc.aio.insecure_channel(target, options=own)
        )
        self._call: Any = self._channel.unary_stream(METHOD)
        self._processes = ClusterProcesses(frozenset())

    async def idle(self, seconds: float) -> float:
        """The longest health check of an idle cluster."""
        probe = asyncio.create_task(self._probe())
        await asyncio.sleep(seconds)
        return await _stopped(probe)

    async def measure(self, request: bytes) -> dict[str, Any]:
        before = self._processes.memory_bytes()["rss"]
        self._processes.reset_peaks()
        probe = asyncio.create_task(self._probe())
        began_s, first_s, usage = time.perf_counter(), None, pb.Usage()
        async for message in self._call(request, metadata=self._metadata, timeout=CALL_TIMEOUT_S):
            event = pb.GenerateStreamResponse.FromString(message)
            if first_s is None and event.WhichOneof("event") == "delta":
                first_s = time.perf_counter() - began_s
            if event.WhichOneof("event") == "usage":
                usage = event.usage
        peaks = self._processes.peak_bytes()
        return {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "first_token_s": first_s,
            "health_max_s": await _stopped(probe),
            "peak_mib": {kind: (peaks[kind] - before[kind]) / MIB for kind in KINDS[:3]},
        }

    async def _probe(self) -> float:
        """Checks health until it is cancelled; the longest time that a check took."""
        longest_s = 0.0
        try:
            while True:
                began_s = time.perf_counter()
                await self._health.Check(health_pb2.HealthCheckRequest(), timeout=CALL_TIMEOUT_S)
                longest_s = max(longest_s, time.perf_counter() - began_s)
                await asyncio.sleep(HEALTH_PERIOD_S)
        except asyncio.CancelledError:
            return longest_s


async def _stopped(probe: asyncio.Task[float]) -> float:
    probe.cancel()
    return await probe


async def _rounds(target: str, api_key: str | None, rounds: int) -> dict[str, Any]:
    long = LongPrompts(target, api_key)
    requests = prompts()
    idle_s = await long.idle(3.0)
    found = [
        {name: await long.measure(request) for name, request in requests.items()}
        for _ in range(rounds)
    ]
    return {"idle_health_max_s": idle_s, "rounds": found}


def run(rounds: int) -> dict[str, Any]:
    with model_with_context(CONTEXT) as model:
        config = build(
            {
                "model": str(model),
                "ingress": {"port": 0, "http_port": 0},
                "engine": {
                    "max_num_batched_tokens": 8192,
                    "kv_memory_bytes": "64MiB",
                    "kv_probe": "off",
                    "cpus_per_rank": 0.1,
                },
            }
        )
        with Cluster(config, install_engine) as endpoint:
            return asyncio.run(_rounds(endpoint.target, endpoint.api_key, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    report = {**conditions(), "commit": commit_of(HERE), **run(arguments.rounds)}
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
