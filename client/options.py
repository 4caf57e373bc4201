"""A caller's options: prompts, generation, retries, TLS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

from kvmesh.client.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat; role is "system", "user", "assistant" or one of the template's.

    tool_calls: that the model made, as OpenAI's API returns them or as {"id", "name",
        "arguments"}; arguments are JSON text or a mapping
    tool_call_id, name: of the call that a message of the role "tool" has the result of
    """

    role: str
    content: str | Sequence[Mapping[str, Any]] = ""
    tool_calls: Sequence[Mapping[str, Any]] = ()
    tool_call_id: str = ""
    name: str = ""


Messages: TypeAlias = Sequence[Message | Mapping[str, Any]]
# Text, a chat, or token ids.
Prompt: TypeAlias = str | Messages | Sequence[int]


class GenerateOptions(TypedDict, total=False):
    """The keyword options of generate, generate_stream, chat and chat_stream.

    Options that are left out take the server's default, given in brackets.

    temperature: [1] 0 to 100; below 1e-5 it is greedy
    top_p: [1] nucleus sampling, in (0, 1]
    top_k: [0] keep the k most likely tokens; 0 keeps all
    min_p: [0] 0 to 1: minimum probability relative to the most likely token's
    repetition_penalty: [1] 0.01 to 100
    presence_penalty, frequency_penalty: [0, 0] -100 to 100
    seed: 64 bits; if left out, the server chooses one and reports it
    max_tokens, min_tokens: [256, 0] output tokens per choice
    stop, stop_token_ids: end a choice; the text does not include the stop string
    ignore_eos: [False] continue past the model's end-of-sequence tokens
    logit_bias: token id -> bias added to its logit, -100 to 100
    logprobs: [none] log-probabilities of the chosen token and the k best alternatives, k <= 20
    n: [1] choices
    request_id: names the request, e.g. for abort; generated if left out
    model: checked against the served model
    priority: [0] higher starts sooner
    timeout_s: from the call to the last token, including retries; at most 30 days
    allowed_kv_formats: [all] KV formats that are acceptable, e.g. ["exact", "int8"]
    max_kv_divergence_nats: [none] the most that the KV format may diverge from exact KV, as
        measured: see `model_info().groups`
    cache_salt: cached prefixes are shared only between requests with the same salt

    For chats only:

    tools: functions that the model may call: each with name, description and parameters, a
        JSON schema, or as OpenAI wraps them, {"type": "function", "function": ...}
    chat_template_kwargs: variables of the model's chat template, e.g. {"enable_thinking": False}
    continue_final_message: [False] continue the last message instead of answering it
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
    n: int
    request_id: str
    model: str
    priority: int
    timeout_s: float | None
    allowed_kv_formats: Sequence[str]
    max_kv_divergence_nats: float
    cache_salt: str
    tools: Sequence[Mapping[str, Any]]
    chat_template_kwargs: Mapping[str, Any]
    continue_final_message: bool


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How many retries a call gets, and how long it waits between them.

    Lost connections and refusals for lack of room are retried. The k-th wait is
    uniform in [0, min(max_backoff_s, initial_backoff_s · 2^k)]. If the server sends
    retry_after_s, the client waits that long and adds the jittered back-off, so that
    requests refused together do not return together.

    A server that has served this client before, and is lost, is expected to return: a
    call tries again, and a stream resumes where it stopped, as long as its timeout allows.

    max_attempts: per call; a stream that makes progress starts counting from 1 again;
        1: never retry; not counted while the client waits for a lost server
    max_retry_after_s: if the server asks for a longer wait, the call fails instead
    max_outage_s: how long a call without a timeout waits for a lost server
    """

    max_attempts: int = 4
    initial_backoff_s: float = 0.2
    max_backoff_s: float = 10.0
    max_retry_after_s: float = 60.0
    max_outage_s: float = 120.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise InvalidRequestError.of(
                "max_attempts", f"must be at least 1, got {self.max_attempts}"
            )
        for name in ("max_outage_s", "initial_backoff_s", "max_backoff_s", "max_retry_after_s"):
            # A comparison that is also false for NaN.
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidRequestError.of(
                    name, f"must be finite and at least 0, got {getattr(self, name)}"
                )


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
