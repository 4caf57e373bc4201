"""Why a request is turned away, with figures that a client can act on."""

from __future__ import annotations

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.errors import (
    DeadlineUnreachableError,
    NeverFitsError,
    NoGroupError,
    OverCapacityError,
    QueueFullError,
    QuotaExceededError,
    RoutingError,
)
from kvmesh.cluster.routing.fleet import Fleet
from kvmesh.cluster.routing.forecast import earliest_start
from kvmesh.cluster.routing.placement import Asked, Choice
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.cluster.routing.verdict import Reason, Verdicts


class Refusals:
    """Finds them; changes nothing."""

    def __init__(self, config: RouterConfig, fleet: Fleet) -> None:
        self._config = config
        self._fleet = fleet

    def hopeless(
        self, request: PlaceRequest, asked: Asked, choice: Choice, in_front: int, now: float
    ) -> RoutingError | None:
        """Why waiting is of no use, if it is not. in_front: requests that wait already"""
        if not self._fleet.views:
            return NoGroupError("no group is up", self._config.retry_most_s, 0, 0)
        if choice.never:
            return _never_fits(choice.verdicts)
        if all(verdict.never or verdict.reason is Reason.EXCLUDED for verdict in choice.verdicts):
            return self._over_capacity(
                OverCapacityError,
                "every group that could hold it is excluded",
                asked,
                choice,
                in_front,
                now,
            )
        quota = self._fleet.tenants.policy(request.tenant).quota_bytes
        if quota is not None and (least_bytes := self.least_bytes(asked)) > quota:
            return QuotaExceededError(
                "the request alone exceeds the tenant's quota",
                self._config.retry_most_s,
                least_bytes,
                quota,
            )
        if request.timeout_s is not None and choice.group is None:
            leases = self._fleet.ledger.leases
            start = earliest_start(self._fleet.views, asked, choice.verdicts, leases, now)
            if start is not None and start - now > request.timeout_s:
                return DeadlineUnreachableError(request.timeout_s, start - now)
        return None

    def queue_full(
        self, asked: Asked, choice: Choice, in_front: int, now: float
    ) -> OverCapacityError:
        message = f"{in_front} requests wait already"
        return self._over_capacity(QueueFullError, message, asked, choice, in_front, now)

    def projected_start_s(
        self, asked: Asked, choice: Choice, in_front: int, now: float
    ) -> float | None:
        """From now: the soonest start, plus what those in front take of the fleet's rate."""
        leases = self._fleet.ledger.leases
        start = earliest_start(self._fleet.views, asked, choice.verdicts, leases, now)
        if start is None:
            return None
        in_front_s = in_front * self._fleet.mean_lease_s / max(len(leases), 1)
        return start - now + in_front_s

    def least_bytes(self, asked: Asked) -> int:
        """That the request's lease takes where it takes least."""
        return min(
            view.spec.geometry.bytes_of(asked.leased(view)) for view in self._fleet.views.values()
        )

    def _over_capacity(
        self,
        error: type[OverCapacityError],
        message: str,
        asked: Asked,
        choice: Choice,
        in_front: int,
        now: float,
    ) -> OverCapacityError:
        possible = [verdict for verdict in choice.verdicts if not verdict.never]
        nearest = min(possible, key=lambda v: v.needed_bytes - v.available_bytes, default=None)
        return error(
            message,
            self._retry_after_s(asked, choice, in_front, now),
            nearest.needed_bytes if nearest else 0,
            nearest.available_bytes if nearest else 0,
        )

    def _retry_after_s(self, asked: Asked, choice: Choice, in_front: int, now: float) -> float:
        start_s = self.projected_start_s(asked, choice, in_front, now)
        if start_s is None:
            return self._config.retry_most_s
        return min(max(start_s, self._config.retry_least_s), self._config.retry_most_s)


def _never_fits(verdicts: Verdicts) -> NeverFitsError:
    worded = list(verdicts)
    return NeverFitsError(
        {verdict.group: verdict.needed_bytes for verdict in worded},
        {verdict.group: verdict.available_bytes for verdict in worded},
        {verdict.group: verdict.reason.value for verdict in worded},
    )
