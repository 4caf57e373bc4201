"""The leader: streams, cancellation, lost clients, leases, failure."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import (
    CapacityError,
    DrainingError,
    InvalidRequestError,
    WorkerDiedError,
)
from kvmesh.workers.executor import RankDescription
from kvmesh.workers.leader import EngineLeader
from kvmesh.workers.plan import StepPlan, StepResult
from kvmesh.workers.request import FinishReason, LeaseTerms, SequenceDelta
from kvmesh.workers.sampling_params import SamplingParams
from tests.workers.memory_executor import MemoryExecutor, expected_output
from tests.workers.test_engine import PAGE, request, tokens_of

CONFIG = EngineConfig(model="memory", page_size=PAGE, max_num_seqs=4, max_num_batched_tokens=16)
MANY = 10_000
ENDLESS = SamplingParams(temperature=0.0, max_tokens=700, ignore_eos=True)


class GatedExecutor(MemoryExecutor):
    """Needs a permit for each step, so that a test decides what is in flight."""

    def __init__(self) -> None:
        super().__init__(PAGE, 0, 0, 400)
        self.permits = threading.Semaphore(0)
        self.error: Exception | None = None

    def allow(self, steps: int) -> None:
        self.permits.release(steps)

    def execute(self, plan: StepPlan) -> StepResult:
        assert self.permits.acquire(timeout=30)
        if self.error is not None:
            raise self.error
        return super().execute(plan)


@asynccontextmanager
async def running() -> AsyncIterator[tuple[EngineLeader, GatedExecutor]]:
    executor = GatedExecutor()
    leader = EngineLeader(CONFIG, executor)
    await leader.start()
    try:
        yield leader, executor
    finally:
        executor.allow(MANY)
        await leader.stop()


async def read_until_end(
    stream: AsyncIterator[list[SequenceDelta]], names: set[str]
) -> dict[str, list[SequenceDelta]]:
    read: dict[str, list[SequenceDelta]] = {name: [] for name in names}
    left = set(names)
    async for deltas in stream:
        for delta in deltas:
            read[delta.request_id].append(delta)
            if delta.finish_reason is not None:
                left.discard(delta.request_id)
        if not left:
            return read
    raise AssertionError("the stream ended early")


async def idle(leader: EngineLeader) -> None:
    """Wait until no sequence is left, using the drain signal."""
    await asyncio.wait_for(leader._idle.wait(), 10)


@pytest.mark.asyncio
async def test_one_stream_carries_all_sequences_of_a_client() -> None:
    async with running() as (leader, executor):
        executor.allow(MANY)
        prompts = {str(i): [i + 2, 5, 6] for i in range(6)}
        for name, prompt in prompts.items():
            await leader.submit(request(name, prompt, 20))
        read = await read_until_end(leader.outputs("client"), set(prompts))
        for name, prompt in prompts.items():
            assert tokens_of(read[name]) == expected_output(prompt, 20)
        pool = leader.loads().pool
        assert pool.sealed_used == pool.hot_used == 0


@pytest.mark.asyncio
async def test_abort_ends_a_sequence_in_flight() -> None:
    async with running() as (leader, executor):
        await leader.submit(request("a", [3, 4], params=ENDLESS))
        stream = leader.outputs("client")
        executor.allow(1)
        await anext(stream)
        assert await leader.abort("a")
        executor.allow(1)
        read = await read_until_end(stream, {"a"})
        assert read["a"][-1].finish_reason is FinishReason.ABORT
        assert leader.loads().pool.sealed_used == 0
        assert not await leader.abort("a")


@pytest.mark.asyncio
async def test_a_client_that_stops_reading_loses_only_its_own_sequences() -> None:
    async with running() as (leader, executor):
        gone, stays = leader.outputs("gone"), leader.outputs("stays")
        for name in ("a", "b"):
            await leader.submit(request(name, [3, 4], params=ENDLESS, client_id="gone"))
        executor.allow(1)
        await anext(gone)
        await leader.submit(request("c", [3, 4], 5, client_id="stays"))
        await gone.aclose()  # type: ignore[attr-defined]
        executor.allow(MANY)
        read = await read_until_end(stays, {"c"})
        assert tokens_of(read["c"]) == expected_output([3, 4], 5)
        await idle(leader)
        assert leader.loads().outcomes_total["abort"] == 2


@pytest.mark.asyncio
async def test_a_failed_rank_ends_every_sequence_with_an_error() -> None:
    async with running() as (leader, executor):
        stream = leader.outputs("client")
        for name in ("a", "b"):
            await leader.submit(request(name, [3, 4], params=ENDLESS))
        executor.allow(1)
        await anext(stream)
        executor.error = WorkerDiedError("rank 1 ended")
        executor.allow(1)
        read = await read_until_end(stream, {"a", "b"})
        assert all(deltas[-1].finish_reason is FinishReason.ERROR for deltas in read.values())
        assert leader.failed is executor.error
        with pytest.raises(WorkerDiedError):
            await leader.submit(request("c", [3]))


@pytest.mark.asyncio
async def test_start_raises_the_error_that_kept_the_ranks_from_starting() -> None:
    class Broken(GatedExecutor):
        def describe(self) -> list[RankDescription]:
            raise WorkerDiedError("rank 0 ended with exit code 1")

    with pytest.raises(WorkerDiedError, match="exit code 1"):
        await EngineLeader(CONFIG, Broken()).start()


@pytest.mark.asyncio
async def test_submit_refuses_invalid_requests() -> None:
    async with running() as (leader, _):
        await leader.submit(request("a", [3, 4], params=ENDLESS))
        with pytest.raises(InvalidRequestError, match="request_id"):
            await leader.submit(request("a", [3, 4]))
        total = leader.info().sealed_pages
        big = LeaseTerms("l1", 1, hot_pages=1, sealed_pages=total - 1)
        await leader.submit(request("b", [3, 4], params=ENDLESS, lease=big))
        with pytest.raises(CapacityError) as caught:
            await leader.submit(request("c", [3, 4], lease=LeaseTerms("l2", 1, 1, 2)))
        assert caught.value.ever
        assert leader.loads().leases in ((), (big,))
        leader._draining = True
        with pytest.raises(DrainingError):
            await leader.submit(request("d", [3, 4]))


@pytest.mark.asyncio
async def test_drain_waits_for_running_sequences() -> None:
    async with running() as (leader, executor):
        executor.allow(MANY)
        await leader.submit(request("a", [3, 4], 20))
        stream = leader.outputs("client")
        await asyncio.wait_for(leader.drain(), 10)
        read = await read_until_end(stream, {"a"})
        assert tokens_of(read["a"]) == expected_output([3, 4], 20)
