"""The stream of a response: items that open, grow and close, in numbered events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import msgspec

from kvmesh.cluster.openai import sse
from kvmesh.cluster.openai.call import EventSource
from kvmesh.cluster.openai.chat_reply import ChatToken, chat_logprobs
from kvmesh.cluster.openai.response_items import (
    IN_PROGRESS,
    FunctionCallItem,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseReply,
    new_response,
)
from kvmesh.cluster.openai.responses import ResponseBody
from kvmesh.v1 import kvmesh_pb2 as pb


class ResponseEvent(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One event; which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: ResponseReply | None = None
    output_index: int | None = None
    item: OutputItem | None = None
    item_id: str | None = None
    content_index: int | None = None
    part: OutputText | ReasoningText | None = None
    delta: str | None = None
    text: str | None = None
    name: str | None = None
    arguments: str | None = None
    logprobs: list[ChatToken] | None = None


class ResponseStream:
    """Makes the stream of one response from the events of its generation.

    One item is open at a time: reasoning, then the message, then one call after the other.
    """

    def __init__(self, body: ResponseBody, request_id: str) -> None:
        self._body = body
        self._request_id = request_id
        self._sent = 0
        self._response = new_response(body, request_id, body.model or "")
        self._open: OutputItem | None = None

    async def read(self, source: EventSource) -> AsyncIterator[bytes]:
        async for _, event in source:
            for chunk in self._chunks(event):
                yield chunk

    def _chunks(self, event: pb.GenerateStreamResponse) -> Iterator[bytes]:
        match event.WhichOneof("event"):
            case "started":
                self._response.model = event.started.model
                yield self._event("response.created", response=self._response)
                yield self._event("response.in_progress", response=self._response)
            case "delta":
                yield from self._reasoning(event.delta.reasoning)
                yield from self._text(event.delta)
                for part in event.delta.tool_calls:
                    yield from self._call(part)
            case "choice_finished":
                if not self._response.output:
                    yield from self._message()
                last = self._open
                self._response.end(event.choice_finished.finish_reason)
                if last is not None:
                    yield from self._close(last)
            case "usage":
                self._response.charge(event.usage)
                yield self._event(f"response.{self._response.status}", response=self._response)
            case _:
                if (comment := sse.comment(event)) is not None:
                    yield comment

    def _event(self, kind: str, about: OutputItem | None = None, **fields: object) -> bytes:
        """about: the item that it is about"""
        if about is not None:
            fields |= {"item_id": about.id, "output_index": len(self._response.output) - 1}
        event = ResponseEvent(type=kind, sequence_number=self._sent, **fields)  # type: ignore[arg-type]
        self._sent += 1
        return sse.named(kind, event)

    def _begin(self, item: OutputItem) -> Iterator[bytes]:
        """Close the item that is open, and open this one."""
        if self._open is not None:
            self._open.status = "completed"
            yield from self._close(self._open)
        self._open = item
        index = len(self._response.output)
        self._response.output = [*self._response.output, item]
        yield self._event("response.output_item.added", output_index=index, item=item)

    def _reasoning(self, text: str) -> Iterator[bytes]:
        if not text:
            return
        item = self._open
        if not isinstance(item, ReasoningItem):
            item = ReasoningItem(f"rs_{self._request_id}", IN_PROGRESS, [])
            yield from self._begin(item)
            item.content = [ReasoningText()]
            part = item.content[0]
            yield self._event("response.content_part.added", item, content_index=0, part=part)
        item.content[0].text += text
        yield self._event("response.reasoning_text.delta", item, content_index=0, delta=text)

    def _text(self, delta: pb.Delta) -> Iterator[bytes]:
        tokens = chat_logprobs(delta.logprobs).content if self._body.wants_logprobs else []
        silent = bool(delta.reasoning or delta.tool_calls)
        if not delta.text and (silent or not tokens):
            return
        if not isinstance(self._open, MessageItem):
            yield from self._message()
        item = self._open
        assert isinstance(item, MessageItem)
        item.content[0].text += delta.text
        item.content[0].logprobs.extend(tokens)
        yield self._event(
            "response.output_text.delta",
            item,
            content_index=0,
            delta=delta.text,
            logprobs=tokens,
        )

    def _message(self) -> Iterator[bytes]:
        item = MessageItem(f"msg_{self._request_id}", IN_PROGRESS, [])
        yield from self._begin(item)
        item.content = [OutputText(logprobs=[])]
        part = item.content[0]
        yield self._event("response.content_part.added", item, content_index=0, part=part)

    def _call(self, part: pb.ToolCallDelta) -> Iterator[bytes]:
        item = self._open
        item_id = f"fc_{self._request_id}_{part.index}"
        if not isinstance(item, FunctionCallItem) or item.id != item_id:
            item = FunctionCallItem(item_id, part.id, part.name, IN_PROGRESS)
            yield from self._begin(item)
        if part.arguments_json:
            item.arguments += part.arguments_json
            kind = "response.function_call_arguments.delta"
            yield self._event(kind, item, delta=part.arguments_json)

    def _close(self, item: OutputItem) -> Iterator[bytes]:
        match item:
            case MessageItem(content=[part]):
                yield self._event(
                    "response.output_text.done",
                    item,
                    content_index=0,
                    text=part.text,
                    logprobs=part.logprobs,
                )
                yield self._event("response.content_part.done", item, content_index=0, part=part)
            case ReasoningItem(content=[part]):
                done = "response.reasoning_text.done"
                yield self._event(done, item, content_index=0, text=part.text)
                yield self._event("response.content_part.done", item, content_index=0, part=part)
            case FunctionCallItem():
                yield self._event(
                    "response.function_call_arguments.done",
                    item,
                    name=item.name,
                    arguments=item.arguments,
                )
        index = len(self._response.output) - 1
        yield self._event("response.output_item.done", output_index=index, item=item)
