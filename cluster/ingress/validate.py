"""From a request on the wire to checked values, or to a typed error that names the field."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from kvmesh.cluster.errors import OversizedRequestError, UnsupportedFieldError
from kvmesh.cluster.ingress.answers.plan import AnswerSpec
from kvmesh.cluster.ingress.chat import conversation
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.ingress.structured import answer_spec
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.model.chat import Conversation
from kvmesh.workers.model.generation_defaults import NEUTRAL, DefaultSampling
from kvmesh.workers.request import TokenIds
from kvmesh.workers.sampling_params import RANGES, NumberRange, SamplingParams

MAX_ID_CHARS = 128
PROMPT_IDS = "prompt.token_ids.ids"
MAX_REPLY_ENTRIES = 1 << 18  # log-probabilities of a prompt in one message, about 4 MB
MAX_SALT_CHARS = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds a server sets; cluster/config.py documents them."""

    max_request_bytes: int = 16 << 20
    max_stop_strings: int = 16
    max_stop_chars: int = 1024
    max_choices: int = 16
    default_max_tokens: int = 256
    default_timeout_s: float | None = None


Prompt = str | Conversation | TokenIds


def check_size(num_bytes: int, limits: Limits) -> None:
    """Raises OversizedRequestError."""
    if num_bytes > limits.max_request_bytes:
        raise OversizedRequestError(
            "request", f"must have at most {limits.max_request_bytes:,} bytes, got {num_bytes:,}"
        )


@dataclass(frozen=True, slots=True)
class ResumedChoice:
    """Output that a client already has: its tokens, and how many characters of its text, of its
    reasoning and of the arguments of each tool call.

    position: in the request's list, which need not be in the order of the choices
    """

    token_ids: tuple[int, ...] = ()
    text_chars: int = 0
    finished: bool = False
    position: int = 0
    reasoning_chars: int = 0
    tool_arguments_chars: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Resume:
    """choices: one for each index below n; scores: of the prompt, that the client has"""

    model_revision: str
    choices: tuple[ResumedChoice, ...]
    scores: int = 0


@dataclass(frozen=True, slots=True)
class TextRules:
    """How a choice's tokens become its text.

    stop: strings that end it
    skip_special_tokens: special tokens have no text
    include_stop: the text has the stop string or stop token that ends it
    """

    stop: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    include_stop: bool = False


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """A well-formed request. Checks that depend on the model follow after tokenising.

    params: its seed is the request's; each choice derives its own
    max_tokens_given: False where params.max_tokens is the server's default
    """

    request_id: str
    prompt: Prompt
    params: SamplingParams
    max_tokens_given: bool
    n: int
    rules: TextRules
    priority: int
    timeout_s: float | None
    cache_salt: str
    resume: Resume | None
    answer: AnswerSpec = field(default_factory=AnswerSpec)


def cache_salt(tenant: str, salt: str) -> str:
    """Prompts with different salts share no cached pages.

    Otherwise the time to the first token would reveal that another tenant sent the same text.
    Each part is hashed with its length, so that no two pairs are alike.
    """
    digest = hashlib.sha256()
    for part in (tenant.encode(), salt.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def generation_spec(
    request: pb.GenerateRequest,
    limits: Limits,
    defaults: DefaultSampling = NEUTRAL,
) -> GenerationSpec:
    """Raises InvalidFieldError naming the field by its path in the request."""
    wire = request.sampling_params
    for path, given in (("adapter", bool(request.adapter)),):
        if given:
            raise UnsupportedFieldError(path, "is not supported by this server yet")
    n = number_of_choices("sampling_params.n", wire, limits)
    params = sampling_params(wire, limits, defaults)
    if params.max_tokens == 0 and n > 1:
        refuse("sampling_params.n", f"must be 1 with max_tokens 0, without output; got {n}")
    found = prompt(request.prompt)
    answer = answer_spec(request, found if isinstance(found, Conversation) else None)
    return GenerationSpec(
        request_id=_request_id(request.request_id),
        prompt=found,
        params=params,
        max_tokens_given=wire.HasField("max_tokens"),
        n=n,
        rules=TextRules(
            _stop_strings(wire.stop, limits),
            wire.skip_special_tokens if wire.HasField("skip_special_tokens") else True,
            wire.include_stop_str_in_output,
        ),
        priority=request.priority,
        timeout_s=_timeout_s(request, limits),
        cache_salt=_short("cache_salt", request.cache_salt, MAX_SALT_CHARS),
        resume=_resume(request.resume, n) if request.HasField("resume") else None,
        answer=answer,
    )


def number_of_choices(
    field: str, wire: pb.SamplingParams | pb.EstimateBudgetRequest, limits: Limits
) -> int:
    n = wire.n if wire.HasField("n") else 1
    NumberRange(1, limits.max_choices).check(field, n)
    return n


def sampling_params(
    wire: pb.SamplingParams, limits: Limits, defaults: DefaultSampling
) -> SamplingParams:
    """The wire's parameters with defaults, and with a random seed if none is given."""
    given = {
        name: getattr(wire, name)
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "seed",
            "max_tokens",
            "min_tokens",
            "ignore_eos",
            "logprobs",
            "prompt_logprobs",
        )
        if wire.HasField(name)
    }
    given = {**defaults.given(), "seed": secrets.randbits(64), **given}
    if "max_tokens" not in given:
        # The default must not conflict with a larger min_tokens.
        given["max_tokens"] = max(limits.default_max_tokens, given.get("min_tokens", 0))
    try:
        return SamplingParams(
            **given,
            stop_token_ids=tuple(wire.stop_token_ids),
            logit_bias=dict(wire.logit_bias),
        )
    except InvalidFieldError as error:
        raise InvalidFieldError(f"sampling_params.{error.field}", error.message) from None


def prompt(wire: pb.Prompt) -> Prompt:
    """The prompt as text, chat turns or token ids; refuses an empty one."""
    kind = wire.WhichOneof("kind")
    if kind == "text":
        if not wire.text:
            refuse("prompt.text", "must not be empty")
        return wire.text
    if kind == "chat":
        return conversation(wire.chat)
    if kind == "token_ids":
        if not wire.token_ids.ids:
            refuse("prompt.token_ids", "must not be empty")
        ids = np.array(wire.token_ids.ids, dtype=np.int64)
        # Vocabularies are far smaller: no model has a token id beyond int32.
        if int(ids.max()) > np.iinfo(np.int32).max:
            refuse(
                "prompt.token_ids",
                f"{int(ids.max())} is not a valid token id; the maximum is 2^31 - 1",
            )
        return ids.astype(np.int32)
    raise InvalidFieldError("prompt", "must have one of text, chat or token_ids; none is set")


def check_tokens(
    spec: GenerationSpec,
    prompt_ids: TokenIds,
    vocab_size: int,
    unused: frozenset[int] = frozenset(),
) -> None:
    """Refuse token ids that the model does not have, and a prompt of no tokens.

    unused: ids that have no token, though they may be below `vocab_size`
    """
    if prompt_ids.size == 0:
        refuse("prompt", "must have at least one token")
    if isinstance(spec.prompt, np.ndarray):
        check_ids(PROMPT_IDS, spec.prompt, vocab_size, unused)
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
    return replace(params, max_tokens=available)


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


def choice_seed(seed: int, index: int) -> int:
    """A choice's seed: the request's own for the first, mixed (SplitMix64) for the others."""
    if index == 0:
        return seed
    mask = (1 << 64) - 1
    mixed = (seed + index * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31)


def _unknown(token_id: int, vocab_size: int) -> str:
    """What is wrong with an id that no token has."""
    return f"{token_id} is not a valid token id; the vocabulary has {vocab_size:,} tokens"


def _request_id(request_id: str) -> str:
    if not request_id:
        return secrets.token_hex(16)
    _short("request_id", request_id, MAX_ID_CHARS)
    if not request_id.isprintable():
        refuse("request_id", f"must be printable, got {request_id!r}")
    return request_id


def _short(field: str, value: str, max_chars: int) -> str:
    if len(value) > max_chars:
        refuse(field, f"must have at most {max_chars} characters, got {len(value)}")
    return value


def _stop_strings(stops: Sequence[str], limits: Limits) -> tuple[str, ...]:
    field = "sampling_params.stop"
    if len(stops) > limits.max_stop_strings:
        refuse(field, f"must have at most {limits.max_stop_strings} strings, got {len(stops)}")
    for index, stop in enumerate(stops):
        if not stop:
            refuse(f"{field}[{index}]", "must not be empty")
        _short(f"{field}[{index}]", stop, limits.max_stop_chars)
    return tuple(stops)


def _timeout_s(request: pb.GenerateRequest, limits: Limits) -> float | None:
    if not request.HasField("timeout_s"):
        return limits.default_timeout_s
    timeout_s = request.timeout_s
    RANGES["timeout_s"].check("timeout_s", timeout_s)
    if limits.default_timeout_s is not None:
        return min(timeout_s, limits.default_timeout_s)
    return timeout_s


def _resume(wire: pb.Resume, n: int) -> Resume:
    choices = [ResumedChoice()] * n
    seen: set[int] = set()
    for position, choice in enumerate(wire.choices):
        field = f"resume.choices[{position}].index"
        if choice.index >= n:
            refuse(field, f"must be less than n ({n}), got {choice.index}")
        if choice.index in seen:
            refuse(field, f"must be unique, but {choice.index} appears twice")
        seen.add(choice.index)
        choices[choice.index] = ResumedChoice(
            tuple(choice.token_ids),
            choice.text_chars,
            choice.finished,
            position,
            choice.reasoning_chars,
            tuple(choice.tool_arguments_chars),
        )
    return Resume(wire.model_revision, tuple(choices), wire.prompt_logprobs_received)
