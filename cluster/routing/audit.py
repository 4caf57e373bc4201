"""Compares an engine's report with the ledger."""

from __future__ import annotations

from kvmesh.cluster.routing.ledger import Account
from kvmesh.cluster.routing.live import Lease
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.loads import EngineLoads
from kvmesh.workers.sizes import PageNeed


def audit(account: Account, loads: EngineLoads) -> tuple[str, ...]:
    """Where a group's engine and its account disagree, in words; nothing if they agree.

    The words name the group, leases, their requests, and pages here and there.

    loads: one moment of the engine's, sent after all updates of its account before it.
        An extension may be on its way there: terms are never larger there than here.
    """
    faults: list[str] = []
    group, covered, there = account.group, PageNeed(0, 0), dict[str, str]()
    here = {lease.lease_id: lease for lease in account.by_age()}
    for terms in loads.leases:
        need = PageNeed(terms.hot_pages, terms.sealed_pages)
        covered += need
        lease = here.get(terms.lease_id)
        there[terms.lease_id] = f"{_named(terms)} {need}"
        if lease is None:
            faults.append(f"{group} has {there[terms.lease_id]}, and it is not in the ledger")
        elif not _within(terms, lease):
            faults.append(f"{_named(lease)} is {lease.terms} in the ledger and {terms} in {group}")
    for lease in here.values():
        if lease.arrived and lease.lease_id not in there:
            faults.append(
                f"{_named(lease)} has arrived with {lease.need}, and {group} does not have it"
            )
    if not loads.pool.used.fits(covered):
        faults.append(
            f"sequences in {group} hold {loads.pool.used}, their leases cover {covered}: "
            + ", ".join(there.values())
        )
    return tuple(faults)


def _named(lease: Lease | LeaseTerms) -> str:
    return f"lease {lease.lease_id} of request {lease.request_id}"


def _within(terms: LeaseTerms, lease: Lease) -> bool:
    return (
        (terms.epoch, terms.number) == lease.age
        and PageNeed(terms.hot_pages, terms.sealed_pages).fits(lease.need)
        and terms.max_sealed_pages <= lease.max.sealed
        and terms.sequences <= lease.sequences
    )
