"""The reply to EstimateBudget: what every group says to a request of that size."""

from __future__ import annotations

from kvmesh.cluster.peers import ClusterStatus
from kvmesh.cluster.routing.request import Estimate, PlaceRequest
from kvmesh.cluster.routing.verdict import Reason
from kvmesh.protos.kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.request import EngineInfo
from kvmesh.workers.sizes import PageGeometry

_AT_ONCE = frozenset({Reason.CHOSEN, Reason.WORSE})


def geometry_of(info: EngineInfo) -> PageGeometry:
    """Page shapes of a group; an engine's page bytes are over all its ranks."""
    return PageGeometry(
        page_size=info.page_size,
        sink_pages=info.sink_pages,
        recent_pages=info.recent_pages,
        hot_page_bytes=info.hot_page_bytes,
        sealed_page_bytes=info.sealed_page_bytes,
    )


def estimate_reply(
    asked: PlaceRequest, estimate: Estimate, status: ClusterStatus
) -> pb.EstimateBudgetResponse:
    reply = pb.EstimateBudgetResponse(
        prompt_tokens=asked.prompt_tokens,
        max_tokens=asked.max_tokens,
        feasible_now=estimate.fits_now,
        feasible_ever=estimate.fits_ever,
        group=estimate.group or "",
    )
    if estimate.projected_start_s is not None:
        reply.projected_wait_s = estimate.projected_start_s
    for verdict in estimate.verdicts:
        report = status.reports.get(verdict.group)
        group = reply.groups.add(
            group=verdict.group,
            needed_bytes=verdict.needed_bytes,
            free_bytes=verdict.available_bytes,
            capacity_bytes=verdict.capacity_bytes,
            feasible_now=verdict.reason in _AT_ONCE,
            feasible_ever=not verdict.never and verdict.reason is not Reason.EXCLUDED,
            reason=verdict.reason.value,
        )
        if report is not None:
            geometry = geometry_of(report.info)
            need = geometry.peak_need(asked.prompt_tokens + asked.max_tokens)
            group.kv_format = report.info.kv_format
            # Of all the tokens asked for: a verdict counts no more than the context holds.
            group.needed_bytes = geometry.bytes_of(need) * asked.sequences
            group.hot_pages = need.hot * asked.sequences
            group.sealed_pages = need.sealed * asked.sequences
        if estimate.projected_start_s is not None and group.feasible_ever:
            group.projected_wait_s = 0.0 if group.feasible_now else estimate.projected_start_s
    return reply
