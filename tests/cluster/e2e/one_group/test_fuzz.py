"""Mutated requests: each ends with a documented status, and the server serves on.

pytest tests/cluster/e2e/one_group/test_fuzz.py --fuzz-cases 100000 --fuzz-seed 7
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import psutil
import pytest

from kvmesh.client import Client
from kvmesh.client.status import TRAILER, decode
from kvmesh.cluster.lifecycle import Endpoint
from kvmesh.protos import pb
from tests.cluster.e2e.harness import check_accounts, processes_named, wait_idle
from tests.cluster.e2e.one_group.mutants import Mutant, mutants

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(0),
    # Ray's own, at its import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

CONCURRENT_CALLS = 24
# Of a call without a limit of its own: the client then leaves.
PATIENCE_S = 10.0
# For a busy machine: the limit bounds the engine's work, not the way there and back.
GRACE_S = 120.0
# The contract's table, without what only a lost or starting server may answer, and INTERNAL.
DOCUMENTED = frozenset(
    {
        "OK",
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "FAILED_PRECONDITION",
        "RESOURCE_EXHAUSTED",
        "DEADLINE_EXCEEDED",
    }
)


def test_mutated_requests(endpoint: Endpoint, pytestconfig: pytest.Config) -> None:
    cases = mutants(pytestconfig.getoption("fuzz_seed"), pytestconfig.getoption("fuzz_cases"))
    with Client(endpoint.target, api_key=endpoint.api_key) as client:
        before = client.generate("The sea", max_tokens=8, temperature=0.0)
        processes = server_processes()
        codes = asyncio.run(call_all(endpoint, cases))
        print(f"answers: {dict(codes)}")
        assert codes["OK"] and codes["INVALID_ARGUMENT"], codes
        wait_idle(client)
        check_accounts(client.loads())
        assert server_processes() == processes, "a process of the server has ended"
        after = client.generate("The sea", max_tokens=8, temperature=0.0)
        assert after.choices == before.choices


def server_processes() -> set[psutil.Process]:
    """Ranks, engines, router and ingresses, which must all survive."""
    return {*processes_named("RankActor"), *processes_named("ServeReplica")}


async def call_all(endpoint: Endpoint, cases: Iterator[Mutant]) -> Counter[str]:
    """Call with every mutant, some at a time; the number of answers of each code."""
    codes: Counter[str] = Counter()
    headers = (("authorization", f"Bearer {endpoint.api_key}"),)

    async def caller(channel: grpc.aio.Channel) -> None:
        for mutant in cases:
            codes[await call(channel, headers, mutant)] += 1

    # Above the server's limit, whose answer is wanted.
    options = (("grpc.max_send_message_length", -1),)
    async with (
        grpc.aio.insecure_channel(endpoint.target, options) as channel,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(CONCURRENT_CALLS):
            group.create_task(caller(channel))
    return codes


async def call(
    channel: grpc.aio.Channel, headers: tuple[tuple[str, str], ...], mutant: Mutant
) -> str:
    """One call, read to its end; the code of its answer."""
    limit_s = PATIENCE_S if mutant.timeout_s is None else mutant.timeout_s + GRACE_S
    multi: Any = channel.unary_stream(f"/kvmesh.v1.KVMesh/{mutant.method}")
    try:
        async for _ in multi(mutant.body, metadata=headers, timeout=limit_s):
            pass
    except grpc.aio.AioRpcError as error:
        code, details = error.code().name, error.details() or ""
        trailers = dict(error.trailing_metadata() or ())
    else:
        return "OK"
    if mutant.timeout_s is None and code == "DEADLINE_EXCEEDED":
        return "left"  # gRPC's own timer, which may be a little early by another clock
    assert code in DOCUMENTED, f"{mutant.method}, {mutant.what}: {code}, {details}"
    trailer = trailers.get(TRAILER)
    detail = decode(trailer) if isinstance(trailer, bytes) else None
    assert details and detail is not None, f"{mutant.method}, {mutant.what}: {code}, {details}"
    if code == "INVALID_ARGUMENT" and detail.reason == pb.ERROR_REASON_INVALID_FIELD:
        assert detail.field_violations, f"{mutant.method}, {mutant.what}: {details}"
    return code
