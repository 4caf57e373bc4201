"""A stream that has no tokens to send says why: it waits, or its prompt is being computed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from kvmesh.client import FinishReason
from kvmesh.client.stream_state import StreamState
from kvmesh.cluster import router_service
from kvmesh.cluster.ingress.choice import RunningChoice
from kvmesh.cluster.ingress.output import RequestOutput
from kvmesh.cluster.ingress.prompt_scores import PromptScores
from kvmesh.cluster.ingress.reply_queue import ReplyQueue
from kvmesh.cluster.ingress.resume import ResumedChoice
from kvmesh.cluster.ingress.stream_status import StreamStatus
from kvmesh.cluster.ingress.validate import TextRules
from kvmesh.cluster.ingress.waker import Waker
from kvmesh.cluster.messages import CallFailed, Placed, Release, Waiting
from kvmesh.cluster.routing.outcome import Enqueued
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.cluster.waiting_callers import WaitingCaller
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers import engine
from kvmesh.workers.request import PrefillProgress
from kvmesh.workers.sampling_params import SamplingParams
from tests.cluster.machine import (
    PATIENCE_S,
    TENANT,
    LetterCodec,
    Machine,
    ScriptedIngress,
    answer,
    machine,
    scripted_ingress,
)
from tests.cluster.test_generation import (
    PROMPT,
    Stream,
    fail_engine,
    make_request,
    read_until,
)
from tests.workers.test_engine import PAGE
from tests.workers.test_leader import MANY

LONG = [i % 50 for i in range(6 * PAGE)]


@asynccontextmanager
async def silent(groups: int = 1, silence_s: float = 1000.0) -> AsyncIterator[Machine]:
    """On a clock that stands still, so that projections of the router do too."""
    async with machine(groups, clock=lambda: 0.0) as built:
        built.ingress._context = replace(built.ingress._context, silence_s=silence_s)
        yield built


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines report progress at every step."""
    monkeypatch.setattr(engine, "PROGRESS_PERIOD_S", 0.0)


async def fill(built: Machine) -> tuple[ScriptedIngress, list[str]]:
    """Another ingress takes every place on the only engine."""
    other = await scripted_ingress(built)
    held = [(await other.place(PlaceRequest(f"t/{i}", 20, 20), i)).lease for i in range(4)]
    return other, [lease.lease_id for lease in held]


async def next_event(stream: Stream) -> pb.GenerateStreamResponse:
    return await asyncio.wait_for(anext(stream), PATIENCE_S)


async def next_queued(stream: Stream) -> pb.Queued:
    while (event := await next_event(stream)).WhichOneof("event") is None:
        pass  # it was silent before it came to the queue
    assert event.WhichOneof("event") == "queued"
    return event.queued


async def until_started(stream: Stream) -> None:
    while not (event := await next_event(stream)).HasField("started"):
        assert event.WhichOneof("event") in (None, "queued")


def kinds(events: list[pb.GenerateStreamResponse]) -> list[str | None]:
    return [event.WhichOneof("event") for event in events]


async def all_events(stream: Stream) -> list[pb.GenerateStreamResponse]:
    async with asyncio.timeout(PATIENCE_S):
        return [event async for event in stream]


def prefilling(events: list[pb.GenerateStreamResponse]) -> list[tuple[int, int, int]]:
    return [
        (found.computed_tokens, found.cached_tokens, found.total_tokens)
        for found in (event.prefilling for event in events if event.HasField("prefilling"))
    ]


# In the queue


async def test_a_request_that_waits_says_so_at_once_and_when_it_moves_up() -> None:
    async with silent() as one:
        other, leases = await fill(one)
        first, second = (one.stream(make_request(5, request_id=name)) for name in "ab")
        queued = await next_queued(first)
        assert queued.position == 0
        assert queued.projected_wait_s > 0
        assert (await next_queued(second)).position == 1
        other.router.send(Release(leases[0]))
        assert (await next_event(first)).HasField("started")
        one.router._informed_s -= router_service.INFORM_PERIOD_S
        one.router.tick()
        assert (await next_queued(second)).position == 0
        for lease_id in leases[1:]:
            other.router.send(Release(lease_id))
        one.allow(MANY)
        for stream in (first, second):
            assert "queued" not in kinds(await all_events(stream))


async def test_a_request_that_is_placed_at_once_is_never_queued() -> None:
    async with silent() as one:
        one.allow(MANY)
        events = await all_events(one.stream(make_request(20)))
        assert kinds(events)[0] == "started"
        assert {"queued", "prefilling", None}.isdisjoint(kinds(events))


async def test_a_request_waits_again_after_its_engine_is_lost() -> None:
    async with silent() as one:
        stream = one.stream(make_request(20))
        one.allow(3)
        await read_until(stream, 3)
        one.engines["g0"].cut()
        await next_queued(stream)
        await one.replace_engine("g0")
        one.allow(MANY)
        events = await all_events(stream)
        assert [x for event in events for x in event.delta.token_ids] == answer(PROMPT, 20)[3:]


async def test_the_time_in_the_queue_is_that_of_all_placements() -> None:
    now = 0.0
    async with machine(clock=lambda: now) as one:
        other, leases = await fill(one)
        stream = one.stream(make_request(20))
        await next_queued(stream)
        now = 3.0
        other.router.send(Release(leases[0]))
        one.allow(3)
        await read_until_tokens(stream, 3)
        one.engines["g0"].cut()
        await next_queued(stream)
        now = 7.0
        await one.replace_engine("g0")
        one.allow(MANY)
        (usage,) = [event.usage for event in await all_events(stream) if event.HasField("usage")]
        assert usage.queue_s >= 3.0 + 4.0


async def test_a_request_that_is_aborted_while_it_waits_ends_as_the_contract_says() -> None:
    async with silent() as one:
        other, leases = await fill(one)
        stream = one.stream(make_request(5))
        await next_queued(stream)
        await one.ingress.questions.abort(pb.AbortRequest(request_id="r"), TENANT)
        events = await all_events(stream)
        assert kinds(events) == ["started", "choice_finished", "usage"]
        assert (events[0].started.seed, events[0].started.group) == (7, "")
        state = StreamState(make_request(5))
        for event in events:
            state.feed(event)
        assert state.completion().choices[0].finish_reason is FinishReason.ABORT
        for lease_id in leases:
            other.router.send(Release(lease_id))


async def test_a_waiting_stream_outlasts_its_router() -> None:
    async with silent(silence_s=0.01) as one:
        other, _ = await fill(one)
        stream = one.stream(make_request(5))
        while not (await next_queued(stream)).HasField("projected_wait_s"):
            pass  # the router has not answered yet
        one.router.die()
        for _ in range(3):
            await next_queued(stream)
        other.die()
        await one.new_router()
        one.allow(MANY)
        assert kinds(await all_events(stream))[-1] == "usage"


class Outbox:
    """A connection that keeps what is sent to it."""

    def __init__(self) -> None:
        self.messages: list[Waiting] = []

    def send(self, message: CallFailed | Placed | Waiting, /) -> None:
        assert isinstance(message, Waiting)
        self.messages.append(message)


def make_caller() -> tuple[WaitingCaller, list[Waiting]]:
    outbox = Outbox()
    return WaitingCaller(outbox, 7, 0.0), outbox.messages


def test_a_caller_far_back_hears_of_changes_that_matter_to_it() -> None:
    caller, received = make_caller()
    for position in range(10_000, -1, -1):
        caller.inform(Enqueued("r", position, None), 0.0)
    positions = [message.position for message in received]
    assert positions[0] == 10_000
    assert positions[-18:] == list(range(17, -1, -1))
    assert len(positions) < 200


@pytest.mark.parametrize("start", [0.0, 1e6])
def test_a_caller_hears_of_a_start_that_shifts_but_not_of_passing_time(start: float) -> None:
    """start: of the router's clock, which may have run for weeks"""
    caller, received = make_caller()
    for now, start_s in [
        (0.0, None),
        (1.0, None),
        (2.0, 100.0),
        (3.0, 99.0),
        (50.0, 52.5),
        (60.0, 43.5),
        (61.0, 50.0),
        (62.0, None),
    ]:
        caller.inform(Enqueued("r", 3, start_s), start + now)
    assert [message.start_s for message in received] == [None, 100.0, 50.0, None]


async def test_nobody_hears_of_a_queue_in_which_nothing_moves() -> None:
    async with silent() as one:
        other, leases = await fill(one)
        stream = one.stream(make_request(5))
        await next_queued(stream)
        # The projection is stale by less than a second, so nothing is noticed.
        one.router._informed_s -= router_service.INFORM_PERIOD_S
        one.router.tick()
        for lease_id in leases:
            other.router.send(Release(lease_id))
        assert (await next_event(stream)).HasField("started")
        one.allow(MANY)
        await all_events(stream)


# In the engine


@pytest.mark.usefixtures("every_step")
async def test_a_stream_shows_how_far_its_prompt_is() -> None:
    async with silent() as one:
        stream = one.stream(make_request(3, prompt=LONG))
        assert (await next_event(stream)).HasField("started")
        for pages in range(1, 6):
            one.allow(1)
            event = await next_event(stream)
            assert prefilling([event]) == [(pages * PAGE, 0, len(LONG))]
        one.allow(3)
        assert "prefilling" not in kinds(await all_events(stream))
        stream = one.stream(make_request(3, prompt=LONG + LONG))
        assert (await next_event(stream)).HasField("started")
        one.allow(1)
        assert prefilling([await next_event(stream)]) == [(7 * PAGE, 6 * PAGE, 12 * PAGE)]
        one.allow(MANY)
        assert kinds(await all_events(stream))[-1] == "usage"


@pytest.mark.usefixtures("every_step")
async def test_the_choices_of_a_request_have_one_progress() -> None:
    async with silent() as one:
        stream = one.stream(make_request(3, prompt=LONG, n=3))
        assert (await next_event(stream)).HasField("started")
        for pages in range(1, 6):
            one.allow(1)
            assert prefilling([await next_event(stream)]) == [(pages * PAGE, 0, len(LONG))]
        one.allow(MANY)
        assert kinds(await all_events(stream)).count("choice_finished") == 3


@pytest.mark.usefixtures("every_step")
async def test_progress_starts_again_on_another_engine() -> None:
    async with silent(groups=2) as two:
        stream = two.stream(make_request(30, prompt=LONG))
        event = await next_event(stream)
        first = event.started.group
        two.executors[first].allow(6 + 19)
        await read_until_tokens(stream, 20)
        await fail_engine(two, first)
        two.executors["g1" if first == "g0" else "g0"].allow(1)
        again = await next_event(stream)
        assert prefilling([again]) == [(PAGE, 0, len(LONG) + 20)]
        two.allow(MANY)
        events = await all_events(stream)
        assert [x for event in events for x in event.delta.token_ids] == answer(LONG, 30)[20:]


async def read_until_tokens(stream: Stream, tokens: int) -> None:
    seen = 0
    while seen < tokens:
        seen += len((await next_event(stream)).delta.token_ids)


async def test_a_stream_is_never_silent() -> None:
    """Not while its prompt waits in the engine, nor while its next token is not there."""
    async with silent(silence_s=0.01) as one:
        stream = one.stream(make_request(5, prompt=LONG))
        await until_started(stream)
        events = [await next_event(stream) for _ in range(3)]
        assert prefilling(events) == [(0, 0, len(LONG))] * 3
        one.allow(6 + 1)
        await read_until_tokens(stream, 2)
        events = [await next_event(stream) for _ in range(3)]
        assert prefilling(events) == [(len(LONG), 0, len(LONG))] * 3
        one.allow(MANY)
        assert kinds(await all_events(stream))[-1] == "usage"


async def test_a_stream_is_not_silent_while_its_prompt_is_tokenised() -> None:
    tokenising = threading.Event()
    async with silent(silence_s=0.01) as one:
        codec = one.ingress._context.codec
        assert isinstance(codec, LetterCodec)
        encode = codec.encode

        def slowly(text: str) -> npt.NDArray[np.int32]:
            assert tokenising.wait(PATIENCE_S)
            return encode(text)[: len(PROMPT)]

        codec.encode = slowly  # type: ignore[method-assign]
        codec.max_token_chars = 10
        request = make_request(5)
        request.prompt.text = "A" * 5000
        stream = one.stream(request)
        for _ in range(3):
            assert (await next_event(stream)).WhichOneof("event") is None
        tokenising.set()
        one.allow(MANY)
        assert kinds(await all_events(stream))[-1] == "usage"


async def test_a_reader_that_lags_gets_only_the_latest_status() -> None:
    async with silent() as one:
        other, leases = await fill(one)
        stream = one.stream(make_request(5))
        await next_queued(stream)
        (caller,) = one.router.callers._by_request.values()
        for position in (9, 7, 5):
            caller.inform(Enqueued("r", position, None), 0.0)
        assert (await next_queued(stream)).position == 5
        for lease_id in leases:
            other.router.send(Release(lease_id))
        one.allow(MANY)
        assert "queued" not in kinds(await all_events(stream))


async def test_leaving_stops_the_repetition() -> None:
    async with silent(silence_s=0.01) as one:
        other, leases = await fill(one)
        async with aclosing(one.stream(make_request(5))) as stream:
            await next_queued(stream)
        await one.until(lambda: one.router.status().router.queue_depth == 0)
        for lease_id in leases:
            other.router.send(Release(lease_id))
        timers = [x for x in asyncio.get_running_loop()._scheduled if not x.cancelled()]  # type: ignore[attr-defined]
        assert not [x for x in timers if "_break_silence" in repr(x)]


async def test_a_whole_reply_is_made_of_a_stream_that_waited() -> None:
    async with silent(silence_s=0.01) as one:
        other, leases = await fill(one)
        replying = asyncio.ensure_future(one.ingress.generate(make_request(5), TENANT))
        await one.until(lambda: one.router.status().router.queue_depth == 1)
        for lease_id in leases:
            other.router.send(Release(lease_id))
        one.allow(MANY)
        (choice,) = (await replying).choices
        assert list(choice.token_ids) == answer(PROMPT, 5)


# The status by itself


def test_a_projected_wait_counts_down() -> None:
    now = 10.0
    status = StreamStatus("r", lambda: now)
    assert status.event().queued == pb.Queued(request_id="r")
    status.queued(3, 8.0)
    now = 12.5
    assert status.event().queued == pb.Queued(position=3, projected_wait_s=5.5, request_id="r")
    now = 30.0
    assert status.event().queued == pb.Queued(position=3, projected_wait_s=0.0, request_id="r")


@pytest.mark.parametrize("finished", [False, True])
async def test_there_is_no_status_once_every_choice_has_finished(finished: bool) -> None:
    choice = RunningChoice(
        0, SamplingParams(), TextRules(), LetterCodec(), ResumedChoice(finished=finished)
    )
    status = StreamStatus("r", lambda: 0.0)
    scores = PromptScores(np.zeros(1, np.int32), LetterCodec(), skip_special_tokens=True)
    queue = ReplyQueue(Waker(), status)
    output = RequestOutput([choice], LetterCodec(), queue, lambda *_: "", scores)
    queue.send_status()
    assert kinds(output.take()) == ([] if finished else ["queued"])
    assert output.take() == []


def test_the_most_advanced_choice_leads() -> None:
    status = StreamStatus("r", lambda: 0.0)
    assert not status.computed("a", PrefillProgress(16, 0, 100))  # of a placement that was lost
    status.placed(100)
    assert status.computed("a", PrefillProgress(32, 0, 100))
    assert not status.computed("b", PrefillProgress(16, 0, 100))
    assert not status.computed("b", PrefillProgress(32, 0, 100))  # no further than the first
    assert status.computed("b", PrefillProgress(48, 0, 100))
    assert not status.computed("a", PrefillProgress(40, 0, 100))
    assert status.computed("b", PrefillProgress(0, 0, 100))  # it was preempted
    assert status.event().prefilling == pb.Prefilling(total_tokens=100)
    status.generating()
    assert status.event().prefilling == pb.Prefilling(computed_tokens=100, total_tokens=100)
    assert status.computed("a", PrefillProgress(10, 0, 103))
    status.queued()
    status.generating()
    assert status.event().HasField("queued")
