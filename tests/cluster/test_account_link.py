"""What an engine tells the router, and when: over a connection that keeps what is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvmesh.cluster import account_link
from kvmesh.cluster.account_link import AccountLink
from kvmesh.cluster.identity import Identity
from kvmesh.cluster.link import Address
from kvmesh.cluster.messages import (
    AccountNews,
    AskReport,
    Extend,
    Hello,
    Replaced,
    Report,
    Withdraw,
)
from kvmesh.cluster.telemetry import table
from kvmesh.cluster.telemetry.gpus import Gpus
from kvmesh.cluster.telemetry.meters import EngineMeters
from kvmesh.workers.engine_account import EngineAccount
from kvmesh.workers.engine_thread import EngineNews
from kvmesh.workers.errors import EngineError
from kvmesh.workers.lease import AccountUpdate, LeaseEnd, LeaseTerms, PageChanges
from kvmesh.workers.lease_book import HeldLease
from kvmesh.workers.loads import EngineLoads, StepTime
from tests.cluster.machine import PATIENCE_S, SeenMeters
from tests.workers.test_engine import make_engine, request

ENGINE = Address("engine", 1)


class FakeLeader:
    """Stands in for an engine's leader, whose account the test changes."""

    def __init__(self) -> None:
        self.account = EngineAccount(make_engine()[0])
        self.failed: Exception | None = None
        self.step_age_s = 0.0
        self.obeyed: list[object] = []

    def extend(self, terms: LeaseTerms) -> None:
        self.obeyed.append(terms)

    def withdraw(self, lease_id: str) -> None:
        self.obeyed.append(lease_id)

    def engine_failed(self, error: Exception) -> None:
        self.failed = error

    def admit(self, number: int) -> HeldLease:
        """A lease arrives. The loads that were reported are those of before."""
        lease = terms(number)
        self.account.loads_current = False
        return self.account.book.admit(lease, [request(lease.lease_id, [2, 3, 4])])

    def note(
        self,
        *,
        running: int = 0,
        pages: dict[bytes, bool] | None = None,
        steps: list[StepTime] | None = None,
    ) -> None:
        """The engine has published a report."""
        self.account.note(EngineNews(EngineLoads(running=running), pages or {}, steps or []))


class RouterEnd:
    """The engine's connection, and what has gone over it."""

    def __init__(self) -> None:
        self.sent: list[object] = []
        self.closed = False
        self._sent = asyncio.Event()

    def send(self, message: object) -> None:
        self.sent.append(message)
        self._sent.set()

    def close(self) -> None:
        self.closed = True

    def take(self) -> list[object]:
        sent, self.sent = self.sent, []
        self._sent.clear()
        return sent

    async def next(self) -> list[object]:
        """What is sent at the next time."""
        await asyncio.wait_for(self._sent.wait(), PATIENCE_S)
        return self.take()


class Linked:
    """An account link and its surroundings. report_period_s: by default, none is due in a test"""

    def __init__(self, report_period_s: float = 1000.0) -> None:
        self.leader = FakeLeader()
        self.meters = SeenMeters()
        meters = EngineMeters(self.meters, "g0")
        self.link = AccountLink("g0", "node", self.leader, meters, report_period_s)  # type: ignore[arg-type]

    def start(self) -> None:
        nowhere: asyncio.Future[Address] = asyncio.get_running_loop().create_future()

        async def find() -> Address:
            return await nowhere

        self.link.start(find, Identity.make(), ENGINE, Gpus([]))

    def connect(self) -> RouterEnd:
        router = RouterEnd()
        self.link._connected(router)  # type: ignore[arg-type]
        return router


@pytest.fixture
async def linked() -> AsyncIterator[Linked]:
    made = Linked()
    made.start()
    yield made
    made.link.leave()


def terms(number: int) -> LeaseTerms:
    return LeaseTerms(f"1-{number}", 1, 4, 4, 8, number=number)


def news(message: object) -> AccountUpdate:
    assert isinstance(message, AccountNews)
    return message.update


def loads(message: object) -> EngineLoads:
    assert isinstance(message, Report)
    return message.report.loads


async def test_a_connection_starts_with_everything_and_a_report(linked: Linked) -> None:
    held, ended = linked.leader.admit(1), linked.leader.admit(2)
    linked.leader.account.book.note(held, 4)
    linked.leader.account.book.end(ended, 1)
    linked.leader.note(running=1, pages={b"a": True, b"b": True})
    hello, report = linked.connect().sent
    assert isinstance(hello, Hello)
    assert (hello.group, hello.address) == ("g0", ENGINE)
    assert hello.info == linked.leader.account.info
    assert hello.leases == (terms(1),)
    assert hello.update == AccountUpdate(first_tokens=("1-1",))
    assert hello.pages == PageChanges(held=(b"a", b"b"))
    assert loads(report).running == 1
    assert loads(report).leases == (terms(1),)
    again = linked.connect().sent[0]
    assert again == hello, "of the same engine"


async def test_changes_leave_together_and_once(linked: Linked) -> None:
    router = linked.connect()
    router.take()
    for number in (1, 2):
        linked.leader.admit(number)
        linked.link.changed()
    assert router.sent == []
    (sent,) = await router.next()
    assert news(sent).arrived == (terms(1), terms(2))
    held = linked.leader.admit(3)
    linked.link.changed()
    (sent,) = await router.next()
    assert news(sent).arrived == (terms(3),)
    linked.leader.account.book.end(held, None)
    linked.link.changed()
    (sent,) = await router.next()
    assert news(sent) == AccountUpdate(ended=(LeaseEnd("1-3"),))
    linked.leader.note(pages={b"a": True})
    linked.link.changed()
    (sent,) = await router.next()
    assert sent == AccountNews(AccountUpdate(), PageChanges(held=(b"a",)))
    linked.leader.note(pages={b"a": False})
    linked.link.changed()
    (sent,) = await router.next()
    assert sent == AccountNews(AccountUpdate(), PageChanges(dropped=(b"a",)))


async def test_a_report_is_sent_when_it_is_due_and_agrees_with_the_account(linked: Linked) -> None:
    router = linked.connect()
    (_, first) = router.take()
    assert isinstance(first, Report)
    assert not first.audited, "the engine has published nothing yet"
    # None is due: however current, it is not sent.
    linked.leader.note(running=1)
    linked.leader.admit(1)
    linked.leader.note(running=2)
    linked.link.changed()
    (sent,) = await router.next()
    assert news(sent).arrived
    # One is due, but a lease has come since it was made.
    linked.link._report_due = True
    linked.leader.admit(2)
    linked.link.changed()
    (sent,) = await router.next()
    assert news(sent).arrived
    linked.leader.note(running=3)
    linked.link.changed()
    (sent,) = await router.next()
    assert loads(sent).running == 3
    assert sent.audited  # type: ignore[attr-defined]
    assert not linked.link._report_due
    # The router asks: at once, and not audited if it does not agree.
    linked.leader.admit(3)
    linked.link.received(AskReport())
    (sent, report) = router.take()
    assert news(sent).arrived == (terms(3),)
    assert loads(report).running == 3
    assert not report.audited  # type: ignore[attr-defined]
    linked.link.draining = True
    linked.link.report_now()
    (report,) = router.take()
    assert report.report.draining  # type: ignore[attr-defined]


async def test_reports_are_sent_and_measured_regularly() -> None:
    linked = Linked(report_period_s=0.001)
    linked.start()
    router = linked.connect()
    router.take()
    linked.leader.note(running=1)
    for _ in range(3):
        for report in await router.next():
            assert loads(report).running == 1
    assert linked.meters.of(table.ROUTER_CONNECTED, "g0") == 1
    linked.link.lost()
    while linked.meters.of(table.ROUTER_CONNECTED, "g0") == 1:
        await asyncio.sleep(0)
    router.take()
    linked.leader.failed = EngineError("failed")
    linked.link.leave()
    assert router.sent == [], "nobody is connected any more"


async def test_the_last_changes_are_sent_before_it_leaves(linked: Linked) -> None:
    router = linked.connect()
    router.take()
    linked.leader.admit(1)
    linked.link.changed()
    linked.link.leave()
    (sent,) = router.take()
    assert news(sent).arrived == (terms(1),)
    assert router.closed


async def test_what_happens_without_a_connection_is_in_the_next_hello(linked: Linked) -> None:
    first = linked.connect()
    linked.link.lost()
    first.take()
    linked.leader.admit(1)
    linked.link.changed()
    while linked.link._flush_timer is not None:
        await asyncio.sleep(0)
    assert first.sent == []
    second = linked.connect()
    hello = second.take()[0]
    assert isinstance(hello, Hello)
    assert hello.leases == (terms(1),)
    linked.leader.admit(2)
    linked.link.changed()
    (sent,) = await second.next()
    assert news(sent).arrived == (terms(2),)


async def test_it_obeys_the_router(linked: Linked) -> None:
    linked.link.received(Extend((terms(1), terms(2))))
    linked.link.received(Withdraw(("1-3", "1-4")))
    assert linked.leader.obeyed == [terms(1), terms(2), "1-3", "1-4"]
    assert [*linked.link.withdrawn] == ["1-3", "1-4"]
    linked.link.received(Replaced())
    assert isinstance(linked.leader.failed, EngineError)


async def test_the_latest_leases_that_were_withdrawn_are_remembered(
    linked: Linked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account_link, "WITHDRAWN_LIMIT", 2)
    for lease_id in ("1-1", "1-2", "1-3"):
        linked.link.received(Withdraw((lease_id,)))
    assert [*linked.link.withdrawn] == ["1-2", "1-3"]


async def test_an_engine_that_has_failed_leaves(linked: Linked) -> None:
    router = linked.connect()
    router.take()
    linked.leader.admit(1)
    linked.leader.failed = EngineError("failed")
    linked.link.report_now()
    assert router.sent == [], "its account means nothing any more"
    linked.link.changed()
    assert router.closed
    await asyncio.gather(*linked.link._tasks, return_exceptions=True)
    assert all(task.cancelled() for task in linked.link._tasks)


async def test_each_step_is_measured_once(linked: Linked) -> None:
    linked.leader.note(steps=[StepTime(0.1, 0.2), StepTime(0.1, 0.2)])
    linked.link.changed()
    linked.link.changed()
    assert linked.meters.of(table.STEP, "g0", "host") == 2
