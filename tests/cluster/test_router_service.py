"""The router's messages, one at a time: who hears what, on a clock that the test moves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType

import pytest

from kvmesh.cluster.divergence import DIVERGENCE_NATS
from kvmesh.cluster.errors import DrainingError
from kvmesh.cluster.ingress.error_table import count_by_reason, to_wire
from kvmesh.cluster.link import Address
from kvmesh.cluster.messages import (
    Abort,
    Aborted,
    AccountNews,
    AskReport,
    AskStatus,
    CallFailed,
    Cancel,
    Drain,
    Extend,
    Finished,
    Hello,
    Place,
    Placed,
    Release,
    Replaced,
    Report,
    Status,
    Waiting,
    Withdraw,
)
from kvmesh.cluster.report_book import FRESH_TIMEOUT_S
from kvmesh.cluster.reports import ClusterStatus, EngineReport
from kvmesh.cluster.router_service import (
    INFORM_PERIOD_S,
    MEASURE_PERIOD_S,
    RouterPeer,
    RouterService,
)
from kvmesh.cluster.routing import router
from kvmesh.cluster.routing.config import RouterConfig, RouterTuning
from kvmesh.cluster.routing.errors import (
    RequestAbortedError,
    RequestIdInUseError,
    RoutingError,
)
from kvmesh.cluster.routing.request import Past
from kvmesh.cluster.routing.status import router_status
from kvmesh.cluster.telemetry import table
from kvmesh.cluster.telemetry.meters import RouterMeters
from kvmesh.workers.lease import AccountUpdate, LeaseEnd, LeaseTerms, LeaseWant, PageChanges
from kvmesh.workers.loads import ArenaLoads, EngineLoads, PoolLoads, SequenceLoad
from tests.cluster.machine import TENANT, SeenMeters
from tests.routing.groups import ask, make_info

NO_NEWS, NO_PAGES = AccountUpdate(), PageChanges()


class FarEnd:
    """A peer of the router, and what it has heard."""

    def __init__(self, routed: Routed) -> None:
        self.heard: list[object] = []
        self.closed = False
        self.peer: RouterPeer = routed.service.accept(self)  # type: ignore[arg-type]

    def send(self, message: object) -> None:
        assert not self.closed
        self.heard.append(message)

    def close(self) -> None:
        self.closed = True

    def says(self, *messages: object) -> list[object]:
        """What it hears at once."""
        before = len(self.heard)
        for message in messages:
            self.peer.received(message)
        return self.heard[before:]

    def all_of(self, kind: type) -> list[object]:
        return [message for message in self.heard if type(message) is kind]


class Routed:
    """A router whose groups run one request each."""

    def __init__(
        self,
        *groups: str,
        divergence_nats: Mapping[str, float] = MappingProxyType({}),
        **settings: object,
    ) -> None:
        self.now = 100.0
        self.meters = SeenMeters()
        self.service = RouterService(
            RouterConfig(**settings),  # type: ignore[arg-type]
            RouterMeters(self.meters, [TENANT]),
            groups=groups,
            clock=lambda: self.now,
            divergence_nats=divergence_nats,
        )
        self.engines = {name: self.engine(name) for name in groups}

    def engine(
        self,
        name: str,
        started_ns: int = 5,
        leases: tuple[LeaseTerms, ...] = (),
        *,
        node: str = "node",
        draining: bool = False,
        max_sequences: int = 1,
    ) -> FarEnd:
        connected = FarEnd(self)
        info = make_info(max_sequences=max_sequences, epoch=f"{name}-{started_ns}")
        address = Address(name, started_ns)
        connected.peer.received(
            Hello(name, started_ns, node, draining, info, address, leases, NO_NEWS, NO_PAGES)
        )
        return connected

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.service.tick()

    @property
    def waiting(self) -> int:
        return self.service.status().router.queue_depth


def report(draining: bool = False, **loads: object) -> Report:
    made = EngineLoads(**loads)  # type: ignore[arg-type]
    return Report(EngineReport(make_info(), made, draining=draining), audited=True)


def placed(ingress: FarEnd, name: str, call: int, **rest: object) -> Placed:
    (answer,) = ingress.says(Place(call, ask(name, **rest)))  # type: ignore[arg-type]
    assert isinstance(answer, Placed)
    assert answer.call == call
    return answer


def failure(messages: list[object]) -> Exception:
    (message,) = messages
    assert isinstance(message, CallFailed)
    return message.failure.error


# Ingresses


def test_a_placement_says_where_and_under_which_lease() -> None:
    routed = Routed("g0")
    answer = placed(FarEnd(routed), "a", 7)
    (lease,) = routed.service.router.leases.values()
    assert answer.lease == lease.terms
    assert (answer.group, answer.address) == ("g0", Address("g0", 5))
    assert answer.engine.epoch == "g0-5"
    assert answer.lease_bytes == answer.engine.geometry.bytes_of(lease.need)
    assert answer.queue_s == 0.0


def test_a_placement_says_how_long_the_request_has_waited() -> None:
    routed = Routed("g0")
    ingress = FarEnd(routed)
    first = placed(ingress, "a", 1)
    ingress.says(Place(2, ask("b")))
    routed.now += 7.0
    ingress.says(Release(first.lease.lease_id))
    (answer,) = (x for x in ingress.all_of(Placed) if isinstance(x, Placed) and x.call == 2)
    assert answer.queue_s == 7.0


def test_requests_that_wait_hear_it_once_a_period_if_it_changes() -> None:
    routed = Routed("g0")
    ingress = FarEnd(routed)
    first = placed(ingress, "a", 1)
    for call in (2, 3, 4):
        (news,) = ingress.says(Place(call, ask(f"w{call}")))
        assert isinstance(news, Waiting)
        assert (news.call, news.position) == (call, call - 2)
    assert routed.service.status().oldest_wait_s == 0.0
    routed.now += INFORM_PERIOD_S / 4
    assert ingress.says(Cancel(2)) == [], "nobody waits for an answer"
    routed.tick(INFORM_PERIOD_S / 4)
    assert ingress.all_of(Waiting)[3:] == [], "too soon"
    routed.tick(INFORM_PERIOD_S / 2)
    moved = ingress.all_of(Waiting)[3:]
    assert [(x.call, x.position) for x in moved if isinstance(x, Waiting)] == [(3, 0), (4, 1)]
    assert routed.service.status().oldest_wait_s == INFORM_PERIOD_S
    ingress.says(Cancel(3))
    routed.tick(INFORM_PERIOD_S / 2)
    assert len(ingress.all_of(Waiting)) == 5, "too soon after the last time"
    assert ingress.says(Release(first.lease.lease_id))[0].call == 4  # type: ignore[attr-defined]
    assert routed.service.status().oldest_wait_s == 0.0


def test_the_longest_wait_is_that_of_the_first_to_come() -> None:
    routed = Routed("g0")
    ingress = FarEnd(routed)
    placed(ingress, "a", 1)
    for call in (2, 3, 4):
        routed.now += 10.0
        ingress.says(Place(call, ask(f"w{call}")))
    assert routed.service.status().oldest_wait_s == 20.0
    ingress.says(Cancel(2))
    assert routed.service.status().oldest_wait_s == 10.0
    ingress.says(Cancel(4), Cancel(3))
    assert routed.service.status().oldest_wait_s == 0.0


def test_requests_of_a_lost_ingress_wait_no_longer() -> None:
    routed = Routed("g0")
    ingress, other = FarEnd(routed), FarEnd(routed)
    first = placed(other, "a", 1)
    for call in (1, 2):
        ingress.says(Place(call, ask(f"w{call}")))
    other.says(Place(2, ask("b")))
    assert routed.waiting == 3
    ingress.peer.lost()
    assert routed.waiting == 1
    assert len(routed.service.callers) == 1
    other.says(Release(first.lease.lease_id))
    assert [x.call for x in other.all_of(Placed)] == [1, 2]  # type: ignore[attr-defined]
    assert router_status(routed.service.router, routed.now).live_requests == 1


def test_what_waits_next_starts_and_hears_of_it_when_the_first_gives_up() -> None:
    routed = Routed()
    routed.engine("g0", max_sequences=16)
    ingress, other = FarEnd(routed), FarEnd(routed)
    placed(other, "runs", 1, prompt=800)
    ingress.says(Place(1, ask("large", 1400)))
    other.says(Place(2, ask("next", 160, 160)))
    assert routed.waiting == 2
    ingress.says(Cancel(1))
    assert [x.call for x in other.all_of(Placed)] == [1, 2]  # type: ignore[attr-defined]


def test_no_request_of_a_lost_ingress_starts_because_others_of_it_are_gone() -> None:
    routed = Routed()
    routed.engine("g0", max_sequences=16)
    lost, other = FarEnd(routed), FarEnd(routed)
    placed(other, "runs", 1, prompt=800)
    for call, prompt in enumerate((1400, 160, 160), 1):
        lost.says(Place(call, ask(f"w{call}", prompt, priority=2 - call)))
    other.says(Place(2, ask("last", priority=-5)))
    assert routed.waiting == 4
    lost.peer.lost()
    assert [x.call for x in other.all_of(Placed)] == [1, 2]  # type: ignore[attr-defined]
    assert routed.service.status().router.granted_total == 2


def test_an_id_that_is_in_use_is_refused_unless_the_request_replaces_it() -> None:
    routed = Routed("g0")
    ingress, again = FarEnd(routed), FarEnd(routed)
    first = placed(ingress, "run", 1)
    assert isinstance(failure(again.says(Place(1, ask("run")))), RequestIdInUseError)
    ingress.says(Place(2, ask("wait")))
    assert isinstance(failure(again.says(Place(2, ask("wait")))), RequestIdInUseError)
    assert routed.waiting == 1
    (news,) = again.says(Place(3, ask("wait", past=Past.AGAIN)))
    assert isinstance(news, Waiting)
    assert isinstance(failure(ingress.heard[-1:]), RequestAbortedError)
    (_, news) = [*again.says(Place(4, ask("wait", past=Past.RAN)))]
    assert isinstance(news, Waiting)
    assert routed.waiting == 1
    assert [x.call for x in again.all_of(CallFailed)] == [1, 2, 3]  # type: ignore[attr-defined]
    again.says(Release(first.lease.lease_id))
    assert again.heard[-1].call == 4  # type: ignore[attr-defined]


def test_an_ingress_that_was_cut_off_does_not_end_what_its_client_asked_for_elsewhere() -> None:
    routed = Routed("g0", "g1", "g2")
    cut_off, other = FarEnd(routed), FarEnd(routed)
    placed(cut_off, "ran", 1, incarnation="old")
    cut_off.peer.lost()
    runs = placed(other, "ran", 1, past=Past.AGAIN, incarnation="new")
    placed(other, "another", 2)
    other.says(Place(3, ask("wait", past=Past.AGAIN, incarnation="new")))
    heard = [len(engine.heard) for engine in routed.engines.values()]
    back = FarEnd(routed)
    for call, name in enumerate(["ran", "ran", "wait", "wait"]):
        past = (Past.ACCEPTED, Past.RAN)[call % 2]
        answer = back.says(Place(call, ask(name, past=past, incarnation="old")))
        assert isinstance(failure(answer), RequestAbortedError)
    assert [len(engine.heard) for engine in routed.engines.values()] == heard, "none is withdrawn"
    assert other.all_of(CallFailed) == []
    # A later router knows it from the lease.
    restarted = Routed()
    engine = restarted.engine(runs.group, leases=(runs.lease,))
    answer = FarEnd(restarted).says(Place(1, ask("ran", past=Past.RAN, incarnation="old")))
    assert isinstance(failure(answer), RequestAbortedError)
    own = FarEnd(restarted).says(Place(1, ask("ran", past=Past.RAN, incarnation="new")))
    assert isinstance(own[0], Waiting)
    assert engine.heard == [Withdraw((runs.lease.lease_id,))]


def test_a_draining_router_takes_only_requests_that_were_accepted() -> None:
    routed = Routed("g0")
    ingress = FarEnd(routed)
    assert not routed.service.status().draining
    ingress.says(Drain())
    assert routed.service.status().draining
    assert isinstance(failure(ingress.says(Place(1, ask("new")))), DrainingError)
    assert isinstance(failure(ingress.says(Place(2, ask("n", past=Past.AGAIN)))), DrainingError)
    ran = placed(ingress, "ran", 3, past=Past.RAN)
    ingress.says(Release(ran.lease.lease_id))
    placed(ingress, "waited", 4, past=Past.ACCEPTED)


def test_an_abort_says_whether_there_was_such_a_request() -> None:
    routed = Routed("g0")
    ingress, operator = FarEnd(routed), FarEnd(routed)
    lease_id = placed(ingress, "run", 1).lease.lease_id
    ingress.says(Place(2, ask("wait")))
    assert operator.says(Abort(1, "none")) == [Aborted(1, found=False)]
    assert operator.says(Abort(2, "wait")) == [Aborted(2, found=True)]
    assert isinstance(failure(ingress.heard[-1:]), RequestAbortedError)
    assert operator.says(Abort(3, "run")) == [Aborted(3, found=True)]
    assert routed.engines["g0"].heard == [Withdraw((lease_id,))]


@pytest.mark.parametrize("lists", ["at once", "as it arrives"])
def test_a_withdrawal_that_was_lost_with_its_connection_is_sent_again(lists: str) -> None:
    routed = Routed("g0")
    lease = placed(FarEnd(routed), "run", 1).lease
    assert FarEnd(routed).says(Abort(1, "run")) == [Aborted(1, found=True)]
    withdraw = Withdraw((lease.lease_id,))
    routed.engines["g0"].peer.lost()
    arrived = AccountNews(AccountUpdate(arrived=(lease,)), NO_PAGES)
    if lists == "at once":
        engine = routed.engine("g0", leases=(lease,))
    else:
        engine = routed.engine("g0")
        engine.says(arrived)
    assert engine.heard == [withdraw]
    assert engine.says(arrived) == [], "it is on its way"
    engine.says(AccountNews(AccountUpdate(ended=(LeaseEnd(lease.lease_id),)), NO_PAGES))
    assert not routed.service.router._withdrawn
    assert router_status(routed.service.router, routed.now).live_requests == 0


def test_the_withdrawals_that_are_remembered_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "MAX_WITHDRAWN", 1)
    routed = Routed("g0", "g1")
    ingress = FarEnd(routed)
    leases = [placed(ingress, name, call).lease.lease_id for call, name in enumerate("ab")]
    ingress.says(Abort(3, "a"), Abort(4, "b"))
    assert [*routed.service.router._withdrawn] == leases[1:]


def test_the_id_of_a_request_that_its_client_has_seen_end_is_free() -> None:
    routed = Routed("g0")
    ingress = FarEnd(routed)
    first = placed(ingress, "a", 1)
    assert ingress.says(Finished(first.lease.lease_id)) == []
    (news,) = ingress.says(Place(2, ask("a")))
    assert isinstance(news, Waiting), "its pages are not free yet"
    ended = AccountUpdate(ended=(LeaseEnd(first.lease.lease_id),))
    routed.engines["g0"].says(AccountNews(ended, NO_PAGES))
    assert ingress.heard[-1].call == 2  # type: ignore[attr-defined]


# Status


def status(message: object, call: int) -> ClusterStatus:
    assert isinstance(message, Status)
    assert message.call == call
    return message.status


def test_a_fresh_status_waits_for_every_group() -> None:
    routed = Routed("g0", "g1")
    ingress = FarEnd(routed)
    (at_once,) = ingress.says(AskStatus(1, fresh=False))
    assert status(at_once, 1).healthy == {"g0", "g1"}
    assert ingress.says(AskStatus(2, fresh=True)) == []
    for engine in routed.engines.values():
        assert engine.heard == [AskReport()]
    routed.engines["g0"].says(report(running=3))
    assert len(ingress.heard) == 1
    routed.engines["g1"].says(report(running=4))
    reports = status(ingress.heard[1], 2).reports
    assert [reports[name].loads.running for name in ("g0", "g1")] == [3, 4]
    routed.engines["g1"].says(report())
    routed.tick(2 * FRESH_TIMEOUT_S)
    assert len(ingress.heard) == 2, "it is answered once"


def test_a_fresh_status_does_not_wait_for_a_group_that_is_lost() -> None:
    routed = Routed("g0", "g1")
    ingress = FarEnd(routed)
    ingress.says(AskStatus(1, fresh=True))
    routed.engines["g0"].says(report())
    routed.engines["g1"].peer.lost()
    assert status(ingress.heard[0], 1).healthy == {"g0"}
    ingress.says(AskStatus(2, fresh=True))
    routed.engines["g0"].peer.lost()
    (_, empty) = ingress.heard
    assert status(empty, 2).healthy == frozenset()
    (at_once,) = ingress.says(AskStatus(3, fresh=True))
    assert status(at_once, 3).healthy == frozenset()


def test_a_fresh_status_waits_for_a_limited_time() -> None:
    routed = Routed("g0")
    ingress = FarEnd(routed)
    ingress.says(AskStatus(1, fresh=True))
    routed.tick(FRESH_TIMEOUT_S / 2)
    ingress.says(AskStatus(2, fresh=True))
    assert ingress.heard == []
    routed.tick(FRESH_TIMEOUT_S / 2)
    assert [x.call for x in ingress.heard] == [1]  # type: ignore[attr-defined]
    routed.tick(FRESH_TIMEOUT_S / 2)
    assert [x.call for x in ingress.heard] == [1, 2]  # type: ignore[attr-defined]


def test_reports_name_the_requests_of_sequences() -> None:
    routed = Routed("g0")
    lease_id = placed(FarEnd(routed), "tenant/a", 1).lease.lease_id
    sequences = tuple(SequenceLoad(name, 1.0, 8, 8, 0, 9) for name in (lease_id, "gone", ""))
    routed.engines["g0"].says(report(oldest=sequences))
    assert routed.service.status().requests == {lease_id: "tenant/a"}


def test_the_budget_is_measured_once_a_period() -> None:
    routed = Routed("g0")
    ingress = FarEnd(routed)

    def live() -> float | None:
        return routed.meters.of(table.TENANT_LIVE, TENANT, "running")

    placed(ingress, "a", 1, tenant=TENANT)
    routed.tick(MEASURE_PERIOD_S / 2)
    assert live() is None
    routed.tick(MEASURE_PERIOD_S / 2)
    assert live() == 1
    assert routed.meters.of(table.GROUP_UP, "g0") == 1
    ingress.says(Release(ingress.heard[0].lease.lease_id))  # type: ignore[attr-defined]
    routed.engines["g0"].peer.lost()
    routed.tick(MEASURE_PERIOD_S / 2)
    assert live() == 1, "too soon"
    routed.tick(MEASURE_PERIOD_S / 2)
    assert live() == 0
    assert routed.meters.of(table.GROUP_UP, "g0") == 0


# Engines


def test_news_of_leases_reach_their_own_engine() -> None:
    tuning = RouterTuning(min_samples=1)
    routed = Routed("g0", "g1", tuning=tuning)
    ingress = FarEnd(routed)
    teacher = placed(ingress, "teacher", 1)
    ended = AccountUpdate(
        arrived=(teacher.lease,), ended=(LeaseEnd(teacher.lease.lease_id, output_tokens=16),)
    )
    routed.engines[teacher.group].says(AccountNews(ended, NO_PAGES))
    made = placed(ingress, "a", 2)
    assert made.lease.sealed_pages < made.lease.max_sealed_pages
    own = routed.engines[made.group]
    (other,) = (x for x in routed.engines.values() if x is not own)
    want = LeaseWant(made.lease.lease_id, 160, 160 + 32)
    own.says(AccountNews(AccountUpdate(arrived=(made.lease,), wants=(want,)), NO_PAGES))
    (extended,) = own.heard
    assert isinstance(extended, Extend)
    (terms,) = extended.leases
    assert terms.lease_id == made.lease.lease_id
    assert terms.sealed_pages > made.lease.sealed_pages
    ingress.says(Release(made.lease.lease_id))
    assert own.heard[1:] == [Withdraw((made.lease.lease_id,))], "its sequences have arrived"
    assert other.heard == []


@pytest.mark.parametrize("returned", [4, 5, 6])
def test_the_later_engine_of_a_group_stays(returned: int) -> None:
    """Started at 5; another connects that started at this time, which may be the same one."""
    routed = Routed("g0")
    ingress = FarEnd(routed)
    before = routed.engines["g0"]
    placed(ingress, "a", 1)
    after = routed.engine("g0", returned)
    left, stays = (after, before) if returned < 5 else (before, after)
    assert left.closed
    assert left.heard == ([] if returned == 5 else [Replaced()])
    assert not stays.closed
    assert stays.heard == []
    assert len(routed.service.router.leases) == (returned < 5), "others were of the former"
    # What is still on its way from the one that left does not count.
    lease = LeaseTerms("late", 1, 1, 1, 1)
    left.peer.received(AccountNews(AccountUpdate(arrived=(lease,)), NO_PAGES))
    left.peer.received(report(running=9))
    left.peer.lost()
    assert "late" not in routed.service.router.leases
    assert routed.service.status().reports == {}
    assert routed.service.status().healthy == {"g0"}
    stays.peer.received(AccountNews(AccountUpdate(arrived=(lease,)), NO_PAGES))
    assert "late" in routed.service.router.leases


@pytest.mark.parametrize("successor_ns", [50, 150])
def test_a_successor_has_the_name_whatever_the_clocks_of_nodes_say(successor_ns: int) -> None:
    routed = Routed()
    former = routed.engine("g0", 100, node="a")
    groups = routed.service.groups
    groups.nodes_leave(frozenset({"a"}))
    successor = routed.engine("g0", successor_ns, node="b")
    assert [(x.name, x.node) for x in groups.all] == [("g0.leaving", "a"), ("g0", "b")]
    # The former one connects again.
    former.peer.lost()
    again = routed.engine("g0", 100, node="a")
    assert {x.name: x.node for x in groups.all} == {"g0.leaving": "a", "g0": "b"}
    assert groups["g0.leaving"].closed and not groups["g0"].closed
    assert successor.heard == former.heard == again.heard == []
    assert not successor.closed and not again.closed


def test_a_group_that_returns_is_listed_with_its_leases() -> None:
    routed = Routed("g0")
    ingress = FarEnd(routed)
    made = placed(ingress, "a", 1)
    routed.engines["g0"].peer.lost()
    assert routed.service.router.leases == {}
    routed.engine("g0", leases=(made.lease,))
    assert [*routed.service.router.leases] == [made.lease.lease_id]


def test_nothing_is_placed_on_an_engine_that_drains() -> None:
    routed = Routed("g0", "g1")
    ingress = FarEnd(routed)
    routed.engines["g0"].says(report(draining=False))
    routed.engines["g1"].says(report(draining=True))
    assert placed(ingress, "a", 1).group == "g0"
    (news,) = ingress.says(Place(2, ask("b")))
    assert isinstance(news, Waiting)


def test_audits_and_their_faults_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    routed = Routed("g0")
    engine = routed.engines["g0"]
    engine.says(report())
    not_audited = Report(EngineReport(make_info(), EngineLoads(running=1)), audited=False)
    engine.says(not_audited)
    found = routed.service.status()
    assert (found.audits_total, found.audit_faults_total) == (1, 0)
    with caplog.at_level(logging.ERROR):
        engine.says(report(pool=PoolLoads(sealed=ArenaLoads(total=9, used=3, free=6))))
    found = routed.service.status()
    assert (found.audits_total, found.audit_faults_total) == (2, 1)
    assert "group g0 and the ledger disagree" in caplog.text


def test_pages_of_the_prefix_cache_attract_requests_until_they_are_dropped() -> None:
    routed = Routed("g0", "g1")
    ingress = FarEnd(routed)
    prompt = tuple(bytes([i]) for i in range(16))
    block = prompt[7]  # runs of eight pages are known by their last one
    routed.engines["g1"].says(AccountNews(NO_NEWS, PageChanges(held=(block,))))
    first = placed(ingress, "a", 1, prompt=256, page_hashes=prompt)
    assert first.group == "g1"
    assert first.cached_tokens == 8 * first.engine.geometry.page_size
    ingress.says(Release(first.lease.lease_id))
    routed.engines["g1"].says(AccountNews(NO_NEWS, PageChanges((), (block, prompt[15]))))
    # Nobody holds anything, and the group that is listed first is as good as the other.
    assert placed(ingress, "b", 2, prompt=256, page_hashes=prompt).group == "g0"


def test_an_engine_that_leaves_may_connect_again_before_its_end_is_known() -> None:
    routed = Routed("g0")
    terms = LeaseTerms("1-1", 1, 1, 2, 2)
    routed.engines["g0"].says(report(draining=True))
    routed.engine("g0", started_ns=6)
    assert routed.service.groups.names == {"g0", "g0.leaving"}
    again = routed.engine("g0", leases=(terms,), draining=True)
    assert routed.service.groups.names == {"g0", "g0.leaving"}
    assert routed.engines["g0"].closed
    routed.engines["g0"].peer.lost()
    assert routed.service.status().router.leases == 1
    again.says(AccountNews(AccountUpdate(ended=(LeaseEnd("1-1"),)), NO_PAGES))
    assert routed.service.status().router.leases == 0
    again.peer.lost()
    assert routed.service.groups.names == {"g0"}


@pytest.mark.parametrize("leaves", ["draining", "not wanted", "node"])
def test_who_waits_does_not_go_to_an_engine_that_connects_again_and_leaves(leaves: str) -> None:
    routed = Routed("g0", "g1")
    ingress = FarEnd(routed)
    routed.engines["g0"].peer.lost()
    placed(ingress, "a", 1)
    ingress.says(Place(2, ask("b")))
    groups = routed.service.groups
    if leaves == "not wanted":
        groups.expect(frozenset({"g1"}))
    elif leaves == "node":
        groups.nodes_leave(frozenset({"old"}))
    back = routed.engine("g0", node="old", draining=leaves == "draining")
    assert groups["g0"].closed and not groups["g1"].closed
    assert (routed.waiting, back.heard) == (1, [])
    routed.engines["g0"] = routed.engine("g0", started_ns=6, node="new")
    assert routed.waiting == (1 if leaves == "not wanted" else 0)


@pytest.mark.parametrize(
    ("own", "reason"), [(True, "deadline_unreachable"), (False, "over_capacity")]
)
def test_a_wait_ends_for_the_reason_that_its_client_hears(own: bool, reason: str) -> None:
    routed, refused = Routed("g0"), list[RoutingError]()
    routed.service.on_refused = refused.append
    ingress = FarEnd(routed)
    placed(ingress, "a", 1)
    ingress.says(Place(2, ask("b", timeout_s=5.0, own_deadline=own)))
    routed.tick(5.0)
    assert to_wire(failure(ingress.heard[-1:])) == to_wire(refused[0])
    assert routed.meters.of(table.REFUSALS, reason) == 1
    (counted,) = count_by_reason(routed.service.status().router.refused_total)
    assert counted == f"ERROR_REASON_{reason.upper()}"


def test_who_waits_for_a_missing_group_that_is_not_wanted_any_more_is_refused() -> None:
    routed = Routed("g0")
    ingress, groups = FarEnd(routed), routed.service.groups
    groups.expect(frozenset({"g0", "g1"}))
    routed.service.router.fleet.missing.add("g1")
    routed.now += RouterConfig().rebuild_timeout_s
    assert not [x for x in ingress.says(Place(1, ask("a", 10_000))) if isinstance(x, CallFailed)]
    assert routed.service.router.fleet.expected == {"g0", "g1"}
    groups.expect(frozenset({"g0"}))
    assert routed.service.router.fleet.expected == {"g0"}
    routed.tick(1.0)
    assert isinstance(ingress.heard[-1], CallFailed)


def test_the_router_knows_what_operators_and_tables_say_of_a_format() -> None:
    configured = Routed("g0", divergence_nats={"int4": 0.25}).service
    assert configured.groups["g0"].info.kv_divergence_nats == 0.25
    assert configured.router.fleet.groups["g0"].info.kv_divergence_nats == 0.25
    routed = Routed("g0")
    routed.engines["g0"].says(report())
    reported = routed.service.status().reports["g0"].info
    assert reported.kv_divergence_nats == DIVERGENCE_NATS["int4"]
