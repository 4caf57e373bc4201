"""An ingress's connection to an engine: who gets which delta, and that nothing is kept of what
has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import pytest

from kvmesh.cluster.engine_service import _request
from kvmesh.cluster.errors import EngineLostError, Failure
from kvmesh.cluster.identity import Identity
from kvmesh.cluster.ingress import engine_links
from kvmesh.cluster.ingress.engine_links import EngineLink, EngineLinks
from kvmesh.cluster.link import Address, Link, LinkError
from kvmesh.cluster.messages import Deltas, End, NewSequence, Rejected, Submit
from kvmesh.workers.errors import PoolCapacityError
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.request import EndReason, SequenceDelta
from kvmesh.workers.sampling_params import SamplingParams

Use = Callable[[object], object]


class Sent:
    """In place of a connection."""

    closed = False

    def __init__(self) -> None:
        self.messages: list[msgspec.Struct] = []

    def send(self, message: msgspec.Struct) -> None:
        self.messages.append(message)

    def close(self) -> None:
        self.closed = True


class Inbox:
    def __init__(self) -> None:
        self.deltas: list[SequenceDelta] = []
        self.errors: list[Exception | None] = []

    def deliver(self, delta: SequenceDelta) -> None:
        self.deltas.append(delta)

    def reject(self, error: Exception) -> None:
        self.errors.append(error)

    def lose(self) -> None:
        self.errors.append(None)


def connected() -> tuple[EngineLink, Sent]:
    sent = Sent()
    return EngineLink().use(sent), sent  # type: ignore[arg-type]


def submission(lease_id: str, sequences: int = 2) -> Submit:
    params = SamplingParams()
    new = tuple(NewSequence(f"{lease_id}.{i}", params, b"") for i in range(sequences))
    return Submit(LeaseTerms(lease_id, 1, 1, 1, 1, 0, sequences), b"\1\0\0\0", new, None, "", 0)


def empty(link: EngineLink) -> bool:
    return not link._receivers and not link._sequences


def test_a_refused_submission_is_refused_once_and_forgotten() -> None:
    link, sent = connected()
    refused, accepted = Inbox(), Inbox()
    for lease_id, inbox in (("a", refused), ("b", accepted)):
        link.submit(submission(lease_id), inbox)
    error = PoolCapacityError("no room", 2, 1, retryable=True)
    for _ in range(2):
        link.received(Rejected("a", Failure.of(error)))
    assert [str(x) for x in refused.errors] == ["no room"], "once, for both of its sequences"
    assert [*link._sequences] == ["b"]
    link.received(Deltas([SequenceDelta("a.0", (7,)), SequenceDelta("b.0", (8,))]))
    assert not refused.deltas and [x.token_ids for x in accepted.deltas] == [(8,)]
    link.forget("a")
    link.forget("b")
    assert empty(link)
    assert sent.messages[2:] == [End(["b.0", "b.1"], EndReason.ABORT)], "those that still run"


def test_a_sequence_that_has_ended_gets_no_more_and_is_not_ended_again() -> None:
    link, sent = connected()
    inbox = Inbox()
    link.submit(submission("a"), inbox)
    end = SequenceDelta("a.0", (7,), finish_reason=EndReason.STOP)
    link.received(Deltas([end, SequenceDelta("a.0", (9,)), SequenceDelta("a.1", (8,))]))
    assert [x.token_ids for x in inbox.deltas] == [(7,), (8,)]
    link.forget("a")
    link.forget("a")
    assert empty(link)
    assert sent.messages[1:] == [End(["a.1"], EndReason.ABORT)]


def test_a_lost_engine_is_reported_to_each_of_its_receivers_once() -> None:
    link, _ = connected()
    first, second = Inbox(), Inbox()
    for lease_id, inbox in (("a", first), ("b", second)):
        link.submit(submission(lease_id), inbox)
    for _ in range(2):
        link.lost()
    assert (first.errors, second.errors) == ([None], [None])


def test_nothing_is_submitted_over_a_closed_connection() -> None:
    link, sent = connected()
    sent.closed = True
    inbox = Inbox()
    with pytest.raises(EngineLostError):
        link.submit(submission("a"), inbox)
    assert empty(link) and not sent.messages


def test_a_submission_becomes_the_engines_requests() -> None:
    params = SamplingParams(max_tokens=9)
    terms = LeaseTerms("a", 1, 1, 1, 1)
    new = NewSequence("a.0", params, b"\5\0\0\0\6\0\0\0")
    made = _request(Submit(terms, b"\1\0\0\0\2\0\0\0", (new,), 3.0, "salt", 2), new)
    assert made.prompt_token_ids.tolist() == [1, 2, 5, 6]
    assert (made.request_id, made.params, made.lease) == ("a.0", params, terms)
    assert (made.resumed_tokens, made.timeout_s) == (2, 3.0)
    assert (made.cache_salt, made.suspicion) == ("salt", 2)


def test_a_link_before_its_connection_and_after_it() -> None:
    link = EngineLink()
    assert link.closed
    link.end(["a.0"], EndReason.ABORT)
    link.close()
    link, sent = connected()
    assert not link.closed
    link.close()
    assert sent.closed


def test_news_of_what_nobody_waits_for_is_dropped() -> None:
    link, _ = connected()
    inbox = Inbox()
    link.submit(submission("a"), inbox)
    end = SequenceDelta("a.0", (), finish_reason=EndReason.ABORT)
    link.received(Deltas([end, end]))
    link.received(Rejected("a", Failure.of(EngineLostError())))
    assert len(inbox.deltas) == len(inbox.errors) == 1
    link.received(Rejected("a", Failure.of(EngineLostError())))
    assert empty(link) and len(inbox.errors) == 1


async def test_all_requests_use_one_connection_to_an_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Sent] = []
    proceed = asyncio.Event()

    async def connect(address: Address, identity: Identity, messages: object, use: Use) -> Link:
        await proceed.wait()
        opened.append(Sent())
        use(opened[-1])
        return opened[-1]  # type: ignore[return-value]

    monkeypatch.setattr(engine_links, "connect", connect)
    links = EngineLinks(Identity.make())
    address = Address("127.0.0.1", 1)
    tasks = [asyncio.create_task(links.get(epoch, address)) for epoch in ("e0", "e0", "e1")]
    await asyncio.sleep(0)
    tasks[0].cancel()  # the others still wait for it
    await asyncio.sleep(0)
    proceed.set()
    first, other = await asyncio.wait_for(asyncio.gather(*tasks[1:]), 60)
    assert first is not other and len(opened) == 2
    assert await links.get("e0", address) is first and len(opened) == 2
    opened[0].closed = True
    assert await links.get("e0", address) is not first
    assert len(opened) == 3 and not links._opening
    for connection in opened:
        connection.closed = True
    await links.get("e2", address)
    assert [*links._links] == ["e2"], "connections that are closed are forgotten"


async def test_an_engine_that_could_not_be_reached_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures = [LinkError("refused")]

    async def connect(address: Address, identity: Identity, messages: object, use: Use) -> Link:
        if failures:
            raise failures.pop()
        use(made := Sent())
        return made  # type: ignore[return-value]

    monkeypatch.setattr(engine_links, "connect", connect)
    links = EngineLinks(Identity.make())
    address = Address("127.0.0.1", 1)
    tries = (asyncio.wait_for(links.get("e0", address), 60) for _ in range(2))
    for result in await asyncio.gather(*tries, return_exceptions=True):
        assert isinstance(result, EngineLostError)
    assert not failures
    assert not links._opening
    link = await links.get("e0", address)
    assert not link.closed
    links.close()
    assert link.closed
