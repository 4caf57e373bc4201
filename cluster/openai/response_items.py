"""A response and its items, as OpenAI's clients expect them."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from kvmesh.cluster.openai.body import RequestBody
from kvmesh.cluster.openai.chat_reply import ChatToken
from kvmesh.cluster.openai.responses import ResponseBody
from kvmesh.cluster.openai.usage import CompletionDetails, KVUsage, TokenUsage
from kvmesh.v1 import kvmesh_pb2 as pb


class OutputText(msgspec.Struct):
    text: str = ""
    logprobs: list[ChatToken] = []
    annotations: list[None] = []
    type: str = "output_text"


class MessageItem(msgspec.Struct):
    id: str
    status: str
    content: list[OutputText]
    role: str = "assistant"
    type: str = "message"


class ReasoningText(msgspec.Struct):
    text: str = ""
    type: str = "reasoning_text"


class ReasoningItem(msgspec.Struct):
    """What the model thought before it answered."""

    id: str
    status: str
    content: list[ReasoningText]
    summary: list[None] = []
    type: str = "reasoning"


class FunctionCallItem(msgspec.Struct):
    id: str
    call_id: str
    name: str
    status: str
    arguments: str = ""
    type: str = "function_call"


OutputItem = MessageItem | ReasoningItem | FunctionCallItem
IN_PROGRESS = "in_progress"


class InputDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails
    output_tokens_details: CompletionDetails | None
    kvmesh: KVUsage | msgspec.UnsetType


class IncompleteDetails(msgspec.Struct):
    reason: str


class ResponseReply(msgspec.Struct):
    """A response, complete or in progress."""

    id: str
    created_at: int
    model: str
    instructions: str | None
    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_logprobs: int
    tools: list[dict[str, Any]]
    tool_choice: Any
    parallel_tool_calls: bool
    text: dict[str, Any]
    reasoning: dict[str, Any]
    metadata: Any
    user: Any
    status: str = "in_progress"
    output: list[OutputItem] = []
    incomplete_details: IncompleteDetails | None = None
    usage: ResponseUsage | None = None
    error: None = None
    previous_response_id: None = None
    truncation: str = "disabled"
    store: bool = False
    background: bool = False
    object: str = "response"

    def end(self, reason: pb.FinishReason.ValueType) -> None:
        """Note how the output has ended."""
        whole = reason not in (pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_DEADLINE)
        self.status = "completed" if whole else "incomplete"
        if not whole:
            self.incomplete_details = IncompleteDetails("max_output_tokens")
        for item in self.output:
            if item.status == IN_PROGRESS:
                item.status = self.status

    def charge(self, found: TokenUsage) -> None:
        """Note what it has used."""
        cached = found.prompt_tokens_details
        self.usage = ResponseUsage(
            found.prompt_tokens,
            found.completion_tokens,
            found.total_tokens,
            InputDetails(cached.cached_tokens if cached else 0),
            found.completion_tokens_details,
            found.kvmesh,
        )


def _plain(value: RequestBody | str | None) -> Any:
    """A part of a request as it was."""
    if isinstance(value, RequestBody):
        return value.model_dump(exclude_none=True, by_alias=True)
    return value


def new_response(body: ResponseBody, request_id: str, model: str) -> ResponseReply:
    text_format = body.text.format if body.text and body.text.format else None
    return ResponseReply(
        id=f"resp_{request_id}",
        created_at=int(time.time()),
        model=model,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_logprobs=body.top_logprobs or 0,
        tools=[_plain(tool) for tool in body.tools or []],
        tool_choice=_plain(body.tool_choice) or "auto",
        parallel_tool_calls=body.parallel_tool_calls is not False,
        text={"format": _plain(text_format) or {"type": "text"}},
        reasoning={"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        metadata=body.metadata or {},
        user=body.user,
    )
