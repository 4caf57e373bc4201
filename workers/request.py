"""What goes into an engine and what comes out: the values both sides share."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from kvmesh.workers.sampling_params import SamplingParams

TokenIds = npt.NDArray[np.int32]


class FinishReason(enum.Enum):
    STOP = "stop"  # an end-of-sequence or stop token (stop strings: the ingress)
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"  # the client cancelled, or is gone
    DEADLINE = "deadline"  # the request's time ran out
    ERROR = "error"  # the engine failed; `SequenceDelta.error` says how


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """A reservation of pages on one group, as the router granted it.

    epoch: of the router that granted it, so that a stale one can be told
    number: of that router's grants before it, which gives leases an order of age
    most_sealed_pages: what the lease may grow to
    shared_sealed_pages: of its sealed pages, those that an earlier lease of the group paid
        for when it was granted
    sequences: that it is for
    """

    lease_id: str
    epoch: int
    hot_pages: int
    sealed_pages: int
    most_sealed_pages: int = 0
    shared_sealed_pages: int = 0
    sequences: int = 1
    number: int = 0

    @property
    def share(self) -> LeaseTerms:
        """One sequence's part; page counts are alike for all of them."""
        count = self.sequences
        return replace(
            self,
            hot_pages=self.hot_pages // count,
            sealed_pages=self.sealed_pages // count,
            most_sealed_pages=self.most_sealed_pages // count,
            shared_sealed_pages=-(-self.shared_sealed_pages // count),
            sequences=1,
        )

    def __add__(self, other: LeaseTerms) -> LeaseTerms:
        """Two parts of one lease together."""
        return replace(
            self,
            hot_pages=self.hot_pages + other.hot_pages,
            sealed_pages=self.sealed_pages + other.sealed_pages,
            most_sealed_pages=self.most_sealed_pages + other.most_sealed_pages,
            shared_sealed_pages=self.shared_sealed_pages + other.shared_sealed_pages,
            sequences=self.sequences + other.sequences,
        )


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate.

    request_id: unique among the live ones of the group
    client_id: whose output stream gets the deltas (an ingress replica)
    prompt_token_ids: [prompt_tokens] int32
    resumed_tokens: how many of the prompt's last tokens are output that the
        client already has (failover); penalties and max_tokens count them as
        output, and they are not emitted again
    timeout_s: from submission to the last token, or None
    """

    request_id: str
    client_id: str
    prompt_token_ids: TokenIds
    params: SamplingParams
    lease: LeaseTerms | None = None
    resumed_tokens: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities under the model, before any sampling parameter.

    top: (token id, logprob), best first
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceUsage:
    """What a sequence cost, known when it ends.

    sealed_pages, hot_pages: the most it held at once; kv_bytes: the bytes of
    those, over all ranks; cached_tokens: prompt tokens the prefix cache spared
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    sealed_pages: int
    hot_pages: int
    kv_bytes: int
    queue_s: float
    time_to_first_token_s: float | None
    total_s: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class SequenceDelta:
    """New tokens of one sequence, and its end when `finish_reason` is set."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop_token: int | None = None
    usage: SequenceUsage | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class PoolLoads:
    """Pages of one rank's pool; every rank's is alike. used + cached + free = total.

    hot_page_bytes, sealed_page_bytes: of one page over all ranks
    """

    hot_total: int
    hot_used: int
    hot_cached: int
    hot_free: int
    sealed_total: int
    sealed_used: int
    sealed_cached: int
    sealed_free: int
    hot_page_bytes: int
    sealed_page_bytes: int


@dataclass(frozen=True, slots=True)
class EngineLoads:
    """A report of an engine: what it runs, holds and has done since it started.

    epoch: identifies this incarnation of the engine
    leases: of every lease that live sequences came with, the terms of those together
    """

    epoch: str
    running: int
    waiting: int
    pool: PoolLoads
    leases: tuple[LeaseTerms, ...]
    prompt_tokens_total: int
    completion_tokens_total: int
    cached_tokens_total: int
    preemptions_total: int
    steps_total: int
    outcomes_total: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PageChanges:
    """What an engine's prefix cache has gained and lost, by the digests of blocks' last pages.

    version: of the cache, after them; to ask for what follows
    """

    version: int
    held: tuple[bytes, ...] = ()
    dropped: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What does not change while an engine lives.

    model_revision: digest of the weights' source
    hot_pages, sealed_pages: that sequences can hold, so without the step's headroom
    hot_page_bytes, sealed_page_bytes: of one page over all ranks
    prefix_cache: equal pages of live and ended sequences are stored once
    """

    epoch: str
    model: str
    model_revision: str
    kv_format: str
    dtype: str
    tp: int
    page_size: int
    sink_pages: int
    recent_pages: int
    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    hot_pages: int
    sealed_pages: int
    hot_page_bytes: int
    sealed_page_bytes: int
    prefix_cache: bool = True
