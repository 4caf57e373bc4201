"""A caller's options: prompts, generation, retries, TLS."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, TypedDict

from kvmesh.client.checks import check_seconds
from kvmesh.client.errors import InvalidRequestError
from kvmesh.client.types import ToolCall


class Unset(enum.Enum):
    """Nothing was given, where None already has a meaning."""

    UNSET = enum.auto()

    def __repr__(self) -> str:
        return self.name


UNSET: Final = Unset.UNSET
# Seconds; None: no limit; UNSET: the client's.
Timeout: TypeAlias = float | None | Unset


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat; role is "system", "user", "assistant" or one of the template's.

    tool_calls: that the model made, as `Completion.tool_calls` has them, as OpenAI's API returns
        them, or as {"id", "name", "arguments"}; arguments are JSON text or a mapping
    tool_call_id, name: of the call that a message of the role "tool" has the result of
    """

    role: str
    content: str | Sequence[Mapping[str, Any]] = ""
    tool_calls: Sequence[ToolCall | Mapping[str, Any]] = ()
    tool_call_id: str = ""
    name: str = ""


Messages: TypeAlias = Sequence[Message | Mapping[str, Any]]
# Text, a chat, or token ids.
Prompt: TypeAlias = str | Messages | Sequence[int]


class GenerateOptions(TypedDict, total=False):
    """The keyword options of generate and generate_stream.

    An option that is left out, or None, takes the server's default, which is in brackets. The
    model may have others for the first five: see `model_info().default_sampling_params`.

    temperature: [1] 0 to 100; 0 is greedy, and so is anything below 1e-5
    top_p: [1] nucleus sampling, in (0, 1]
    top_k: [0] keep the k most likely tokens; 0 keeps all
    min_p: [0] 0 to 1: minimum probability relative to the most likely token's
    repetition_penalty: [1] 0.01 to 100; above 1 it discourages tokens of prompt and output
    presence_penalty: [0] -100 to 100, subtracted from the logits of tokens of the output
    frequency_penalty: [0] -100 to 100, subtracted once for each occurrence in the output
    seed: [random, and reported back] 64 bits
    max_tokens: [256] output tokens per choice; 0, with prompt_logprobs or pin_s, computes only
        the prompt
    min_tokens: [0] no stop token or stop string ends a choice before this many tokens
    stop: [none] strings that end a choice; its text ends before them
    stop_token_ids: [none] token ids that end a choice
    ignore_eos: [False] continue past the model's end-of-sequence tokens
    logit_bias: [none] token id -> bias added to its logit, -100 to 100
    logprobs: [none] log-probabilities of the chosen tokens, and of the k best, k from 0 to 20
    prompt_logprobs: [none] the same for the tokens of the prompt; a long prompt needs a stream
    skip_special_tokens: [True] leave special tokens, such as end-of-turn marks, out of the text
    include_stop_str_in_output: [False] the text ends after the stop string or stop token
    n: [1] choices
    request_id: [a random one] names the request, e.g. for abort
    model: [the client's, or any] checked against the served model
    priority: [0] higher starts sooner
    timeout_s: [the client's, or no limit] seconds from the call to the last token, including
        retries, at most 30 days; here None means no limit
    allowed_kv_formats: [all] KV formats that are acceptable, e.g. ["exact", "int8"]
    max_kv_divergence_nats: [none] the most that the KV format may diverge from exact KV, as
        measured: see `model_info().groups`
    cache_salt: [none] cached prefixes are shared only between requests with the same salt
    pin_s: [none] the prompt stays cached for this many seconds after the request, up to a day;
        0 ends that. `usage.pinned_tokens` says whether it does, as pins have a bound
    max_reasoning_tokens: [none] after this many tokens of reasoning the model has to answer
    structured_output: [none] what the output must match, as one of {"json_schema": a mapping or
        JSON text}, {"json_object": True}, {"regex": text}, {"grammar": Lark or GBNF},
        {"choice": texts}
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logit_bias: Mapping[int, float]
    logprobs: int
    prompt_logprobs: int
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    n: int
    request_id: str
    model: str
    priority: int
    timeout_s: Timeout
    allowed_kv_formats: Sequence[str]
    max_kv_divergence_nats: float
    cache_salt: str
    pin_s: float
    max_reasoning_tokens: int
    structured_output: Mapping[str, Any]


# By the name that other engines have for it: SamplingParams(temperature=0.0, max_tokens=64).
SamplingParams = GenerateOptions


class ChatOptions(GenerateOptions, total=False):
    """The keyword options of chat and chat_stream: those of `GenerateOptions`, and these.

    tools: [none] functions that the model may call, each with name, description and parameters
        (a JSON schema), or as OpenAI's API has them, {"type": "function", "function": ...}
    chat_template_kwargs: [none] variables of the model's chat template, for instance
        {"enable_thinking": False}
    continue_final_message: [False] continue the last message, do not answer it
    chat_template: [the model's] a template to use instead, in Jinja as transformers has it
    chat_template_name: [the model's default] one of the model's own templates, see
        `model_info().chat_template_names`
    tool_choice: ["auto" with tools] "auto", "none", "required", or the tool to call, as
        {"name": ...} or as OpenAI's API has it
    parallel_tool_calls: [True] whether one answer may have several calls
    """

    tools: Sequence[Mapping[str, Any]]
    chat_template_kwargs: Mapping[str, Any]
    continue_final_message: bool
    chat_template: str
    chat_template_name: str
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """What is tried again, how often, and after which waits. Never beyond the call's timeout.

    Two kinds of failure are tried again, with the same request_id:
    - A lost server: it cannot be reached, is draining, is not ready, or its connection broke.
      The call waits for it to return, however many attempts that takes: as long as its timeout
      allows, or `max_outage_s` without one; `max_connect_s` if this server has never answered.
      A stream that has output resumes where it stopped; for as long as it is answered, if only
      that it waits, the server is not lost.
    - A refusal that may pass: no room (pool or queue), or an engine that was lost. The
      call gets `max_attempts`.
    Everything else fails at once: invalid fields, keys, models, requests that can never fit,
    expired timeouts, server faults.

    The k-th wait is random, uniform in [0, min(max_backoff_s, initial_backoff_s · 2^k)]. If the
    server sends retry_after_s, that is added, so that requests refused together do not return
    together.

    max_attempts: per call; a stream that makes progress starts counting from 1 again;
        1: never retry, nor wait for a lost server
    max_retry_after_s: if the server asks for a longer wait, the call fails instead
    """

    max_attempts: int = 4
    initial_backoff_s: float = 0.2
    max_backoff_s: float = 10.0
    max_retry_after_s: float = 60.0
    max_outage_s: float = 120.0
    # Longer than a server's restart, but its address may be wrong.
    max_connect_s: float = 45.0

    def __post_init__(self) -> None:
        attempts = self.max_attempts
        if not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1:
            raise InvalidRequestError.of(
                "max_attempts", f"expected a whole number from 1, got {attempts!r:.60}"
            )
        for field in dataclasses.fields(self):
            if field.name.endswith("_s"):
                check_seconds(field.name, getattr(self, field.name), zero=True)


NO_RETRY = RetryPolicy(max_attempts=1)


@dataclass(frozen=True, slots=True)
class TLS:
    """Encryption with the system's root certificates, unless others are given.

    Certificates and keys are PEM, as bytes or the path of a file.

    root_ca: certificates to trust
    client_cert, client_key: identify the client to the server; give both or neither
    server_name: the name in the server's certificate, if it differs from the target's
    """

    root_ca: bytes | str | Path | None = None
    client_cert: bytes | str | Path | None = None
    client_key: bytes | str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.client_cert is None) != (self.client_key is None):
            raise InvalidRequestError.of("tls", "client_cert and client_key must be given together")
