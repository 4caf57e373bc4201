"""POST /v1/chat/completions: the request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.openai.body import Ignored, Unsupported
from kvmesh.cluster.openai.messages import ChatTool, ChatTurn, chat_of
from kvmesh.cluster.openai.sampling import GenerationBody, put
from kvmesh.cluster.openai.structured import (
    RENAMES,
    VLLM_RENAMES,
    ResponseFormat,
    ToolChoiceField,
    add_format,
    tool_choice_of,
)
from kvmesh.v1 import kvmesh_pb2 as pb


class ChatBody(GenerationBody):
    """What POST /v1/chat/completions takes."""

    messages: list[ChatTurn]
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[ChatTool] | None = None
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    # As in vLLM.
    chat_template: str | None = None
    chat_template_name: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    modalities: list[str] | None = None
    verbosity: Ignored = None
    prediction: Ignored = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    web_search_options: Unsupported = None

    def to_contract(self, headers: Mapping[str, str], request_id: str) -> pb.GenerateRequest:
        """Raises InvalidFieldError."""
        request = self.base_request(headers, request_id)
        params = request.sampling_params
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            refuse("max_tokens", "must not be set together with max_completion_tokens")
        max_name = "max_tokens" if self.max_tokens is not None else "max_completion_tokens"
        put(params, "max_tokens", getattr(self, max_name))
        if self.top_logprobs is not None and not self.logprobs:
            refuse("top_logprobs", "must only be set together with logprobs: true")
        if self.logprobs:
            put(params, "logprobs", self.top_logprobs or 0)
        if self.modalities not in (None, ["text"]):
            refuse("modalities", 'must be ["text"]')
        if self.add_generation_prompt is False and not self.continue_final_message:
            refuse("add_generation_prompt", "must be true, unless continue_final_message is set")
        kwargs = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            kwargs.setdefault("reasoning_effort", self.reasoning_effort)
        request.prompt.chat.CopyFrom(
            chat_of(
                [turn.to_contract(f"messages[{i}]") for i, turn in enumerate(self.messages)],
                [tool.function for tool in self.tools or []],
                kwargs,
                bool(self.continue_final_message),
            )
        )
        chat = request.prompt.chat
        chat.chat_template = self.chat_template or ""
        chat.chat_template_name = self.chat_template_name or ""
        if self.tool_choice is not None:
            chat.tool_choice.CopyFrom(tool_choice_of(self.tool_choice))
        if self.parallel_tool_calls is not None:
            chat.parallel_tool_calls = self.parallel_tool_calls
        if self.response_format is not None:
            add_format(request, self.response_format.to_contract())
        return request

    @property
    def renames(self) -> tuple[tuple[str, str], ...]:
        """Of fields of the contract, for errors."""
        renames = [("^logprobs$", "top_logprobs")]
        renames += RENAMES if self.structured_outputs is None else VLLM_RENAMES
        if self.max_tokens is None:
            renames.append(("^max_tokens$", "max_completion_tokens"))
        return tuple(renames)
