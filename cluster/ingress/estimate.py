"""The replies to EstimateBudget and Explain: whether each group can serve a request."""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.cluster.reports import ClusterStatus, EngineReport
from kvmesh.cluster.routing.outcome import BudgetEstimate, Explained
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.cluster.routing.verdict import Reason, Verdict
from kvmesh.v1 import kvmesh_pb2 as pb

_FITS_NOW = frozenset({Reason.CHOSEN, Reason.WORSE})
_WAITS = "it has room, but the request waits for its turn"


def estimate_reply(
    request: PlaceRequest, estimate: BudgetEstimate, status: ClusterStatus
) -> pb.EstimateBudgetResponse:
    reply = pb.EstimateBudgetResponse(
        prompt_tokens=request.prompt_tokens,
        max_tokens=request.max_tokens,
        feasible_now=estimate.fits_now,
        feasible_ever=estimate.fits_ever,
        group=estimate.group or "",
    )
    if estimate.projected_start_s is not None:
        reply.projected_wait_s = estimate.projected_start_s
    for verdict in estimate.verdicts:
        report = status.reports.get(verdict.group)
        group = _group(verdict, report)
        group.feasible_ever &= estimate.fits_ever  # its tenant's quota may be too small
        if group.feasible_now and not estimate.fits_now:
            group.feasible_now, group.reason = False, _WAITS
        if report is not None:
            geometry = report.info.geometry
            need = geometry.peak_need(request.prompt_tokens + request.max_tokens)
            # For all requested tokens; a verdict counts at most as many as the context holds.
            group.needed_bytes = geometry.bytes_of(need, 1) * request.sequences
            group.hot_pages = need.hot * request.sequences
            group.sealed_pages = need.sealed * request.sequences
        if estimate.projected_start_s is not None and group.feasible_ever:
            group.projected_wait_s = 0.0 if group.feasible_now else estimate.projected_start_s
        reply.groups.append(group)
    return reply


def explain_reply(
    request_id: str, explained: Sequence[Explained], status: ClusterStatus
) -> pb.ExplainResponse:
    """The reply to Explain: past decisions about a request, group by group."""
    reply = pb.ExplainResponse(request_id=request_id)
    for decision in explained:
        groups = [_group(x, status.reports.get(x.group)) for x in decision.verdicts]
        reply.decisions.add(
            age_s=decision.age_s, outcome=decision.outcome, group=decision.group, groups=groups
        )
    return reply


def _group(verdict: Verdict, report: EngineReport | None) -> pb.GroupEstimate:
    group = pb.GroupEstimate(
        group=verdict.group,
        needed_bytes=verdict.needed_bytes,
        free_bytes=verdict.available_bytes,
        capacity_bytes=verdict.capacity_bytes,
        feasible_now=verdict.reason in _FITS_NOW,
        feasible_ever=not verdict.never,
        reason=verdict.reason.value,
    )
    if verdict.cost_s is not None:
        group.cost_s = verdict.cost_s
    if report is not None:
        group.kv_format = report.info.kv_format
        group.cached_tokens = verdict.cached_pages * report.info.geometry.page_size
    return group
