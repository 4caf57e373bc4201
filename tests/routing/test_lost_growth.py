"""Growth that waits for pages when its engine is lost, or its lease ends."""

from __future__ import annotations

from kvmesh.cluster.routing.outcome import Grown, Placement
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.routing.status import router_status
from kvmesh.workers.lease import LeaseTerms
from tests.routing.groups import (
    arrive,
    end,
    foreign,
    info_like,
    make_info,
    place,
    router_with,
    want,
)

INFO = make_info(sealed=40)


def with_waiting_growth() -> tuple[Router, Placement, Placement]:
    """The younger of two leases wants pages that the older one may still need."""
    router = router_with(groups={"g0": INFO}, min_samples=1)
    teacher = place(router, "teacher", 160, 160, 0.0)
    arrive(router, teacher, 0.0)
    end(router, teacher, 1.0, 4)  # so that leases are small, and grow
    older, younger = (place(router, name, 160, 400, 1.0) for name in ("older", "younger"))
    for placement in (older, younger):
        arrive(router, placement, 1.0)
        assert placement.lease.max_sealed_pages > placement.lease.sealed_pages
    assert want(router, younger, 160, 380, 2.0) == [], "it waits"
    return router, older, younger


def grown(outcomes: list[object]) -> list[LeaseTerms]:
    return [x.lease for x in outcomes if isinstance(x, Grown)]


def test_growth_waits_until_the_older_lease_has_ended() -> None:
    router, older, younger = with_waiting_growth()
    (terms,) = grown([*end(router, older, 3.0)])
    assert terms.lease_id == younger.lease.lease_id
    assert terms.sealed_pages > younger.lease.sealed_pages
    assert grown([*router.tick(4.0)]) == []


def test_growth_that_waits_is_forgotten_with_its_engine() -> None:
    router, older, _ = with_waiting_growth()
    assert router.group_down("g0", 3.0) == []
    assert router.tick(4.0) == []
    assert router.group_up("g0", info_like(INFO, "e1"), (), 5.0) == []
    assert end(router, older, 6.0) == [], "of the former engine"
    router.leases.check_integrity()
    assert router_status(router, 6.0).leases == 0


def test_growth_that_waits_is_forgotten_when_its_lease_ends() -> None:
    router, older, younger = with_waiting_growth()
    assert grown([*end(router, younger, 3.0)]) == []
    assert grown([*end(router, older, 4.0)]) == []
    router.leases.check_integrity()


def test_growth_of_a_lease_that_the_engine_brings_back_is_granted_again() -> None:
    router, _, younger = with_waiting_growth()
    router.group_down("g0", 3.0)
    terms = foreign(5, hot=3, sealed=younger.lease.sealed_pages, max_sealed=30)
    router.group_up("g0", INFO, (terms,), 4.0)
    assert router_status(router, 4.0).leases == 1
    assert grown([*router.tick(5.0)]) == [], "it has not asked again"
