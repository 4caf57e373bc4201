"""The inputs and outputs of an engine."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from kvmesh.workers.constraint import OutputConstraint
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.plan import TokenScores
from kvmesh.workers.sampling_params import SamplingParams

TokenIds = npt.NDArray[np.int32]


class EndReason(enum.Enum):
    STOP = "stop"  # an end-of-sequence token, a stop token, or a stop string
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"  # the client cancelled or disconnected
    DEADLINE = "deadline"  # the request's time ran out
    FAULT = "fault"  # this sequence is at fault; `SequenceDelta.error` says why, for its client
    # It has to continue on another engine.
    ERROR = "error"  # this one failed, perhaps because of the sequence; `SequenceDelta.error`
    CLEARED = "cleared"  # this one failed because of another sequence, or it drains


# Ends caused by the model or by its limits: the router learns from their lengths.
NATURAL_ENDS = frozenset({EndReason.STOP, EndReason.LENGTH})


@dataclass(frozen=True, slots=True)
class PinTerms:
    """A prompt stays cached after its request (pins.py).

    owner: whose pins have a bound of their own
    keep_s: seconds after its request has ended; 0 ends the owner's pin of this prompt
    """

    owner: str
    keep_s: float


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate.

    request_id: unique among the live ones of the group
    prompt_token_ids: [prompt_tokens] int32
    lease: of the whole request; this sequence has an equal part of it. None: unlimited
    resumed_tokens: how many of the prompt's last tokens are output that the
        client already has (failover); penalties and max_tokens count them as
        output, and they are not emitted again
    timeout_s: from submission to the last token, or None
    suspicion: how many engines have failed, perhaps because of its request (blame.py)
    constraint: what the output must be, None for anything
    scored_tokens: of the prompt's, from its second on, those whose log-probabilities the client
        has
    pin: of the prompt, None for none
    """

    request_id: str
    prompt_token_ids: TokenIds
    params: SamplingParams
    lease: LeaseTerms | None = None
    resumed_tokens: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""
    suspicion: int = 0
    constraint: OutputConstraint | None = None
    scored_tokens: int = 0
    pin: PinTerms | None = None


class SampledLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Natural-log probabilities under the model, before any sampling parameter.

    top: (token id, logprob), best first
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class SequenceUsage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a sequence cost, known when it ends.

    sealed_pages, hot_pages: the most it held at once; kv_bytes: the bytes of
    those, over all ranks; cached_tokens: prompt tokens found in the prefix cache
    reserved_bytes: its part of the lease as it was at the end, over all ranks
    pinned_tokens: of the prompt, that stay cached because it was to be pinned
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    sealed_pages: int
    hot_pages: int
    kv_bytes: int
    reserved_bytes: int
    queue_s: float
    time_to_first_token_s: float | None
    total_s: float
    preemptions: int
    pinned_tokens: int = 0


class PrefillProgress(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How far a sequence is computed.

    computed_tokens: of total_tokens, which are its prompt and output so far
    cached_tokens: of computed_tokens, those of the prompt found in the prefix cache
    """

    computed_tokens: int
    cached_tokens: int
    total_tokens: int


class SequenceDelta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one sequence, and its end when `finish_reason` is set.

    progress: instead of tokens, at times, while there are many to compute before the next
    scores: instead of tokens, log-probabilities of the next tokens of the prompt
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[SampledLogprobs, ...] = ()
    finish_reason: EndReason | None = None
    matched_stop_token: int | None = None
    usage: SequenceUsage | None = None
    error: str | None = None
    progress: PrefillProgress | None = None
    scores: TokenScores | None = None
