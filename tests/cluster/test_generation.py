"""One request through ingress, router and engine, and everything that may happen to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest

from kvmesh.cluster.errors import (
    ContextExceededError,
    EngineLostError,
    Failure,
    NotReadyError,
    RequestDeadlineError,
    ResumeMismatchError,
    UnknownModelError,
)
from kvmesh.cluster.ingress import generation, router_link
from kvmesh.cluster.ingress.error_table import to_wire
from kvmesh.cluster.ingress.failovers import MAX_FAILOVERS
from kvmesh.cluster.messages import CallFailed, Place
from kvmesh.cluster.routing.errors import (
    NoAllowedFormatError,
    NoRoomError,
    RequestIdInUseError,
)
from kvmesh.cluster.routing.request import Past
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import InvalidFieldError, PoolCapacityError, WorkerDiedError
from kvmesh.workers.sizes import PageNeed
from tests.cluster.machine import PATIENCE_S, TENANT, Machine, answer, machine, text_of
from tests.workers.memory_executor import EOS, expected_output, expected_scores
from tests.workers.test_leader import MANY

PROMPT = [3, 14, 15, 9, 26]
Stream = AsyncGenerator[pb.GenerateStreamResponse]


def make_request(
    max_tokens: int = 40,
    *,
    prompt: list[int] | None = None,
    request_id: str = "r",
    timeout_s: float | None = None,
    **params: object,
) -> pb.GenerateRequest:
    values: dict[str, object] = {"ignore_eos": True, "seed": 7, **params}
    return pb.GenerateRequest(
        request_id=request_id,
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=PROMPT if prompt is None else prompt)),
        sampling_params=pb.SamplingParams(max_tokens=max_tokens, **values),  # type: ignore[arg-type]
        timeout_s=timeout_s,
    )


class Received:
    """A client's view of one stream, which checks the order that the contract gives."""

    def __init__(self) -> None:
        self.started: pb.Started | None = None
        self.usage: pb.Usage | None = None
        self.tokens: dict[int, list[int]] = {}
        self.text: dict[int, str] = {}
        self.finished: dict[int, pb.ChoiceFinished] = {}
        self.deltas = 0

    def take(self, event: pb.GenerateStreamResponse, offsets: dict[int, int] | None = None) -> None:
        assert self.usage is None, "nothing follows usage"
        match event.WhichOneof("event"):
            case "started":
                assert self.started is None
                self.started = event.started
            case "delta":
                delta = event.delta
                assert self.started is not None
                assert delta.index not in self.finished
                tokens = self.tokens.setdefault(delta.index, [])
                before = (offsets or {}).get(delta.index, 0)
                assert delta.token_offset == before + len(tokens)
                tokens.extend(delta.token_ids)
                self.text[delta.index] = self.text.get(delta.index, "") + delta.text
                self.deltas += 1
            case "choice_finished":
                assert event.choice_finished.index not in self.finished
                self.finished[event.choice_finished.index] = event.choice_finished
            case "usage":
                self.usage = event.usage

    def reason(self, index: int = 0) -> str:
        name = pb.FinishReason.Name(self.finished[index].finish_reason)
        return name.removeprefix("FINISH_REASON_").lower()


async def read(stream: Stream, offsets: dict[int, int] | None = None) -> Received:
    received = Received()
    async with asyncio.timeout(PATIENCE_S):
        async for event in stream:
            received.take(event, offsets)
    assert received.usage is not None
    return received


async def read_until(stream: Stream, tokens: int) -> Received:
    """Read until a choice has this many tokens; the stream stays open."""
    received = Received()
    async with asyncio.timeout(PATIENCE_S):
        while max((len(t) for t in received.tokens.values()), default=0) < tokens:
            received.take(await anext(stream))
    return received


async def read_until_finished(stream: Stream) -> Received:
    received = Received()
    async with asyncio.timeout(PATIENCE_S):
        while not received.finished:
            received.take(await anext(stream))
    return received


async def rest_of(stream: Stream, received: Received) -> Received:
    async with asyncio.timeout(PATIENCE_S):
        async for event in stream:
            received.take(event)
    assert received.usage is not None
    return received


@pytest.fixture
async def one() -> AsyncIterator[Machine]:
    async with machine() as built:
        yield built


@pytest.fixture
async def two() -> AsyncIterator[Machine]:
    async with machine(groups=2) as built:
        yield built


# The normal case


async def test_a_stream_gives_tokens_text_finish_and_usage(one: Machine) -> None:
    one.allow(MANY)
    received = await read(one.stream(make_request(40)))
    expected = answer(PROMPT, 40)
    assert received.started is not None
    assert received.usage is not None
    assert received.started.group == received.usage.group == "g0"
    assert received.started.seed == 7
    assert received.started.kv_reserved_bytes > 0
    assert received.tokens == {0: expected}
    assert received.text == {0: text_of(expected)}
    assert received.reason() == "length"
    usage = received.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), 40)
    assert 0 < usage.kv_used_bytes == usage.kv_freed_bytes <= usage.kv_reserved_bytes
    assert usage.HasField("time_to_first_token_s")


async def test_tokens_are_sent_as_they_are_generated(one: Machine) -> None:
    stream = one.stream(make_request(10))
    one.allow(3)
    received = await read_until(stream, 3)
    assert received.tokens[0] == answer(PROMPT, 3)
    one.allow(MANY)
    assert (await rest_of(stream, received)).tokens[0] == answer(PROMPT, 10)


async def test_tokens_that_are_ready_are_sent_together(one: Machine) -> None:
    stream = one.stream(make_request(40))
    assert (await anext(stream)).HasField("started")
    one.allow(1)
    received = Received()
    received.started = pb.Started()
    received.take(await anext(stream))
    one.allow(MANY)
    await asyncio.wait_for(one.leaders["g0"]._idle.wait(), PATIENCE_S)
    await rest_of(stream, received)
    assert received.tokens[0] == answer(PROMPT, 40)
    assert received.deltas < 10


async def test_the_end_of_sequence_ends_a_choice(one: Machine) -> None:
    one.allow(MANY)
    prompt = next([i, 2] for i in range(50) if EOS in expected_output([i, 2], 60)[2:])
    expected = expected_output(prompt, 60)
    received = await read(one.stream(make_request(60, prompt=prompt, ignore_eos=False)))
    assert received.tokens[0] == expected
    assert received.text[0] == text_of(expected)
    assert received.reason() == "stop"
    assert received.finished[0].matched_stop_token_id == EOS


async def test_generate_returns_the_whole_stream(one: Machine) -> None:
    one.allow(MANY)
    reply = await one.ingress.generate(make_request(12), TENANT)
    (choice,) = reply.choices
    assert list(choice.token_ids) == answer(PROMPT, 12)
    assert choice.text == text_of(answer(PROMPT, 12))
    assert reply.usage.completion_tokens == 12


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (make_request(5, prompt=[2] * 800), ContextExceededError),
        (make_request(5, prompt=[50]), InvalidFieldError),
        (make_request(800), InvalidFieldError),
        (pb.GenerateRequest(model="another", prompt=pb.Prompt(text="A")), UnknownModelError),
        (
            pb.GenerateRequest(allowed_kv_formats=["int9"], prompt=pb.Prompt(text="A")),
            InvalidFieldError,
        ),
        (
            pb.GenerateRequest(allowed_kv_formats=["exact"], prompt=pb.Prompt(text="A")),
            NoAllowedFormatError,
        ),
    ],
)
async def test_bad_requests_are_refused_and_others_still_served(
    one: Machine, request_: pb.GenerateRequest, kind: type[Exception]
) -> None:
    with pytest.raises(kind) as caught:
        await read(one.stream(request_))
    if to_wire(caught.value).reason == pb.ERROR_REASON_NEVER_FITS:
        assert to_wire(caught.value).HasField("needed_bytes")
        assert to_wire(caught.value).available_bytes > 0
    one.allow(MANY)
    assert (await read(one.stream(make_request(5)))).tokens[0] == answer(PROMPT, 5)


@pytest.mark.parametrize(
    "request_", [make_request(5, prompt=[2] * 800), make_request(800)], ids=["prompt", "output"]
)
async def test_what_only_a_missing_group_may_hold_waits_for_it(
    one: Machine, request_: pb.GenerateRequest
) -> None:
    one.router.router.fleet.missing.add("g1")
    await one.ingress.refresh()
    waits = asyncio.create_task(read(one.stream(request_)))
    await one.until(lambda: waits.done() or len(one.router.callers) > 0)
    assert not waits.done()
    waits.cancel()
    await one.until(lambda: not one.router.callers)


# Stop strings


async def test_a_stop_string_ends_the_sequence_on_the_engine(one: Machine) -> None:
    whole = text_of(answer(PROMPT, 600))
    stop = whole[20:23]
    cut = whole.index(stop)
    stream = one.stream(make_request(600, stop=[stop]))
    one.allow(cut + 4)
    received = await read_until_finished(stream)
    await asyncio.gather(rest_of(stream, received), one.permit_end())
    assert received.text[0] == whole[:cut]
    assert received.reason() == "stop"
    assert received.finished[0].matched_stop_string == stop
    assert received.tokens[0] == answer(PROMPT, len(received.tokens[0]))
    assert received.usage is not None
    assert received.usage.completion_tokens == len(received.tokens[0])
    # The last event comes when the pages are free, not before.
    loads = one.leaders["g0"].account.loads
    assert loads.pool.used == PageNeed(0, 0)
    assert loads.outcomes_total == {"stop": 1}


async def test_a_stop_string_ends_one_choice_while_others_continue(one: Machine) -> None:
    whole = answer(PROMPT, 300)
    stop = text_of(whole[38:42])
    assert text_of(whole).index(stop) == 38
    request = resumed(make_request(300, n=2, stop=[stop]), {0: (whole[:30], 30)})
    stream = one.stream(request)
    one.allow(16)
    received = Received()
    async with asyncio.timeout(PATIENCE_S):
        while 0 not in received.finished:
            received.take(await anext(stream), {0: 30})
        one.allow(4)
        await one.until(lambda: bool(one.engines["g0"].ended))
    assert 1 not in received.finished
    assert one.engines["g0"].ended == one.engines["g0"].sequences[:1]
    async with asyncio.timeout(PATIENCE_S):
        one.allow(50)  # up to the stop string, not to the end
        ending = asyncio.ensure_future(one.permit_end(2))
        async for event in stream:
            received.take(event, {0: 30})
        await ending
    assert received.text == {0: text_of(whole[30:38]), 1: text_of(whole[:38])}
    assert received.reason(0) == received.reason(1) == "stop"
    assert one.engines["g0"].ended == one.engines["g0"].sequences


# Several choices


async def test_choices_share_a_lease_and_have_their_own_seeds(one: Machine) -> None:
    one.allow(MANY)
    received = await read(one.stream(make_request(70, n=3)))
    expected = answer(PROMPT, 70)
    assert received.tokens == {0: expected, 1: expected, 2: expected}
    assert [received.reason(index) for index in range(3)] == ["length"] * 3
    assert received.usage is not None
    assert received.usage.completion_tokens == 210
    (placement,) = one.router.granted
    (submit,) = one.engines["g0"].submitted
    seeds = [sequence.params.seed for sequence in submit.sequences]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert submit.lease == placement.lease


async def test_abort_ends_every_choice_of_a_resumed_request(one: Machine) -> None:
    """Its sequences are fewer than its choices: one had finished."""
    whole = answer(PROMPT, 600)
    request = resumed(make_request(600, n=3), {0: (whole[:9], 9)}, finished={0})
    stream = one.stream(request)
    one.allow(8)
    await read_until(stream, 2)
    assert len(one.engines["g0"].sequences) == 2
    assert (await one.ingress.questions.abort(pb.AbortRequest(request_id="r"), TENANT)).aborted
    await one.permit_end()
    received = Received()
    received.started = pb.Started()
    async with asyncio.timeout(PATIENCE_S):
        async for event in stream:
            if not event.HasField("delta"):
                received.take(event)
    assert set(received.finished) == {1, 2}
    assert received.reason(1) == received.reason(2) == "abort"


# Clients that disconnect


@pytest.mark.parametrize("tokens", [0, 1, 5])
async def test_a_client_that_disconnects_frees_its_pages(one: Machine, tokens: int) -> None:
    stream = one.stream(make_request(600, n=2))
    one.allow(8)
    if tokens:
        await read_until(stream, tokens)
    else:
        await anext(stream)
    await stream.aclose()
    await one.permit_end(sequences=2 if tokens else 0)
    await one.at_rest()


async def test_a_client_that_disconnects_before_its_sequence_has_arrived(one: Machine) -> None:
    engine = one.engines["g0"]
    engine.hold()
    reader = asyncio.ensure_future(read(one.stream(make_request(600))))
    await asyncio.wait_for(engine.arrived.wait(), PATIENCE_S)
    await cancelled(reader)
    assert one.router.lease_ends.total() == 0  # the engine has not received it yet
    engine.deliver_held()
    await one.permit_end()
    await one.at_rest()
    assert engine.ended == engine.sequences


async def test_a_client_that_disconnects_while_it_waits_for_pages(one: Machine) -> None:
    holders = await fill_engine(one)
    waiting = asyncio.ensure_future(read(one.stream(make_request(10, request_id="w"))))
    await one.until(lambda: one.router.status().router.queue_depth == 1)
    await cancelled(waiting)
    await one.until(lambda: one.router.status().router.queue_depth == 0)
    assert one.leases() == 4
    for holder in holders:
        await holder.aclose()


async def test_a_client_that_disconnects_as_its_lease_is_granted(one: Machine) -> None:
    """The grant arrives at an ingress where no request waits for it."""
    holders = await fill_engine(one)
    waiting = asyncio.ensure_future(read(one.stream(make_request(10, request_id="w"))))
    await one.until(lambda: one.router.status().router.queue_depth == 1)
    await holders[0].aclose()
    await one.permit_end()
    await one.until(lambda: len(one.router.granted) == 5)
    await cancelled(waiting)
    await one.until(lambda: one.router.lease_ends[one.router.granted[4].lease.lease_id] == 1)
    for holder in holders:
        await holder.aclose()


async def fill_engine(built: Machine) -> list[Stream]:
    """As many long requests as the engine runs at once."""
    holders = [built.stream(make_request(500, request_id=f"h{i}")) for i in range(4)]
    built.allow(20)
    for holder in holders:
        await anext(holder)
    return holders


async def test_abort_ends_a_running_request_and_keeps_its_output(one: Machine) -> None:
    stream = one.stream(make_request(600))
    one.allow(5)
    received = await read_until(stream, 3)
    assert (await one.ingress.questions.abort(pb.AbortRequest(request_id="r"), TENANT)).aborted
    await one.permit_end()
    await rest_of(stream, received)
    assert received.reason() == "abort"
    assert received.tokens[0] == answer(PROMPT, len(received.tokens[0]))
    assert not (await one.ingress.questions.abort(pb.AbortRequest(request_id="r"), TENANT)).aborted


async def test_abort_ends_a_waiting_request(one: Machine) -> None:
    holders = await fill_engine(one)
    waiting = asyncio.ensure_future(read(one.stream(make_request(10, request_id="w"))))
    await one.until(lambda: one.router.status().router.queue_depth == 1)
    assert (await one.ingress.questions.abort(pb.AbortRequest(request_id="w"), TENANT)).aborted
    received = await waiting
    assert received.started is not None
    assert (received.started.request_id, received.started.group) == ("w", "")
    assert received.reason() == "abort"
    for holder in holders:
        await holder.aclose()


async def test_a_request_id_in_use_is_refused(one: Machine) -> None:
    stream = one.stream(make_request(300))
    one.allow(3)
    await read_until(stream, 1)
    with pytest.raises(RequestIdInUseError) as caught:
        await read(one.stream(make_request(5)))
    assert caught.value.request_id == "r"
    await stream.aclose()


# Engines that are lost, or refuse


async def fail_engine(built: Machine, group: str) -> None:
    built.executors[group].error = WorkerDiedError("rank 1 ended")
    built.executors[group].allow(1)


@pytest.mark.parametrize("way", ["fails", "vanishes"])
async def test_a_request_continues_on_another_engine_when_its_own_is_lost(
    two: Machine, way: str
) -> None:
    stream = two.stream(make_request(120, n=2, stop=["no such text"]))
    two.allow(20)
    received = await read_until(stream, 12)
    assert received.started is not None
    first = received.started.group
    other = "g1" if first == "g0" else "g0"
    if way == "fails":
        await fail_engine(two, first)
    else:
        two.engines[first].cut()
    two.allow(MANY)
    await rest_of(stream, received)
    expected = answer(PROMPT, 120)
    assert received.tokens == {0: expected, 1: expected}
    assert received.text == {0: text_of(expected), 1: text_of(expected)}
    assert received.usage is not None
    assert (received.usage.group, received.usage.failovers) == (other, 1)
    assert received.usage.prompt_tokens == len(PROMPT)
    assert received.usage.completion_tokens == 240
    (again,) = two.engines[other].submitted
    assert np.frombuffer(again.prompt, np.int32).tolist() == PROMPT
    for sequence in again.sequences:
        output = np.frombuffer(sequence.output, np.int32).tolist()
        assert len(output) >= 12
        assert output == expected[: len(output)]
    placed = two.router.placed[-1]
    assert placed.past is Past.RAN and placed.prompt_tokens >= len(PROMPT) + 12
    assert placed.prompt_tokens + placed.max_tokens == len(PROMPT) + 120


async def test_a_request_is_placed_again_even_while_the_cluster_drains(two: Machine) -> None:
    stream = two.stream(make_request(60))
    two.allow(10)
    received = await read_until(stream, 4)
    assert received.started is not None
    two.router.drain()
    two.engines[received.started.group].cut()
    two.allow(MANY)
    await rest_of(stream, received)
    assert received.tokens[0] == answer(PROMPT, 60)


async def test_a_request_continues_on_another_engine_when_its_own_hangs(two: Machine) -> None:
    stream = two.stream(make_request(60))
    two.allow(10)
    received = await read_until(stream, 4)
    assert received.started is not None
    first = received.started.group
    two.hang(first)
    two.executors["g1" if first == "g0" else "g0"].allow(MANY)
    await rest_of(stream, received)
    assert received.tokens[0] == answer(PROMPT, 60)
    two.allow(MANY)


async def test_an_engine_lost_before_it_accepted_the_request(two: Machine) -> None:
    two.allow(MANY)
    probe = await read(two.stream(make_request(2)))
    assert probe.started is not None
    two.engines[probe.started.group].cut()
    received = await read(two.stream(make_request(30)))
    assert received.tokens[0] == answer(PROMPT, 30)


async def test_a_request_fails_after_too_many_lost_engines() -> None:
    async with machine(groups=MAX_FAILOVERS + 2) as many:
        for engine in many.engines.values():
            engine.refusals = [EngineLostError()]
        with pytest.raises(EngineLostError):
            await read(many.stream(make_request(30)))
        groups = [placement.group for placement in many.router.granted]
        assert len(set(groups)) == len(groups) == MAX_FAILOVERS + 1


async def test_a_request_waits_for_the_replacement_of_the_only_engine(one: Machine) -> None:
    stream = one.stream(make_request(60))
    one.allow(8)
    received = await read_until(stream, 4)
    one.engines["g0"].cut()
    await one.until(lambda: len(one.router.placed) == 2)
    await one.until(lambda: one.router.status().router.queue_depth == 1)
    await one.replace_engine("g0")
    one.allow(MANY)
    await rest_of(stream, received)
    assert received.tokens[0] == answer(PROMPT, 60)


def full() -> PoolCapacityError:
    return PoolCapacityError("other leases hold all pages", 90, 50, retryable=True)


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "REFUSAL_PAUSE_S", 0.0)


@pytest.mark.usefixtures("no_pause")
async def test_a_request_is_placed_again_when_an_engine_refuses(one: Machine) -> None:
    one.engines["g0"].refusals = [full(), full()]
    one.allow(MANY)
    received = await read(one.stream(make_request(30, n=2)))
    assert received.tokens[1] == answer(PROMPT, 30)
    assert len(one.router.granted) == 3


@pytest.mark.usefixtures("no_pause")
async def test_an_engine_that_keeps_refusing_is_full_and_not_lost(one: Machine) -> None:
    one.engines["g0"].refusals = [full() for _ in range(generation.MAX_REFUSALS)]
    with pytest.raises(PoolCapacityError) as caught:
        await read(one.stream(make_request(30)))
    assert to_wire(caught.value).reason == pb.ERROR_REASON_OVER_CAPACITY
    assert to_wire(caught.value).HasField("retry_after_s")
    assert one.router.status().healthy == {"g0"}


@pytest.mark.parametrize(
    "error",
    [
        PoolCapacityError("too long", 90, 50, retryable=False),
        InvalidFieldError("prompt", "is not valid"),
    ],
)
async def test_a_final_refusal_by_the_engine_releases_the_lease(
    one: Machine, error: Exception
) -> None:
    one.engines["g0"].refusals = [error]
    with pytest.raises(type(error)):
        await read(one.stream(make_request(30)))
    await one.until(lambda: one.leases() == 0)


# Deadlines


def skip(seconds: float) -> None:
    """Let the event loop's clock jump."""
    loop = asyncio.get_running_loop()
    time_s = loop.time
    loop.time = lambda: time_s() + seconds  # type: ignore[method-assign]


async def test_a_deadline_after_the_first_token_keeps_the_output(one: Machine) -> None:
    stream = one.stream(make_request(600, timeout_s=1000.0))
    one.allow(5)
    received = await read_until(stream, 3)
    # No further step runs, so the engine cannot end it.
    skip(1000.0 + generation.DEADLINE_GRACE_S)
    await asyncio.gather(rest_of(stream, received), one.permit_end())
    assert received.reason() == "deadline"
    assert received.tokens[0] == answer(PROMPT, len(received.tokens[0]))


async def test_a_deadline_before_the_first_token_is_an_error(one: Machine) -> None:
    stream = one.stream(make_request(600, timeout_s=1000.0))
    assert (await anext(stream)).HasField("started")
    await one.until(lambda: bool(one.engines["g0"].submitted))
    skip(1000.0 + generation.DEADLINE_GRACE_S)
    with pytest.raises(RequestDeadlineError):
        await rest_of(stream, Received())
    await one.permit_end()


async def test_the_engine_ends_an_overdue_sequence(
    one: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ingress gives it time for that."""
    monkeypatch.setattr(generation, "DEADLINE_GRACE_S", 1000.0)
    engine = one.leaders["g0"]._engine
    assert engine is not None
    now = 0.0
    monkeypatch.setattr(engine, "_clock", lambda: now)
    stream = one.stream(make_request(700, timeout_s=1000.0))
    one.allow(3)
    received = await read_until(stream, 2)
    skip(1100.0)
    now = 1000.0
    one.allow(5)
    await rest_of(stream, received)
    assert received.reason() == "deadline"
    assert one.leaders["g0"].account.loads.outcomes_total.get("deadline") == 1
    assert one.engines["g0"].ended == []


async def without_a_router(
    one: Machine, timeout_s: float | None
) -> tuple[asyncio.Task[None], Place]:
    """A request that asks for a place, for which the server waits 1,000 s, of nobody."""
    one.ingress._context = replace(one.ingress._context, queue_timeout_s=1000.0)
    link = one.ingress._router
    one.router.die()
    await one.until(lambda: not link.connected)

    async def read_all() -> None:
        async for _ in one.stream(make_request(600, timeout_s=timeout_s)):
            pass

    def asked() -> list[Place]:
        messages = (call.message for call in link._open.values())
        return [message for message in messages if isinstance(message, Place)]

    reading = asyncio.create_task(read_all())
    await one.until(lambda: bool(asked()))
    return reading, asked()[0]


@pytest.mark.parametrize(
    ("timeout_s", "error", "reason"),
    [
        (900.0, RequestDeadlineError, pb.ERROR_REASON_DEADLINE_EXCEEDED),
        (1100.0, NotReadyError, pb.ERROR_REASON_NOT_READY),
        (None, NotReadyError, pb.ERROR_REASON_NOT_READY),
    ],
)
async def test_nobody_waits_longer_because_there_is_no_router(
    one: Machine,
    timeout_s: float | None,
    error: type[Exception],
    reason: pb.ErrorReason.ValueType,
) -> None:
    reading, _ = await without_a_router(one, timeout_s)
    skip(1000.0 + router_link.PLACE_GRACE_S)
    with pytest.raises(error) as caught:
        await reading
    assert to_wire(caught.value).reason == reason
    await one.new_router()


@pytest.mark.parametrize(("timeout_s", "own"), [(900.0, True), (1100.0, False), (None, False)])
async def test_the_router_knows_what_limits_a_wait(
    one: Machine, timeout_s: float | None, own: bool
) -> None:
    """The client's own deadline, or the server's longest wait."""
    reading, message = await without_a_router(one, timeout_s)
    place = message.request
    assert place.timeout_s is not None and place.timeout_s <= (900.0 if own else 1000.0)
    assert place.own_deadline == own
    one.ingress._router.received(CallFailed(message.call, Failure.of(NoRoomError("no room", 1.0))))
    with pytest.raises(NoRoomError, match="no room"):
        await reading
    await one.new_router()


# Resuming


def resumed(
    request: pb.GenerateRequest,
    choices: dict[int, tuple[list[int], int]],
    finished: set[int] = frozenset(),  # type: ignore[assignment]
) -> pb.GenerateRequest:
    """choices: by index, the tokens received and how many characters of text."""
    request.resume.model_revision = "0"
    for index, (tokens, chars) in choices.items():
        request.resume.choices.add(
            index=index, token_ids=tokens, text_chars=chars, finished=index in finished
        )
    return request


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 33, 69, 70])
async def test_a_resumed_stream_sends_what_is_missing(one: Machine, cut: int) -> None:
    one.allow(MANY)
    expected = answer(PROMPT, 70)
    chars = len(text_of(expected[: max(0, cut - 2)]))  # text arrives after its tokens
    request = resumed(make_request(70), {0: (expected[:cut], chars)})
    received = await read(one.stream(request), {0: cut})
    assert received.tokens.get(0, []) == expected[cut:]
    assert received.text[0] == text_of(expected)[chars:]
    assert received.reason() == "length"
    assert received.usage is not None
    assert received.usage.completion_tokens == 70


@pytest.mark.parametrize("cut", [18, 20, 21, 22, 23])
async def test_a_stop_string_is_found_across_the_cut(one: Machine, cut: int) -> None:
    one.allow(MANY)
    whole = text_of(answer(PROMPT, 70))
    stop = whole[20:23]
    assert whole.index(stop) == 20
    request = resumed(make_request(70, stop=[stop]), {0: (answer(PROMPT, cut), min(cut, 20))})
    received = await read(one.stream(request), {0: cut})
    assert received.text.get(0, "") == whole[min(cut, 20) : 20]
    assert received.finished[0].matched_stop_string == stop


async def test_tokens_of_the_output_do_not_count_as_cached_prompt(one: Machine) -> None:
    one.allow(MANY)
    expected = answer(PROMPT, 70)
    await read(one.stream(make_request(70, request_id="first")))
    received = await read(one.stream(resumed(make_request(70), {0: (expected[:60], 60)})), {0: 60})
    assert received.usage is not None
    assert received.usage.cached_tokens == received.usage.prompt_tokens == len(PROMPT)


async def test_a_choice_that_had_finished_is_only_counted(one: Machine) -> None:
    one.allow(MANY)
    expected = answer(PROMPT, 30)
    request = resumed(
        make_request(30, n=2), {0: (expected, 30), 1: (expected[:3], 3)}, finished={0}
    )
    received = await read(one.stream(request), {1: 3})
    assert received.tokens == {1: expected[3:]}
    assert set(received.finished) == {1}
    assert one.router.placed[0].sequences == 1
    assert received.usage is not None
    assert received.usage.completion_tokens == 60


async def test_a_resumed_request_replaces_the_original(one: Machine) -> None:
    expected = answer(PROMPT, 60)
    old = one.stream(make_request(60))
    one.allow(6)
    before = await read_until(old, 4)
    received = asyncio.ensure_future(
        read(one.stream(resumed(make_request(60), {0: (expected[:4], 4)})), {0: 4})
    )
    # The engine has to know before it computes further.
    await one.until(lambda: len(one.engines["g0"]._account.withdrawn) == 1)
    one.allow(MANY)
    await rest_of(old, before)
    assert before.reason() == "abort"
    assert (await received).tokens[0] == expected[4:]


@pytest.mark.parametrize(
    ("tokens", "chars", "revision"),
    [([], 0, "another"), ([2, 3], 3, "0"), ([2] * 41, 0, "0")],
)
async def test_a_cursor_that_does_not_match_is_refused(
    one: Machine, tokens: list[int], chars: int, revision: str
) -> None:
    request = resumed(make_request(40), {0: (tokens, chars)})
    request.resume.model_revision = revision
    with pytest.raises(ResumeMismatchError):
        await read(one.stream(request))


async def test_resuming_needs_the_seed(one: Machine) -> None:
    request = resumed(make_request(40), {})
    request.sampling_params.ClearField("seed")
    with pytest.raises(InvalidFieldError, match=r"sampling_params\.seed"):
        await read(one.stream(request))


# Many at once


async def test_more_requests_than_fit_all_end(one: Machine) -> None:
    one.allow(MANY)
    prompts = [[i % 50, 5, 9, i // 50] for i in range(60)]
    requests = [
        make_request(20 + i % 80, prompt=prompt, request_id=str(i))
        for i, prompt in enumerate(prompts)
    ]
    read_all = asyncio.gather(*(read(one.stream(request)) for request in requests))
    for i, received in enumerate(await asyncio.wait_for(read_all, PATIENCE_S)):
        assert received.tokens[0] == answer(prompts[i], 20 + i % 80)


async def test_requests_that_end_in_any_way_leave_nothing(two: Machine) -> None:
    two.allow(MANY)

    async def one_of(i: int) -> None:
        request = make_request(
            10 + 7 * (i % 30),
            prompt=[i % 50, i // 50, 4],
            request_id=str(i),
            n=1 + i % 3,
            timeout_s=0.01 + (i % 11) / 20 if i % 4 == 0 else None,
        )
        leave_after = i % 13 if i % 3 == 0 else None
        async with aclosing(two.stream(request)) as stream:
            count = 0
            async for _ in stream:
                count += 1
                if count == leave_after:
                    return

    ended = asyncio.gather(*(one_of(i) for i in range(100)), return_exceptions=True)
    for result in await asyncio.wait_for(ended, PATIENCE_S):
        if result is not None:
            assert to_wire(result).code in (4, 8), result  # deadline, over capacity


async def cancelled(task: asyncio.Future[Received]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def scored(stream: Stream) -> tuple[Received, pb.Logprobs, list[int]]:
    """Of a stream with log-probabilities of its prompt: those, and the sizes of their events."""
    received, columns, sizes = Received(), pb.Logprobs(), []
    async with asyncio.timeout(PATIENCE_S):
        async for event in stream:
            if event.HasField("prompt_logprobs"):
                assert received.started is not None
                assert not received.tokens, "the prompt comes before the output"
                sizes.append(len(event.prompt_logprobs.chosen))
                columns.MergeFrom(event.prompt_logprobs)
            received.take(event)
    return received, columns, sizes


LONG_PROMPT = [(i * i + 3) % 40 for i in range(150)]


@pytest.mark.parametrize("n", [1, 3])
async def test_the_prompts_logprobs_come_before_the_output(n: int) -> None:
    async with machine() as built:
        built.allow(MANY)
        request = make_request(3, prompt=LONG_PROMPT, prompt_logprobs=1, n=n)
        received, columns, sizes = await scored(built.stream(request))
        assert columns.chosen == pytest.approx(expected_scores(LONG_PROMPT))
        assert list(columns.chosen_token_ids) == LONG_PROMPT[1:]
        assert list(columns.top_token_ids) == LONG_PROMPT[1:]
        assert columns.chosen_bytes == [text_of([token]).encode() for token in LONG_PROMPT[1:]]
        assert len(sizes) > 1
        assert received.tokens[0] == answer(LONG_PROMPT, 3)
        assert len(received.tokens) == n
        reply = await built.ingress.generate(request, TENANT)
        assert reply.prompt_logprobs == columns


async def test_a_prompt_alone_is_scored_with_max_tokens_0() -> None:
    async with machine() as built:
        built.allow(MANY)
        request = make_request(0, prompt=LONG_PROMPT, prompt_logprobs=0)
        received, columns, _ = await scored(built.stream(request))
        assert columns.chosen == pytest.approx(expected_scores(LONG_PROMPT))
        assert received.reason() == "length"
        assert received.tokens == {}
        assert received.usage is not None
        assert received.usage.completion_tokens == 0
        for refused, field in (
            (make_request(0), "max_tokens"),
            (make_request(0, prompt_logprobs=0, n=2), "n"),
            (make_request(1, prompt_logprobs=21), "prompt_logprobs"),
        ):
            with pytest.raises(InvalidFieldError) as caught:
                await read(built.stream(refused))
            assert caught.value.field == f"sampling_params.{field}"


async def test_a_long_prompts_logprobs_come_in_events_of_limited_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvmesh.cluster.ingress.prompt_scores.EVENT_ENTRIES", 10)
    monkeypatch.setattr("kvmesh.cluster.ingress.model_checks.MAX_REPLY_ENTRIES", 250)
    async with machine() as built:
        built.allow(MANY)
        request = make_request(1, prompt=LONG_PROMPT, prompt_logprobs=1)
        _, columns, sizes = await scored(built.stream(request))
        assert max(sizes) == 5
        assert columns.chosen == pytest.approx(expected_scores(LONG_PROMPT))
        with pytest.raises(InvalidFieldError, match="GenerateStream") as caught:
            await built.ingress.generate(request, TENANT)
        assert caught.value.field == "sampling_params.prompt_logprobs"
        assert len((await built.ingress.generate(make_request(1), TENANT)).choices) == 1


@pytest.mark.parametrize("received", [0, 1, 77, 149])
async def test_a_resumed_stream_gets_the_logprobs_that_it_lacks(received: int) -> None:
    async with machine() as built:
        built.allow(MANY)
        request = make_request(2, prompt=LONG_PROMPT, prompt_logprobs=0)
        request.resume.model_revision = "0"
        request.resume.prompt_logprobs_received = received
        _, columns, _ = await scored(built.stream(request))
        assert columns.chosen == pytest.approx(expected_scores(LONG_PROMPT)[received:])
        request.resume.prompt_logprobs_received = len(LONG_PROMPT)
        with pytest.raises(InvalidFieldError) as caught:
            await read(built.stream(request))
        assert caught.value.field == "resume.prompt_logprobs_received"


@pytest.mark.parametrize("way", ["fails", "vanishes"])
async def test_logprobs_of_a_prompt_continue_on_another_engine(two: Machine, way: str) -> None:
    stream = two.stream(make_request(5, prompt=LONG_PROMPT, prompt_logprobs=0))
    two.allow(3)
    received, columns = Received(), pb.Logprobs()
    async with asyncio.timeout(PATIENCE_S):
        while not columns.chosen:
            event = await anext(stream)
            columns.MergeFrom(event.prompt_logprobs)
            received.take(event)
        assert received.started is not None
        first = received.started.group
        if way == "fails":
            await fail_engine(two, first)
        else:
            two.engines[first].cut()
        two.allow(MANY)
        async for event in stream:
            columns.MergeFrom(event.prompt_logprobs)
            received.take(event)
    assert columns.chosen == pytest.approx(expected_scores(LONG_PROMPT))
    assert received.tokens[0] == answer(LONG_PROMPT, 5)
    assert received.usage is not None
    assert received.usage.failovers == 1
