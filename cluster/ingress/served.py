"""The model that a cluster serves, as its groups report it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from kvmesh.cluster.errors import ContextExceededError, NotReadyError, UnknownModelError
from kvmesh.cluster.ingress.router_link import RouterLink
from kvmesh.cluster.reports import ClusterStatus
from kvmesh.cluster.routing.accepted_formats import AcceptedFormats
from kvmesh.workers.loads import EngineInfo

logger = logging.getLogger(__name__)

REFRESH_PERIOD_S = 1.0
UNKNOWN_CONTEXT = 1 << 40  # tokens, more than any has


class Served:
    """The cluster's status, as the router last said it.

    aliases: other names for the model that requests may use
    measure: called regularly
    """

    def __init__(
        self, router: RouterLink, aliases: frozenset[str], measure: Callable[[], None]
    ) -> None:
        self._router = router
        self._aliases = aliases
        self._measure = measure
        self._status: ClusterStatus | None = None
        self._fresh: asyncio.Future[ClusterStatus] | None = None

    async def run(self) -> None:
        """Ask the router regularly; runs until cancelled."""
        while True:
            try:
                await self.refresh()
            except NotReadyError as error:
                logger.warning("%s", error)
            self._measure()
            await asyncio.sleep(REFRESH_PERIOD_S)

    async def refresh(self) -> None:
        self._status = await self._router.status()

    @property
    def healthy(self) -> bool:
        """Whether a group is up."""
        return bool(self._status and self._status.healthy)

    @property
    def draining(self) -> bool:
        """Whether the whole cluster shuts down."""
        return bool(self._status and self._status.draining)

    @property
    def status(self) -> ClusterStatus:
        """Raises NotReadyError before any group has reported."""
        if self._status is None or not self._status.reports:
            raise NotReadyError()
        return self._status

    def status_for(self, model: str) -> ClusterStatus:
        """Like `status`; raises UnknownModelError for a request for another model."""
        status = self.status
        check_model(model, status, self._aliases)
        return status

    async def fresh(self) -> ClusterStatus:
        """With reports made now; one question to the engines answers all who ask meanwhile."""
        if self._fresh is None or self._fresh.done():
            self._fresh = asyncio.ensure_future(self._router.status(fresh=True))
        return await asyncio.shield(self._fresh)


def any_info(status: ClusterStatus) -> EngineInfo:
    """The facts of some group; what concerns the model is the same for all of them."""
    return next(iter(status.reports.values())).info


def max_model_len(status: ClusterStatus) -> int:
    """The longest context of any group, in tokens; for a request, see `accepting`."""
    return max(report.info.max_model_len for report in status.reports.values())


def longest_context(status: ClusterStatus, tokens: int) -> int:
    """What a request of so many tokens, prompt and output, must fit in.

    A group that is missing may hold what none of the others can, so the router decides.
    """
    known = max_model_len(status)
    return UNKNOWN_CONTEXT if status.missing and tokens > known else known


def accepting(status: ClusterStatus, accepts: AcceptedFormats) -> ClusterStatus:
    """As a request sees it that accepts these formats. If it accepts no group's, the router says
    so, or lets it wait for others."""
    reports = {
        name: report for name, report in status.reports.items() if not accepts.why_not(report.info)
    }
    return replace(status, reports=reports or status.reports)


def check_model(requested: str, status: ClusterStatus, aliases: frozenset[str]) -> None:
    """Raise UnknownModelError unless the name is empty, an alias, or the model's own."""
    served = any_info(status).model
    if requested and requested not in aliases and requested != served:
        raise UnknownModelError(requested, served)


def context_exceeded(prompt_tokens: int, status: ClusterStatus) -> ContextExceededError:
    """The error, with the bytes of the group with the longest context."""
    info = max((r.info for r in status.reports.values()), key=lambda i: i.max_model_len)
    geometry = info.geometry
    return ContextExceededError(
        prompt_tokens,
        info.max_model_len,
        geometry.bytes_of(geometry.peak_need(prompt_tokens + 1), 1),
        info.capacity_bytes,
    )
