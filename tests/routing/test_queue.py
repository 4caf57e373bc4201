from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from kvmesh.cluster.routing.config import RouterTuning
from kvmesh.cluster.routing.demand import DemandModel
from kvmesh.cluster.routing.live import LiveRequest
from kvmesh.cluster.routing.output_lengths import OutputLengths
from kvmesh.cluster.routing.prefix_index import PrefixIndex
from kvmesh.cluster.routing.queue import MIN_DEPARTURES, WaitingQueue, _Line
from tests.routing.groups import ask

DEMAND = DemandModel(OutputLengths(), PrefixIndex(), RouterTuning()).demand(ask("any"), [])


def waiting(
    name: str,
    arrival: int,
    *,
    due: float = 9.0,
    tenant: str = "x",
    priority: int = 0,
    deadline: float | None = None,
    since: float | None = None,
    drain_s: float = 0.0,
    resumed: bool = False,
) -> LiveRequest:
    """A request that came a tenth of a second after the one before, if it is not said when."""
    since = arrival / 10 if since is None else since
    request = ask(name, tenant=tenant, priority=priority)
    rank = (-priority, not resumed, due, arrival)
    return LiveRequest(request, DEMAND, 0.0, since, rank, due, deadline, drain_s)


def names(queue: WaitingQueue, used: dict[str, float], now: float) -> list[str]:
    return [live.request_id for live in queue.in_order(used.__getitem__, now)]


def test_a_queue_orders_by_priority_then_use_then_due_time() -> None:
    queue = WaitingQueue(100)
    used = {"x": 5.0, "y": 1.0}
    all_of_them = [
        waiting(f"r{index}", index, tenant=tenant, priority=priority, due=due)
        for index, (tenant, priority, due) in enumerate(
            [
                ("x", 0, 9.0),
                ("y", 0, 8.0),
                ("x", 0, 7.0),
                ("y", 0, 3.0),
                ("x", 1, 9.0),
                ("y", 0, 7.0),
            ]
        )
    ]
    for live in all_of_them:
        queue.put(live)
    assert names(queue, used, 1.0) == ["r4", "r3", "r5", "r1", "r2", "r0"]
    for live in all_of_them:
        queue.remove(live, 1.0)
    assert names(queue, used, 60.0) == []
    assert len(queue) == 0


def test_nobody_asks_about_a_tenant_whose_last_request_has_left() -> None:
    queue = WaitingQueue(100)
    gone, left = waiting("r0", 0, tenant="gone"), waiting("r1", 1, tenant="left")
    queue.put(gone)
    queue.put(left)
    queue.remove(gone, 1.0)
    assert names(queue, {"left": 0.0}, 1.0) == ["r1"]


@pytest.mark.parametrize("before", [{"priority": 1}, {"resumed": True}])
def test_late_requests_let_those_of_their_own_rank_pass(before: Any) -> None:
    """Whatever waits with a higher one."""
    queue = WaitingQueue(100)
    former = waiting("former", 0, since=-30.0)
    queue.put(former)
    queue.remove(former, 0.0)  # so late ones wait for as long before they are urgent
    queue.put(waiting("higher", 1, due=90.0, **before))
    queue.put(waiting("late", 2, due=2.0))
    queue.put(waiting("timely", 3, due=80.0))
    queue.put(waiting("other", 4, due=70.0, tenant="y"))
    used = {"x": 0.0, "y": 0.0}
    assert names(queue, used, 2.0) == ["higher", "late", "other", "timely"], "it is due now"
    assert names(queue, used, 3.0) == ["higher", "other", "timely", "late"]


def test_a_class_of_priority_is_urgent_whatever_waits_in_others() -> None:
    queue = WaitingQueue(100)
    former = waiting("former", 0, since=-30.0)
    queue.put(former)
    queue.remove(former, 0.0)
    queue.put(waiting("high", 1, priority=1, since=10.0, due=11.0))
    queue.put(waiting("low", 2, since=0.0, due=1.0))
    queue.put(waiting("timely", 3, priority=1, since=50.0, due=99.0))
    assert names(queue, {"x": 0.0}, 60.0) == ["high", "timely", "low"]


class Steady:
    """A queue that one request joins and one leaves every second; each waits for 30 s."""

    def __init__(self) -> None:
        self.queue = WaitingQueue(1000)
        self._number = 0
        self._waiting: deque[LiveRequest] = deque()
        self.until(200)

    def until(self, now: int) -> None:
        for second in range(self._number, now + 1):
            self._waiting.append(waiting(f"r{second}", second, since=float(second), due=1e9))
            self.queue.put(self._waiting[-1])
            if second >= 30:
                self.queue.remove(self._waiting.popleft(), float(second))
        self._number = now + 1

    def late(self, *names: str, drain_s: float = 0.0) -> None:
        """Requests that came at 200 s and were due a second later."""
        for index, name in enumerate(names):
            number = 10_000 + index
            self.queue.put(waiting(name, number, since=200.0, due=201.0, drain_s=drain_s))

    def first(self, now: float) -> str:
        return next(self.queue.in_order({"x": 0.0}.__getitem__, now)).request_id

    def last(self, now: float) -> str:
        return list(self.queue.in_order({"x": 0.0}.__getitem__, now))[-1].request_id


def test_a_late_request_lets_others_pass_until_it_has_waited_as_long_as_in_order() -> None:
    steady = Steady()
    steady.late("late")
    assert steady.first(200.5) == "late", "it is due first"
    steady.until(230)
    assert steady.last(230.0) == "late"
    steady.until(231)
    assert steady.first(231.0) == "late"


def test_late_requests_are_urgent_in_time_for_the_last_of_them() -> None:
    steady = Steady()
    steady.late("late0", "late1", "late2", "late3", "late4")
    steady.until(223)
    assert steady.last(223.0) == "late4"
    # With 35 in line the wait in order is 35 s, and the fifth starts 5 s after the first.
    steady.until(231)
    assert steady.first(231.0) == "late0"


def test_a_request_that_a_full_group_has_to_make_room_for_is_urgent_earlier() -> None:
    steady = Steady()
    steady.late("late", drain_s=10.0)
    steady.until(215)
    assert steady.last(215.0) == "late"
    steady.until(222)
    assert steady.first(222.0) == "late"


def test_late_requests_go_first_while_nothing_is_known_of_waits() -> None:
    queue = WaitingQueue(10)
    for number, due in enumerate((0.5, 50.0)):
        queue.put(waiting(f"r{number}", number, due=due))
    assert names(queue, {"x": 0.0}, 0.9) == ["r0", "r1"]


def test_late_requests_go_first_while_others_need_not_wait() -> None:
    queue = WaitingQueue(10)
    queue.note_passed()
    for number, due in enumerate((0.5, 50.0)):
        queue.put(waiting(f"r{number}", number, due=due))
    assert names(queue, {"x": 0.0}, 0.9) == ["r0", "r1"]


def test_a_queue_has_no_negative_limit() -> None:
    with pytest.raises(ValueError, match="limit must be at least 0, got -1"):
        WaitingQueue(-1)


def test_deadlines_come_up_in_their_order() -> None:
    queue = WaitingQueue(3)
    late, later = waiting("a", 0, deadline=5.0), waiting("b", 1, deadline=4.0)
    for live in (late, later, waiting("c", 2)):
        queue.put(live)
    assert queue.full
    assert queue.overdue(3.9) == []
    assert queue.overdue(5.0) == [later, late]
    queue.remove(later, 5.0)
    assert queue.overdue(5.0) == [late]


def test_a_request_that_is_retracted_takes_its_own_arrival_with_it() -> None:
    line = _Line()
    first, refused = waiting("a", 0, since=10.0), waiting("b", 1, since=17.0)
    line.put(first)
    line.put(refused)
    line.retract(refused)
    assert line.remove(first, 20.0) == 10.0


def test_a_line_leaves_at_the_rate_since_its_first_arrival() -> None:
    line = _Line()
    for round_start in (10.0, 1000.0):
        lives = [waiting(f"r{n}", n, since=round_start + n / 8) for n in range(MIN_DEPARTURES + 1)]
        for live in lives:
            line.put(live)
        for number, live in enumerate(lives[:MIN_DEPARTURES], 1):
            assert line._rate(round_start + 2.0 * number) == float("inf"), "too few have left"
            waited_s = 2.0 * number - (number - 1) / 8
            assert line.remove(live, round_start + 2.0 * number) == waited_s
        now = round_start + 2.0 * MIN_DEPARTURES
        assert line._rate(now) == 0.5
        assert line._rate(round_start + 0.5) == 8.0
        assert line._rate(now + 2.0 * MIN_DEPARTURES) == 0.25
        line.remove(lives[-1], now)
        assert len(line) == 0, "and the next to come starts again"
