"""One request between a router and engines that the test plays."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from kvmesh.cluster.errors import EngineLostError, RequestDeadlineError, RequestFaultError
from kvmesh.cluster.ingress import attempt, generation
from kvmesh.cluster.ingress.answers.call_ids import call_id
from kvmesh.cluster.ingress.answers.plan import NO_PLAN, AnswerPlan
from kvmesh.cluster.ingress.answers.reader import AnswerForm
from kvmesh.cluster.ingress.answers.syntaxes import SYNTAXES
from kvmesh.cluster.ingress.attempt import Attempt
from kvmesh.cluster.ingress.choice import choice_seed
from kvmesh.cluster.ingress.engine_links import Receiver
from kvmesh.cluster.ingress.failovers import MAX_FAILOVERS, Loss
from kvmesh.cluster.ingress.generation import (
    DEADLINE_GRACE_S,
    MAX_REFUSALS,
    Generation,
    IngressContext,
)
from kvmesh.cluster.ingress.output import MUCH_UNREAD
from kvmesh.cluster.ingress.prepare import PreparedRequest
from kvmesh.cluster.ingress.prompts import cache_salt
from kvmesh.cluster.ingress.resume import Resume, ResumedChoice
from kvmesh.cluster.ingress.router_link import HeldPlace
from kvmesh.cluster.ingress.validate import GenerationSpec, TextRules
from kvmesh.cluster.link import Address
from kvmesh.cluster.messages import Placed, Submit, Waiting
from kvmesh.cluster.routing.accepted_formats import AcceptedFormats
from kvmesh.cluster.routing.errors import (
    DeadlineUnreachableError,
    NoRoomError,
    RequestAbortedError,
    RequestIdInUseError,
)
from kvmesh.cluster.routing.request import Past, PlaceRequest
from kvmesh.cluster.telemetry import table
from kvmesh.cluster.telemetry.meters import IngressMeters
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.constraint import OutputConstraint
from kvmesh.workers.errors import PoolCapacityError
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.plan import TokenScores
from kvmesh.workers.request import (
    EndReason,
    PinTerms,
    PrefillProgress,
    SampledLogprobs,
    SequenceDelta,
    SequenceUsage,
    TokenIds,
)
from kvmesh.workers.sampling_params import SamplingParams
from tests.cluster.answers.test_choices import CharacterCodec
from tests.cluster.machine import (
    PATIENCE_S,
    TENANT,
    LetterCodec,
    LetterStream,
    SeenMeters,
    text_of,
)
from tests.routing.groups import make_info
from tests.workers.memory_executor import EOS

PROMPT = [3, 14, 15, 9, 26]
QUEUE_TIMEOUT_S = 100.0
SILENCE_S = 1000.0
EXACT_ONLY = AcceptedFormats(frozenset({"exact"}))


class Notes:
    """A trace that keeps its phases and events, with what they say."""

    def __init__(self) -> None:
        self.all: list[tuple[str, dict[str, object]]] = []

    def phase(self, name: str, **attributes: object) -> None:
        self.all.append((name, attributes))

    def event(self, name: str, **attributes: object) -> None:
        self.all.append((name, attributes))

    def finish(self, usage: pb.Usage, finish_reasons: list[str]) -> None:
        self.all.append(("finish", {"usage": usage, "reasons": finish_reasons}))

    def fail(self, reason: str) -> None: ...


class Surroundings:
    """A router that answers with what the test puts, engines that keep what they are sent."""

    def __init__(self) -> None:
        self.asked: list[PlaceRequest] = []
        self.on_waiting: Callable[[Waiting], None] | None = None
        self.given_back: list[str] = []  # what became of each place
        self.submitted: asyncio.Queue[Submit] = asyncio.Queue()
        self.receiver: Receiver | None = None  # of what was submitted last
        self.forgotten: list[str] = []
        self.ended: list[tuple[list[str], EndReason]] = []
        self.reached: list[tuple[str, Address]] = []
        self.unreachable = 0  # engines that cannot be connected to
        self.closed = 0  # connections that close before the submission
        self._answers: asyncio.Queue[Placed | Exception] = asyncio.Queue()

    @asynccontextmanager
    async def place(
        self, request: PlaceRequest, on_waiting: Callable[[Waiting], None]
    ) -> AsyncIterator[HeldPlace]:
        self.asked.append(request)
        self.on_waiting = on_waiting
        answer = await self._answers.get()
        if isinstance(answer, Exception):
            raise answer
        held = HeldPlace(answer)
        try:
            yield held
        finally:
            self.given_back.append("finished" if held.submitted else "released")

    def answer(self, *answers: Placed | Exception) -> None:
        for answer in answers:
            self._answers.put_nowait(answer)

    async def get(self, epoch: str, address: Address) -> Surroundings:
        self.reached.append((epoch, address))
        if self.unreachable:
            self.unreachable -= 1
            raise EngineLostError()
        return self

    def submit(self, message: Submit, receiver: Receiver) -> None:
        if self.closed:
            self.closed -= 1
            raise EngineLostError()
        self.receiver = receiver
        self.submitted.put_nowait(message)

    def forget(self, lease_id: str) -> None:
        self.forgotten.append(lease_id)

    def end(self, names: list[str], reason: EndReason) -> None:
        self.ended.append((names, reason))


class Alone:
    """A generation and a client that reads it."""

    def __init__(
        self,
        *,
        n: int = 1,
        timeout_s: float | None = None,
        resume: Resume | None = None,
        stop: tuple[str, ...] = (),
        max_tokens: int = 20,
        prompt_logprobs: int | None = None,
        pin_s: float | None = None,
        plan: AnswerPlan = NO_PLAN,
        codec: LetterCodec | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        self.now = 1000.0
        self.around = Surroundings()
        self.notes = Notes()
        self.meters = SeenMeters()
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, seed=7, prompt_logprobs=prompt_logprobs
        )
        spec = GenerationSpec(
            request_id="r",
            prompt="",
            params=params,
            n=n,
            rules=TextRules(stop, skip_special_tokens),
            priority=4,
            timeout_s=timeout_s,
            cache_salt="salt",
            pin_s=pin_s,
            resume=resume,
        )
        around: Any = self.around
        context = IngressContext(
            around, around, codec or LetterCodec(), QUEUE_TIMEOUT_S,
            IngressMeters(self.meters, [TENANT]), clock=lambda: self.now, silence_s=SILENCE_S,
        )  # fmt: skip
        request = PreparedRequest(
            spec=spec,
            tenant=TENANT,
            prompt_ids=np.array(PROMPT, np.int32),
            params=params,
            page_hashes=(b"page",),
            accepts=EXACT_ONLY,
            plan=plan,
        )
        self.generation = Generation(request, context, self.notes)
        self.stream = self.generation.events()
        self.received: list[pb.GenerateStreamResponse] = []
        self._reading: asyncio.Task[None] | None = None
        self._placements = 0

    def place(self, epoch: str = "e0", queue_s: float = 0.0) -> Placed:
        """The router's next answer."""
        self._placements += 1
        lease = LeaseTerms(f"l{self._placements}", 1, 4, 4, 8)
        placed = Placed(
            1, "g0", make_info(epoch=epoch), Address("g0", 1), lease, 9_000, queue_s, 512
        )  # fmt: skip
        self.around.answer(placed)
        return placed

    def read(self) -> asyncio.Task[None]:
        async def read() -> None:
            async for event in self.stream:
                self.received.append(event)

        self._reading = asyncio.create_task(read())
        return self._reading

    async def submitted(self) -> Submit:
        await self.until(lambda: not self.around.submitted.empty())
        return self.around.submitted.get_nowait()

    @property
    def attempt(self) -> Attempt:
        """The one that was submitted last."""
        attempt = self.around.receiver
        assert isinstance(attempt, Attempt)
        return attempt

    def deliver(self, name: str, *tokens: int, end: EndReason | None = None, **rest: Any) -> None:
        if name.partition(".")[0] not in self.around.forgotten:  # or the link drops it
            self.attempt.deliver(SequenceDelta(name, tokens, finish_reason=end, **rest))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Raises what the client gets, if that is an error."""
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                reading = self._reading
                if reading is not None and reading.done() and not reading.cancelled():
                    reading.result()
                    raise AssertionError("the stream has ended")
                await asyncio.sleep(0)

    def kinds(self) -> list[str | None]:
        return [event.WhichOneof("event") for event in self.received]

    @property
    def usage(self) -> pb.Usage:
        assert self.received[-1].HasField("usage")
        return self.received[-1].usage


async def over(task: asyncio.Task[None]) -> None:
    await asyncio.wait_for(task, PATIENCE_S)


def used(**changes: Any) -> SequenceUsage:
    values: dict[str, Any] = {
        "prompt_tokens": 5, "completion_tokens": 1, "cached_tokens": 0, "sealed_pages": 1,
        "hot_pages": 1, "kv_bytes": 1, "reserved_bytes": 1, "queue_s": 0.0,
        "time_to_first_token_s": 0.1, "total_s": 0.2, "preemptions": 0,
    }  # fmt: skip
    return SequenceUsage(**{**values, **changes})


def resumed(*choices: ResumedChoice) -> Resume:
    return Resume("r", choices)


# What it asks for and sends


async def test_the_router_and_the_engine_hear_what_the_request_is() -> None:
    alone = Alone(n=2, timeout_s=30.0)
    task = alone.read()
    placed = alone.place()
    sent = await alone.submitted()
    assert f"generate {TENANT}/r" in {task.get_name() for task in asyncio.all_tasks()}
    (asked,) = alone.around.asked
    assert asked == PlaceRequest(
        f"{TENANT}/r",
        len(PROMPT),
        20,
        tenant=TENANT,
        priority=4,
        timeout_s=30.0,
        page_hashes=(b"page",),
        accepts=EXACT_ONLY,
        sequences=2,
        incarnation=asked.incarnation,
    )
    assert alone.around.reached == [("e0", Address("g0", 1))]
    assert sent.lease == placed.lease
    assert np.frombuffer(sent.prompt, "<i4").tolist() == PROMPT
    assert [x.request_id for x in sent.sequences] == ["l1.0", "l1.1"]
    assert [x.params.seed for x in sent.sequences] == [7, choice_seed(7, 1)]
    assert [x.output for x in sent.sequences] == [b"", b""]
    assert [x.scored for x in sent.sequences] == [0, 0]
    assert (sent.constraint, sent.pin) == (None, None)
    assert alone.generation._output.queue._silence_s == SILENCE_S
    assert (sent.timeout_s, sent.suspicion, sent.cache_salt) == (
        30.0,
        0,
        cache_salt(TENANT, "salt"),
    )
    for index in range(2):
        alone.deliver(f"l1.{index}", 2, end=EndReason.LENGTH, usage=used())
    await over(task)
    assert alone.around.given_back == ["finished"]
    assert alone.around.forgotten == ["l1"]


async def test_the_engine_hears_what_is_asked_of_the_answer_and_of_the_prompt() -> None:
    constraint = OutputConstraint("start: /[A-Z]+/")
    alone = Alone(
        n=2,
        prompt_logprobs=2,
        pin_s=60.0,
        plan=AnswerPlan(constraint=constraint),
        resume=Resume("r", (ResumedChoice(),) * 2, scores=3),
    )
    task = alone.read()
    alone.place()
    sent = await alone.submitted()
    assert (sent.constraint, sent.pin) == (constraint, PinTerms(TENANT, 60.0))
    assert [x.params.prompt_logprobs for x in sent.sequences] == [2, None]
    assert [x.scored for x in sent.sequences] == [3, 0]
    score = np.array([-1.5], np.float32).tobytes()
    scores = TokenScores(score, np.array([PROMPT[-1]], np.int32).tobytes(), score)
    alone.deliver("l1.0", scores=scores)
    for index in range(2):
        alone.deliver(f"l1.{index}", 2, end=EndReason.LENGTH, usage=used())
    await over(task)
    assert alone.kinds()[:3] == ["started", "prompt_logprobs", "delta"]
    assert alone.received[1].prompt_logprobs.chosen_token_ids == PROMPT[-1:]


class WatchedCodec(LetterCodec):
    """Keeps after which prompts it has to decode; the last token of PROMPT is special."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def special_text(self, token_id: int) -> str:
        return "<s>" if token_id == PROMPT[-1] else ""

    def stream(self, prompt: Sequence[int] | TokenIds, skip_special_tokens: bool) -> LetterStream:
        self.prompts.append(list(prompt))
        return LetterStream()


@pytest.mark.parametrize(("skip", "shown"), [(True, b""), (False, text_of(PROMPT[-1:]).encode())])
async def test_tokens_are_decoded_as_the_request_says(skip: bool, shown: bytes) -> None:
    codec, had = WatchedCodec(), Resume("r", (ResumedChoice(),), scores=3)
    alone = Alone(codec=codec, skip_special_tokens=skip, prompt_logprobs=0, resume=had)
    task = alone.read()
    alone.place()
    await alone.submitted()
    score = np.array([-1.5], np.float32).tobytes()
    alone.deliver("l1.0", scores=TokenScores(score, b"", b""))
    found = (SampledLogprobs(-1.0, ()),)
    alone.deliver("l1.0", 5, end=EndReason.LENGTH, logprobs=found)
    await over(task)
    assert alone.kinds() == ["started", "prompt_logprobs", "delta", "choice_finished", "usage"]
    assert alone.received[1].prompt_logprobs.chosen_bytes == [shown]
    assert alone.received[2].delta.logprobs.chosen_bytes == [b"F"]
    assert codec.prompts == [PROMPT]


async def test_a_tool_call_has_the_id_that_it_has_on_every_ingress() -> None:
    syntax = SYNTAXES["mistral"]
    plan = AnswerPlan(AnswerForm(None, syntax, ["f"]))
    alone = Alone(max_tokens=99, plan=plan, codec=CharacterCodec())
    task = alone.read()
    alone.place()
    await alone.submitted()
    tokens = map(ord, '[TOOL_CALLS][{"name": "f", "arguments": {}}]')
    alone.deliver("l1.0", *tokens, end=EndReason.STOP)
    await over(task)
    (call,) = alone.received[1].delta.tool_calls
    assert (call.id, call.name) == (call_id(f"{TENANT}/r", syntax, 0, 0), "f")


@pytest.mark.parametrize(("grammar", "left"), [("start: /F/", 0), ("", 1)])
async def test_only_a_grammar_decides_where_an_output_ends(grammar: str, left: int) -> None:
    """Here the request ignores the end of sequence, which its client already has."""
    had = resumed(ResumedChoice((5, EOS), 1))
    alone = Alone(resume=had, plan=AnswerPlan(constraint=OutputConstraint(grammar)))
    task = alone.read()
    alone.place()
    await alone.until(lambda: task.done() or not alone.around.submitted.empty())
    assert alone.around.submitted.qsize() == left
    if left:
        alone.deliver("l1.0", 5, end=EndReason.LENGTH)
    await over(task)


async def test_the_client_hears_where_its_request_is() -> None:
    alone = Alone(n=2)
    task = alone.read()
    await alone.until(lambda: alone.around.on_waiting is not None)
    status = alone.generation._status
    assert alone.around.on_waiting is not None
    alone.around.on_waiting(Waiting(1, 3, 2.5))
    await alone.until(lambda: len(alone.received) == 1)
    alone.place()
    await alone.submitted()
    unstarted = pb.Prefilling(total_tokens=len(PROMPT))
    assert status.event().prefilling == unstarted
    alone.deliver("l1.0", progress=PrefillProgress(2, 1, 5))
    await alone.until(lambda: len(alone.received) == 3)
    alone.deliver("l1.1", progress=PrefillProgress(1, 1, 5))  # not the one that leads
    assert status.event().prefilling.computed_tokens == 2
    alone.deliver("l1.0", 5)
    alone.attempt.lose()
    await alone.until(lambda: len(alone.around.asked) == 2)
    assert status.event().queued == pb.Queued(request_id="r")
    alone.place()
    await alone.submitted()
    unstarted.total_tokens += 1
    assert status.event().prefilling == unstarted
    for name in ("l2.0", "l2.1"):
        alone.deliver(name, 6, end=EndReason.LENGTH, usage=used())
    await over(task)
    queued, started, prefilling, *_ = alone.received
    assert queued.queued == pb.Queued(position=3, projected_wait_s=2.5, request_id="r")
    assert prefilling.prefilling == pb.Prefilling(
        computed_tokens=2, cached_tokens=1, total_tokens=5
    )
    assert started.started == pb.Started(
        request_id="r",
        model="m",
        model_revision="r",
        group="g0",
        kv_format="int4",
        seed=7,
        prompt_tokens=len(PROMPT),
        kv_hot_pages=4,
        kv_sealed_pages=4,
        kv_reserved_bytes=9_000,
        cached_tokens=512,
    )
    assert (alone.usage.group, alone.usage.kv_format) == ("g0", "int4")


async def test_the_log_says_which_request_lost_what(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "REFUSAL_PAUSE_S", 0.0)
    alone = Alone()
    task = alone.read()
    for _ in range(3):
        alone.place()
    await alone.submitted()
    alone.attempt.lose()
    await alone.submitted()
    alone.attempt.reject(PoolCapacityError("full", 1, 0, retryable=True))
    await alone.submitted()
    alone.deliver("l3.0", end=EndReason.FAULT)
    with pytest.raises(RequestFaultError):
        await over(task)
    found = [(x.levelname, x.getMessage(), about_of(x)) for x in caplog.records]
    whose = {"tenant": TENANT, "request_id": "r", "group": "g0"}
    assert found == [
        ("WARNING", f"request {TENANT}/r lost group g0", whose),
        ("WARNING", f"{TENANT}/r was refused by its group: full", whose),
        ("ERROR", f"request {TENANT}/r is not tried again: it failed", whose),
    ]


def about_of(record: logging.LogRecord) -> dict[str, object]:
    return {name: getattr(record, name, None) for name in ("tenant", "request_id", "group")}


async def test_after_a_loss_only_what_is_missing_is_asked_for() -> None:
    alone = Alone(n=2, timeout_s=30.0)
    task = alone.read()
    alone.place()
    await alone.submitted()
    alone.deliver("l1.0", 5, 6, 7)
    alone.deliver("l1.1", 8, end=EndReason.LENGTH, usage=used())
    alone.now += 10.0
    alone.place(epoch="e1")
    alone.attempt.lose()
    sent = await alone.submitted()
    alone.deliver("l1.0", 9)  # too late: it is computed again
    asked = alone.around.asked[1]
    assert (asked.prompt_tokens, asked.max_tokens) == (len(PROMPT) + 3, 20 - 3)
    assert (asked.sequences, asked.past) == (1, Past.RAN)
    assert asked.incarnation == alone.around.asked[0].incarnation
    assert asked.incarnation != Alone().generation._place_request().incarnation
    assert asked.lost_engines == {"e0"}
    assert (asked.timeout_s, sent.timeout_s) == (20.0, 20.0)
    assert [x.request_id for x in sent.sequences] == ["l2.0"]
    assert np.frombuffer(sent.sequences[0].output, "<i4").tolist() == [5, 6, 7]
    assert sent.suspicion == 1
    alone.deliver("l2.0", 10, end=EndReason.LENGTH, usage=used())
    await over(task)
    assert alone.usage.completion_tokens == 5
    assert alone.usage.failovers == 1
    assert alone.around.forgotten == ["l1", "l2"]
    assert alone.kinds().count("started") == 1


@pytest.mark.parametrize(("timeout_s", "asked_s"), [(None, 100.0), (300.0, 100.0), (99.0, 99.0)])
async def test_nobody_waits_longer_than_the_server_allows(
    timeout_s: float | None, asked_s: float
) -> None:
    alone = Alone(timeout_s=timeout_s)
    task = alone.read()
    alone.place()
    assert (await alone.submitted()).timeout_s == timeout_s
    assert alone.around.asked[0].timeout_s == asked_s
    alone.deliver("l1.0", 2, end=EndReason.LENGTH)
    await over(task)


async def test_choices_that_had_finished_are_not_submitted() -> None:
    done = ResumedChoice((5, 6), 2, finished=True)
    alone = Alone(n=2, resume=resumed(done, ResumedChoice((7,), 1)))
    task = alone.read()
    alone.place()
    sent = await alone.submitted()
    (asked,) = alone.around.asked
    assert (asked.prompt_tokens, asked.max_tokens) == (len(PROMPT) + 2, 20 - 2)
    assert (asked.sequences, asked.past) == (1, Past.AGAIN)
    assert [x.request_id for x in sent.sequences] == ["l1.0"]
    assert [x.output for x in sent.sequences] == [np.array([7], "<i4").tobytes()]
    alone.deliver("l1.0", 8, end=EndReason.LENGTH)
    await over(task)
    assert {x.delta.index for x in alone.received if x.HasField("delta")} == {1}
    assert alone.usage.completion_tokens == 4


async def test_a_request_with_nothing_left_to_compute_gives_its_place_back() -> None:
    alone = Alone(resume=resumed(ResumedChoice(tuple(range(2, 22)), 19)))
    task = alone.read()
    alone.place()
    await over(task)
    assert alone.kinds() == ["started", "delta", "choice_finished", "usage"]
    assert alone.around.given_back == ["released"]
    assert alone.around.submitted.empty()
    (asked,) = alone.around.asked
    assert (asked.max_tokens, asked.sequences) == (1, 1), "no request may ask for less"


async def test_a_stop_string_ends_its_own_sequence_alone() -> None:
    alone = Alone(n=2, stop=("CD",))
    task = alone.read()
    alone.place()
    await alone.submitted()
    alone.deliver("l1.1", 2)
    alone.deliver("l1.0", 5, 2, 3, 4)
    await alone.until(lambda: bool(alone.around.ended))
    alone.deliver("l1.0", 6)  # on its way meanwhile
    alone.deliver("l1.1", 5)
    await alone.until(lambda: any(5 in x.delta.token_ids and x.delta.index for x in alone.received))
    alone.deliver("l1.0", end=EndReason.STOP)
    alone.deliver("l1.1", end=EndReason.LENGTH)
    await over(task)
    assert alone.around.ended == [(["l1.0"], EndReason.STOP)], "it is ended once"
    deltas = [event.delta for event in alone.received if event.HasField("delta")]
    for index, (text, tokens) in enumerate([("F", [5, 2, 3]), ("CF", [2, 5])]):
        own = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in own) == text
        assert [token for delta in own for token in delta.token_ids] == tokens


async def test_a_stop_string_that_nobody_reads_ends_its_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempt, "UNREAD_PERIOD_S", 0.0)
    alone = Alone(stop=("CD",), max_tokens=2 * MUCH_UNREAD)
    alone.place()
    assert (await asyncio.wait_for(anext(alone.stream), PATIENCE_S)).HasField("started")
    await alone.submitted()
    alone.deliver("l1.0", 2, 3)
    for _ in range(MUCH_UNREAD - 1):
        assert not alone.around.ended
        alone.deliver("l1.0", 5)
    await alone.until(lambda: bool(alone.around.ended))
    assert alone.around.ended == [(["l1.0"], EndReason.STOP)]
    alone.deliver("l1.0", end=EndReason.STOP)
    await over(alone.read())
    assert alone.kinds() == ["delta", "choice_finished", "usage"]


# What it reports


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("fault", [False, True])
async def test_an_answer_that_is_complete_needs_no_engine_any_more(fault: bool, read: bool) -> None:
    alone = Alone(stop=("CD",))
    task = alone.read()
    alone.place()
    await alone.submitted()
    alone.deliver("l1.0", 5, 2, 3, 4)
    if read:
        await alone.until(lambda: "choice_finished" in alone.kinds())
    if fault:
        alone.deliver("l1.0", end=EndReason.FAULT, error="it failed")
    else:
        alone.attempt.lose()
    await over(task)
    assert len(alone.around.asked) == 1
    assert alone.kinds()[-2:] == ["choice_finished", "usage"]
    assert alone.usage.failovers == 0


async def test_usage_adds_up_all_placements() -> None:
    alone = Alone()
    task = alone.read()
    alone.place(queue_s=2.0)
    await alone.submitted()
    alone.now += 3.0
    alone.deliver("l1.0", 5)
    alone.place(epoch="e1", queue_s=4.0)
    alone.attempt.lose()
    await alone.submitted()
    alone.now += 3.0
    alone.deliver("l2.0", 6, end=EndReason.LENGTH, usage=used(queue_s=0.5, cached_tokens=9))
    await over(task)
    usage = alone.usage
    assert usage.queue_s == 2.0 + 4.0 + 0.5
    assert usage.time_to_first_token_s == 3.0
    assert usage.total_s == 6.0
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), 2)
    assert usage.kv_reserved_bytes == 9_000
    (started, *_) = [event.started for event in alone.received if event.HasField("started")]
    assert started.cached_tokens == 512, "as the router thinks"
    assert usage.cached_tokens == 9, "as the engine found"


async def test_a_trace_has_the_phases_of_every_placement() -> None:
    alone = Alone()
    task = alone.read()
    await alone.until(lambda: alone.around.on_waiting is not None)
    for position in (1, 0):
        alone.around.on_waiting(Waiting(1, position, None))  # type: ignore[misc]
    alone.place()
    await alone.submitted()
    alone.deliver("l1.0", progress=PrefillProgress(2, 0, 5))
    alone.deliver("l1.0", 5)
    alone.deliver("l1.0", 6)
    alone.place(epoch="e1")
    alone.attempt.lose()
    await alone.submitted()
    alone.deliver("l2.0", 7)
    alone.deliver("l2.0", end=EndReason.LENGTH)
    await over(task)
    prefill = ("prefill", {"group": "g0", "kv_format": "int4"})
    assert alone.notes.all == [
        ("place", {"prompt_tokens": len(PROMPT)}),
        ("queue", {}),
        ("waiting", {"position": 1}),
        ("waiting", {"position": 0}),
        prefill,
        ("prefilling", {"computed_tokens": 2}),
        ("decode", {}),
        ("engine lost", {"cause": "suspect"}),
        ("place", {"prompt_tokens": len(PROMPT) + 2}),
        prefill,
        ("decode", {}),
        ("finish", {"usage": alone.usage, "reasons": ["length"]}),
    ]
    assert alone.meters.of(table.FAILOVERS, "g0", "suspect") == 1


# How it fails


async def test_losses_count_since_the_latest_token_whether_or_not_it_was_read() -> None:
    alone = Alone()
    alone.place()
    assert (await anext(alone.stream)).HasField("started")
    await alone.submitted()
    alone.deliver("l1.0", 5)
    for _ in range(MAX_FAILOVERS):
        alone.place()
        alone.attempt.lose(Loss.REFUSED)
        await alone.submitted()
    alone.attempt.lose(Loss.REFUSED)
    alone.place()
    with pytest.raises(EngineLostError):
        async for event in alone.stream:
            alone.received.append(event)
    assert len(alone.around.asked) == MAX_FAILOVERS + 1


async def test_at_a_deadline_one_choice_that_has_output_is_enough() -> None:
    """Here all of it comes at once, and that of the choice without output comes first."""
    alone = Alone(n=2, timeout_s=30.0)
    task = alone.read()
    alone.place()
    await alone.submitted()
    alone.deliver("l1.0", end=EndReason.DEADLINE, usage=used())
    alone.deliver("l1.1", 5)
    alone.deliver("l1.1", end=EndReason.DEADLINE, usage=used())
    await over(task)
    assert alone.usage.completion_tokens == 1
    assert alone.kinds().count("choice_finished") == 2


@pytest.mark.parametrize("when", ["unreachable", "closed"])
async def test_an_engine_that_cannot_be_reached_is_lost_without_blame(when: str) -> None:
    alone = Alone()
    task = alone.read()
    setattr(alone.around, when, 1)
    alone.place(epoch="e0")
    alone.place(epoch="e1")
    sent = await alone.submitted()
    assert sent.suspicion == 0
    assert alone.around.asked[1].lost_engines == {"e0"}
    assert alone.around.given_back == ["released"]
    alone.deliver("l2.0", 5, end=EndReason.LENGTH)
    await over(task)


@pytest.mark.parametrize(("reason", "suspicion"), [(EndReason.CLEARED, 0), (EndReason.ERROR, 1)])
async def test_a_loss_is_as_suspicious_as_its_worst_sequence(
    reason: EndReason, suspicion: int
) -> None:
    alone = Alone(n=2)
    task = alone.read()
    alone.place()
    await alone.submitted()
    alone.place()
    alone.deliver("l1.0", end=reason, error="it failed")
    alone.deliver("l1.1", end=EndReason.CLEARED, error="it failed")
    assert (await alone.submitted()).suspicion == suspicion
    assert (alone.meters.of(table.QUARANTINES, "g0") or 0) == suspicion
    for index in range(2):
        alone.deliver(f"l2.{index}", 5, end=EndReason.LENGTH)
    await over(task)


@pytest.mark.parametrize("fault_first", [False, True])
async def test_a_request_at_fault_fails_even_if_another_of_its_choices_was_lost(
    fault_first: bool,
) -> None:
    alone = Alone(n=2)
    task = alone.read()
    alone.place()
    await alone.submitted()
    ends = [("l1.0", EndReason.ERROR), ("l1.1", EndReason.FAULT)]
    for name, reason in reversed(ends) if fault_first else ends:
        alone.deliver(name, end=reason, error="NaN")
    with pytest.raises(RequestFaultError, match="NaN"):
        await over(task)
    assert len(alone.around.asked) == 1
    assert alone.around.given_back == ["finished"]


async def test_a_refusal_by_the_engine_is_tried_again_a_few_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Pause(float):
        def __mul__(self, times: float) -> float:
            paused.append(times)
            return 0.0

    paused: list[float] = []
    monkeypatch.setattr(generation, "REFUSAL_PAUSE_S", Pause())
    alone = Alone()
    task = alone.read()
    for _ in range(MAX_REFUSALS):
        alone.place()
        await alone.submitted()
        alone.attempt.reject(
            PoolCapacityError("full", needed_bytes=1, available_bytes=0, retryable=True)
        )
    with pytest.raises(PoolCapacityError):
        await over(task)
    assert [x.past for x in alone.around.asked] == [Past.NEW, *[Past.ACCEPTED] * (MAX_REFUSALS - 1)]
    assert paused == [2.0**number for number in range(1, MAX_REFUSALS)]
    assert alone.around.given_back == ["released"] * MAX_REFUSALS, "nothing runs under the lease"


async def test_a_refusal_for_good_is_not_tried_again() -> None:
    alone = Alone()
    task = alone.read()
    alone.place()
    await alone.submitted()
    alone.attempt.reject(PoolCapacityError("too long", 2, 1, retryable=False))
    with pytest.raises(PoolCapacityError, match="too long"):
        await over(task)
    assert len(alone.around.asked) == 1


async def test_a_failure_whose_reader_has_left_is_no_surprise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    alone = Alone()
    alone.place()
    await anext(alone.stream)
    await alone.submitted()
    alone.deliver("l1.0", end=EndReason.FAULT)
    given_back = alone.around.given_back
    await alone.until(lambda: bool(given_back))
    await asyncio.sleep(0)
    await alone.stream.aclose()
    del alone
    gc.collect()
    assert [x.name for x in caplog.records] == ["kvmesh.cluster.ingress.generation"]


async def test_a_client_that_leaves_lets_everything_go(caplog: pytest.LogCaptureFixture) -> None:
    alone = Alone()
    task = alone.read()
    alone.place()
    await alone.submitted()
    alone.deliver("l1.0", 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await alone.stream.aclose()
    await alone.until(lambda: bool(alone.around.given_back))
    assert alone.around.forgotten == ["l1"]
    assert alone.around.given_back == ["finished"]
    assert alone.generation._output.queue._timer is None
    assert not caplog.records


@pytest.mark.parametrize("tokens", [(), (5,)])
async def test_an_engine_that_misses_a_deadline_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tokens: tuple[int, ...]
) -> None:
    monkeypatch.setattr(generation, "DEADLINE_GRACE_S", 0.0)
    assert DEADLINE_GRACE_S > 0
    alone = Alone(timeout_s=10.0)
    task = alone.read()
    await alone.until(lambda: len(alone.around.asked) == 1)
    alone.now += 10.0  # before it has a place
    alone.place()
    assert (await alone.submitted()).timeout_s == 1e-3, "an engine needs some"
    if tokens:
        alone.deliver("l1.0", *tokens)
        await over(task)
        assert alone.received[-2].choice_finished.finish_reason == pb.FINISH_REASON_DEADLINE
    else:
        with pytest.raises(RequestDeadlineError):
            await over(task)
    assert alone.around.forgotten == ["l1"]


@pytest.mark.parametrize(
    ("refusal", "timeout_s", "expected"),
    [
        (RequestIdInUseError(f"{TENANT}/r"), None, RequestIdInUseError("r")),
        (DeadlineUnreachableError(3.0, 5.0), 3.0, DeadlineUnreachableError(3.0, 5.0)),
        (NoRoomError("no room", 25.0), None, NoRoomError("no room", 25.0)),
    ],
)
async def test_a_refusal_is_in_the_clients_terms(
    refusal: Exception, timeout_s: float | None, expected: Exception
) -> None:
    alone = Alone(timeout_s=timeout_s)
    task = alone.read()
    alone.around.answer(refusal)
    with pytest.raises(type(expected)) as caught:
        await over(task)
    assert caught.value.args == expected.args


async def test_output_is_kept_if_no_other_place_comes_in_time() -> None:
    alone = Alone(timeout_s=3.0)
    task = alone.read()
    alone.place()
    await alone.submitted()
    alone.deliver("l1.0", 5)
    alone.attempt.lose()
    alone.around.answer(DeadlineUnreachableError(2.0, None))
    await over(task)
    assert alone.kinds() == ["started", "delta", "choice_finished", "usage"]
    assert alone.received[2].choice_finished.finish_reason == pb.FINISH_REASON_DEADLINE


@pytest.mark.parametrize(("timeout_s", "limit_s"), [(None, None), (8.0, 8.0 + DEADLINE_GRACE_S)])
async def test_an_engine_has_a_moment_to_end_what_is_overdue_itself(
    monkeypatch: pytest.MonkeyPatch, timeout_s: float | None, limit_s: float | None
) -> None:
    limits_s: list[float | None] = []

    async def run(attempt: Attempt, link: object, message: Submit, timeout_s: float | None) -> None:
        limits_s.append(timeout_s)
        raise TimeoutError

    monkeypatch.setattr(Attempt, "run", run)
    alone = Alone(timeout_s=timeout_s)
    alone.place()
    with pytest.raises(RequestDeadlineError):
        await over(alone.read())
    assert limits_s == [limit_s]


async def test_a_request_that_is_aborted_while_it_waits_has_started_and_ended() -> None:
    alone = Alone(n=2)
    alone.around.answer(RequestAbortedError())
    await over(alone.read())
    assert alone.kinds() == ["started", "choice_finished", "choice_finished", "usage"]
    started = pb.Started(request_id="r", seed=7, prompt_tokens=len(PROMPT))
    assert alone.received[0].started == started
    for index, event in enumerate(alone.received[1:3]):
        aborted = pb.ChoiceFinished(index=index, finish_reason=pb.FINISH_REASON_ABORT)
        assert event.choice_finished == aborted
    assert alone.usage == pb.Usage(prompt_tokens=len(PROMPT))


async def test_an_abort_keeps_what_there_is() -> None:
    alone = Alone()
    task = alone.read()
    alone.place()
    await alone.submitted()
    alone.deliver("l1.0", 5)
    alone.attempt.lose()
    alone.around.answer(RequestAbortedError())
    await over(task)
    assert alone.kinds() == ["started", "delta", "choice_finished", "usage"]
    assert alone.received[2].choice_finished.finish_reason == pb.FINISH_REASON_ABORT


async def test_what_is_over_is_freed_without_the_garbage_collector() -> None:
    """A full collection would hold up every stream, and long prompts would stay until then."""
    alone = Alone()
    task = alone.read()
    alone.place()
    await alone.submitted()
    alone.deliver("l1.0", 5, end=EndReason.LENGTH, usage=used())
    await over(task)
    gc.disable()
    try:
        request, output = weakref.ref(alone.generation), weakref.ref(alone.generation._output)
        alone.around.receiver = alone.around.on_waiting = None
        del alone.generation, alone.stream
        assert (request(), output()) == (None, None)
    finally:
        gc.enable()
