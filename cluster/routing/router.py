"""The router's core: synchronous, deterministic, told the time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.demand import worst_case
from kvmesh.cluster.routing.errors import (
    DeadlineUnreachableError,
    DuplicateRequestError,
    NeverFitsError,
    NoGroupError,
    OverCapacityError,
    QueueFullError,
    RoutingError,
)
from kvmesh.cluster.routing.events import Event, Lease
from kvmesh.cluster.routing.group import GroupSpec
from kvmesh.cluster.routing.ledger import Ledger, Reconciliation
from kvmesh.cluster.routing.placement import Asked, Candidate, Choice, GroupView, choose
from kvmesh.cluster.routing.queue import WaitingQueue
from kvmesh.cluster.routing.request import (
    Decision,
    Estimate,
    Granted,
    Outcome,
    Placement,
    PlaceRequest,
    Queued,
    Refused,
)
from kvmesh.cluster.routing.verdict import Verdict
from kvmesh.workers.request import EngineLoads
from kvmesh.workers.sizes import PageNeed

SMOOTHING = 0.1  # weight of the newest lease in the mean duration


@dataclass(frozen=True, slots=True)
class Changes:
    """What a call set in motion, besides its own answer.

    outcomes: waiting requests that were granted or refused by it
    voided: leases whose group is gone; their requests must be placed again
    """

    outcomes: tuple[Outcome, ...] = ()
    voided: tuple[Lease, ...] = ()


class Router:
    """Admits requests to groups so that leases never exceed what a group holds.

    epoch: greater than any former router's, e.g. the time of its start
    expected_groups: those that may hold leases of a former router; until they
        have reported, or `rebuild_timeout_s` is over, every request waits
    """

    def __init__(
        self,
        config: RouterConfig,
        epoch: int,
        now: float,
        *,
        expected_groups: Collection[str] = (),
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.config = config
        self.ledger = Ledger(
            epoch, ttl_s=config.lease_ttl_s, grace_s=config.grace_s, on_event=on_event
        )
        self._queue = WaitingQueue(config.queue_limit)
        self._specs: dict[str, GroupSpec] = {}
        self._unheard = set(expected_groups)
        self._rebuild_until = now + config.rebuild_timeout_s
        self._mean_lease_s = 1.0

    # Requests

    def submit(self, request: PlaceRequest, now: float) -> Decision:
        """Place the request, queue it, or refuse it with the reason.

        Raises DuplicateRequestError if the id already waits.
        """
        if request.request_id in self._queue:
            raise DuplicateRequestError(request.request_id)
        choice = self._choose(request)
        if self._ready(now):
            if not self._specs:
                return Refused(request.request_id, self._no_group())
            if choice.never:
                return Refused(request.request_id, _never_fits(choice), choice.verdicts)
            if choice.group is not None and not len(self._queue):
                return self._grant(request, choice, now, now)
        if self._queue.full:
            return Refused(request.request_id, self._queue_full(choice, now), choice.verdicts)
        self._queue.put(request, now)
        position = self._queue.position(request.request_id)
        return Queued(request.request_id, position, self._projected_start_s(), choice.verdicts)

    def cancel(self, request_id: str, now: float) -> Changes:
        """Take a waiting request out of the queue, if it is there."""
        self._queue.cancel(request_id)
        return Changes(self._admit(now))

    def release(self, lease_id: str, now: float) -> Changes:
        """End a lease; a second time changes nothing."""
        lease = self.ledger.release(lease_id, now)
        if lease is None:
            return Changes()
        self._learn_duration(lease, now)
        return Changes(self._admit(now))

    def estimate(self, request: PlaceRequest, now: float) -> Estimate:
        """What would become of the request, without submitting it."""
        choice = self._choose(request)
        fits_now = choice.group is not None and not len(self._queue) and self._ready(now)
        fits_ever = not choice.never
        return Estimate(
            request_id=request.request_id,
            fits_ever=fits_ever,
            fits_now=fits_now,
            group=choice.group if fits_now else None,
            needed_bytes={verdict.group: verdict.needed_bytes for verdict in choice.verdicts},
            projected_start_s=0.0 if fits_now else self._projected_start_s() if fits_ever else None,
            queue_depth=len(self._queue),
            verdicts=choice.verdicts,
        )

    # Groups

    def group_up(self, spec: GroupSpec, now: float) -> Changes:
        """A group's engine is there. It takes requests from its first report on."""
        self._specs[spec.group] = spec
        return Changes(self._admit(now), self.ledger.group_up(spec, now))

    def group_down(self, group: str, now: float, *, gone: bool = False) -> Changes:
        """A group's engine is lost; `gone` if it will not come back.

        What only this group could hold waits for its return, unless it is gone.
        """
        if gone:
            self._specs.pop(group, None)
            self._unheard.discard(group)
        voided = self.ledger.group_down(group, now)
        return Changes(self._admit(now), voided)

    def report(self, group: str, loads: EngineLoads, now: float) -> tuple[Reconciliation, Changes]:
        """An engine's account of what it runs; the ledger follows it."""
        reconciled = self.ledger.reconcile(group, loads.epoch, loads.leases, now)
        if not reconciled.stale:
            self._unheard.discard(group)
        return reconciled, Changes(self._admit(now))

    def tick(self, now: float) -> Changes:
        """What time alone brings: deadlines, expired leases, the end of the rebuild."""
        self.ledger.sweep(now)
        overdue = tuple(self._expire(waiting.request, now) for waiting in self._queue.overdue(now))
        return Changes(overdue + self._admit(now))

    # Reading

    @property
    def queue_depth(self) -> int:
        return len(self._queue)

    def ready(self, now: float) -> bool:
        """Whether requests are admitted, and not held until the groups have reported."""
        return self._ready(now)

    def views(self) -> tuple[GroupView, ...]:
        """Every known group as placement sees it."""
        return tuple(self._view(spec) for spec in self._specs.values())

    # Within

    def _ready(self, now: float) -> bool:
        return not self._unheard or now >= self._rebuild_until

    def _view(self, spec: GroupSpec) -> GroupView:
        account = self.ledger.accounts.get(spec.group)
        if account is None:
            return GroupView(spec, PageNeed(0, 0), 0, up=False, reported=False)
        return GroupView(
            spec, account.used, account.sequences, reported=account.reported_at is not None
        )

    def _choose(self, request: PlaceRequest) -> Choice:
        candidates = [
            Candidate(self._view(spec), worst_case(request, spec)) for spec in self._specs.values()
        ]
        asked = Asked(request.sequences, request.min_quality, request.excluded_groups)
        return choose(candidates, asked)

    def _grant(self, request: PlaceRequest, choice: Choice, since: float, now: float) -> Granted:
        assert choice.group is not None
        spec = self._specs[choice.group]
        demand = worst_case(request, spec)
        lease = self.ledger.grant(
            choice.group,
            demand.leased,
            now,
            request_id=request.request_id,
            tenant=request.tenant,
            sequences=request.sequences,
        )
        placement = Placement(
            request_id=request.request_id,
            group=choice.group,
            lease=lease.terms,
            lease_bytes=demand.leased_bytes,
            expires_at=lease.expires_at,
            queue_s=now - since,
            verdicts=choice.verdicts,
        )
        return Granted(placement)

    def _admit(self, now: float) -> tuple[Outcome, ...]:
        """Grant from the front of the queue, in order, until one does not fit."""
        outcomes: list[Outcome] = []
        while len(self._queue) and self._ready(now):
            first = next(iter(self._queue))
            choice = self._choose(first.request)
            if self._specs and choice.never:
                outcomes.append(
                    Refused(first.request.request_id, _never_fits(choice), choice.verdicts)
                )
            elif choice.group is not None:
                outcomes.append(self._grant(first.request, choice, first.since, now))
            else:
                break
            self._queue.cancel(first.request.request_id)
        return tuple(outcomes)

    def _expire(self, request: PlaceRequest, now: float) -> Refused:
        self._queue.cancel(request.request_id)
        assert request.timeout_s is not None
        return Refused(request.request_id, DeadlineUnreachableError(request.timeout_s, None))

    def _learn_duration(self, lease: Lease, now: float) -> None:
        self._mean_lease_s += SMOOTHING * (now - lease.granted_at - self._mean_lease_s)

    def _projected_start_s(self) -> float:
        """Waiting requests over the rate at which leases end, bounded."""
        live = max(len(self.ledger.leases), 1)
        wait_s = (len(self._queue) + 1) * self._mean_lease_s / live
        return min(max(wait_s, self.config.retry_least_s), self.config.retry_most_s)

    def _no_group(self) -> RoutingError:
        return NoGroupError("no group is up", self.config.retry_most_s, 0, 0)

    def _queue_full(self, choice: Choice, now: float) -> OverCapacityError:
        nearest = _nearest(choice.verdicts)
        needed, available = (nearest.needed_bytes, nearest.available_bytes) if nearest else (0, 0)
        return QueueFullError(
            f"{len(self._queue)} requests wait already",
            self._projected_start_s(),
            needed,
            available,
        )


def _never_fits(choice: Choice) -> NeverFitsError:
    return NeverFitsError(
        {verdict.group: verdict.needed_bytes for verdict in choice.verdicts},
        {verdict.group: verdict.available_bytes for verdict in choice.verdicts},
        {verdict.group: verdict.reason.value for verdict in choice.verdicts},
    )


def _nearest(verdicts: tuple[Verdict, ...]) -> Verdict | None:
    """The verdict of the group that lacks the fewest bytes."""
    possible = [verdict for verdict in verdicts if not verdict.never]
    return min(possible, key=lambda v: v.needed_bytes - v.available_bytes, default=None)
