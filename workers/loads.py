"""What an engine reports: facts that do not change while it lives, and its load."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.sizes import PageGeometry, PageNeed

OLDEST = 8


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What does not change while an engine lives.

    epoch: identifies this incarnation of the engine
    model_revision: digest of the weights' source
    geometry: page shapes and windows; `geometry.ranks` ranks hold each page's parts
    capacity: pages of one rank that sequences can hold, the step's headroom left out
    vocab_size: all tokens have ids below it
    rope: how positions are scaled, and instead of what if an operator chose it
    prefix_cache: equal pages of live and ended sequences are stored once
    max_num_batched_tokens: of a step
    device: of the ranks, cpu or cuda
    operators: see RankDescription
    max_pinned_pages: of a prompt, that pins of one key can hold; 0 if nothing can be pinned
    kv_divergence_nats, kv_format_warning: see FormatCheck
    """

    epoch: str
    model: str
    model_revision: str
    kv_format: str
    dtype: str
    tp: int
    geometry: PageGeometry
    capacity: PageNeed
    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    prefix_cache: bool = True
    max_num_batched_tokens: int = 512
    device: str = "cpu"
    rope: str = "default"
    operators: str = ""
    max_pinned_pages: int = 0
    kv_divergence_nats: float | None = None
    kv_format_warning: str = ""

    @property
    def capacity_bytes(self) -> int:
        """Bytes of KV and states over all ranks."""
        return self.geometry.bytes_of(self.capacity, self.max_num_seqs)


@dataclass(frozen=True, slots=True)
class ArenaLoads:
    """Pages of one rank's arena, the same on every rank. used + cached + free = total."""

    total: int = 0
    used: int = 0
    cached: int = 0
    free: int = 0


@dataclass(frozen=True, slots=True)
class PoolLoads:
    """Both arenas of one rank."""

    hot: ArenaLoads = ArenaLoads()
    sealed: ArenaLoads = ArenaLoads()

    @property
    def used(self) -> PageNeed:
        return PageNeed(self.hot.used, self.sealed.used)


@dataclass(frozen=True, slots=True)
class StepTime:
    """How long a step took.

    host_s: scheduling, preparing and accounting; device_s: the model
    token_gap_s: since the previous token of the sequence that waited longest for one of
        this step's, None if no sequence got a further token
    """

    host_s: float
    device_s: float
    token_gap_s: float | None = None


@dataclass(frozen=True, slots=True)
class SequenceLoad:
    """A live sequence.

    lease_id: "" without a lease; age_s: since it was submitted
    computed_tokens: of total_tokens, which are its prompt and output so far
    cached_tokens: of the prompt, found in the prefix cache
    """

    lease_id: str
    age_s: float = field(compare=False)  # differs with each look
    prompt_tokens: int
    computed_tokens: int
    cached_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class EngineLoads:
    """A report of an engine: what it runs, holds and has done since it started.

    leases: of all live sequences
    oldest: the sequences that were submitted first, at most OLDEST of them
    prefill_remaining_tokens: to compute before live sequences get their next token
    expert_imbalance: tokens of the busiest expert relative to the mean, as measured last; None
        for models without experts
    prefill_tokens_total, decode_tokens_total: computed in chunks of prompts, and singly
    pinned_pages: of prompts, that stay cached for a time, over all ranks that share a sequence's
    pinned_evictions_total: pages that were needed all the same
    """

    running: int = 0
    waiting: int = 0
    pool: PoolLoads = PoolLoads()
    leases: tuple[LeaseTerms, ...] = ()
    prompt_tokens_total: int = 0
    completion_tokens_total: int = 0
    cached_tokens_total: int = 0
    prefill_tokens_total: int = 0
    decode_tokens_total: int = 0
    prefill_remaining_tokens: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    oldest: tuple[SequenceLoad, ...] = ()
    outcomes_total: dict[str, int] = field(default_factory=dict)
    expert_imbalance: float | None = None
    pinned_pages: int = 0
    pinned_evictions_total: int = 0
