"""The reply to a chat completion, and its stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import msgspec

from kvmesh.cluster.openai import sse
from kvmesh.cluster.openai.call import EventSource
from kvmesh.cluster.openai.chat import ChatBody
from kvmesh.cluster.openai.finish import finish_of
from kvmesh.cluster.openai.tokens import MIN_LOGPROB, ScoredToken, scored, shown
from kvmesh.cluster.openai.usage import RunningUsage, TokenUsage
from kvmesh.v1 import kvmesh_pb2 as pb


class TopToken(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopToken]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatToken]
    refusal: None = None


class CalledTool(msgspec.Struct):
    name: str
    arguments: str


class ReplyToolCall(msgspec.Struct):
    id: str
    function: CalledTool
    type: str = "function"


class ReplyMessage(msgspec.Struct):
    """reasoning_content: what the model thought before, if it did"""

    role: str
    content: str | None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ReplyToolCall] | msgspec.UnsetType = msgspec.UNSET
    refusal: None = None


class ChatChoice(msgspec.Struct):
    """stop_reason: the stop string, or the stop token's id, that ended it"""

    index: int
    message: ReplyMessage
    finish_reason: str
    stop_reason: str | int | None
    logprobs: ChatLogprobs | None


class ChatReply(msgspec.Struct):
    id: str
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
    created: int
    object: str = "chat.completion"


class ToolDelta(msgspec.Struct, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class ToolCallPart(msgspec.Struct, omit_defaults=True):
    """A tool call that begins, with an id, or continues."""

    index: int
    function: ToolDelta
    id: str | None = None
    type: str | None = None


class ChatDelta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallPart] | None = None


class ChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    stop_reason: str | int | msgspec.UnsetType | None = msgspec.UNSET


class ChatChunk(msgspec.Struct):
    id: str
    model: str
    created: int
    choices: list[ChunkChoice]
    usage: TokenUsage | msgspec.UnsetType | None = msgspec.UNSET
    object: str = "chat.completion.chunk"


def chat_reply(body: ChatBody, generated: pb.GenerateResponse, usage: TokenUsage) -> ChatReply:
    choices = []
    for choice in generated.choices:
        finish = finish_of(choice)
        calls = [
            ReplyToolCall(call.id, CalledTool(call.name, call.arguments_json))
            for call in choice.tool_calls
        ]
        message = ReplyMessage(
            "assistant",
            choice.text if choice.text or not calls else None,
            choice.reasoning or msgspec.UNSET,
            calls or msgspec.UNSET,
        )
        choices.append(
            ChatChoice(
                choice.index,
                message,
                finish.reason,
                finish.stop,
                chat_logprobs(choice.logprobs) if body.logprobs else None,
            )
        )
    return ChatReply(
        f"chatcmpl-{generated.request_id}",
        generated.model,
        choices,
        usage,
        int(time.time()),
    )


async def chat_chunks(body: ChatBody, source: EventSource) -> AsyncIterator[bytes]:
    """The stream of a chat's events."""
    usage = RunningUsage()
    chunk = ChatChunk("", "", int(time.time()), [])
    roles: set[int] = set()

    def said(choice: ChunkChoice) -> bytes:
        if choice.index not in roles:
            roles.add(choice.index)
            choice.delta.role = "assistant"
        chunk.choices = [choice]
        if body.usage_everywhere:
            chunk.usage = usage.so_far
        elif body.include_usage:
            chunk.usage = None
        return sse.data(chunk)

    async for index, event in source:
        usage.note(index, event)
        match event.WhichOneof("event"):
            case "started":
                chunk.id = f"chatcmpl-{event.started.request_id}"
                chunk.model = event.started.model
            case "delta":
                delta = event.delta
                scores = chat_logprobs(delta.logprobs) if delta.HasField("logprobs") else None
                if delta.text or delta.reasoning or delta.tool_calls or scores:
                    yield said(ChunkChoice(delta.index, chat_delta(delta), None, scores))
            case "choice_finished":
                finish = finish_of(event.choice_finished)
                yield said(
                    ChunkChoice(
                        event.choice_finished.index,
                        ChatDelta(),
                        finish.reason,
                        stop_reason=finish.stop,
                    )
                )
            case "usage":
                if body.include_usage:
                    chunk.choices, chunk.usage = [], usage.final
                    yield sse.data(chunk)
            case _:
                if (comment := sse.comment(event)) is not None:
                    yield comment
    yield sse.DONE


def chat_delta(delta: pb.Delta) -> ChatDelta:
    calls = [
        ToolCallPart(
            part.index,
            ToolDelta(part.name or None, part.arguments_json),
            part.id or None,
            "function" if part.id else None,
        )
        for part in delta.tool_calls
    ]
    silent = delta.reasoning or calls
    return ChatDelta(
        content=delta.text if delta.text or not silent else None,
        reasoning_content=delta.reasoning or None,
        tool_calls=calls or None,
    )


def chat_logprobs(columns: pb.Logprobs) -> ChatLogprobs:
    return ChatLogprobs([_token(token) for token in scored(columns)])


def _token(token: ScoredToken) -> ChatToken:
    return ChatToken(
        shown(token.text),
        MIN_LOGPROB if token.logprob is None else token.logprob,
        list(token.text),
        [TopToken(shown(text), logprob, list(text)) for text, logprob in token.top],
    )
