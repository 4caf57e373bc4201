"""Checks of a request that depend on the model, when its prompt is tokenised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from kvmesh.cluster.errors import UnsupportedFieldError
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.ingress.validate import GenerationSpec, Prompt
from kvmesh.cluster.reports import ClusterStatus
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.request import TokenIds
from kvmesh.workers.sampling_params import SamplingParams

PROMPT_IDS = "prompt.token_ids.ids"
NO_PLACEHOLDERS: Mapping[int, str] = MappingProxyType({})
MAX_REPLY_ENTRIES = 1 << 18  # log-probabilities of a prompt in one message, about 4 MB


def check_tokens(
    spec: GenerationSpec,
    prompt_ids: TokenIds,
    vocab_size: int,
    unused: frozenset[int] = frozenset(),
    placeholders: Mapping[int, str] = NO_PLACEHOLDERS,
) -> None:
    """Refuse token ids that the model does not have, and a prompt of no tokens, or not of text.

    unused: ids that have no token, though they may be below `vocab_size`
    placeholders: those that stand for an image or the like, and the keys of config.json for them
    """
    if prompt_ids.size == 0:
        refuse("prompt", "must have at least one token")
    if isinstance(spec.prompt, np.ndarray):
        check_ids(PROMPT_IDS, spec.prompt, vocab_size, unused)
    for token_id, key in placeholders.items():
        if (found := np.flatnonzero(prompt_ids == token_id)).size:
            refuse(
                _place(spec.prompt, int(found[0])),
                f"has token {token_id}, which stands for something other than text ({key} in the "
                "model's config.json); only text is served",
            )
    if spec.resume is not None and spec.resume.scores > len(prompt_ids) - 1:
        refuse(
            "resume.prompt_logprobs_received",
            f"must be less than the prompt's tokens ({len(prompt_ids)}), got {spec.resume.scores}",
        )
    for name, ids in (
        ("sampling_params.stop_token_ids", spec.params.stop_token_ids),
        ("sampling_params.logit_bias", spec.params.logit_bias),
        *(
            (f"resume.choices[{choice.position}].token_ids", choice.token_ids)
            for choice in (spec.resume.choices if spec.resume else ())
        ),
    ):
        for token_id in ids:
            if token_id >= vocab_size or token_id in unused:
                refuse(name, _unknown(token_id, vocab_size))


def _place(prompt: Prompt, at: int) -> str:
    """The field that token `at` of a prompt is from."""
    if isinstance(prompt, np.ndarray):
        return f"{PROMPT_IDS}[{at}]"
    return "prompt.text" if isinstance(prompt, str) else "prompt.chat"


def check_pin(spec: GenerationSpec, prompt_ids: TokenIds, status: ClusterStatus) -> None:
    """Refuse to pin a prompt that no group could keep."""
    if not spec.pin_s:
        return
    infos = [report.info for report in status.reports.values()]
    longest = max(info.max_pinned_pages * info.geometry.page_size for info in infos)
    if not longest:
        raise UnsupportedFieldError(
            "pin_s",
            "is not supported here: nothing is cached after a request (engine.prefix_cache, "
            "engine.max_pinned_share, or a model with recurrent layers)",
        )
    if len(prompt_ids) > longest and not status.missing:
        refuse(
            "pin_s",
            f"must not be set for a prompt of {len(prompt_ids):,} tokens: the pins of a tenant "
            f"hold at most {longest:,} in a group (engine.max_pinned_share_per_key)",
        )


def check_ids(
    field: str,
    ids: npt.NDArray[np.integer],
    vocab_size: int,
    unused: frozenset[int] = frozenset(),
) -> None:
    """Refuse ids that have no token, by their places in `field`; see `check_tokens`."""
    bad = (ids < 0) | (ids >= vocab_size)
    if holes := [token_id for token_id in unused if token_id < vocab_size]:
        bad |= np.isin(ids, holes)
    unknown = np.flatnonzero(bad)
    if unknown.size:
        at = int(unknown[0])
        refuse(f"{field}[{at}]", _unknown(int(ids[at]), vocab_size))


def fit_context(spec: GenerationSpec, prompt_tokens: int, max_model_len: int) -> SamplingParams:
    """The parameters, with a max_tokens that fits in the context after the prompt.

    A default is lowered to what fits; an explicit value that does not fit is refused.
    prompt_tokens: less than max_model_len
    """
    available = max_model_len - prompt_tokens
    params = spec.params
    if params.max_tokens <= available:
        return params
    if spec.max_tokens_given:
        refuse(
            "sampling_params.max_tokens",
            f"must be at most {available}: the prompt has {prompt_tokens} tokens and the context "
            f"holds {max_model_len}; got {params.max_tokens}",
        )
    if params.min_tokens > available:
        refuse(
            "sampling_params.min_tokens", f"must be at most {available}, got {params.min_tokens}"
        )
    return replace(
        params, max_tokens=default_max_tokens(params.max_tokens, prompt_tokens, max_model_len)
    )


def default_max_tokens(default: int, prompt_tokens: int, max_model_len: int) -> int:
    """Of a request that gives none: lowered to what fits in the context, but output all the same.

    default: the server's
    """
    return max(min(default, max_model_len - prompt_tokens), 1)


def check_reply(params: pb.SamplingParams, prompt_tokens: int) -> None:
    """Refuse log-probabilities of a prompt that one message cannot hold."""
    entries = prompt_tokens * (1 + params.prompt_logprobs)
    if params.HasField("prompt_logprobs") and entries > MAX_REPLY_ENTRIES:
        refuse(
            "sampling_params.prompt_logprobs",
            f"must be requested with GenerateStream for a prompt of {prompt_tokens:,} tokens: one "
            f"reply holds at most {MAX_REPLY_ENTRIES:,} log-probabilities, this one would have "
            f"{entries:,}",
        )


def _unknown(token_id: int, vocab_size: int) -> str:
    """What is wrong with an id that no token has."""
    return f"{token_id} is not a valid token id; the vocabulary has {vocab_size:,} tokens"
