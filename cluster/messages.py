"""The messages between the processes of the control plane; cluster/link.py carries them.

    ingress ── Place, Release, Finished, Abort, … ──► router   Waiting, Placed, CallFailed, …  back
    ingress ── Submit, End ──► engine                          Deltas, Rejected            back
    engine ── Hello, AccountNews, Report ──► router                Extend, Withdraw, … back

`call` numbers an ingress's calls to the router; an answer carries the same number.
"""

from __future__ import annotations

import msgspec

from kvmesh.cluster.errors import Failure
from kvmesh.cluster.link import Address
from kvmesh.cluster.reports import ClusterStatus, EngineReport
from kvmesh.cluster.routing.outcome import BudgetEstimate, Explained, TenantStatus
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.workers.constraint import OutputConstraint
from kvmesh.workers.lease import AccountUpdate, LeaseTerms, PageChanges
from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.request import EndReason, PinTerms, SequenceDelta
from kvmesh.workers.sampling_params import SamplingParams


class _Message(msgspec.Struct, tag=True):
    """One message; the class name is its tag."""


# Ingress to router


class Place(_Message):
    """Wait for a lease on a group; answered by Placed or CallFailed, after any Waiting."""

    call: int
    request: PlaceRequest


class Cancel(_Message):
    """The caller no longer waits for the placement."""

    call: int


class Release(_Message):
    """No sequence will be submitted under this lease."""

    lease_id: str


class Finished(_Message):
    """The request under this lease has ended, so its id is free. The engine ends the lease."""

    lease_id: str


class Abort(_Message):
    """End a request, whether it waits or runs; answered by Aborted."""

    call: int
    request_id: str


class AskEstimate(_Message):
    call: int
    request: PlaceRequest


class AskExplanation(_Message):
    call: int
    request_id: str


class AskTenant(_Message):
    """Answered by TenantUse."""

    call: int
    tenant: str


class Drain(_Message):
    """Take no new requests."""


class AskStatus(_Message):
    """fresh: ask every engine first"""

    call: int
    fresh: bool


# Router to ingress


class Waiting(_Message):
    """A placement has to wait, or its prospects have changed; its answer follows later.

    position: requests ahead of it
    start_s: from now until its projected start, or None where it is not known
    """

    call: int
    position: int
    start_s: float | None


class Placed(_Message):
    """A lease on a group, and where its engine listens.

    cached_tokens: of the prompt, that the group is thought to hold
    """

    call: int
    group: str
    engine: EngineInfo
    address: Address
    lease: LeaseTerms
    lease_bytes: int
    queue_s: float
    cached_tokens: int = 0


class Aborted(_Message):
    """found: whether there was such a request"""

    call: int
    found: bool


class Estimated(_Message):
    call: int
    estimate: BudgetEstimate


class Decisions(_Message):
    """decisions: oldest first; empty for a request that is unknown or forgotten"""

    call: int
    decisions: tuple[Explained, ...]


class TenantUse(_Message):
    call: int
    status: TenantStatus


class Status(_Message):
    call: int
    status: ClusterStatus


class CallFailed(_Message):
    call: int
    failure: Failure


# Ingress to engine


class NewSequence(msgspec.Struct, frozen=True):
    """One choice of a request.

    output: int32 token ids that the client already has, little-endian
    scored: how many tokens of the prompt the client has log-probabilities of
    """

    request_id: str
    params: SamplingParams
    output: bytes = b""
    scored: int = 0


class Submit(_Message):
    """All sequences of a lease; answered by Deltas until each has ended, or by Rejected.

    prompt: int32 token ids, little-endian
    suspicion: how many engines have failed, perhaps because of the request
    constraint: of every sequence's output
    pin: of the prompt
    """

    lease: LeaseTerms
    prompt: bytes
    sequences: tuple[NewSequence, ...]
    timeout_s: float | None = None
    cache_salt: str = ""
    suspicion: int = 0
    constraint: OutputConstraint | None = None
    pin: PinTerms | None = None


class End(_Message):
    """End sequences; their last deltas follow."""

    request_ids: list[str]
    reason: EndReason


# Engine to ingress


class Deltas(_Message):
    """The output of a step."""

    deltas: list[SequenceDelta]


class Rejected(_Message):
    """The engine did not accept the sequences of a lease."""

    lease_id: str
    failure: Failure


# Engine to router


class Hello(_Message):
    """The first message of an engine: its facts, its address, and the leases it holds.

    started_ns: wall clock; of two engines of a group that both stay, the later one has
        replaced the other
    node: of the Ray cluster, that it runs on
    draining: the engine accepts nothing new
    """

    group: str
    started_ns: int
    node: str
    draining: bool
    info: EngineInfo
    address: Address
    leases: tuple[LeaseTerms, ...]
    update: AccountUpdate
    pages: PageChanges


class AccountNews(_Message):
    """What has changed."""

    update: AccountUpdate
    pages: PageChanges


class Report(_Message):
    """audited: loads and leases are of the same moment, so they can be compared"""

    report: EngineReport
    audited: bool


# Router to engine


class Extend(_Message):
    leases: tuple[LeaseTerms, ...]


class Withdraw(_Message):
    """End the sequences of these leases, and reject them if they arrive later."""

    lease_ids: tuple[str, ...]


class AskReport(_Message):
    """Send a Report now."""


class Replaced(_Message):
    """A later engine is the group's, so this one must exit."""


FROM_INGRESS = (
    Place
    | Cancel
    | Release
    | Finished
    | Abort
    | AskEstimate
    | AskExplanation
    | AskTenant
    | AskStatus
    | Drain
)
FROM_ENGINE = Hello | AccountNews | Report
TO_ROUTER = FROM_INGRESS | FROM_ENGINE
TO_INGRESS_FROM_ROUTER = (
    Waiting | Placed | Aborted | Estimated | Decisions | TenantUse | Status | CallFailed
)
TO_ENGINE_FROM_ROUTER = Extend | Withdraw | AskReport | Replaced
TO_ENGINE_FROM_INGRESS = Submit | End
TO_INGRESS_FROM_ENGINE = Deltas | Rejected
