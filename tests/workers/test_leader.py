"""The leader: streams, cancellation, lost clients, leases, failure."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from msgspec import structs

from kvmesh.workers import engine_thread
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import (
    ConfigError,
    EngineDrainingError,
    EngineError,
    InvalidFieldError,
    PoolCapacityError,
    WorkerDiedError,
)
from kvmesh.workers.executor import MakeMasks, RankDescription
from kvmesh.workers.leader import EngineLeader
from kvmesh.workers.lease import AccountUpdate, LeaseEnd, LeaseTerms
from kvmesh.workers.lease_book import AHEAD_TOKENS
from kvmesh.workers.plan import StepPlan, StepResult, TokenScores
from kvmesh.workers.request import EndReason, PrefillProgress, SequenceDelta
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.sizes import BLOCK_PAGES, PageNeed
from tests.workers.memory_executor import MemoryExecutor, expected_output
from tests.workers.test_engine import PAGE, request, tokens_of

CONFIG = EngineConfig(model="memory", page_size=PAGE, max_num_seqs=4, max_num_batched_tokens=16)
MANY = math.inf
ENDLESS = SamplingParams(temperature=0.0, max_tokens=700, ignore_eos=True)


class GatedExecutor(MemoryExecutor):
    """Needs a permit for each step, so that a test decides what is in flight."""

    def __init__(self, budget: int = 400) -> None:
        super().__init__(PAGE, 0, 0, budget)
        self.permits: float = 0
        self.permitted = threading.Condition()
        self.started = 0  # steps, the one that waits for its permit among them
        self.error: Exception | None = None

    def allow(self, steps: float) -> None:
        with self.permitted:
            self.permits += steps
            self.permitted.notify_all()

    def execute(self, plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        self.started += 1
        with self.permitted:
            assert self.permitted.wait_for(lambda: self.permits > 0, timeout=60)
            self.permits -= 1
        if self.error is not None:
            raise self.error
        return super().execute(plan, masks)


@asynccontextmanager
async def running() -> AsyncIterator[tuple[EngineLeader, GatedExecutor]]:
    executor = GatedExecutor()
    leader = EngineLeader(CONFIG, executor)
    with mock.patch.object(engine_thread, "AUDIT_PERIOD_S", 0.0):
        await leader.start()
        try:
            yield leader, executor
        finally:
            executor.allow(MANY)
            await leader.stop()


class Inbox:
    """Collects a client's deltas."""

    def __init__(self) -> None:
        self._arrived: asyncio.Queue[list[SequenceDelta]] = asyncio.Queue()

    def deliver(self, deltas: list[SequenceDelta]) -> None:
        self._arrived.put_nowait(deltas)

    async def take(self) -> list[SequenceDelta]:
        return await asyncio.wait_for(self._arrived.get(), 60)

    async def until_end(self, names: set[str]) -> dict[str, list[SequenceDelta]]:
        read: dict[str, list[SequenceDelta]] = {name: [] for name in names}
        left = set(names)
        while left:
            for delta in await self.take():
                read[delta.request_id].append(delta)
                if delta.finish_reason is not None:
                    left.discard(delta.request_id)
        return read


async def idle(leader: EngineLeader) -> None:
    """Wait until no sequence is left, using the drain signal."""
    await asyncio.wait_for(leader._idle.wait(), 60)


async def test_one_client_gets_all_its_sequences() -> None:
    async with running() as (leader, executor):
        executor.allow(MANY)
        inbox = Inbox()
        prompts = {str(i): [i + 2, 5, 6] for i in range(6)}
        for name, prompt in prompts.items():
            leader.submit([request(name, prompt, 20)], inbox.deliver)
        read = await inbox.until_end(set(prompts))
        for name, prompt in prompts.items():
            assert tokens_of(read[name]) == expected_output(prompt, 20)
        assert leader.account.loads.pool.used == PageNeed(0, 0)


async def test_abort_ends_a_sequence_in_flight() -> None:
    async with running() as (leader, executor):
        inbox = Inbox()
        leader.submit([request("a", [3, 4], params=ENDLESS)], inbox.deliver)
        executor.allow(1)
        await inbox.take()
        leader.abort(["a", "unknown"])
        executor.allow(1)
        read = await inbox.until_end({"a"})
        assert read["a"][-1].finish_reason is EndReason.ABORT
        assert leader.account.loads.pool.used == PageNeed(0, 0)


async def test_a_client_that_stops_reading_loses_only_its_own_sequences() -> None:
    async with running() as (leader, executor):
        gone, stays = Inbox(), Inbox()
        for name in ("a", "b"):
            leader.submit([request(name, [3, 4], params=ENDLESS)], gone.deliver)
        executor.allow(1)
        await gone.take()
        leader.submit([request("c", [3, 4], 5)], stays.deliver)
        leader.disconnect(gone.deliver)
        executor.allow(MANY)
        read = await stays.until_end({"c"})
        assert tokens_of(read["c"]) == expected_output([3, 4], 5)
        await idle(leader)
        assert leader.account.loads.outcomes_total["abort"] == 2


async def test_a_failed_rank_ends_every_sequence_with_an_error() -> None:
    async with running() as (leader, executor):
        inbox = Inbox()
        for name in ("a", "b"):
            leader.submit([request(name, [3, 4], params=ENDLESS)], inbox.deliver)
        executor.allow(1)
        await inbox.take()
        executor.error = WorkerDiedError("rank 1 ended")
        executor.allow(1)
        read = await inbox.until_end({"a", "b"})
        assert all(deltas[-1].finish_reason is EndReason.ERROR for deltas in read.values())
        assert leader.failed is executor.error
        failed = "the engine of this group has failed: rank 1 ended"
        with pytest.raises(WorkerDiedError, match=failed):
            leader.submit([request("c", [3])], inbox.deliver)


async def test_start_raises_the_error_of_a_rank_that_could_not_start() -> None:
    class Broken(GatedExecutor):
        def describe(self) -> list[RankDescription]:
            raise WorkerDiedError("rank 0 ended with exit code 1")

    with pytest.raises(WorkerDiedError, match="exit code 1"):
        await EngineLeader(CONFIG, Broken()).start()


@pytest.mark.parametrize("chosen", ["", "k4v4"])
def test_the_format_that_the_ranks_have_chosen_is_checked(
    monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    monkeypatch.setattr("kvmesh.workers.leader.check_format", lambda *given: given)
    monkeypatch.setattr("kvmesh.workers.leader.Engine", lambda *given, check: (*given, check))
    executor = GatedExecutor()
    described = structs.replace(executor._description, kv_format=chosen, values_in_keys=4)
    executor._description = described
    made: Any = EngineLeader(CONFIG, executor)._make_engine()
    config = CONFIG.replace(kv_format=chosen or CONFIG.kv_format)
    assert made == (CONFIG, executor, (config, described.head_dim, executor.divergences, 4))


async def test_a_step_has_an_age_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    leader = EngineLeader(CONFIG, GatedExecutor())
    assert leader.step_age_s == 0.0, "there is no engine yet"
    monkeypatch.setattr("kvmesh.workers.leader.time.monotonic", lambda: 100.0)
    for start_s, age_s in [(None, 0.0), (97.5, 2.5), (100.5, 0.0)]:
        monkeypatch.setattr(leader, "_engine", SimpleNamespace(step_start_s=start_s))
        assert leader.step_age_s == age_s


async def test_submit_refuses_invalid_requests() -> None:
    async with running() as (leader, _):
        inbox = Inbox()
        leader.submit([request("a", [3, 4], params=ENDLESS)], inbox.deliver)
        with pytest.raises(InvalidFieldError, match="request_id: 'a' is already running"):
            leader.submit([request("a", [3, 4])], inbox.deliver)
        with pytest.raises(InvalidFieldError, match="request_id: 't' is already running"):
            leader.submit([request("t", [3, 4]), request("t", [3, 4])], inbox.deliver)
        total = leader.account.info.capacity.sealed
        big = LeaseTerms("l1", 1, hot_pages=1, sealed_pages=total - 1, max_sealed_pages=total - 1)
        leader.submit([request("b", [3, 4], params=ENDLESS, lease=big)], inbox.deliver)
        small = LeaseTerms("l2", 1, 1, 2, 2)
        with pytest.raises(PoolCapacityError) as caught:
            leader.submit([request("c", [3, 4], lease=small)], inbox.deliver)
        assert caught.value.retryable
        assert leader.account.book.take_update() == AccountUpdate(arrived=(big,))
        leader._draining = True
        with pytest.raises(EngineDrainingError, match="this group is shutting down"):
            leader.submit([request("d", [3, 4])], inbox.deliver)


async def test_all_sequences_of_a_lease_are_accepted_or_none() -> None:
    async with running() as (leader, _):
        lease = LeaseTerms("l", 1, 2, 4, 4, sequences=2)
        good, bad = request("l.0", [3, 4], lease=lease), request("l.1", [-1], lease=lease)
        with pytest.raises(InvalidFieldError):
            leader.submit([good, bad], Inbox().deliver)
        assert not leader.account.book.take_update()
        assert leader._idle.is_set()


async def test_nothing_works_before_the_start_and_a_failed_start_raises_its_reason() -> None:
    executor = GatedExecutor()
    leader = EngineLeader(CONFIG, executor)
    with pytest.raises(EngineError, match="has not started"):
        leader.submit([request("a", [3])], Inbox().deliver)
    leader.withdraw("unknown")
    leader.extend(LeaseTerms("unknown", 1, 1, 1, 1))
    error = ConfigError("tp", "must be 1")

    def fail() -> list[RankDescription]:
        raise error

    executor.describe = fail  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="must be 1"):
        await asyncio.wait_for(leader.start(), 60)
    assert leader.failed is error
    await leader.stop()


async def test_stopping_ends_what_runs_and_closes_the_ranks_even_twice() -> None:
    executor = GatedExecutor()
    closed: list[None] = []
    executor.close = lambda: closed.append(None)  # type: ignore[method-assign]
    leader = EngineLeader(CONFIG, executor)
    await leader.start()
    inbox = Inbox()
    leader.submit([request("a", [3, 4], params=ENDLESS)], inbox.deliver)
    executor.allow(1)
    await inbox.take()
    stopping = asyncio.create_task(leader.stop())
    # A step is in flight or about to be; the thread must not run to the last token meanwhile.
    while not leader._draining:
        await asyncio.sleep(0)
    executor.allow(2)
    await stopping
    with pytest.raises(EngineDrainingError):
        leader.submit([request("b", [3])], inbox.deliver)
    read = await inbox.until_end({"a"})
    assert read["a"][-1].finish_reason is EndReason.ABORT
    assert len(closed) == 1
    await leader.stop()


async def test_a_failure_is_reported_to_the_router_even_without_a_sequence() -> None:
    changed = asyncio.Event()
    leader = EngineLeader(CONFIG, GatedExecutor(), changed.set)
    await leader.start()
    await leader.drain()
    changed.clear()
    leader.engine_failed(WorkerDiedError("rank 1 ended"))
    assert changed.is_set()
    await leader.stop()


async def test_cached_blocks_and_loads_come_with_the_reports() -> None:
    async with running() as (leader, executor):
        executor.allow(MANY)
        inbox = Inbox()
        prompt = [i % 40 for i in range(BLOCK_PAGES * PAGE + 1)]
        leader.submit([request("a", prompt, 2)], inbox.deliver)
        await inbox.until_end({"a"})
        assert len(leader.account.blocks.take_changes().held) == 1
        assert leader.account.loads.prompt_tokens_total == len(prompt)


async def test_a_report_stays_current_while_no_sequence_comes_or_ends() -> None:
    async with running() as (leader, executor):
        executor.allow(MANY)
        inbox = Inbox()
        leader.submit([request("a", [3, 4], 5)], inbox.deliver)
        current = [leader.account.loads_current]
        await inbox.until_end({"a"})
        current.append(leader.account.loads_current)
        leader.engine_output([SequenceDelta("a", (3,))])  # it has ended
        current.append(leader.account.loads_current)
        assert current == [False, True, True]


async def test_who_receives_an_end_finds_it_in_the_report() -> None:
    async with running() as (leader, executor):
        executor.allow(1)
        reported: list[int] = []

        def deliver(deltas: list[SequenceDelta]) -> None:
            reported.append(leader.account.loads.completion_tokens_total)

        leader.submit([request("a", [3, 4], 1)], deliver)
        await idle(leader)
        assert reported == [1]


async def test_drain_waits_for_running_sequences() -> None:
    async with running() as (leader, executor):
        inbox = Inbox()
        leader.submit([request("a", [3, 4], 20)], inbox.deliver)
        draining = asyncio.create_task(leader.drain())
        while not leader._draining:
            await asyncio.sleep(0)
        assert not draining.done()
        executor.allow(MANY)
        await asyncio.wait_for(draining, 60)
        read = await inbox.until_end({"a"})
        assert tokens_of(read["a"]) == expected_output([3, 4], 20)


async def test_drain_hands_over_what_has_not_ended_in_time() -> None:
    async with running() as (leader, executor):
        inbox = Inbox()
        leader.submit([request("a", [3, 4], params=ENDLESS)], inbox.deliver)
        executor.allow(1)
        await inbox.take()
        while executor.started < 2:
            await asyncio.sleep(0)
        draining = asyncio.create_task(leader.drain(0.0))
        while leader._thread._commands.empty():
            assert not draining.done()
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not draining.done(), "it waits for what it has cleared"
        executor.allow(MANY)
        read = await inbox.until_end({"a"})
        assert read["a"][-1].finish_reason is EndReason.CLEARED
        await asyncio.wait_for(draining, 60)
        assert leader.account.loads.pool.used == PageNeed(0, 0)


async def test_the_account_of_a_lease_from_its_arrival_to_its_end() -> None:
    async with running() as (leader, executor):
        inbox = Inbox()
        lease = LeaseTerms("l", 1, hot_pages=1, sealed_pages=1, max_sealed_pages=8)
        params = SamplingParams(temperature=0.0, max_tokens=6 * PAGE, ignore_eos=True)
        leader.submit([request("l.0", [3, 4], params=params, lease=lease)], inbox.deliver)
        assert leader.account.book.take_update() == AccountUpdate(arrived=(lease,))
        executor.allow(MANY)
        # Until it has used up its lease, and waits.
        tokens: list[int] = []
        while len(tokens) < 2 * PAGE - 2:
            for delta in await inbox.take():
                tokens += delta.token_ids
        update = leader.account.book.take_update()
        assert update.first_tokens == ("l",)
        (want,) = update.wants
        assert want.prompt_tokens == 2
        assert want.tokens <= 2 * PAGE + AHEAD_TOKENS
        assert leader.account.book.restate().wants == (want,), "a new router gets it again"
        leader.extend(replace(lease, sealed_pages=8))
        read = await inbox.until_end({"l.0"})
        tokens += tokens_of(read["l.0"])
        assert tokens == expected_output([3, 4], 6 * PAGE, ignore_eos=True)
        assert leader.account.book.take_update() == AccountUpdate(ended=(LeaseEnd("l", 6 * PAGE),))
        assert (leader.account.book.leases, leader.account.book.restate()) == ((), AccountUpdate())


async def test_what_comes_before_the_first_token_is_not_reported_as_it() -> None:
    async with running() as (leader, _):
        lease = LeaseTerms("l", 1, 1, 90, 90)
        leader.submit([request("l.0", [3, 4], params=ENDLESS, lease=lease)], Inbox().deliver)
        leader.account.book.take_update()
        progress = PrefillProgress(computed_tokens=1, cached_tokens=0, total_tokens=2)
        leader.engine_output([SequenceDelta("l.0", (), progress=progress)])
        scores = TokenScores(bytes(4), b"", b"")
        leader.engine_output([SequenceDelta("l.0", (), scores=scores)])
        assert not leader.account.book.take_update()
        leader.engine_output([SequenceDelta("l.0", (5,))])
        assert leader.account.book.take_update().first_tokens == ("l",)


async def test_a_withdrawn_lease_ends_whether_it_runs_or_not() -> None:
    async with running() as (leader, executor):
        inbox = Inbox()
        lease = LeaseTerms("l", 1, 1, 90, 90)
        leader.submit([request("l.0", [3, 4], params=ENDLESS, lease=lease)], inbox.deliver)
        executor.allow(1)
        await inbox.take()
        leader.account.book.take_update()
        leader.withdraw("never came")
        assert leader.account.book.take_update() == AccountUpdate(ended=(LeaseEnd("never came"),))
        leader.withdraw("l")
        executor.allow(1)
        read = await inbox.until_end({"l.0"})
        assert read["l.0"][-1].finish_reason is EndReason.ABORT
        assert leader.account.book.take_update() == AccountUpdate(ended=(LeaseEnd("l"),))


async def test_reports_agree_with_the_account() -> None:
    """What sequences hold is within what the leases of the same report cover."""
    changed = asyncio.Event()
    executor = GatedExecutor()
    leader = EngineLeader(CONFIG, executor, changed.set)
    await leader.start()
    executor.allow(MANY)
    inbox = Inbox()
    for number in range(4):
        lease = LeaseTerms(str(number), 1, 1, 3, 3, number=number)
        leader.submit([request(f"{number}.0", [number] * 20, 20, lease=lease)], inbox.deliver)
    left = 4
    while left:
        for delta in await inbox.take():
            left -= delta.finish_reason is not None
        loads = leader.account.loads
        if leader.account.loads_current:
            assert loads.pool.sealed.used <= sum(x.sealed_pages for x in loads.leases)
            assert loads.pool.hot.used <= sum(x.hot_pages for x in loads.leases)
    assert changed.is_set()
    assert (leader.account.loads.leases, leader.account.loads.pool.used) == ((), PageNeed(0, 0))
    await leader.stop()
