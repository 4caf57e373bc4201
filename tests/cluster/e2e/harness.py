"""A cluster on a small model, and helpers that wait for its state."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

from kvmesh.client import Client, KVMeshError, Loads
from kvmesh.client.failures import error_of
from kvmesh.client.transport import RpcFailure
from kvmesh.cluster.config import ClusterConfig, build
from kvmesh.cluster.errors import StartError
from kvmesh.cluster.lifecycle import Cluster, Endpoint
from kvmesh.protos import pb
from kvmesh.workers.leader import EngineLeader
from kvmesh.workers.local import LocalProcesses
from kvmesh.workers.request import EngineRequest, SequenceDelta
from kvmesh.workers.sampling_params import SamplingParams
from tests.model.shallow import LAYERS, make_shallow, shallow_path

POLL_S = 0.05
PATIENCE_S = 300.0  # on a machine with other work
PAGE_TOKENS = 16
POOL_SEQUENCES = 4
START_ATTEMPTS = 3

# Small pages and a small pool: four sequences at once, of about 800 tokens at most.
KV_LAYER_BYTES = 560 << 10
SMALL_ENGINE: Mapping[str, Any] = {
    "kv_format": "int8",  # without exact windows, of which four sequences would fill the pool
    "tp": 1,
    "threads_per_rank": 1,
    "page_size": PAGE_TOKENS,
    "max_num_seqs": POOL_SEQUENCES,
    "max_num_batched_tokens": 128,
    "kv_memory_bytes": LAYERS * KV_LAYER_BYTES,
    "kv_probe": "off",
}
SMALL: Mapping[str, Any] = {"model": str(shallow_path()), "engine": SMALL_ENGINE}


def small_config(**sections: Any) -> ClusterConfig:
    return build({**SMALL, "ingress": {"port": 0, "http_port": 0}, **sections})


@contextmanager
def serving(config: ClusterConfig, keys: Path) -> Iterator[Endpoint]:
    """A running cluster, whose API key is created below the directory `keys`."""
    make_shallow()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(keys))
        patch.delenv("KVMESH_API_KEY", raising=False)
        for attempts_left in reversed(range(START_ATTEMPTS)):
            cluster = Cluster(config)
            try:
                endpoint = cluster.start_guarded()
                break
            except StartError as error:
                # Ray gives its node 30 s, too little on a busy machine; what is ours fails again.
                print(f"started again, because: {error}")
                if not attempts_left:
                    raise
        try:
            yield endpoint
        finally:
            cluster.stop()


def wait_for(
    condition: Callable[[], bool],
    what: str | Callable[[], str],
    within_s: float = PATIENCE_S,
    period_s: float = POLL_S,
) -> float:
    """Seconds until `condition` held; fails the test, naming `what`, if it does not."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > within_s:
            missed = what if isinstance(what, str) else what()
            pytest.fail(f"not within {within_s:g} s: {missed}")
        time.sleep(period_s)
    return time.monotonic() - started


def used_pages(loads: Loads) -> int:
    return sum(group.hot.used + group.sealed.used for group in loads.groups)


def in_use(loads: Loads) -> dict[str, int]:
    """Everything that is zero in an idle cluster; cached pages do not count."""
    return {
        "pages": used_pages(loads),
        "bytes": sum(group.used_bytes for group in loads.groups),
        "running": sum(group.running for group in loads.groups),
        "waiting": sum(group.waiting for group in loads.groups),
        "queued": loads.router.queue_length,
        "leases": loads.router.leases,
        "leased bytes": sum(account.leased_bytes for account in loads.router.ledger),
    }


def wait_idle(client: Client, within_s: float = PATIENCE_S) -> float:
    """Seconds until pools and ledger are at exactly zero use."""
    return wait_for(
        lambda: not any(in_use(client.loads()).values()),
        lambda: f"pool and ledger at zero; they are at {in_use(client.loads())}",
        within_s,
    )


def check_accounts(loads: Loads) -> None:
    """Every page is used, cached or free, and the ledger's groups are the engines'."""
    for group in loads.groups:
        for pages in (group.hot, group.sealed):
            assert pages.used + pages.cached + pages.free == pages.total
        assert group.used_bytes + group.cached_bytes + group.free_bytes == group.total_bytes
    assert {account.group for account in loads.router.ledger} == {g.group for g in loads.groups}


def call_raw(target: str, method: str, body: bytes, key: str | None) -> KVMeshError | None:
    """Send bytes as the request of a unary method; the error that comes back, if any."""
    metadata = () if key is None else (("authorization", f"Bearer {key}"),)
    with grpc.insecure_channel(target) as channel:
        call: Callable[..., Any] = channel.unary_unary(f"/kvmesh.v1.KVMesh/{method}")
        try:
            call(body, metadata=metadata, timeout=PATIENCE_S)
        except grpc.RpcError as error:
            return _typed(error)
    return None


def stream_raw(target: str, body: bytes, key: str | None) -> KVMeshError | None:
    """Like `call_raw`, for GenerateStream, read to its end."""
    metadata = () if key is None else (("authorization", f"Bearer {key}"),)
    with grpc.insecure_channel(target) as channel:
        call: Callable[..., Any] = channel.unary_stream("/kvmesh.v1.KVMesh/GenerateStream")
        try:
            for _ in call(body, metadata=metadata, timeout=PATIENCE_S):
                pass
        except grpc.RpcError as error:
            return _typed(error)
    return None


def _typed(error: Any) -> KVMeshError:
    """As the SDK would raise it. error: what grpc raises, which is a grpc.Call as well"""
    trailers = tuple(error.trailing_metadata() or ())
    return error_of(RpcFailure(error.code().name, error.details() or "", trailers))


def text_request(text: str = "Once upon a time", **params: Any) -> pb.GenerateRequest:
    params.setdefault("max_tokens", 2)
    return pb.GenerateRequest(
        prompt=pb.Prompt(text=text), sampling_params=pb.SamplingParams(**params)
    )


def greedy_by_engine(
    config: ClusterConfig,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    group: str = "engine-0",
) -> list[tuple[int, ...]]:
    """The output of a group's engine without a cluster, one prompt after the other."""

    async def run() -> list[tuple[int, ...]]:
        engine_config = config.engine_config(group)
        leader = EngineLeader(engine_config, LocalProcesses(engine_config))
        await leader.start()
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        answers: list[tuple[int, ...]] = []
        arrived: asyncio.Queue[list[SequenceDelta]] = asyncio.Queue()
        for number, prompt in enumerate(prompts):
            ids = np.array(prompt, np.int32)
            leader.submit([EngineRequest(str(number), ids, params)], arrived.put_nowait)
            tokens: list[int] = []
            ended = False
            while not ended:
                for delta in await arrived.get():
                    tokens.extend(delta.token_ids)
                    ended = ended or delta.finish_reason is not None
            answers.append(tuple(tokens))
        await leader.stop()
        return answers

    return asyncio.run(run())


def processes_named(part: str) -> list[psutil.Process]:
    """Descendants of this process whose command line holds `part`."""
    found = []
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            if part in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
