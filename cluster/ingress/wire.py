"""Protobuf replies, from the control plane's own types."""

from __future__ import annotations

from collections.abc import Callable

from kvmesh.cluster.ingress.choice import ChoiceFinish, ChoiceOutput
from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.cluster.messages import Placed
from kvmesh.cluster.reports import ClusterStatus
from kvmesh.cluster.routing.outcome import TenantStatus
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.request import EndReason

FINISH_REASONS = {
    EndReason.STOP: pb.FINISH_REASON_STOP,
    EndReason.LENGTH: pb.FINISH_REASON_LENGTH,
    EndReason.ABORT: pb.FINISH_REASON_ABORT,
    EndReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}


def delta(
    index: int,
    output: ChoiceOutput,
    codec: TextCodec,
    call_id: Callable[[int, int], str],
    skip_special_tokens: bool,
) -> pb.Delta:
    """call_id: of a choice's call, both by index"""
    return pb.Delta(
        index=index,
        text=output.text,
        token_ids=output.token_ids,
        logprobs=logprobs(output, codec, skip_special_tokens),
        token_offset=output.offset,
        reasoning=output.reasoning,
        tool_calls=[
            pb.ToolCallDelta(
                index=call.index,
                id=call_id(index, call.index) if call.name else "",
                name=call.name,
                arguments_json=call.arguments,
            )
            for call in output.calls
        ],
    )


def logprobs(
    output: ChoiceOutput, codec: TextCodec, skip_special_tokens: bool
) -> pb.Logprobs | None:
    """As columns; None if they were not requested."""
    if not output.logprobs:
        return None
    alternatives = [pair for found in output.logprobs for pair in found.top]
    skip = skip_special_tokens
    return pb.Logprobs(
        chosen=[found.logprob for found in output.logprobs],
        chosen_bytes=[shown_bytes(token_id, codec, skip) for token_id in output.token_ids],
        top_token_ids=[token_id for token_id, _ in alternatives],
        top=[logprob for _, logprob in alternatives],
        top_bytes=[shown_bytes(token_id, codec, skip) for token_id, _ in alternatives],
    )


def shown_bytes(token_id: int, codec: TextCodec, skip_special_tokens: bool) -> bytes:
    """What the token adds to the text that the client gets."""
    hidden = skip_special_tokens and codec.special_text(token_id)
    return b"" if hidden else codec.token_bytes(token_id)


def choice_finished(index: int, finish: ChoiceFinish) -> pb.ChoiceFinished:
    reason = pb.FINISH_REASON_TOOL_CALLS if finish.in_calls else FINISH_REASONS[finish.reason]
    wire = pb.ChoiceFinished(index=index, finish_reason=reason)
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
        cached_tokens=placed.cached_tokens,
    )


def model_info(
    status: ClusterStatus,
    codec: TextCodec,
    version: str,
    defaults: pb.SamplingDefaults,
) -> pb.GetModelInfoResponse:
    """The model and its groups. What the groups have in common is read from the first."""
    first = next(iter(status.reports.values())).info
    wire = pb.GetModelInfoResponse(
        model=first.model,
        model_revision=first.model_revision,
        max_model_len=max(report.info.max_model_len for report in status.reports.values()),
        vocab_size=first.vocab_size,
        version=version,
        has_chat_template=bool(codec.chat_template_names),
        chat_template_names=codec.chat_template_names,
        eos_token_ids=codec.eos_token_ids,
        default_sampling_params=defaults,
    )
    for group, report in status.reports.items():
        info = report.info
        wire.groups.add(
            group=group,
            kv_format=info.kv_format,
            dtype=info.dtype,
            capacity_bytes=info.capacity_bytes,
            max_model_len=info.max_model_len,
            kv_divergence_nats=info.kv_divergence_nats,
            rope=info.rope,
        )
    return wire


def tenant_loads(tenant: str, status: TenantStatus) -> pb.GetTenantLoadsResponse:
    return pb.GetTenantLoadsResponse(
        tenant=tenant,
        queued=status.queued,
        running=status.running,
        leased_bytes=status.leased_bytes,
        quota_bytes=status.quota_bytes,
    )
