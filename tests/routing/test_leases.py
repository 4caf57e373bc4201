"""What follows from a lease's grant, growth and end: its time, its bytes, what is learned."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmesh.cluster.routing.errors import LedgerError
from kvmesh.cluster.routing.fairness import TenantPolicy
from kvmesh.cluster.routing.live import Lease
from kvmesh.cluster.routing.outcome import Enqueued, Placement
from kvmesh.cluster.routing.router import Router
from kvmesh.workers.lease import LeaseWant
from tests.routing.groups import (
    SLOW,
    ask,
    emit,
    end,
    foreign,
    granted,
    make_info,
    place,
    router_with,
)

GEOMETRY = replace(make_info().geometry, state_bytes=5000)
INFO = replace(make_info(sealed=1000), geometry=GEOMETRY)
PAGES = tuple(b"%d" % page for page in range(100))


def router_that_expects(output_tokens: int | None = None) -> Router:
    """Of every prompt of about 160 tokens."""
    router = router_with(groups={"g0": INFO}, pace=SLOW, min_samples=1, ahead_s=1e9)
    if output_tokens is not None:
        router.fleet.lengths.learn("default", 160, output_tokens)
    return router


def lease_of(router: Router, placement: Placement) -> Lease:
    return router.leases[placement.lease.lease_id]


def grow(router: Router, lease: Lease, output: int, now: float) -> None:
    router.leases.want(lease, LeaseWant(lease.lease_id, 160, 160 + output))
    (grown,) = router.leases.grow_wanting(now)
    assert grown.lease == lease.terms and lease.want is None


def test_a_grant_charges_all_sequences_and_what_is_not_cached() -> None:
    router = router_that_expects()
    first = place(router, "a", 1600, 16, 0.0, page_hashes=PAGES)
    end(router, first, 5.0)
    made = place(router, "b", 1600, 16, 10.0, page_hashes=PAGES, sequences=2)
    lease, backlog = lease_of(router, made), router.fleet.groups["g0"].backlog
    assert made.lease_bytes == GEOMETRY.bytes_of(lease.need, 2)
    assert made.cached_tokens == 1536
    assert backlog.seconds(10.0) == pytest.approx(SLOW.prefill_s(1600 - 1536, 1536))
    router.leases.check_integrity()


def test_an_adopted_lease_is_expected_to_last_as_long_as_others() -> None:
    router = router_that_expects()
    end(router, place(router, "a", 160, 16, 5.0), 12.0)
    assert router.leases.mean_s == pytest.approx(1.0 + 0.05 * (7.0 - 1.0))
    router.leases.adopt("g0", foreign(1, 4, 9), 20.0)
    assert router.leases["3-1"].ends_at == 20.0 + router.leases.mean_s


def test_a_tenant_is_charged_for_the_time_that_it_had_the_lease() -> None:
    router = router_that_expects()
    made = place(router, "a", 160, 160, 5.0, tenant="x")
    ends_at, use = lease_of(router, made).ends_at, router.fleet.tenants.counter
    assert use("x") == pytest.approx(made.lease_bytes * (ends_at - 5.0))
    end(router, made, 12.0)
    assert use("x") == pytest.approx(made.lease_bytes * 7.0)


def test_a_tenant_is_charged_for_what_a_lease_grows_from_then_on() -> None:
    router = router_that_expects(output_tokens=16)
    made = place(router, "a", 160, 160, 5.0, tenant="x", sequences=2)
    lease, tenants = lease_of(router, made), router.fleet.tenants
    grow(router, lease, 40, 8.0)
    grown_bytes = GEOMETRY.bytes_of(lease.need, 2)
    assert tenants.leased_bytes("x") == grown_bytes > made.lease_bytes
    expected = made.lease_bytes * 3.0 + grown_bytes * (lease.ends_at - 8.0)
    assert tenants.counter("x") == pytest.approx(expected)
    router.leases.check_integrity()
    end(router, made, 12.0)
    assert tenants.leased_bytes("x") == 0
    assert tenants.counter("x") == pytest.approx(made.lease_bytes * 3.0 + grown_bytes * 4.0)


def test_a_lease_may_grow_past_its_tenants_quota_and_others_of_it_wait() -> None:
    router = router_that_expects(output_tokens=16)
    lease_bytes = place(router, "size", 160, 160, 0.0).lease_bytes
    policies = {"x": TenantPolicy(quota_bytes=2 * lease_bytes)}
    router = router_with(
        groups={"g0": INFO}, pace=SLOW, min_samples=1, ahead_s=1e9, tenants=policies
    )
    router.fleet.lengths.learn("default", 160, 16)
    made = place(router, "a", 160, 160, 0.0, tenant="x")
    grow(router, lease_of(router, made), 150, 1.0)
    assert isinstance(router.place(ask("b", tenant="x"), 1.0)[0], Enqueued)
    assert granted(end(router, made, 2.0)).request_id == "b"
    router.leases.check_integrity()


def test_lengths_are_learned_by_tenant_and_a_pace_from_the_first_gap_on() -> None:
    router = router_that_expects()
    group = router.fleet.groups["g0"]
    for tenant, output_tokens in (("x", 2), ("y", 200), ("y", 200)):
        made = place(router, tenant, 160, 320, 0.0, tenant=tenant)
        if tenant == "x":
            emit(router, made, 1.0)
        end(router, made, 2.0, output_tokens)
    lengths = router.fleet.lengths
    assert (lengths.median("x", 160), lengths.median("y", 160)) == (2, 200)
    step_s = SLOW.decode_step_s
    assert group.decode_step_s == pytest.approx(step_s + 0.05 * (1.0 - step_s))


def test_leases_that_wait_to_grow_do_so_in_the_order_of_their_age() -> None:
    router = router_that_expects(4)
    leases = [lease_of(router, place(router, f"r{n}", 160, 400, 0.0)) for n in range(8)]
    for lease in reversed(leases):
        router.leases.want(lease, LeaseWant(lease.lease_id, 160, 260))
    grown = router.leases.grow_wanting(1.0)
    assert [x.lease.number for x in grown] == [*range(8)]
    assert router.leases.grow_wanting(2.0) == []


@pytest.mark.parametrize("sequences", [1, 2])
def test_growth_covers_half_as_much_output_again_and_moves_the_end(sequences: int) -> None:
    router = router_that_expects(4)
    made = place(router, "r", 160, 400, 0.0, sequences=sequences)
    lease, step_s = lease_of(router, made), router.fleet.groups["g0"].decode_step_s
    grow(router, lease, 100, 30.0)
    assert lease.need.sealed == GEOMETRY.sealed_need(160 + 150) * sequences
    assert lease.ends_at == pytest.approx(30.0 + 50 * step_s)
    last = GEOMETRY.tokens_within(lease.max.sealed // sequences)
    grow(router, lease, last - 160, 60.0)
    assert lease.need.sealed == lease.max.sealed
    assert lease.ends_at == 60.0, "it wants all that it may have"


def test_a_lease_that_is_in_one_place_alone_is_found() -> None:
    router = router_that_expects()
    made = place(router, "a", 160, 16, 0.0)
    del router.leases._by_id[made.lease.lease_id]
    with pytest.raises(LedgerError, match=f"{made.lease.lease_id}.* are not in both places"):
        router.leases.check_integrity()
