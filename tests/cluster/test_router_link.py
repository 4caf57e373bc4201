"""An ingress's calls of the router, over connections that come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kvmesh.cluster.errors import DrainingError, Failure, NotReadyError
from kvmesh.cluster.identity import Identity
from kvmesh.cluster.ingress import router_link
from kvmesh.cluster.ingress.router_link import RouterLink
from kvmesh.cluster.link import Address, LinkError
from kvmesh.cluster.messages import (
    TO_INGRESS_FROM_ROUTER,
    Abort,
    Aborted,
    AskEstimate,
    AskExplanation,
    AskStatus,
    AskTenant,
    CallFailed,
    Cancel,
    Decisions,
    Drain,
    Estimated,
    Finished,
    Place,
    Placed,
    Release,
    Status,
    TenantUse,
    Waiting,
)
from kvmesh.cluster.routing.request import Past, PlaceRequest
from kvmesh.workers.lease import LeaseTerms
from tests.cluster.machine import PATIENCE_S
from tests.routing.groups import ask, make_info

IDENTITY = Identity.make()


class Wire:
    """A connection that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[object] = []

    def send(self, message: object) -> None:
        self.sent.append(message)

    def take(self) -> list[object]:
        sent, self.sent = self.sent, []
        return sent


async def nowhere() -> Address:
    raise LinkError("not known yet")


def linked() -> tuple[RouterLink, Wire]:
    link = RouterLink(IDENTITY, nowhere)
    assert not link.connected
    return link, connect(link)


def connect(link: RouterLink) -> Wire:
    """Over a new connection; returns what the open calls are sent over."""
    wire = Wire()
    link._connected(wire)  # type: ignore[arg-type]
    assert link.connected
    return wire


def placed(call: int, lease_id: str = "l") -> Placed:
    lease = LeaseTerms(lease_id, 1, 4, 4, 8)
    return Placed(call, "g0", make_info(), Address("g0", 1), lease, 9, 0.0)


async def turns() -> None:
    """Let all tasks run until they wait for something else."""
    for _ in range(10):
        await asyncio.sleep(0)


async def hold(
    link: RouterLink, leave: asyncio.Event, heard: list[Waiting], *, submitted: bool
) -> Placed:
    async with link.place(ask("a"), heard.append) as held:
        held.submitted = submitted
        await leave.wait()
        return held.placed


@pytest.mark.parametrize("submitted", [False, True])
async def test_a_place_is_given_back_unless_the_engine_ends_it(submitted: bool) -> None:
    link, wire = linked()
    leave, heard = asyncio.Event(), list[Waiting]()
    task = asyncio.create_task(hold(link, leave, heard, submitted=submitted))
    await turns()
    (sent,) = wire.take()
    assert isinstance(sent, Place)
    assert sent.request == ask("a")
    news = [Waiting(sent.call, 1, 3.0), Waiting(sent.call, 0, None)]
    for message in news:
        link.received(message)
    assert heard == news
    link.received(placed(sent.call))
    await turns()
    assert wire.take() == []
    leave.set()
    assert await asyncio.wait_for(task, PATIENCE_S) == placed(sent.call)
    assert wire.take() == [Finished("l") if submitted else Release("l")]
    assert not link._open


async def test_a_failed_placement_raises_the_routers_error() -> None:
    link, wire = linked()
    task = asyncio.create_task(hold(link, asyncio.Event(), [], submitted=False))
    await turns()
    (sent,) = wire.take()
    link.received(CallFailed(sent.call, Failure.of(DrainingError())))  # type: ignore[attr-defined]
    with pytest.raises(DrainingError):
        await asyncio.wait_for(task, PATIENCE_S)
    assert wire.take() == []
    assert not link._open


async def test_who_leaves_while_it_waits_gives_up_its_turn() -> None:
    link, wire = linked()
    task = asyncio.create_task(hold(link, asyncio.Event(), [], submitted=False))
    await turns()
    (sent,) = wire.take()
    assert isinstance(sent, Place)
    task.cancel()
    await turns()
    assert task.cancelled()
    assert wire.take() == [Cancel(sent.call)]
    link.received(Waiting(sent.call, 3, None))
    assert wire.take() == []
    # The answer was on its way: nobody else can give this lease back.
    link.received(placed(sent.call, "late"))
    assert wire.take() == [Release("late")]


async def test_who_leaves_in_the_moment_of_the_answer_gives_the_lease_back() -> None:
    link, wire = linked()
    task = asyncio.create_task(hold(link, asyncio.Event(), [], submitted=False))
    await turns()
    (sent,) = wire.take()
    link.received(placed(sent.call))  # type: ignore[attr-defined]
    task.cancel()
    await turns()
    assert task.cancelled()
    assert wire.take() == [Release("l")]


async def test_who_leaves_in_the_moment_of_a_refusal_has_left() -> None:
    link, wire = linked()
    task = asyncio.create_task(hold(link, asyncio.Event(), [], submitted=False))
    await turns()
    (sent,) = wire.take()
    link.received(CallFailed(sent.call, Failure.of(DrainingError())))  # type: ignore[attr-defined]
    task.cancel()
    await turns()
    assert task.cancelled()
    assert wire.take() == []


async def test_a_placement_that_comes_as_its_caller_leaves_is_given_back() -> None:
    link, wire = linked()
    leave = asyncio.Event()
    waits = asyncio.create_task(hold(link, leave, [], submitted=False))
    await turns()
    (sent,) = wire.take()
    assert isinstance(sent, Place)
    waits.cancel()  # and in the same turn of the loop
    answer = placed(sent.call)
    link.received(answer)
    await asyncio.wait([waits])
    assert waits.cancelled()
    assert Release(answer.lease.lease_id) in wire.take()


async def test_open_calls_are_made_again_over_the_next_connection() -> None:
    link, wire = linked()
    leave = asyncio.Event()
    waits = asyncio.create_task(hold(link, leave, [], submitted=False))
    await turns()
    aborts = asyncio.create_task(link.abort("tenant/b"))
    await turns()
    place, abort = wire.take()
    link.lost()
    assert not link.connected
    link.drain()  # there is nobody to tell
    other = asyncio.create_task(link.abort("tenant/c"))
    await turns()
    again = connect(link)
    # The same router may still know the request, of which it must not say that its id is in use.
    repeated, *rest = again.take()
    assert isinstance(place, Place) and isinstance(repeated, Place)
    assert repeated.call == place.call
    assert repeated.request == PlaceRequest("a", 160, 160, past=Past.ACCEPTED)
    assert isinstance(abort, Abort)
    assert rest[0] == abort
    assert rest[1].request_id == "tenant/c"  # type: ignore[attr-defined]
    link.received(Aborted(abort.call, found=True))
    link.received(Aborted(rest[1].call, found=False))  # type: ignore[attr-defined]
    assert await asyncio.wait_for(aborts, PATIENCE_S)
    assert not await asyncio.wait_for(other, PATIENCE_S)
    link.received(placed(place.call))
    leave.set()
    await asyncio.wait_for(waits, PATIENCE_S)
    assert wire.take() == []
    assert again.take() == [Release("l")]
    third = connect(link)
    assert third.take() == [], "answered calls are not made again"
    link.drain()
    assert third.take() == [Drain()]


async def test_a_place_that_no_router_has_seen_is_new() -> None:
    """Its id may be that of a live request, which it must not end."""
    link = RouterLink(IDENTITY, nowhere)
    waits = asyncio.create_task(hold(link, asyncio.Event(), [], submitted=False))
    await turns()
    (first,) = connect(link).take()
    assert isinstance(first, Place) and first.request.past is Past.NEW
    link.lost()
    (again,) = connect(link).take()
    assert isinstance(again, Place) and again.request.past is Past.ACCEPTED
    waits.cancel()
    await asyncio.wait([waits])


async def test_a_place_ends_an_older_incarnation_until_a_router_has_heard_it() -> None:
    """Later its client may have asked again elsewhere."""
    link = RouterLink(IDENTITY, nowhere)

    async def resume() -> None:
        async with link.place(ask("a", past=Past.AGAIN)):
            pass

    waits = asyncio.create_task(resume())
    await turns()
    for heard, past in ((False, Past.AGAIN), (True, Past.AGAIN), (True, Past.ACCEPTED)):
        (sent,) = connect(link).take()
        assert isinstance(sent, Place) and sent.request.past is past
        if heard:
            link.received(Waiting(sent.call, 0, None))
        link.lost()
    waits.cancel()
    await asyncio.wait([waits])


async def test_a_repeated_place_has_the_time_that_is_left() -> None:
    link, wire = linked()
    request = ask("a", timeout_s=1000.0)

    async def place() -> None:
        async with link.place(request):
            pass

    waits = asyncio.create_task(place())
    await turns()
    (first,) = wire.take()
    assert isinstance(first, Place) and first.request.timeout_s is not None
    assert 900 < first.request.timeout_s <= 1000
    link.lost()
    again = connect(link)
    (repeated,) = again.take()
    assert isinstance(repeated, Place)
    assert repeated.request.timeout_s is not None
    assert 900 < repeated.request.timeout_s < 1000
    (call,) = link._open.values()
    assert call.due_s is not None
    call.send(again, call.due_s + 1)  # type: ignore[arg-type]
    (late,) = again.take()
    assert isinstance(late, Place) and late.request.timeout_s is not None
    assert late.request.timeout_s > 0, "the router refuses it at once"
    waits.cancel()
    await asyncio.wait([waits])


async def test_the_router_has_time_to_say_that_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It knows why; without its answer a place can only be given up."""
    ends: list[float | None] = []

    def timeout_at(end_s: float | None) -> asyncio.Timeout:
        ends.append(end_s)
        return asyncio.timeout(PATIENCE_S)

    monkeypatch.setattr("asyncio.timeout_at", timeout_at)
    link, _ = linked()

    async def place() -> None:
        async with link.place(ask("a", timeout_s=5.0)):
            pass

    waits = asyncio.create_task(place())
    await turns()
    (call,) = link._open.values()
    assert call.due_s is not None
    assert ends == [call.due_s + router_link.PLACE_GRACE_S]
    assert router_link.PLACE_GRACE_S > 0
    waits.cancel()
    await asyncio.wait([waits])


@pytest.mark.parametrize("connected", [False, True])
async def test_a_place_is_waited_for_until_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch, connected: bool
) -> None:
    monkeypatch.setattr(router_link, "PLACE_GRACE_S", 0.0)
    link = RouterLink(IDENTITY, nowhere)
    wire = connect(link) if connected else Wire()
    with pytest.raises(NotReadyError, match="the router does not answer"):
        async with asyncio.timeout(PATIENCE_S), link.place(ask("a", timeout_s=1e-3)):
            pass
    assert not link._open, "it is not asked again later"
    assert wire.take()[1:] == ([Cancel(1)] if connected else [])


RESULT: Any = object()  # the link does not look into what it hands over


@pytest.mark.parametrize(
    ("call", "sent", "answer"),
    [
        (lambda link: link.abort("tenant/a"), Abort(1, "tenant/a"), Aborted(1, RESULT)),
        (lambda link: link.estimate(ask("a")), AskEstimate(1, ask("a")), Estimated(1, RESULT)),
        (lambda link: link.explain("tenant/a"), AskExplanation(1, "tenant/a"),
         Decisions(1, RESULT)),
        (lambda link: link.tenant("t"), AskTenant(1, "t"), TenantUse(1, RESULT)),
        (lambda link: link.status(), AskStatus(1, False), Status(1, RESULT)),
        (lambda link: link.status(fresh=True), AskStatus(1, True), Status(1, RESULT)),
    ],
)  # fmt: skip
async def test_a_question_reaches_the_router_and_its_answer_who_asked(
    call: Callable[[RouterLink], Coroutine[Any, Any, object]], sent: object, answer: object
) -> None:
    link, wire = linked()
    task = asyncio.create_task(call(link))
    await turns()
    assert wire.take() == [sent]
    link.received(answer)
    assert await asyncio.wait_for(task, PATIENCE_S) is RESULT
    assert not link._open
    failed = asyncio.create_task(call(link))
    await turns()
    wire.take()
    link.received(CallFailed(2, Failure.of(DrainingError())))
    with pytest.raises(DrainingError):
        await asyncio.wait_for(failed, PATIENCE_S)


async def test_a_place_can_be_waited_for_without_news() -> None:
    link, _ = linked()

    async def place() -> Placed:
        async with link.place(ask("a")) as held:
            return held.placed

    task = asyncio.create_task(place())
    await turns()
    link.received(Waiting(1, 3, None))
    link.received(placed(1))
    assert await asyncio.wait_for(task, PATIENCE_S) == placed(1)


async def test_it_stays_connected_to_where_the_router_listens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[tuple[object, ...]] = []

    async def stay_connected(*how: object) -> None:
        kept.append(how)

    monkeypatch.setattr(router_link, "stay_connected", stay_connected)
    link = RouterLink(IDENTITY, nowhere)
    await link.run()
    assert kept == [(nowhere, IDENTITY, TO_INGRESS_FROM_ROUTER, link._connected)]
    wire = Wire()
    assert link._connected(wire) is link, "it takes what is received"  # type: ignore[arg-type]


async def test_a_router_that_does_not_answer_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_link, "ANSWER_TIMEOUT_S", 0.0)
    link, _ = linked()
    with pytest.raises(NotReadyError, match="does not answer"):
        await link.status()
    assert not link._open, "it is not asked again later"
