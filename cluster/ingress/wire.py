"""Protobuf replies, from the control plane's own types."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvmesh.cluster.ingress.choice import ChoiceFinish, ChoiceOutput
from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.cluster.ingress.error_table import count_by_reason
from kvmesh.cluster.messages import Placed
from kvmesh.cluster.reports import ClusterStatus, EngineReport, LatencyStats
from kvmesh.protos.kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.loads import ArenaLoads
from kvmesh.workers.request import EndReason, SampledLogprobs, SequenceUsage
from kvmesh.workers.sizes import PageNeed

FINISH_REASONS = {
    EndReason.STOP: pb.FINISH_REASON_STOP,
    EndReason.LENGTH: pb.FINISH_REASON_LENGTH,
    EndReason.ABORT: pb.FINISH_REASON_ABORT,
    EndReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
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


def _logprobs(token_id: int, found: SampledLogprobs, codec: TextCodec) -> pb.TokenLogprobs:
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


def started(placed: Placed | None, request_id: str, prompt_tokens: int, seed: int) -> pb.Started:
    """placed: None for a request that has ended without a place"""
    if placed is None:
        return pb.Started(request_id=request_id, seed=seed, prompt_tokens=prompt_tokens)
    return pb.Started(
        request_id=request_id,
        model=placed.engine.model,
        model_revision=placed.engine.model_revision,
        group=placed.group,
        kv_format=placed.engine.kv_format,
        seed=seed,
        prompt_tokens=prompt_tokens,
        kv_hot_pages=placed.lease.hot_pages,
        kv_sealed_pages=placed.lease.sealed_pages,
        kv_reserved_bytes=placed.lease_bytes,
    )


def usage(sequences: Sequence[SequenceUsage], placed: Placed | None) -> pb.Usage:
    """What the sequences of a request cost together. placed: the latest placement, if any"""
    used_bytes = sum(sequence.kv_bytes for sequence in sequences)
    wire = pb.Usage(
        cached_tokens=max((sequence.cached_tokens for sequence in sequences), default=0),
        queue_s=max((sequence.queue_s for sequence in sequences), default=0.0),
        kv_hot_pages=sum(sequence.hot_pages for sequence in sequences),
        kv_sealed_pages=sum(sequence.sealed_pages for sequence in sequences),
        # A sequence's usage comes with its end, when its pages have been freed.
        kv_used_bytes=used_bytes,
        kv_freed_bytes=used_bytes,
        preemptions=sum(sequence.preemptions for sequence in sequences),
    )
    if placed is not None:
        reserved_bytes = sum(sequence.reserved_bytes for sequence in sequences)
        wire.kv_reserved_bytes = max(reserved_bytes, placed.lease_bytes)
        wire.group = placed.group
        wire.kv_format = placed.engine.kv_format
    return wire


def generated(events: Iterable[pb.GenerateStreamResponse]) -> pb.GenerateResponse:
    """A stream's events in one reply."""
    reply = pb.GenerateResponse()
    choices: dict[int, pb.Choice] = {}

    def choice_of(index: int) -> pb.Choice:
        return choices.setdefault(index, pb.Choice(index=index))

    for event in events:
        match event.WhichOneof("event"):
            case "started":
                reply.request_id = event.started.request_id
                reply.model = event.started.model
                reply.seed = event.started.seed
            case "delta":
                choice = choice_of(event.delta.index)
                choice.text += event.delta.text
                choice.token_ids.extend(event.delta.token_ids)
                choice.logprobs.extend(event.delta.logprobs)
            case "choice_finished":
                finished = event.choice_finished
                choice = choice_of(finished.index)
                choice.finish_reason = finished.finish_reason
                match finished.WhichOneof("matched_stop"):
                    case "matched_stop_string":
                        choice.matched_stop_string = finished.matched_stop_string
                    case "matched_stop_token_id":
                        choice.matched_stop_token_id = finished.matched_stop_token_id
            case "usage":
                reply.usage.CopyFrom(event.usage)
    reply.choices.extend(choices[index] for index in sorted(choices))
    return reply


def model_info(status: ClusterStatus, codec: TextCodec, version: str) -> pb.GetModelInfoResponse:
    """The model and its groups. What the groups have in common is read from the first."""
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


def _latency(summary: LatencyStats) -> pb.LatencySummary:
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
        refused_total=count_by_reason(router.refused_total),
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
