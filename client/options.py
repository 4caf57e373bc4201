"""What a caller may ask for: prompts, generation options, retries, TLS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypedDict

from kvmesh.client.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat; role is "system", "user", "assistant" or the template's own."""

    role: str
    content: str


Messages: TypeAlias = Sequence[Message | Mapping[str, str]]
# Text, a chat, or token ids.
Prompt: TypeAlias = str | Messages | Sequence[int]


class GenerateOptions(TypedDict, total=False):
    """The keyword options of generate, generate_stream, chat and chat_stream.

    One definition for all of them; what is left out takes the server's default.

    temperature: [1] 0 is greedy
    top_p, top_k, min_p: nucleus (0, 1]; best k, 0 for all; relative to the best
    repetition_penalty, presence_penalty, frequency_penalty: [1, 0, 0]
    seed: 64 bits; chosen and reported by the server if left out
    max_tokens, min_tokens: of output, per choice
    stop, stop_token_ids: end a choice; a stop string is not part of the text
    ignore_eos: go on past the model's end of sequence
    logit_bias: token id -> added to its logit
    logprobs: k for the chosen token's and the k best alternatives'
    n: choices
    request_id: to name the request, e.g. for abort; made up if left out
    model: checked against the served one
    priority: higher starts sooner
    timeout_s: from the call to the last token, retries included
    min_kv_format: the least faithful KV format that will do, e.g. "int8"
    cache_salt: cached prefixes are shared only under an equal salt
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
    min_kv_format: str
    cache_salt: str


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently a call is tried again.

    Retried are lost connections and refusals for lack of room. The k-th wait is
    drawn evenly from [0, min(max_backoff_s, initial_backoff_s · 2^k)]; a server's
    retry_after_s is waited for in full, with up to that much on top, so that those
    who were refused together do not return together.

    max_attempts: of one call; a stream that makes progress starts counting anew
    max_retry_after_s: a server that asks for more patience is not waited for
    """

    max_attempts: int = 4
    initial_backoff_s: float = 0.2
    max_backoff_s: float = 10.0
    max_retry_after_s: float = 60.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise InvalidRequestError.of(
                "max_attempts", f"must be at least 1, got {self.max_attempts}"
            )
        for name in ("initial_backoff_s", "max_backoff_s", "max_retry_after_s"):
            # Written so that NaN fails too.
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidRequestError.of(
                    name, f"must be finite and not negative, got {getattr(self, name)}"
                )


NO_RETRY = RetryPolicy(max_attempts=1)


@dataclass(frozen=True, slots=True)
class TLS:
    """Encryption, with the system's roots unless given others.

    Each is PEM, as bytes or a file's path.

    root_ca: certificates to trust
    client_cert, client_key: to show the server who calls; both or neither
    server_name: the name the server's certificate must have, where it is not the target's
    """

    root_ca: bytes | str | Path | None = None
    client_cert: bytes | str | Path | None = None
    client_key: bytes | str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.client_cert is None) != (self.client_key is None):
            raise InvalidRequestError.of("tls", "client_cert and client_key must be given together")
