"""Where a router stands, for those who ask."""

from __future__ import annotations

from kvmesh.cluster.routing.outcome import RouterStatus, TenantStatus
from kvmesh.cluster.routing.router import Router


def router_status(router: Router, now: float) -> RouterStatus:
    """The budget as it stands."""
    records, queue = router.records, router.admission.queue
    return RouterStatus(
        epoch=router.leases.epoch,
        ready=router.admission.ready(now),
        queue_depth=len(queue),
        queue_limit=queue.limit,
        live_requests=records.num_live,
        leases=len(router.leases),
        groups=tuple(group.status() for group in router.fleet.groups.values()),
        granted_total=records.granted,
        released_total=records.released,
        expired_total=records.expired,
        refused_total=dict(records.refused),
    )


def tenant_status(router: Router, tenant: str) -> TenantStatus:
    """What a tenant uses of it."""
    tenants, queued = router.fleet.tenants, router.admission.queue.count_of(tenant)
    return TenantStatus(
        queued=queued,
        running=tenants.live(tenant) - queued,
        leased_bytes=tenants.leased_bytes(tenant),
        quota_bytes=tenants.policy(tenant).quota_bytes,
    )
