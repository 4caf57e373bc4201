"""Converts a caller's arguments to request messages."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from kvmesh.client.chats import assign, chat, set_chat_option, set_structured_output
from kvmesh.client.errors import InvalidRequestError
from kvmesh.client.options import Message, Messages, Prompt
from kvmesh.protos import pb

Named = TypeVar("Named", pb.AbortRequest, pb.ExplainRequest)


def prompt_message(prompt: Prompt) -> pb.Prompt:
    """The message of a prompt: text from a str, a chat from messages, otherwise token ids."""
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
    return pb.Prompt(chat=chat(messages))


def generate_request(prompt: pb.Prompt, options: Mapping[str, Any]) -> pb.GenerateRequest:
    """The message of a generation; generates a request_id if there is none.

    Raises InvalidRequestError for values that the message cannot hold, such as a
    negative token id. The server checks whether the values make sense.
    """
    request = pb.GenerateRequest(prompt=prompt)
    for name, value in options.items():
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
