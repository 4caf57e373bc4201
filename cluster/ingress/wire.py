"""Replies on the wire, from the control plane's own values."""

from __future__ import annotations

from kvmesh.cluster.ingress.choice import ChoiceFinish, ChoiceOutput
from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.cluster.reports import ClusterStatus, EngineReport, LatencySummary
from kvmesh.protos.kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.loads import ArenaLoads
from kvmesh.workers.request import FinishReason, TokenLogprobs
from kvmesh.workers.sizes import PageNeed

FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}


def delta(index: int, output: ChoiceOutput, codec: TextCodec) -> pb.Delta:
    return pb.Delta(
        index=index,
        text=output.text,
        token_ids=output.token_ids,
        logprobs=logprobs(output, codec),
        token_offset=output.offset,
    )


def logprobs(output: ChoiceOutput, codec: TextCodec) -> list[pb.TokenLogprobs]:
    pairs = zip(output.token_ids, output.logprobs, strict=False)
    return [_logprobs(token_id, found, codec) for token_id, found in pairs]


def _logprobs(token_id: int, found: TokenLogprobs, codec: TextCodec) -> pb.TokenLogprobs:
    wire = pb.TokenLogprobs(chosen=_logprob(token_id, found.logprob, codec))
    wire.top.extend(_logprob(other, logprob, codec) for other, logprob in found.top)
    return wire


def _logprob(token_id: int, logprob: float, codec: TextCodec) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=token_id, text=codec.decode_token(token_id), logprob=logprob)


def choice_finished(index: int, finish: ChoiceFinish) -> pb.ChoiceFinished:
    wire = pb.ChoiceFinished(index=index, finish_reason=FINISH_REASONS[finish.reason])
    if finish.stop_string is not None:
        wire.matched_stop_string = finish.stop_string
    elif finish.stop_token_id is not None:
        wire.matched_stop_token_id = finish.stop_token_id
    return wire


def model_info(status: ClusterStatus, codec: TextCodec, version: str) -> pb.GetModelInfoResponse:
    """What is served; the groups' common facts are those of the first."""
    first = next(iter(status.reports.values())).info
    wire = pb.GetModelInfoResponse(
        model=first.model,
        model_revision=first.model_revision,
        max_model_len=max(report.info.max_model_len for report in status.reports.values()),
        vocab_size=first.vocab_size,
        version=version,
        has_chat_template=codec.has_chat_template,
        eos_token_ids=codec.eos_token_ids,
    )
    for group, report in sorted(status.reports.items()):
        info, geometry = report.info, report.info.geometry
        wire.groups.add(
            group=group,
            kv_format=info.kv_format,
            dtype=info.dtype,
            tp=info.tp,
            kvp=1,
            page_size=geometry.page_size,
            sink_pages=geometry.sink_pages,
            recent_pages=geometry.recent_pages,
            max_num_seqs=info.max_num_seqs,
            hot_pages=info.capacity.hot,
            sealed_pages=info.capacity.sealed,
            hot_page_bytes=geometry.hot_page_bytes,
            sealed_page_bytes=geometry.sealed_page_bytes,
            capacity_bytes=info.capacity_bytes,
        )
    return wire


def loads(status: ClusterStatus) -> pb.GetLoadsResponse:
    wire = pb.GetLoadsResponse(router=_router(status))
    for group, report in sorted(status.reports.items()):
        wire.groups.append(_group(group, report, group in status.healthy))
    return wire


def _group(group: str, report: EngineReport, healthy: bool) -> pb.GroupLoads:
    engine, geometry = report.loads, report.info.geometry
    hot, sealed = engine.pool.hot, engine.pool.sealed

    def over_all_ranks(hot_pages: int, sealed_pages: int) -> int:
        return geometry.bytes_of(PageNeed(hot_pages, sealed_pages))

    return pb.GroupLoads(
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
    )


def _pages(arena: ArenaLoads, page_bytes: int) -> pb.PagesLoad:
    return pb.PagesLoad(
        total=arena.total,
        used=arena.used,
        cached=arena.cached,
        free=arena.free,
        page_bytes=page_bytes,
    )


def _latency(summary: LatencySummary) -> pb.LatencySummary:
    return pb.LatencySummary(
        count=summary.count,
        mean_s=summary.mean_s,
        p50_s=summary.p50_s,
        p90_s=summary.p90_s,
        p99_s=summary.p99_s,
    )


def _router(status: ClusterStatus) -> pb.RouterLoads:
    router = status.router
    wire = pb.RouterLoads(
        epoch=router.epoch,
        queue_length=router.queue_depth,
        queue_capacity=router.queue_limit,
        leases=router.leases,
        granted_total=router.granted_total,
        released_total=router.released_total,
        expired_total=router.expired_total,
        refused_total=dict(router.refused_total),
        audits_total=status.audits_total,
        audit_faults_total=status.audit_faults_total,
    )
    for group in router.groups:
        wire.ledger.add(
            group=group.group,
            leases=group.sequences,
            hot_pages_leased=group.used.hot,
            hot_pages_total=group.capacity.hot,
            sealed_pages_leased=group.used.sealed,
            sealed_pages_total=group.capacity.sealed,
            leased_bytes=group.used_bytes,
            total_bytes=group.capacity_bytes,
        )
    return wire
