"""Starting and stopping groups as the autoscaler decides, through Serve.

A group is a deployment with one replica, or none while the group is not wanted: Serve then starts
or ends it as it does any other, and on Kubernetes Ray's autoscaler adds nodes for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence

from kvmesh.cluster.router_service import RouterService
from kvmesh.cluster.routing.autoscaling import Autoscaler, AutoscalingPolicy, fleet_load
from kvmesh.cluster.telemetry.logs import about

logger = logging.getLogger(__name__)

PERIOD_S = 1.0


class ScalingError(Exception):
    """Serve did not take a number of replicas."""


class GroupScaler:
    """Has Serve run the groups that are wanted.

    groups: all that may run, in order
    running: those that Serve runs; it may run others that it could not be asked about
    set_replicas: has Serve run so many replicas of a group, 0 or 1; raises ScalingError
    """

    def __init__(
        self,
        service: RouterService,
        policy: AutoscalingPolicy,
        groups: Sequence[str],
        running: Collection[str],
        set_replicas: Callable[[str, int], Awaitable[None]],
    ) -> None:
        self._service = service
        self._autoscaler = Autoscaler(policy, groups, running, service.clock())
        self._groups = tuple(groups)
        # Replicas of groups, as Serve has taken them; without those of which that is not known.
        self._replicas = dict.fromkeys(running, 1)
        self._set_replicas = set_replicas
        service.on_refused = self._autoscaler.note_refused

    async def run(self) -> None:
        """Decide again and again, until cancelled."""
        while True:
            await self.step()
            await asyncio.sleep(PERIOD_S)

    async def step(self) -> None:
        """Decide, and tell Serve what has changed; what it does not take is tried again."""
        service = self._service
        now = service.clock()
        if not service.router.admission.ready(now):
            return  # the groups of a former router are still connecting
        wanted = self._autoscaler.decide(fleet_load(service.router, now), now)
        service.groups.expect(wanted)
        for group in self._groups:
            count = int(group in wanted)
            if self._replicas.get(group) == count:
                continue
            # Serve may have taken a number although it did not say so.
            self._replicas.pop(group, None)
            try:
                await self._set_replicas(group, count)
            except ScalingError as error:
                logger.warning("cannot scale group %s: %s", group, error, extra=about(group=group))
                continue
            logger.info(
                "Serve runs %d replicas of group %s; %d groups are wanted",
                count,
                group,
                len(wanted),
                extra=about(group=group),
            )
            self._replicas[group] = count
