"""POST /v1/responses: the request. Nothing is stored: each request has its whole conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from kvmesh.cluster.errors import UnsupportedFieldError
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.openai.body import Ignored, RequestBody, Unsupported
from kvmesh.cluster.openai.messages import Content, FunctionTool, chat_of
from kvmesh.cluster.openai.sampling import GenerationBody, put
from kvmesh.cluster.openai.structured import (
    RESPONSE_RENAMES,
    VLLM_RENAMES,
    TextFormat,
    ToolChoiceField,
    add_format,
    tool_choice_of,
)
from kvmesh.v1 import kvmesh_pb2 as pb

LOGPROBS = "message.output_text.logprobs"


class InputItem(RequestBody):
    """A message, a call of a function, its result, or what a model has thought."""

    type: str = "message"
    role: str | None = None
    content: Content | None = None
    name: str | None = None
    call_id: str | None = None
    arguments: str | None = None
    output: Content | None = None
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None
    summary: Ignored = None
    encrypted_content: Ignored = None
    namespace: Unsupported = None
    async_: Unsupported = None  # as the official client writes out its own field
    caller: Ignored = None
    parsed_arguments: Ignored = None

    def add_to(self, messages: list[pb.ChatMessage], path: str) -> None:
        match self.type:
            case "message":
                if self.role is None:
                    refuse(f"{path}.role", "is required")
                messages.append(_message(self.role, self.content, f"{path}.content"))
            case "function_call":
                # Templates expect the calls of a turn together, with what was said before them.
                if not messages or messages[-1].role != "assistant":
                    messages.append(pb.ChatMessage(role="assistant"))
                messages[-1].tool_calls.add(
                    id=self.call_id or "",
                    name=self.name or "",
                    arguments_json=self.arguments or "{}",
                )
            case "function_call_output":
                result = _message("tool", self.output, f"{path}.output")
                result.tool_call_id = self.call_id or ""
                result.name = _called(messages, result.tool_call_id)
                messages.append(result)
            case "reasoning":
                pass  # it is not shown to the model again
            case _:
                raise UnsupportedFieldError(
                    f"{path}.type", f"{self.type!r} is not supported by this server"
                )


def _message(role: str, content: Any, path: str) -> pb.ChatMessage:
    message = pb.ChatMessage(role="system" if role == "developer" else role)
    if isinstance(content, str):
        message.content = content
    else:
        parts = content or []
        message.parts.extend(
            part.to_contract(f"{path}[{index}]") for index, part in enumerate(parts)
        )
    return message


def _called(messages: list[pb.ChatMessage], call_id: str) -> str:
    """The name of the function that was called."""
    return next(
        (call.name for turn in messages for call in turn.tool_calls if call.id == call_id), ""
    )


def _kind(value: object) -> str:
    return "[text]" if isinstance(value, str) else "[items]"


class ResponseTool(FunctionTool):
    type: Literal["function"]


class TextSettings(RequestBody):
    format: TextFormat | None = None
    verbosity: Ignored = None


class ReasoningSettings(RequestBody):
    effort: str | None = None
    summary: Ignored = None
    generate_summary: Ignored = None


class ResponseBody(GenerationBody):
    """What POST /v1/responses takes."""

    input: Annotated[
        Annotated[str, Tag("[text]")] | Annotated[list[InputItem], Tag("[items]")],
        Discriminator(_kind),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    truncation: Literal["disabled", "auto"] | None = None
    background: bool | None = None

    max_tool_calls: Ignored = None
    previous_response_id: Unsupported = None
    conversation: Unsupported = None
    prompt: Unsupported = None
    context_management: Unsupported = None

    @property
    def wants_logprobs(self) -> bool:
        return self.top_logprobs is not None or LOGPROBS in (self.include or [])

    def to_contract(self, headers: Mapping[str, str], request_id: str) -> pb.GenerateRequest:
        """Raises InvalidFieldError."""
        self._check()
        request = self.base_request(headers, request_id)
        put(request.sampling_params, "max_tokens", self.max_output_tokens)
        if self.wants_logprobs:
            put(request.sampling_params, "logprobs", self.top_logprobs or 0)
        kwargs = dict(self.chat_template_kwargs or {})
        if self.reasoning is not None and self.reasoning.effort is not None:
            kwargs.setdefault("reasoning_effort", self.reasoning.effort)
        chat = chat_of(self._messages(), self.tools or [], kwargs, False)
        if self.tool_choice is not None:
            chat.tool_choice.CopyFrom(tool_choice_of(self.tool_choice))
        if self.parallel_tool_calls is not None:
            chat.parallel_tool_calls = self.parallel_tool_calls
        request.prompt.chat.CopyFrom(chat)
        if self.text is not None and self.text.format is not None:
            add_format(request, self.text.format.to_format())
        return request

    def _check(self) -> None:
        if self.n not in (None, 1):
            refuse("n", f"must be 1: a response has one choice; got {self.n}")
        if self.truncation == "auto":
            raise UnsupportedFieldError("truncation", "must be disabled on this server")
        if self.background:
            raise UnsupportedFieldError("background", "must be false on this server")

    def _messages(self) -> list[pb.ChatMessage]:
        messages: list[pb.ChatMessage] = []
        if self.instructions:
            messages.append(pb.ChatMessage(role="system", content=self.instructions))
        if isinstance(self.input, str):
            messages.append(pb.ChatMessage(role="user", content=self.input))
        else:
            for index, item in enumerate(self.input):
                item.add_to(messages, f"input[{index}]")
        return messages

    @property
    def renames(self) -> tuple[tuple[str, str], ...]:
        """Of fields of the contract, for errors."""
        return (
            (r"^messages(\[.*)?$", "input"),
            ("^max_tokens$", "max_output_tokens"),
            ("^logprobs$", "top_logprobs"),
            (r"^tools(\[\d+\])\.function\.", r"tools\1."),
            *(RESPONSE_RENAMES if self.structured_outputs is None else VLLM_RENAMES),
        )
