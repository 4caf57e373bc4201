"""Whether an engine's own account and the ledger agree, once a report has been reconciled."""

from __future__ import annotations

from collections.abc import Mapping

from kvmesh.cluster.routing.events import Lease
from kvmesh.workers.request import EngineLoads
from kvmesh.workers.sizes import PageNeed


def audit(loads: EngineLoads, leases: Mapping[str, Lease]) -> tuple[str, ...]:
    """What must not be, in words; nothing if all is well.

    loads: one moment of the engine's, so its parts can be compared with each other
    leases: all that the ledger knows; those released since the report was written are not there
    """
    faults: list[str] = []
    hot = sealed = 0
    for terms in loads.leases:
        hot, sealed = hot + terms.hot_pages, sealed + terms.sealed_pages
        lease = leases.get(terms.lease_id)
        if lease is not None and not PageNeed(terms.hot_pages, terms.sealed_pages).fits(lease.need):
            faults.append(f"lease {terms.lease_id} is {lease.need} here and {terms} there")
    pool = loads.pool
    if pool.hot_used > hot or pool.sealed_used > sealed:
        faults.append(
            f"sequences hold {pool.hot_used} hot and {pool.sealed_used} sealed pages, "
            f"their leases cover {hot} and {sealed}"
        )
    return tuple(faults)
