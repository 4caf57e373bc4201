"""How far down the queue requests may overtake from, when it is read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kvmesh.cluster.routing.accepted_formats import AcceptedFormats
from kvmesh.cluster.routing.demand import RequestDemand
from kvmesh.cluster.routing.fleet import Fleet
from kvmesh.cluster.routing.group import Group
from kvmesh.cluster.routing.placement import lasting_obstacle
from kvmesh.cluster.routing.queue import LineKey
from kvmesh.cluster.routing.request import Past, PlaceRequest


class Backfill:
    """Counts, for each group, the requests that waited for its room in vain.

    After `depth` of them a group is closed, and those that wait for it alone are passed over.
    What waits for something else, such as its tenant's quota or a group that is down, takes
    nothing of that depth: it does not keep others from the room that there is. A tenant has a
    depth of its own for those that its quota stops. So there are at most `depth` tries for
    each group and each tenant, however many wait.
    """

    def __init__(self, fleet: Fleet, depth: int) -> None:
        self._fleet = fleet
        self._depth = depth
        up = (x for x in fleet.groups.values() if x.account is not None and not x.draining)
        self._left = dict.fromkeys(up, depth)
        self._lacked: Counter[str] = Counter()  # by tenant
        self._over_quota: set[str] = set()
        self._accepted: dict[AcceptedFormats, bool] = {}

    def among(self, groups: Iterable[Group]) -> list[Group]:
        """Those of the groups that are not closed."""
        return [group for group in groups if group in self._left]

    def wants(self, line: LineKey) -> bool:
        """Whether any request of the line may start now, or is to be refused."""
        if line.tenant in self._over_quota and line.past < Past.RAN:
            return False
        accepts = line.accepts
        if (found := self._accepted.get(accepts)) is None:
            known = self._fleet.groups.values()
            found = _any_accepted(accepts, self._left) or not _any_accepted(accepts, known)
            self._accepted[accepts] = found
        return found

    def groups(self, demand: RequestDemand) -> list[Group]:
        """Those, not closed, that only lack room for the request, if anything."""
        return [group for group in self._left if lasting_obstacle(group, demand) is None]

    def in_vain(self, groups: Iterable[Group]) -> None:
        """A request waits for room in any of these."""
        for group in groups:
            self._left[group] -= 1
            if not self._left[group]:
                del self._left[group]
                self._accepted.clear()

    def lacks_quota(self, request: PlaceRequest) -> None:
        """A request waits until its tenant has more of its quota left."""
        tenant = request.tenant
        self._lacked[tenant] += 1
        if self._lacked[tenant] == self._depth or self._fleet.quota_left(request) <= 0:
            self._over_quota.add(tenant)


def _any_accepted(accepts: AcceptedFormats, groups: Iterable[Group]) -> bool:
    return any(not accepts.why_not(group.info) for group in groups)
