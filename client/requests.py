"""Converts a caller's arguments to request messages."""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from typing import Any, TypeVar

from kvmesh.client.chats import assign, chat, set_chat_option, set_structured_output
from kvmesh.client.errors import FieldViolation, InvalidRequestError, UnknownOptionError
from kvmesh.client.options import Message, Messages, Prompt
from kvmesh.protos import pb

Named = TypeVar("Named", pb.AbortRequest, pb.ExplainRequest)


# What other libraries call an option.
_SYNONYMS = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_length": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
    "do_sample": "temperature",
    "top_logprobs": "logprobs",
    "random_seed": "seed",
    "timeout": "timeout_s",
    "functions": "tools",
}
_NOT_OPTIONS = frozenset({"prompt", "sampling_params", "resume", "messages"})


def prompt_message(prompt: Prompt) -> pb.Prompt:
    """The message of a prompt: text from a str, a chat from messages, otherwise token ids."""
    if isinstance(prompt, Mapping | Set) or not isinstance(prompt, Sized):
        raise InvalidRequestError.of(
            "prompt", f"expected text, messages or token ids, got {prompt!r:.60}"
        )
    if isinstance(prompt, str):
        message = pb.Prompt()
        assign(message, "text", prompt, "prompt.text")
        return message
    if len(prompt) and isinstance(prompt[0], Message | Mapping):
        return pb.Prompt(chat=chat(prompt))  # type: ignore[arg-type]
    ids = pb.TokenIds()
    assign(ids, "ids", prompt, "prompt.token_ids")
    return pb.Prompt(token_ids=ids)


def chat_message(messages: Messages) -> pb.Prompt:
    """Raises InvalidRequestError for what is not a list of messages."""
    if isinstance(messages, str | bytes | Mapping | Message) or not isinstance(messages, Iterable):
        raise InvalidRequestError.of(
            "messages",
            "expected a list of messages such as [{'role': 'user', 'content': '...'}], "
            f"got {messages!r:.60}",
        )
    return pb.Prompt(chat=chat(messages))


def generate_request(prompt: pb.Prompt, options: Mapping[str, Any]) -> pb.GenerateRequest:
    """The message of a generation; generates a request_id if there is none.

    Raises InvalidRequestError for values that the message cannot hold, such as a
    negative token id, and UnknownOptionError. The server checks whether the values make sense.
    """
    request = pb.GenerateRequest(prompt=prompt)
    known = _option_names(prompt)
    for name, value in options.items():
        if name not in known:
            raise _unknown(name, known)
        if value is None or name == "timeout_s":
            continue  # timeout_s counts from the call, so it is set when the request is sent
        if name == "structured_output":
            set_structured_output(request.structured_output, value)
        elif name in pb.GenerateRequest.DESCRIPTOR.fields_by_name:
            assign(request, name, value, name)
        elif name in pb.Chat.DESCRIPTOR.fields_by_name:
            set_chat_option(request.prompt.chat, name, value)
        elif name == "stop" and isinstance(value, str):
            request.sampling_params.stop.append(value)
        else:
            assign(request.sampling_params, name, value, f"sampling_params.{name}")
    if not request.request_id:
        request.request_id = secrets.token_hex(16)
    return request


def _option_names(prompt: pb.Prompt) -> frozenset[str]:
    """The options of a generation with this prompt."""
    kinds: list[Any] = [pb.GenerateRequest, pb.SamplingParams]
    if prompt.WhichOneof("kind") == "chat":
        kinds.append(pb.Chat)
    names = {name for kind in kinds for name in kind.DESCRIPTOR.fields_by_name}
    return frozenset(names - _NOT_OPTIONS)


def _unknown(name: str, known: frozenset[str]) -> UnknownOptionError:
    if name in pb.Chat.DESCRIPTOR.fields_by_name and name not in _NOT_OPTIONS:
        hint = "it is an option of chats"
    else:
        close = difflib.get_close_matches(name, sorted(known), n=1)
        meant = _SYNONYMS.get(name) or (close[0] if close else None)
        hint = f"did you mean {meant}?" if meant else f"there are {', '.join(sorted(known))}"
    return UnknownOptionError(
        f"{name}: is not an option; {hint}", violations=(FieldViolation(name, hint),)
    )


def detokenize_request(
    token_ids: Sequence[int], model: str | None, skip_special_tokens: bool
) -> pb.DetokenizeRequest:
    request = pb.DetokenizeRequest()
    assign(request, "token_ids", token_ids, "token_ids")
    assign(request, "model", model or "", "model")
    assign(request, "skip_special_tokens", skip_special_tokens, "skip_special_tokens")
    return request


def tokenize_request(prompt: Prompt, model: str | None) -> pb.TokenizeRequest:
    request = pb.TokenizeRequest(prompt=prompt_message(prompt))
    assign(request, "model", model or "", "model")
    return request


def of_request_id(cls: type[Named], request_id: str) -> Named:
    request = cls()
    assign(request, "request_id", request_id, "request_id")
    return request


def estimate_request(
    prompt: Prompt | None,
    *,
    prompt_tokens: int | None,
    max_tokens: int | None,
    n: int | None,
    priority: int | None,
    allowed_kv_formats: Sequence[str] | None,
    max_kv_divergence_nats: float | None,
    model: str | None,
) -> pb.EstimateBudgetRequest:
    if (prompt is None) == (prompt_tokens is None):
        raise InvalidRequestError.of("prompt", "give exactly one of prompt and prompt_tokens")
    request = pb.EstimateBudgetRequest()
    if prompt is not None:
        request.prompt.CopyFrom(prompt_message(prompt))
    for name, value in (
        ("prompt_tokens", prompt_tokens),
        ("max_tokens", max_tokens),
        ("n", n),
        ("priority", priority),
        ("allowed_kv_formats", allowed_kv_formats),
        ("max_kv_divergence_nats", max_kv_divergence_nats),
        ("model", model),
    ):
        if value is not None:
            assign(request, name, value, name)
    return request
