"""The router for asyncio: `place` waits until there is room, or raises why not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvmesh.cluster.routing.decisions import Decided, DecisionLog
from kvmesh.cluster.routing.errors import DuplicateRequestError
from kvmesh.cluster.routing.events import Lease
from kvmesh.cluster.routing.group import GroupSpec
from kvmesh.cluster.routing.ledger import Reconciliation
from kvmesh.cluster.routing.request import (
    Estimate,
    Granted,
    Growth,
    Outcome,
    Placement,
    PlaceRequest,
    Queued,
    Refused,
)
from kvmesh.cluster.routing.router import Changes, Router
from kvmesh.workers.request import EngineInfo, EngineLoads


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """One group's budget; pages of one rank, bytes over all ranks."""

    group: str
    up: bool
    reported: bool
    kv_format: str
    quality: float
    sequences: int
    max_sequences: int
    hot_pages: int
    hot_pages_used: int
    sealed_pages: int
    sealed_pages_used: int
    capacity_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class RouterStatus:
    """ready: requests are admitted; leases: live ones."""

    epoch: int
    ready: bool
    queue_depth: int
    queue_limit: int
    leases: int
    groups: tuple[GroupStatus, ...]


class AsyncRouter:
    """An adapter around `Router`. All calls must come from one event loop.

    clock: seconds, monotonic; `expires_at` of placements is on it
    """

    def __init__(self, router: Router, clock: Callable[[], float] = time.monotonic) -> None:
        self._router = router
        self._clock = clock
        self._futures: dict[str, asyncio.Future[Placement]] = {}
        self._decisions = DecisionLog()

    async def place(self, request: PlaceRequest) -> Placement:
        """Wait for a group and a lease on it.

        Raises the tree of `errors`: NeverFitsError, OverCapacityError,
        DeadlineUnreachableError, DuplicateRequestError. Cancelling the waiting
        task leaves the queue, and gives back a lease it would have got.
        """
        if request.request_id in self._futures:
            raise DuplicateRequestError(request.request_id)
        now = self._clock()
        decision, changes = self._router.submit(request, now)
        self._decisions.note(decision, now)
        self._settle(changes)
        match decision:
            case Granted(placement=placement):
                return placement
            case Refused(error=error):
                raise error
            case Queued():
                return await self._wait(request.request_id)

    async def begun(self, lease_id: str) -> None:
        """The lease's sequence has emitted its first token. Optional, but placement gains by it."""
        self._settle(self._router.begun(lease_id, self._clock()))

    async def grow(self, lease_id: str, request: PlaceRequest, output_tokens: int) -> Growth | None:
        """Extend a lease before a sequence of it goes on to `output_tokens`.

        request: as it was placed. Returns the new terms, or None if the pages are not
        free (ask again in a moment) or the lease is gone.
        """
        return self._router.grow(lease_id, request, output_tokens, self._clock())

    async def release(self, lease_id: str, output_tokens: int | None = None) -> bool:
        """End a lease. Returns False where it had ended before.

        output_tokens: of one sequence, if it ended of its own accord: to learn from
        """
        known = lease_id in self._router.ledger.leases
        self._settle(self._router.release(lease_id, self._clock(), output_tokens))
        return known

    async def cancel(self, request_id: str) -> None:
        """Take a waiting request out; its `place` raises CancelledError."""
        future = self._futures.pop(request_id, None)
        if future is not None:
            future.cancel()
        self._settle(self._router.cancel(request_id, self._clock()))

    async def estimate(self, request: PlaceRequest) -> Estimate:
        """What would become of the request, without submitting it."""
        return self._router.estimate(request, self._clock())

    def explain(self, request_id: str) -> tuple[tuple[float, Decided], ...]:
        """How long ago what was decided of a request, oldest first; nothing if it is not known."""
        now = self._clock()
        return tuple((now - x.at, x) for x in self._decisions.of(request_id))

    async def group_up(self, group: str, info: EngineInfo) -> tuple[Lease, ...]:
        """A group is there. Returns leases of a former incarnation, now void."""
        spec = GroupSpec.from_engine_info(group, info)
        changes = self._router.group_up(spec, self._clock())
        self._settle(changes)
        return changes.voided

    async def group_down(self, group: str, *, gone: bool = False) -> tuple[Lease, ...]:
        """A group is lost. Returns its leases, now void."""
        changes = self._router.group_down(group, self._clock(), gone=gone)
        self._settle(changes)
        return changes.voided

    async def report(self, group: str, loads: EngineLoads) -> Reconciliation:
        """An engine's loads; `stale` in the answer if the engine is not the one known."""
        reconciled, changes = self._router.report(group, loads, self._clock())
        self._settle(changes)
        return reconciled

    async def pages_changed(
        self, group: str, sealed: Iterable[bytes] = (), evicted: Iterable[bytes] = ()
    ) -> None:
        """An engine's prefix cache gained and lost pages with these hashes."""
        self._router.pages_changed(group, sealed, evicted, self._clock())

    async def sweep(self) -> None:
        """To be called about once a second: what time alone brings, deadlines above all."""
        self._settle(self._router.tick(self._clock()))

    def snapshot(self) -> RouterStatus:
        """The budget as it stands."""
        router = self._router
        groups = tuple(
            GroupStatus(
                group=view.spec.group,
                up=view.up,
                reported=view.reported,
                kv_format=view.spec.kv_format,
                quality=view.spec.quality,
                sequences=view.sequences,
                max_sequences=view.spec.max_sequences,
                hot_pages=view.spec.capacity.hot,
                hot_pages_used=view.used.hot,
                sealed_pages=view.spec.capacity.sealed,
                sealed_pages_used=view.used.sealed,
                capacity_bytes=view.spec.capacity_bytes,
                used_bytes=view.spec.geometry.bytes_of(view.used),
            )
            for view in router.views()
        )
        return RouterStatus(
            epoch=router.ledger.epoch,
            ready=router.ready(self._clock()),
            queue_depth=router.queue_depth,
            queue_limit=router.config.queue_limit,
            leases=len(router.ledger.leases),
            groups=groups,
        )

    async def _wait(self, request_id: str) -> Placement:
        future: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        self._futures[request_id] = future
        try:
            return await future
        except asyncio.CancelledError:
            self._abandon(request_id, future)
            raise

    def _abandon(self, request_id: str, future: asyncio.Future[Placement]) -> None:
        """The waiter is gone: leave the queue, or give back what came too late for it."""
        if self._futures.get(request_id) is future:
            del self._futures[request_id]
            self._settle(self._router.cancel(request_id, self._clock()))
        elif future.done() and not future.cancelled() and future.exception() is None:
            lease_id = future.result().lease.lease_id
            self._settle(self._router.release(lease_id, self._clock()))

    def _settle(self, changes: Changes) -> None:
        for outcome in changes.outcomes:
            self._resolve(outcome)

    def _resolve(self, outcome: Outcome) -> None:
        self._decisions.note(outcome, self._clock())
        future = self._futures.pop(outcome.request_id, None)
        match outcome:
            case Granted(placement=placement):
                if future is None or future.done():  # its waiter has just been cancelled
                    self._settle(self._router.release(placement.lease.lease_id, self._clock()))
                else:
                    future.set_result(placement)
            case Refused(error=error):
                if future is not None and not future.done():
                    future.set_exception(error)
