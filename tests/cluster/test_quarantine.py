"""Requests that make engines fail are found and refused; those next to them lose nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import pytest

from kvmesh.cluster.errors import RequestFaultError
from kvmesh.cluster.ingress.error_table import status_code, to_wire
from kvmesh.cluster.ingress.failovers import MAX_FAILOVERS, Failovers, Loss
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import WorkerDiedError
from kvmesh.workers.executor import MakeMasks
from kvmesh.workers.plan import SampledToken, StepPlan, StepResult
from tests.cluster.machine import Machine, WatchedEngine, answer, machine
from tests.cluster.test_generation import Received, make_request, read, read_until, rest_of
from tests.workers.test_leader import MANY, GatedExecutor

POISON = 666  # the seed by which executors recognise it
Fails = Callable[[StepPlan, set[int]], None]


@pytest.fixture
async def three() -> AsyncIterator[Machine]:
    async with machine(groups=3) as built:
        yield built


def watch(built: Machine, act: Fails) -> None:
    """Call `act` before each step, with the plan and the rows of requests with the seed POISON."""
    for executor in built.executors.values():
        _watch(executor, act)


def _watch(executor: GatedExecutor, act: Fails) -> None:
    execute = executor.execute
    rows: set[int] = set()

    def watched(plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        for start in plan.row_starts:
            rows.discard(start.row)
            if start.params.seed == POISON:
                rows.add(start.row)
        act(plan, rows)
        return execute(plan, masks)

    executor.execute = watched  # type: ignore[method-assign]


def raise_at(length: int) -> Fails:
    """Fail in a step that computes the poison request's token at this length."""

    def act(plan: StepPlan, rows: set[int]) -> None:
        if any(chunk.row in rows and chunk.end >= length for chunk in plan.chunks):
            raise IndexError("index 50 is out of range")

    return act


def innocents(count: int) -> list[pb.GenerateRequest]:
    return [
        make_request(60 + i, prompt=[i % 50, 5, 9, i // 50], request_id=f"i{i}")
        for i in range(count)
    ]


def check_undisturbed(requests: list[pb.GenerateRequest], all_received: list[Received]) -> None:
    """`Received` has already checked that no token came twice or is missing."""
    for request, received in zip(requests, all_received, strict=True):
        prompt, length = request.prompt.token_ids.ids, request.sampling_params.max_tokens
        assert received.tokens[0] == answer(prompt, length)
        assert received.reason() == "length"


def failed(built: Machine) -> list[str]:
    return [name for name, leader in built.leaders.items() if leader.failed is not None]


@pytest.mark.parametrize("length", [4, 17, 40])
@pytest.mark.parametrize("choices", [1, 3])
async def test_a_poison_request_ends_two_engines_and_no_other_request(
    three: Machine, length: int, choices: int, caplog: pytest.LogCaptureFixture
) -> None:
    watch(three, raise_at(length))
    good = innocents(9)
    streams = [asyncio.ensure_future(read(three.stream(request))) for request in good]
    bad = make_request(100, prompt=[8, 8, 8, 8], request_id="bad", seed=POISON, n=choices)
    poisoned = asyncio.ensure_future(read(three.stream(bad)))
    three.allow(MANY)
    with pytest.raises(RequestFaultError) as caught:
        await poisoned
    check_undisturbed(good, await asyncio.gather(*streams))
    assert len(failed(three)) == 2
    wire = to_wire(caught.value)
    assert status_code(wire).name == "INTERNAL"
    assert wire.reason == pb.ERROR_REASON_REQUEST_FAULT
    assert not wire.HasField("retry_after_s")
    errors = [x.getMessage() for x in caplog.records if x.levelno == logging.ERROR]
    assert any("request tenant/bad is not tried again" in message for message in errors)


async def test_a_request_without_a_token_to_sample_fails_alone(three: Machine) -> None:
    for executor in three.executors.values():
        _fault(executor)
    good = innocents(9)
    streams = [asyncio.ensure_future(read(three.stream(request))) for request in good]
    three.allow(MANY)
    with pytest.raises(RequestFaultError, match="not finite"):
        await read(three.stream(make_request(100, request_id="bad", seed=POISON)))
    check_undisturbed(good, await asyncio.gather(*streams))
    assert failed(three) == []
    assert sum(x.account.loads.outcomes_total.get("fault", 0) for x in three.leaders.values()) == 1


def _fault(executor: GatedExecutor) -> None:
    """The poison request gets a fault instead of its first token."""
    poisoned: set[int] = set()

    def note(plan: StepPlan, rows: set[int]) -> None:
        poisoned.clear()
        poisoned.update(rows)

    _watch(executor, note)
    execute = executor.execute

    def faulty(plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        result = execute(plan)
        rows = [chunk.row for chunk in plan.chunks if chunk.sample]
        tokens = [
            SampledToken(-1, fault="its logits are not finite") if row in poisoned else token
            for row, token in zip(rows, result.tokens, strict=True)
        ]
        return StepResult(result.step, tokens, result.host_s)

    executor.execute = faulty  # type: ignore[method-assign]


# Engines that are lost by chance


async def lose_two(built: Machine, lose: Callable[[str], None]) -> list[Received]:
    """Many streams, of which those on two groups lose their engines one after the other."""
    good = innocents(12)
    streams = [built.stream(request) for request in good]
    started = [asyncio.ensure_future(read_until(stream, 1)) for stream in streams]
    # The permits are enough for all, but not for those that come after them.
    await built.until(lambda: sum(len(x.sequences) for x in built.engines.values()) == len(good))
    built.allow(30)
    received = await asyncio.gather(*started)
    rest = [
        asyncio.ensure_future(rest_of(stream, before))
        for stream, before in zip(streams, received, strict=True)
    ]
    lose("g0")
    await built.until(lambda: "g0" not in built.router.groups.names)
    for executor in built.executors.values():
        executor.allow(3)
    lose("g1")
    await built.until(lambda: "g1" not in built.router.groups.names)
    built.allow(MANY)
    done = await asyncio.gather(*rest)
    check_undisturbed(good, done)
    return done


async def test_no_request_is_blamed_for_engines_that_vanish(three: Machine) -> None:
    done = await lose_two(three, lambda name: three.engines[name].cut())
    assert max(x.usage.failovers for x in done if x.usage is not None) >= 1


async def test_no_request_is_blamed_for_ranks_that_are_killed(three: Machine) -> None:
    def kill(name: str) -> None:
        three.executors[name].error = WorkerDiedError("rank 0 was killed")
        three.executors[name].allow(1)

    await lose_two(three, kill)
    assert failed(three) == ["g0", "g1"]


async def test_a_kill_in_the_step_of_a_suspect_on_trial_is_not_blamed_on_it(
    three: Machine,
) -> None:
    """The only step that could be mistaken for a second failure of its own making."""
    killed: list[str] = []

    def act(plan: StepPlan, rows: set[int]) -> None:
        if len(killed) < 2 and any(chunk.row in rows for chunk in plan.chunks):
            killed.append("rank 0")
            raise WorkerDiedError("rank 0 was killed")

    watch(three, act)
    three.allow(MANY)
    received = await read(three.stream(make_request(60, request_id="unlucky", seed=POISON)))
    assert len(killed) == 2
    assert len(received.tokens[0]) == 60


async def test_a_request_that_kills_ranks_without_an_error_is_blamed_at_the_third() -> None:
    async with machine(groups=4) as four:

        def act(plan: StepPlan, rows: set[int]) -> None:
            if any(chunk.row in rows for chunk in plan.chunks):
                raise WorkerDiedError("rank 0 died")

        watch(four, act)
        four.allow(MANY)
        with pytest.raises(RequestFaultError):
            await read(four.stream(make_request(60, request_id="bad", seed=POISON)))
        assert len(failed(four)) == 3


async def test_a_request_whose_engines_always_vanish_is_not_tried_forever() -> None:
    async with machine(groups=MAX_FAILOVERS + 2) as many:
        for engine in many.engines.values():
            _vanish_at_submission(engine)
        with pytest.raises(RequestFaultError):
            await read(many.stream(make_request(30)))
        assert len(many.router.granted) == MAX_FAILOVERS + 1


def _vanish_at_submission(engine: WatchedEngine) -> None:
    submit = engine.submit

    def vanish(message: object, ingress: object) -> None:
        submit(message, ingress)  # type: ignore[arg-type]
        engine.cut()

    engine.submit = vanish  # type: ignore[method-assign]


# The account of a request's lost engines


def test_new_tokens_and_other_culprits_do_not_use_up_the_failovers() -> None:
    failovers = Failovers()
    for number in range(20):
        failovers.note(f"a{number}", Loss.SUSPECT, tokens=number)
    assert (failovers.total, failovers.suspicion, failovers.in_vain) == (20, 20, 1)
    for number in range(20):
        failovers.note(f"b{number}", Loss.CLEARED, tokens=19)
    assert (failovers.total, failovers.suspicion, failovers.in_vain) == (40, 20, 1)
    for number in range(MAX_FAILOVERS - 1):
        failovers.note(f"c{number}", Loss.SUSPECT, tokens=19)
    with pytest.raises(RequestFaultError):
        failovers.note("last", Loss.SUSPECT, tokens=19)
