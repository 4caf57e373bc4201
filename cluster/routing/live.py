"""A request while it is live, and the lease it holds.

place ──► waits ──► lease granted ──► its sequences arrive ──► grows ──► ends
            │              │
            └► gives up    └► never arrives: released after a while
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.workers.lease import LeaseTerms, LeaseWant
from kvmesh.workers.sizes import PageNeed

if TYPE_CHECKING:
    from kvmesh.cluster.routing.demand import RequestDemand

Rank = tuple[int, int, float, int]  # -priority, -past, due, arrival
Age = tuple[int, int]  # epoch of the granting router, its grants before: lower is older


@dataclass(slots=True, eq=False)
class Lease:
    """A reservation of pages on one group, from its grant to its end.

    request_id, tenant, incarnation: of the request that holds it
    need: pages of one rank that it covers, those shared with other leases included
    max: what it may grow to
    blocks: hashes of its prompt's runs of pages, from the first page on, that the group
        stores sealed; equal ones of a group are stored, and count, once
    shared: sealed pages of those blocks that others paid for when it was granted
    request: None if the lease was adopted, when nothing else is known of its request
    arrived: its engine has its sequences
    ends_at: projected; its tenant is charged until then
    want: growth that waits for pages
    """

    lease_id: str
    request_id: str
    tenant: str
    group: str
    age: Age
    need: PageNeed
    max: PageNeed
    sequences: int
    granted_at: float
    incarnation: str = ""
    request: PlaceRequest | None = None
    blocks: tuple[bytes, ...] = ()
    shared: int = 0
    arrived: bool = False
    first_token_at: float | None = None
    ends_at: float = 0.0
    want: LeaseWant | None = None

    @property
    def to_grow(self) -> int:
        """Sealed pages between what it covers and what it may grow to."""
        return self.max.sealed - self.need.sealed

    @property
    def adopted(self) -> bool:
        return self.request is None

    @property
    def terms(self) -> LeaseTerms:
        return LeaseTerms(
            lease_id=self.lease_id,
            epoch=self.age[0],
            hot_pages=self.need.hot,
            sealed_pages=self.need.sealed,
            max_sealed_pages=self.max.sealed,
            shared_sealed_pages=self.shared,
            sequences=self.sequences,
            number=self.age[1],
            request_id=self.request_id,
            tenant=self.tenant,
            incarnation=self.incarnation,
        )


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request that waits: from its arrival until it is refused, or has a lease.

    demand: what was found out about it at `demand_at`
    rank: its place among its tenant's requests; lower goes first
    due: it should have started by then; deadline: it must have, or None
    drain_s: to free its pages on a full group: how much earlier it becomes urgent
    start_at: when it could start if it were first in line, by the latest forecast, or None
    """

    request: PlaceRequest
    demand: RequestDemand
    demand_at: float
    since: float
    rank: Rank
    due: float
    deadline: float | None
    drain_s: float
    start_at: float | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def incarnation(self) -> str:
        return self.request.incarnation
