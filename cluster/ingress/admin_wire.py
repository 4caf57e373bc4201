"""Protobuf replies to operators' calls, from the control plane's own types."""

from __future__ import annotations

from collections.abc import Mapping

from kvmesh.cluster.ingress.error_table import count_by_reason
from kvmesh.cluster.reports import ClusterStatus, EngineReport, LatencyStats
from kvmesh.v1alpha import admin_pb2 as admin
from kvmesh.workers.loads import ArenaLoads, SequenceLoad
from kvmesh.workers.sizes import PageNeed


def groups(status: ClusterStatus, layout_reason: str) -> admin.ListGroupsResponse:
    wire = admin.ListGroupsResponse()
    for group, report in status.reports.items():
        info, geometry = report.info, report.info.geometry
        wire.groups.add(
            group=group,
            kv_format=info.kv_format,
            dtype=info.dtype,
            tp=info.tp,
            kvp=geometry.kvp,
            page_size=geometry.page_size,
            sink_pages=geometry.sink_pages,
            recent_pages=geometry.recent_pages,
            max_num_seqs=info.max_num_seqs,
            hot_pages=info.capacity.hot,
            sealed_pages=info.capacity.sealed,
            hot_page_bytes=geometry.hot_page_bytes,
            sealed_page_bytes=geometry.sealed_page_bytes,
            capacity_bytes=info.capacity_bytes,
            max_num_batched_tokens=info.max_num_batched_tokens,
            device=info.device,
            operators=info.operators,
            layout_reason=layout_reason,
            kv_format_warning=info.kv_format_warning,
        )
    return wire


def loads(status: ClusterStatus) -> admin.GetLoadsResponse:
    wire = admin.GetLoadsResponse(router=_router(status))
    for group, report in status.reports.items():
        made = _group(group, report, group in status.healthy)
        made.oldest.extend(_sequence(x, status.requests) for x in report.loads.oldest)
        wire.groups.append(made)
    return wire


def _group(group: str, report: EngineReport, healthy: bool) -> admin.GroupLoads:
    engine, geometry = report.loads, report.info.geometry
    hot, sealed = engine.pool.hot, engine.pool.sealed

    def over_all_ranks(hot_pages: int, sealed_pages: int) -> int:
        return geometry.bytes_of(PageNeed(hot_pages, sealed_pages))

    return admin.GroupLoads(
        group=group,
        kv_format=report.info.kv_format,
        healthy=healthy,
        draining=report.draining,
        running=engine.running,
        waiting=engine.waiting,
        hot=_pages(hot, geometry.hot_page_bytes),
        sealed=_pages(sealed, geometry.sealed_page_bytes),
        used_bytes=over_all_ranks(hot.used, sealed.used),
        cached_bytes=over_all_ranks(hot.cached, sealed.cached),
        free_bytes=over_all_ranks(hot.free, sealed.free),
        total_bytes=over_all_ranks(hot.total, sealed.total),
        prompt_tokens_total=engine.prompt_tokens_total,
        completion_tokens_total=engine.completion_tokens_total,
        cached_tokens_total=engine.cached_tokens_total,
        preemptions_total=engine.preemptions_total,
        steps_total=engine.steps_total,
        outcomes_total=engine.outcomes_total,
        time_to_first_token=_latency(report.latencies.time_to_first_token),
        time_per_output_token=_latency(report.latencies.time_per_output_token),
        queue_time=_latency(report.latencies.queue_time),
        pinned_pages=engine.pinned_pages,
        pinned_evictions_total=engine.pinned_evictions_total,
    )


def _sequence(load: SequenceLoad, requests: Mapping[str, str]) -> admin.SequenceLoads:
    """requests: tenant/id by lease"""
    tenant, _, request_id = requests.get(load.lease_id, "").partition("/")
    return admin.SequenceLoads(
        tenant=tenant,
        request_id=request_id,
        age_s=load.age_s,
        prompt_tokens=load.prompt_tokens,
        completion_tokens=load.total_tokens - load.prompt_tokens,
        computed_tokens=load.computed_tokens,
        cached_tokens=load.cached_tokens,
    )


def _pages(arena: ArenaLoads, page_bytes: int) -> admin.PagesLoad:
    return admin.PagesLoad(
        total=arena.total,
        used=arena.used,
        cached=arena.cached,
        free=arena.free,
        page_bytes=page_bytes,
    )


def _latency(summary: LatencyStats) -> admin.LatencySummary:
    return admin.LatencySummary(
        count=summary.count,
        mean_s=summary.mean_s,
        p50_s=summary.p50_s,
        p90_s=summary.p90_s,
        p99_s=summary.p99_s,
    )


def _router(status: ClusterStatus) -> admin.RouterLoads:
    router = status.router
    wire = admin.RouterLoads(
        epoch=router.epoch,
        queue_length=router.queue_depth,
        queue_capacity=router.queue_limit,
        leases=router.leases,
        granted_total=router.granted_total,
        released_total=router.released_total,
        expired_total=router.expired_total,
        refused_total=count_by_reason(router.refused_total),
        audits_total=status.audits_total,
        audit_faults_total=status.audit_faults_total,
        oldest_wait_s=status.oldest_wait_s,
    )
    for group in router.groups:
        wire.ledger.add(
            group=group.group,
            leases=group.leases,
            hot_pages_leased=group.used.hot,
            hot_pages_total=group.capacity.hot,
            sealed_pages_leased=group.used.sealed,
            sealed_pages_total=group.capacity.sealed,
            leased_bytes=group.used_bytes,
            total_bytes=group.capacity_bytes,
        )
    return wire
