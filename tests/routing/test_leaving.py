"""A group that drains: its leases end under another name, and it is forgotten afterwards."""

from __future__ import annotations

from kvmesh.cluster.routing.outcome import Enqueued, Granted
from kvmesh.cluster.routing.request import Past
from kvmesh.cluster.routing.status import router_status
from kvmesh.cluster.routing.verdict import Reason
from kvmesh.workers.lease import AccountUpdate, LeaseEnd
from tests.routing.groups import ask, granted, make_info, router_with


def test_leases_of_a_group_that_retires_end_next_to_its_successors() -> None:
    router = router_with(groups={"g0": make_info()})
    old = granted(router.place(ask("old"), 0.0))
    router.account("g0", AccountUpdate(arrived=(old.lease,)), 0.1)
    router.fleet.drain("g0")
    (waits,) = router.place(ask("waits"), 1.0)
    assert isinstance(waits, Enqueued)
    assert [verdict.reason for verdict in waits.verdicts] == [Reason.DRAINING]

    router.fleet.retire("g0", "g0.leaving")
    (start,) = router.group_up("g0", make_info(epoch="e1"), (), 2.0)
    assert isinstance(start, Granted)
    assert (start.placement.group, start.placement.engine_epoch) == ("g0", "e1")
    assert router.leases[old.lease.lease_id].group == "g0.leaving"
    used = {group.group: group.sequences for group in router_status(router, 2.0).groups}
    assert used == {"g0": 1, "g0.leaving": 1}
    router.leases.check_integrity()

    # What its engine says of it is noted under that name, and ends exactly that lease.
    router.account("g0.leaving", AccountUpdate(ended=(LeaseEnd(old.lease.lease_id, 5),)), 3.0)
    assert {*router.leases} == {start.placement.lease.lease_id}
    assert router.group_leaves("g0.leaving", 4.0) == []
    assert [group.group for group in router_status(router, 4.0).groups] == ["g0"]
    router.leases.check_integrity()


def test_what_a_group_still_has_when_it_leaves_is_void() -> None:
    router = router_with(groups={"g0": make_info(), "g1": make_info(epoch="e1")})
    first = granted(router.place(ask("a"), 0.0))
    router.group_leaves(first.group, 1.0)
    assert router.leases == {}
    (left,) = router_status(router, 1.0).groups
    assert left.group != first.group
    # Its request comes again, and finds the other group.
    again = granted(router.place(ask("a", past=Past.RAN), 2.0))
    assert again.group == left.group


def test_a_retired_group_is_no_place_for_prefixes() -> None:
    router = router_with(groups={"g0": make_info()})
    router.fleet.pages_changed("g0", [b"page"], [])
    assert router.fleet.index.match([b"page"]) == {"g0": 1}
    router.fleet.drain("g0")
    router.fleet.retire("g0", "g0.leaving")
    router.group_up("g0", make_info(epoch="e1"), (), 1.0)
    assert router.fleet.index.match([b"page"]) == {}
