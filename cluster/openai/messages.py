"""Chat messages and tools of OpenAI's requests as the contract's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from google.protobuf.struct_pb2 import Struct
from pydantic import Discriminator, Tag

from kvmesh.cluster.errors import UnsupportedFieldError
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.openai.body import Ignored, RequestBody, Unsupported
from kvmesh.v1 import kvmesh_pb2 as pb

# OpenAI's name for what other models call system.
_ROLES = {"developer": "system"}


class MessagePart(RequestBody):
    """A part of a message's content; which field it has depends on its type."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    cache_control: Ignored = None
    annotations: Ignored = None
    logprobs: Ignored = None
    parsed: Ignored = None

    def to_contract(self, path: str) -> pb.ContentPart:
        match self.type:
            case "text" | "input_text" | "output_text":
                if self.text is None:
                    refuse(f"{path}.text", "is required")
                return pb.ContentPart(text=self.text)
            case "refusal":
                return pb.ContentPart(text=self.refusal or "")
        raise UnsupportedFieldError(
            f"{path}.type", f"must be text; {self.type!r} is not supported by this server"
        )


def _kind(content: object) -> str:
    return "[text]" if isinstance(content, str) else "[parts]"


Content = Annotated[
    Annotated[str, Tag("[text]")] | Annotated[list[MessagePart], Tag("[parts]")],
    Discriminator(_kind),
]


class CalledFunction(RequestBody):
    name: str
    arguments: str = "{}"
    parsed_arguments: Ignored = None
    provider_specific_fields: Ignored = None


class MessageToolCall(RequestBody):
    type: Literal["function"] = "function"
    id: str = ""
    function: CalledFunction
    index: Ignored = None
    provider_specific_fields: Ignored = None


class ChatTurn(RequestBody):
    """A message. What a model has thought is not shown to it again, and what clients add to a
    reply when they read it may come back with it."""

    type: Literal["message", "text"] | None = None  # as lm-eval has it, and as responses do
    role: str
    content: Content | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    function_call: Unsupported = None
    audio: Unsupported = None
    images: Unsupported = None
    reasoning_content: Ignored = None
    reasoning: Ignored = None
    reasoning_details: Ignored = None
    thinking_blocks: Ignored = None
    annotations: Ignored = None
    parsed: Ignored = None
    provider_specific_fields: Ignored = None

    def to_contract(self, path: str) -> pb.ChatMessage:
        message = pb.ChatMessage(
            role=_ROLES.get(self.role, self.role),
            name=self.name or "",
            tool_call_id=self.tool_call_id or "",
        )
        if isinstance(self.content, str):
            message.content = self.content
        elif self.content is not None:
            message.parts.extend(
                part.to_contract(f"{path}.content[{index}]")
                for index, part in enumerate(self.content)
            )
        elif self.refusal:
            message.content = self.refusal
        for call in self.tool_calls or []:
            message.tool_calls.add(
                id=call.id, name=call.function.name, arguments_json=call.function.arguments
            )
        return message


class FunctionTool(RequestBody):
    """A tool. strict: what the model writes always fits the schema where a call is required"""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def to_contract(self) -> pb.Tool:
        return pb.Tool(
            name=self.name,
            description=self.description or "",
            parameters_json=json_text(self.parameters) if self.parameters is not None else "",
        )


class ChatTool(RequestBody):
    type: Literal["function"]
    function: FunctionTool


def chat_of(
    messages: Sequence[pb.ChatMessage],
    tools: Sequence[FunctionTool],
    template_kwargs: dict[str, Any] | None,
    continue_final_message: bool,
) -> pb.Chat:
    chat = pb.Chat(
        messages=messages,
        tools=[tool.to_contract() for tool in tools],
        continue_final_message=continue_final_message,
    )
    if template_kwargs:
        try:
            chat.chat_template_kwargs.update(template_kwargs)
        except (ValueError, TypeError, RecursionError):
            refuse("chat_template_kwargs", "must have JSON values")
        if not chat.HasField("chat_template_kwargs"):
            chat.chat_template_kwargs.CopyFrom(Struct())
    return chat


def json_text(value: Any) -> str:
    """As JSON text, with keys in their order."""
    return msgspec.json.encode(value).decode()
