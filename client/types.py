"""Results as frozen dataclasses, with the field names of the wire contract."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

TokenId = int


class FinishReason(enum.StrEnum):
    STOP = "stop"  # a stop string, a stop token or the end of sequence
    LENGTH = "length"  # max_tokens, or the context is full
    ABORT = "abort"  # aborted by request_id
    DEADLINE = "deadline"  # timeout_s expired after the first token
    TOOL_CALLS = "tool_calls"  # like STOP, and the output ends in complete tool calls
    OTHER = "other"  # a reason that this SDK does not know, see `finish_reason_number`


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural log of its probability under the model.

    text: the token on its own; U+FFFD for a part of a character
    bytes: what the token adds to the text, in UTF-8: nothing if it is a special token, unless
        the text has those
    """

    token_id: TokenId
    text: str
    logprob: float
    bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The chosen token, and the best alternatives in descending order."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the model calls.

    arguments_json: a JSON object; incomplete if max_tokens has cut the call
    """

    id: str
    name: str
    arguments_json: str

    @property
    def arguments(self) -> dict[str, Any]:
        """Raises ValueError for arguments that are incomplete."""
        found: dict[str, Any] = json.loads(self.arguments_json)
        return found


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A tool call that starts, with its id and name, or continues.

    index: of the call within its choice
    arguments_json: what follows the pieces before
    """

    index: int
    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One output. `matched_stop` is the stop string or stop token id that ended it.

    finish_reason_number: the reason's number in the contract
    reasoning: what the model thought before its answer
    """

    index: int
    text: str
    token_ids: tuple[TokenId, ...]
    finish_reason: FinishReason
    matched_stop: str | int | None
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason_number: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New output of one choice of a stream; the last delta has its finish_reason."""

    index: int
    text: str
    token_ids: tuple[TokenId, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None
    finish_reason_number: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request used, over all choices. Pages are per rank, bytes over all ranks.

    pinned_tokens: of the prompt, that stay cached because of pin_s
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_s: float
    time_to_first_token_s: float | None
    total_s: float
    kv_hot_pages: int
    kv_sealed_pages: int
    kv_reserved_bytes: int
    kv_used_bytes: int
    kv_freed_bytes: int
    preemptions: int
    group: str
    kv_format: str
    failovers: int
    cached_tokens_by_tier: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pinned_tokens: int = 0

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens per second after the first token, or None if there was only one."""
        if self.time_to_first_token_s is None or self.completion_tokens < 2:
            return None
        decode_s = self.total_s - self.time_to_first_token_s
        return (self.completion_tokens - 1) / decode_s if decode_s > 0 else None


@dataclass(frozen=True, slots=True)
class Completion:
    """All output of a request. `text`, `reasoning`, `tool_calls`: those of the first choice.

    prompt_logprobs: if requested, of the prompt's tokens but the first, which nothing predicts
    """

    request_id: str
    model: str
    seed: int
    choices: tuple[Choice, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def reasoning(self) -> str:
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.choices[0].tool_calls


@dataclass(frozen=True, slots=True)
class Started:
    """Which group runs a stream, and what is reserved. Pages per rank, bytes over all ranks.

    cached_tokens: of the prompt, that the group is thought to have in its prefix cache
    """

    request_id: str
    model: str
    model_revision: str
    group: str
    kv_format: str
    seed: int
    prompt_tokens: int
    kv_hot_pages: int
    kv_sealed_pages: int
    kv_reserved_bytes: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits for room: how many are ahead of it, and the projected wait if known."""

    position: int
    projected_wait_s: float | None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Prefilling:
    """How much of the prompt is computed. Comes again if nothing was sent for some seconds.

    computed_tokens: of total_tokens
    cached_tokens: of computed_tokens, those found in the prefix cache
    total_tokens: the prompt, and any output that has to be computed again
    """

    computed_tokens: int
    cached_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """If requested: of the next tokens of the prompt, from its second on."""

    tokens: tuple[TokenLogprobs, ...]


# What `Stream.events` yields. Usage is the last.
StreamEvent: TypeAlias = Queued | Started | Prefilling | PromptLogprobs | Delta | Usage


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt as the model sees it."""

    token_ids: tuple[TokenId, ...]
    max_model_len: int


@dataclass(frozen=True, slots=True)
class GroupEstimate:
    """What a request would need on one group. Pages per rank, bytes over all ranks.

    cost_s: what placement compares, in seconds of time to first token
    """

    group: str
    kv_format: str
    hot_pages: int
    sealed_pages: int
    needed_bytes: int
    free_bytes: int
    capacity_bytes: int
    cached_tokens: int
    feasible_now: bool
    feasible_ever: bool
    projected_wait_s: float | None
    reason: str
    cost_s: float | None


@dataclass(frozen=True, slots=True)
class PlacementDecision:
    """One placement decision and the state of every group at that time.

    `group` is "" if the request was not placed.
    """

    age_s: float
    outcome: str
    group: str
    groups: tuple[GroupEstimate, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """All decisions about a request, oldest first; empty if the request is not known."""

    request_id: str
    decisions: tuple[PlacementDecision, ...]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a request would need and when it could start; `group` is "" if it cannot."""

    prompt_tokens: int
    max_tokens: int
    feasible_now: bool
    feasible_ever: bool
    projected_wait_s: float | None
    group: str
    groups: tuple[GroupEstimate, ...]


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """A group, as far as it matters to a request.

    dtype: of weights, and of pages that are not quantised
    capacity_bytes: of KV, over all ranks
    kv_divergence_nats: of its format from exact KV, as measured; None if it was not
    rope: how positions are scaled, and instead of what if the operator chose it
    """

    group: str
    kv_format: str
    dtype: str
    capacity_bytes: int
    max_model_len: int
    kv_divergence_nats: float | None
    rope: str = ""


@dataclass(frozen=True, slots=True)
class TenantLoads:
    """What the caller's tenant is using. quota_bytes: the most it may reserve, or None"""

    tenant: str
    queued: int
    running: int
    leased_bytes: int
    quota_bytes: int | None


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request gets that sets nothing itself; None: as the options' descriptions say."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model; `version` is the server's.

    vocab_size: token ids are below it
    default_sampling_params: from the model's generation_config.json and the server's settings
    chat_template_names: that the option chat_template_name may have
    """

    model: str
    model_revision: str
    max_model_len: int
    vocab_size: int
    version: str
    has_chat_template: bool
    eos_token_ids: tuple[TokenId, ...]
    groups: tuple[GroupInfo, ...]
    default_sampling_params: SamplingDefaults = SamplingDefaults()
    chat_template_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """What a group is made of. Pages per rank, capacity over all ranks.

    max_num_batched_tokens, device: 0 and "" from a server that does not say them
    operators: that were chosen when the group started, such as "far keys: torch, sums: NCCL"
    layout_reason: why it has this tp and kvp; "" if they were given
    kv_format_warning: that its KV format hurts the model, and what to use instead; "" otherwise
    """

    group: str
    kv_format: str
    dtype: str
    tp: int
    kvp: int
    page_size: int
    sink_pages: int
    recent_pages: int
    max_num_seqs: int
    hot_pages: int
    sealed_pages: int
    hot_page_bytes: int
    sealed_page_bytes: int
    capacity_bytes: int
    max_num_batched_tokens: int = 0
    device: str = ""
    operators: str = ""
    layout_reason: str = ""
    kv_format_warning: str = ""


@dataclass(frozen=True, slots=True)
class PagesLoad:
    """Pages of one rank: used + cached + free = total."""

    total: int
    used: int
    cached: int
    free: int
    page_bytes: int


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """Latencies over a recent window."""

    count: int
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class SequenceLoads:
    """A live sequence: one choice of a request.

    tenant, request_id: empty for a request of before the router's start
    age_s: since its group has had it
    computed_tokens: of prompt_tokens + completion_tokens, those whose KV exists
    cached_tokens: of the prompt, those found in the prefix cache
    """

    tenant: str
    request_id: str
    age_s: float
    prompt_tokens: int
    completion_tokens: int
    computed_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class GroupLoads:
    """What a group is running, holds, and has done since it started. Bytes over all ranks.

    oldest: the live sequences that it has had for longest, oldest first
    pinned_pages: of prompts, that stay cached for a time; pinned_evictions_total: of these, how
        many running requests needed all the same
    """

    group: str
    kv_format: str
    healthy: bool
    draining: bool
    running: int
    waiting: int
    hot: PagesLoad
    sealed: PagesLoad
    used_bytes: int
    cached_bytes: int
    free_bytes: int
    total_bytes: int
    prompt_tokens_total: int
    completion_tokens_total: int
    cached_tokens_total: int
    preemptions_total: int
    steps_total: int
    outcomes_total: Mapping[str, int]
    time_to_first_token: LatencySummary
    time_per_output_token: LatencySummary
    queue_time: LatencySummary
    oldest: tuple[SequenceLoads, ...]
    pinned_pages: int = 0
    pinned_evictions_total: int = 0


@dataclass(frozen=True, slots=True)
class GroupLedger:
    """What leases have reserved on a group. Pages per rank, bytes over all ranks."""

    group: str
    leases: int
    hot_pages_leased: int
    hot_pages_total: int
    sealed_pages_leased: int
    sealed_pages_total: int
    leased_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class RouterLoads:
    """The router's queue and ledger.

    expired_total: leases that expired without being released
    audits_total, audit_faults_total: comparisons of engines' reports with the ledger, and
        how many found a difference
    oldest_wait_s: how long the request that has waited longest has waited, 0 if none waits
    """

    epoch: int
    queue_length: int
    queue_capacity: int
    leases: int
    ledger: tuple[GroupLedger, ...]
    granted_total: int
    released_total: int
    expired_total: int
    refused_total: Mapping[str, int]
    audits_total: int
    audit_faults_total: int
    oldest_wait_s: float


@dataclass(frozen=True, slots=True)
class Loads:
    """The current load of the cluster."""

    groups: tuple[GroupLoads, ...]
    router: RouterLoads
