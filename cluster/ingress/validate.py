"""From a request on the wire to checked values, or to a typed error that names the field."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvmesh.cluster.errors import OversizedRequestError, UnsupportedFieldError
from kvmesh.cluster.ingress.answers.plan import AnswerSpec
from kvmesh.cluster.ingress.chat import conversation
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.ingress.resume import Resume, read_resume
from kvmesh.cluster.ingress.structured import answer_spec
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.model.chat import Conversation
from kvmesh.workers.model.generation_defaults import NEUTRAL, DefaultSampling
from kvmesh.workers.request import TokenIds
from kvmesh.workers.sampling_params import RANGES, NumberRange, SamplingParams

MAX_ID_CHARS = 128
MAX_SALT_CHARS = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds a server sets; cluster/config.py documents those that are settings.

    max_waiting_...: of one tenant; more are refused, as the memory of a server is bounded.
        Callers in the same process bound that themselves, and wait
    max_waiting_prompts: long ones, and chats with a template of their own
    max_waiting_chats: half as many as an ingress has calls, so that others have the rest
    """

    max_request_bytes: int = 16 << 20
    max_stop_strings: int = 16
    max_stop_chars: int = 1024
    max_choices: int = 16
    default_max_tokens: int = 256
    max_timeout_s: float | None = None
    max_waiting_prompts: int = 16
    max_waiting_chats: int = 512
    max_waiting_grammars: int = 64


Prompt = str | Conversation | TokenIds


def check_size(num_bytes: int, limits: Limits) -> None:
    """Raises OversizedRequestError."""
    if num_bytes > limits.max_request_bytes:
        raise OversizedRequestError(
            "request", f"must have at most {limits.max_request_bytes:,} bytes, got {num_bytes:,}"
        )


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


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """A well-formed request. Checks that depend on the model follow after tokenising.

    params: its seed is the request's; each choice derives its own
    max_tokens_given: False where params.max_tokens is the server's default
    pin_s: for how long the prompt stays cached after the request, None if it need not
    """

    request_id: str
    prompt: Prompt
    params: SamplingParams
    max_tokens_given: bool = True
    n: int = 1
    rules: TextRules
    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""
    pin_s: float | None = None
    resume: Resume | None = None
    answer: AnswerSpec = field(default_factory=AnswerSpec)


def generation_spec(
    request: pb.GenerateRequest,
    limits: Limits,
    defaults: DefaultSampling = NEUTRAL,
) -> GenerationSpec:
    """Raises InvalidFieldError naming the field by its path in the request."""
    wire = request.sampling_params
    if request.adapter:
        raise UnsupportedFieldError("adapter", "is not supported by this server yet")
    n = number_of_choices("sampling_params.n", wire, limits)
    pin_s = request.pin_s if request.HasField("pin_s") else None
    if pin_s is not None:
        RANGES["pin_s"].check("pin_s", pin_s)
    params = sampling_params(wire, limits, defaults, output_optional=pin_s is not None)
    if params.max_tokens == 0:
        check_no_output("sampling_params.n", n)
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
        pin_s=pin_s,
        resume=read_resume(request.resume, n) if request.HasField("resume") else None,
        answer=answer,
    )


def number_of_choices(
    field: str, wire: pb.SamplingParams | pb.EstimateBudgetRequest, limits: Limits
) -> int:
    n = wire.n if wire.HasField("n") else 1
    NumberRange(1, limits.max_choices).check(field, n)
    return n


def check_no_output(field: str, n: int) -> None:
    """Refuse several choices of a request without output."""
    if n > 1:
        refuse(field, f"must be 1 with max_tokens 0, without output; got {n}")


def sampling_params(
    wire: pb.SamplingParams,
    limits: Limits,
    defaults: DefaultSampling,
    *,
    output_optional: bool,
) -> SamplingParams:
    """The wire's parameters with defaults, and with a random seed if none is given.

    output_optional: max_tokens may be 0
    """
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
            output_optional=output_optional,
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
        return limits.max_timeout_s
    timeout_s = request.timeout_s
    RANGES["timeout_s"].check("timeout_s", timeout_s)
    if limits.max_timeout_s is not None:
        return min(timeout_s, limits.max_timeout_s)
    return timeout_s
