"""Why a request is refused, with figures that a client can act on."""

from __future__ import annotations

import math
from collections.abc import Collection

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.demand import RequestDemand
from kvmesh.cluster.routing.errors import (
    DeadlineUnreachableError,
    ExceedsEveryGroupError,
    NoAllowedFormatError,
    NoGroupError,
    NoRoomError,
    QueueFullError,
    QuotaExceededError,
    QuotaUsedUpError,
    RoutingError,
)
from kvmesh.cluster.routing.fleet import Fleet
from kvmesh.cluster.routing.forecast import earliest_start
from kvmesh.cluster.routing.group import Group
from kvmesh.cluster.routing.leases import Leases
from kvmesh.cluster.routing.placement import GroupChoice, lease_bytes, never_taken
from kvmesh.cluster.routing.request import Past
from kvmesh.cluster.routing.verdict import Verdicts


class Refusals:
    """Finds them; changes nothing.

    Arguments in common: `choice` was made for `demand`; `ahead` requests wait already.
    """

    def __init__(self, config: RouterConfig, fleet: Fleet, leases: Leases) -> None:
        self._config = config
        self._fleet = fleet
        self._leases = leases

    def hopeless(
        self, demand: RequestDemand, choice: GroupChoice, ahead: int, now: float
    ) -> RoutingError | None:
        """Why waiting would not help, or None if it may."""
        request, verdicts = demand.request, choice.verdicts
        if not self._fleet.groups and request.past < Past.ACCEPTED:
            return NoGroupError("no group is known", self._config.max_retry_s)
        if self.fits_nowhere(demand):
            return self._fits_nowhere(demand, verdicts)
        quota = self._fleet.tenants.policy(request.tenant).quota_bytes
        if quota is not None and self.exceeds_quota(demand):
            return QuotaExceededError(self.min_bytes(demand), quota)
        if choice.group is not None:
            return None
        start_s = self._too_late_s(demand, now)
        return None if start_s is None else self.late(demand, choice, ahead, now, start_s)

    def never(self, demand: RequestDemand) -> bool:
        """Whether the request could not start even if nothing else ran."""
        return self.fits_nowhere(demand) or self.exceeds_quota(demand)

    def fits_nowhere(self, demand: RequestDemand) -> bool:
        """Whether no group that the request allows could hold it, even when empty.

        One that is still missing may, and one that comes where none is known.
        """
        groups = self._fleet.groups.values()
        known = bool(groups) and not self._fleet.missing
        return known and all(never_taken(group, demand) is not None for group in groups)

    def exceeds_quota(self, demand: RequestDemand) -> bool:
        """Whether the request alone exceeds its tenant's quota, and has to keep to it."""
        request = demand.request
        quota = self._fleet.tenants.policy(request.tenant).quota_bytes
        return quota is not None and request.past < Past.RAN and self.min_bytes(demand) > quota

    def late(
        self,
        demand: RequestDemand,
        choice: GroupChoice,
        ahead: int,
        now: float,
        start_s: float | None = None,
    ) -> RoutingError:
        """Of a request that has not started in time, or would not; start_s: when it would"""
        request = demand.request
        assert request.timeout_s is not None
        if request.own_deadline:
            return DeadlineUnreachableError(request.timeout_s, start_s)
        message = f"no room within {round(request.timeout_s, 1):g} s"
        return self._over_capacity(NoRoomError, message, demand, choice.verdicts, ahead, now)

    def queue_full(
        self, demand: RequestDemand, choice: GroupChoice, ahead: int, now: float
    ) -> NoRoomError:
        message = f"the queue is full: {ahead} requests wait"
        return self._over_capacity(QueueFullError, message, demand, choice.verdicts, ahead, now)

    def projected_start_s(self, demand: RequestDemand, ahead: int, now: float) -> float | None:
        """From now: the soonest start, and what those ahead take at the fleet's rate."""
        start = self.earliest_start(demand, now)
        return None if start is None else start - now + self.queue_s(ahead)

    def earliest_start(self, demand: RequestDemand, now: float) -> float | None:
        """The soonest start, were the request first in line; None while its tenant's leases
        leave it no room in the quota: they may grow until they end.
        """
        return earliest_start(self.within_quota(demand), demand, now)

    def queue_s(self, ahead: int) -> float:
        """What those ahead take at the fleet's rate."""
        return ahead * self._leases.mean_s / max(len(self._leases), 1)

    def within_quota(
        self, demand: RequestDemand, among: Collection[Group] | None = None
    ) -> Collection[Group]:
        """Groups, of all or those given, where the tenant may lease what the request needs now."""
        left = self._fleet.quota_left(demand.request)
        groups = self._fleet.groups.values() if among is None else among
        if left == math.inf:
            return groups
        possible = (x for x in groups if never_taken(x, demand) is None)
        return [x for x in possible if lease_bytes(x, demand) <= left]

    def min_bytes(self, demand: RequestDemand) -> int:
        """What the request's lease takes on the group where it is smallest; 0 if there is none."""
        groups = self._fleet.groups.values()
        possible = (x for x in groups if never_taken(x, demand) is None)
        return min((lease_bytes(x, demand) for x in possible), default=0)

    def _too_late_s(self, demand: RequestDemand, now: float) -> float | None:
        """From now, the start of a request that would miss its deadline even as first in line.

        The forecast knows groups that are up. One that comes may be sooner: a new request may
        wait for it, and one that was accepted before until its deadline, whatever comes.
        """
        request = demand.request
        if request.timeout_s is None or request.past >= Past.ACCEPTED or self._may_come(demand):
            return None
        start = earliest_start(self._fleet.groups.values(), demand, now)
        return None if start is None or start - now <= request.timeout_s else start - now

    def _may_come(self, demand: RequestDemand) -> bool:
        """Whether a group that is not up is expected, and may hold the request."""
        groups = self._fleet.groups
        down = (group for group in groups.values() if group.account is None)
        unknown = self._fleet.expected - groups.keys()
        return bool(unknown) or any(never_taken(group, demand) is None for group in down)

    def _fits_nowhere(self, demand: RequestDemand, verdicts: Verdicts) -> RoutingError:
        accepts, groups = demand.request.accepts, self._fleet.groups.items()
        reasons = {name: why for name, group in groups if (why := accepts.why_not(group.info))}
        if len(reasons) == len(groups):
            return NoAllowedFormatError(reasons)
        return _never_fits(verdicts)

    def _over_capacity(
        self,
        error: type[NoRoomError],
        message: str,
        demand: RequestDemand,
        verdicts: Verdicts,
        ahead: int,
        now: float,
    ) -> NoRoomError:
        if self.min_bytes(demand) > self._fleet.quota_left(demand.request):
            message = f"{message}; the tenant's other requests use up its quota"
            return QuotaUsedUpError(message, self._config.max_retry_s)
        possible = [verdict for verdict in verdicts if not verdict.never]
        nearest = min(possible, key=lambda v: v.needed_bytes - v.available_bytes, default=None)
        start_s = self.projected_start_s(demand, ahead, now)
        low, high = self._config.min_retry_s, self._config.max_retry_s
        return error(
            message,
            high if start_s is None else min(max(start_s, low), high),
            nearest.needed_bytes if nearest else None,
            nearest.available_bytes if nearest else None,
        )


def _never_fits(verdicts: Verdicts) -> ExceedsEveryGroupError:
    worded = list(verdicts)
    return ExceedsEveryGroupError(
        {verdict.group: verdict.needed_bytes for verdict in worded},
        {verdict.group: verdict.available_bytes for verdict in worded},
        {verdict.group: verdict.reason.value for verdict in worded},
    )
