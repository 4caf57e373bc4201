from __future__ import annotations

from kvmesh.cluster.routing.config import RouterTuning
from kvmesh.cluster.routing.demand import DemandModel
from kvmesh.cluster.routing.live import LiveRequest
from kvmesh.cluster.routing.output_lengths import OutputLengths
from kvmesh.cluster.routing.prefix_index import PrefixIndex
from kvmesh.cluster.routing.queue import WaitingQueue
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
) -> LiveRequest:
    """A request that came a tenth of a second after the one before."""
    request = ask(name, tenant=tenant, priority=priority)
    rank = (-priority, True, due, arrival)
    return LiveRequest(request, DEMAND, 0.0, arrival / 10, rank, due, deadline)


def names(queue: WaitingQueue, used: dict[str, float], now: float) -> list[str]:
    return [live.request_id for live in queue.in_order(used.__getitem__, now)]


def test_a_queue_orders_by_priority_then_use_then_due_time() -> None:
    queue = WaitingQueue(100, patience_s=50.0)
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
    # at 7.5, r3, r5 and r2 have missed their time and let the others go first
    assert names(queue, used, 7.5) == ["r4", "r1", "r3", "r5", "r0", "r2"]
    # at 50.25, those that have waited for fifty seconds go first, whichever tenant's they are
    assert names(queue, used, 50.25)[:4] == ["r4", "r0", "r1", "r2"]
    for live in all_of_them:
        queue.remove(live)
    assert names(queue, used, 60.0) == []
    assert len(queue) == 0


def test_deadlines_come_up_in_their_order() -> None:
    queue = WaitingQueue(3)
    late, later = waiting("a", 0, deadline=5.0), waiting("b", 1, deadline=4.0)
    for live in (late, later, waiting("c", 2)):
        queue.put(live)
    assert queue.full
    assert queue.overdue(3.9) == []
    assert queue.overdue(5.0) == [later, late]
    queue.remove(later)
    assert queue.overdue(5.0) == [late]
