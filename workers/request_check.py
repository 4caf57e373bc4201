"""Whether an engine can ever serve a request."""

from __future__ import annotations

from kvmesh.workers.errors import InvalidFieldError, PoolCapacityError
from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import RANGES
from kvmesh.workers.sizes import PageNeed


def check_request(request: EngineRequest, info: EngineInfo) -> None:
    """Raise if the engine can never serve the request, however little else it does.

    InvalidFieldError names the field, PoolCapacityError has the bytes.
    """
    _check_tokens(request, info.vocab_size)
    if request.timeout_s is not None:
        RANGES["timeout_s"].check("timeout_s", request.timeout_s)
    _check_counts(request)
    prompt_tokens = len(request.prompt_token_ids)
    if prompt_tokens >= info.max_model_len:
        raise InvalidFieldError(
            "prompt",
            f"must have less than {info.max_model_len} tokens, the model's context, "
            f"to leave room for output; got {prompt_tokens}",
        )
    total = prompt_tokens - request.resumed_tokens + request.params.max_tokens
    _check_pages(min(total, info.max_model_len), info)


def unknown_token(token_id: int, vocab_size: int) -> str:
    """What is wrong with an id that no token has."""
    return f"{token_id} is not a valid token id; the vocabulary has {vocab_size:,} tokens"


def _check_tokens(request: EngineRequest, vocab_size: int) -> None:
    prompt = request.prompt_token_ids
    if len(prompt) == 0:
        raise InvalidFieldError("prompt", "must have at least one token")
    if (bad := prompt[(prompt < 0) | (prompt >= vocab_size)]).size:
        raise InvalidFieldError("prompt.token_ids", unknown_token(int(bad[0]), vocab_size))
    for field in ("stop_token_ids", "logit_bias"):
        for token_id in getattr(request.params, field):
            if not 0 <= token_id < vocab_size:
                raise InvalidFieldError(field, unknown_token(token_id, vocab_size))


def _check_counts(request: EngineRequest) -> None:
    """How much of the prompt is output already, and how much of it has scores."""
    prompt_tokens = len(request.prompt_token_ids)
    resumable = max(min(prompt_tokens, request.params.max_tokens) - 1, 0)
    if not 0 <= request.resumed_tokens <= resumable:
        raise InvalidFieldError(
            "resumed_tokens",
            f"must be from 0 to {resumable}, less than the prompt's tokens and than "
            f"max_tokens; got {request.resumed_tokens}",
        )
    scorable = prompt_tokens - request.resumed_tokens - 1
    if not 0 <= request.scored_tokens <= scorable:
        raise InvalidFieldError(
            "scored_tokens",
            f"must be from 0 to {scorable}, less than the prompt's tokens; "
            f"got {request.scored_tokens}",
        )


def _check_pages(num_tokens: int, info: EngineInfo) -> None:
    geometry = info.geometry
    need = geometry.peak_need(num_tokens)
    # One sequence's hot pages always fit, and it can have all sealed pages.
    largest = PageNeed(geometry.hot_per_sequence(), info.capacity.sealed)
    if need.sealed > largest.sealed:
        needed, available = geometry.bytes_of(need), geometry.bytes_of(largest)
        raise PoolCapacityError(
            f"the request needs {needed:,} bytes of KV cache; this group has {available:,}",
            needed_bytes=needed,
            available_bytes=available,
            retryable=False,
        )
