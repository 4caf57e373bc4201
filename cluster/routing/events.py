"""The ledger's transitions. Applied in order to an empty ledger, they make its state.

`at` is the router's clock when the transition happened, in seconds.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvmesh.cluster.routing.group import GroupSpec
from kvmesh.workers.request import LeaseTerms
from kvmesh.workers.sizes import PageNeed


class ReleaseReason(enum.Enum):
    ENDED = "its holder gave it back"
    EXPIRED = "its holder never handed it to the engine"
    VANISHED = "its engine no longer runs it"
    VOIDED = "its group is down"


@dataclass(frozen=True, slots=True)
class Lease:
    """A reservation of pages on one group.

    epoch, number: of the router that granted it; of its grants before
    need: pages of one rank, those shared with other leases of the group included
    most: what it may grow to
    blocks: hashes of its prompt's runs of `block_pages` pages, from the first page on;
        equal ones of a group are stored, and count, once
    shared: sealed pages of those blocks that others paid for when it was granted
    expires_at: until then it is to be handed to the engine, or when that was known to have
        been done; without meaning once confirmed
    confirmed: an engine's report has listed it
    """

    lease_id: str
    request_id: str
    tenant: str
    group: str
    epoch: int
    need: PageNeed
    most: PageNeed
    sequences: int
    granted_at: float
    expires_at: float
    confirmed: bool = False
    blocks: tuple[bytes, ...] = ()
    block_pages: int = 0
    shared: int = 0
    number: int = 0

    @property
    def to_grow(self) -> int:
        """Sealed pages between what it holds and the most it may hold."""
        return self.most.sealed - self.need.sealed

    @property
    def terms(self) -> LeaseTerms:
        return LeaseTerms(
            lease_id=self.lease_id,
            epoch=self.epoch,
            hot_pages=self.need.hot,
            sealed_pages=self.need.sealed,
            most_sealed_pages=self.most.sealed,
            shared_sealed_pages=self.shared,
            sequences=self.sequences,
            number=self.number,
        )


@dataclass(frozen=True, slots=True)
class GroupUp:
    spec: GroupSpec
    at: float


@dataclass(frozen=True, slots=True)
class GroupDown:
    """Its leases were voided before."""

    group: str
    at: float


@dataclass(frozen=True, slots=True)
class GroupReported:
    """The engine's report listed `lease_ids`: they are confirmed."""

    group: str
    lease_ids: tuple[str, ...]
    at: float


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    lease: Lease
    at: float


@dataclass(frozen=True, slots=True)
class LeaseAdopted:
    """An engine runs under a lease the ledger did not know; its pages are in use, so they count."""

    lease: Lease
    at: float


@dataclass(frozen=True, slots=True)
class LeaseRestated:
    """An adopted lease is larger than its engine's reports had said so far."""

    lease: Lease
    at: float


@dataclass(frozen=True, slots=True)
class LeaseResized:
    lease_id: str
    need: PageNeed
    at: float


@dataclass(frozen=True, slots=True)
class LeaseHanded:
    """Its engine has it, as others than the engine's report say."""

    lease_id: str
    at: float


@dataclass(frozen=True, slots=True)
class LeaseHandedOver:
    """The lease goes on at another group, unconfirmed there as yet."""

    lease_id: str
    group: str
    need: PageNeed
    expires_at: float
    at: float


@dataclass(frozen=True, slots=True)
class LeaseReleased:
    lease_id: str
    reason: ReleaseReason
    at: float


Event = (
    GroupUp
    | GroupDown
    | GroupReported
    | LeaseGranted
    | LeaseAdopted
    | LeaseRestated
    | LeaseResized
    | LeaseHanded
    | LeaseHandedOver
    | LeaseReleased
)
