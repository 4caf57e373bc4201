"""A response: items that open, grow and close, in numbered events of a stream, or whole."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator

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
from kvmesh.cluster.openai.usage import RunningUsage
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
    """Makes one response from the events of its generation, as a stream or whole.

    One item is open at a time, in the order of the output: reasoning, messages, calls. A message
    has the tokens of its text, also those that only a later token shows. Other tokens that show
    nothing are markers of what they stand next to.
    """

    def __init__(self, body: ResponseBody, request_id: str) -> None:
        self._body = body
        self._request_id = request_id
        self._sent = 0
        self._usage = RunningUsage()
        self._response = new_response(body, request_id, body.model or "")
        self._open: OutputItem | None = None
        # Of the open item: adding to a long text would copy it.
        self._pieces: list[str] = []
        self._hidden: list[ChatToken] = []  # of a message, if text follows, or its end

    async def read(self, source: EventSource) -> AsyncIterator[bytes]:
        async for _, event in source:
            if (comment := sse.comment(event)) is not None:
                yield comment
            for made in self._events(event):
                yield sse.named(made.type, made)

    async def whole(self, source: EventSource) -> tuple[ResponseReply, RunningUsage]:
        """What the stream ends with, and what it has used."""
        async for _, event in source:
            for _ in self._events(event):
                pass
        return self._response, self._usage

    def _events(self, event: pb.GenerateStreamResponse) -> Iterator[ResponseEvent]:
        """To be encoded one by one: each may hold what the next one changes."""
        self._usage.note(0, event)
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
                if self._hidden and isinstance(self._open, MessageItem):
                    yield self._said(self._open, "")
                last = self._open
                self._response.end(event.choice_finished.finish_reason)
                if last is not None:
                    yield from self._close(last)
            case "usage":
                self._response.charge(self._usage.final)
                yield self._event(f"response.{self._response.status}", response=self._response)

    def _event(self, kind: str, about: OutputItem | None = None, **fields: object) -> ResponseEvent:
        """about: the item that it is about"""
        if about is not None:
            fields |= {"item_id": about.id, "output_index": len(self._response.output) - 1}
        event = ResponseEvent(type=kind, sequence_number=self._sent, **fields)  # type: ignore[arg-type]
        self._sent += 1
        return event

    def _begin(self, item: OutputItem) -> Iterator[ResponseEvent]:
        """Close the item that is open, and open this one."""
        if self._open is not None:
            self._open.status = "completed"
            yield from self._close(self._open)
        self._open = item
        if not isinstance(item, MessageItem):
            self._hidden = []
        index = len(self._response.output)
        self._response.output = [*self._response.output, item]
        yield self._event("response.output_item.added", output_index=index, item=item)

    def _reasoning(self, text: str) -> Iterator[ResponseEvent]:
        if not text:
            return
        item = self._open
        if not isinstance(item, ReasoningItem):
            item = ReasoningItem(self._id("rs"), IN_PROGRESS, [])
            yield from self._begin(item)
            item.content = [ReasoningText()]
            part = item.content[0]
            yield self._event("response.content_part.added", item, content_index=0, part=part)
        self._pieces.append(text)
        yield self._event("response.reasoning_text.delta", item, content_index=0, delta=text)

    def _text(self, delta: pb.Delta) -> Iterator[ResponseEvent]:
        if not delta.text and isinstance(self._open, ReasoningItem | FunctionCallItem):
            return
        if self._body.wants_logprobs:
            self._hidden += chat_logprobs(delta.logprobs).content
        if not delta.text:
            return
        item = self._open
        if not isinstance(item, MessageItem):
            item = yield from self._message()
        yield self._said(item, delta.text)

    def _said(self, item: MessageItem, text: str) -> ResponseEvent:
        """Its next text, with the tokens up to there."""
        tokens, self._hidden = self._hidden, []
        self._pieces.append(text)
        item.content[0].logprobs.extend(tokens)
        kind = "response.output_text.delta"
        return self._event(kind, item, content_index=0, delta=text, logprobs=tokens)

    def _message(self) -> Generator[ResponseEvent, None, MessageItem]:
        item = MessageItem(self._id("msg"), IN_PROGRESS, [])
        yield from self._begin(item)
        item.content = [OutputText(logprobs=[])]
        part = item.content[0]
        yield self._event("response.content_part.added", item, content_index=0, part=part)
        return item

    def _id(self, kind: str) -> str:
        """Of the next item: there may be several of a kind."""
        return f"{kind}_{self._request_id}_{len(self._response.output)}"

    def _call(self, part: pb.ToolCallDelta) -> Iterator[ResponseEvent]:
        item = self._open
        item_id = f"fc_{self._request_id}_{part.index}"
        if not isinstance(item, FunctionCallItem) or item.id != item_id:
            item = FunctionCallItem(item_id, part.id, part.name, IN_PROGRESS)
            yield from self._begin(item)
        if part.arguments_json:
            self._pieces.append(part.arguments_json)
            kind = "response.function_call_arguments.delta"
            yield self._event(kind, item, delta=part.arguments_json)

    def _close(self, item: OutputItem) -> Iterator[ResponseEvent]:
        text, self._pieces = "".join(self._pieces), []
        match item:
            case MessageItem(content=[part]):
                part.text = text
                yield self._event(
                    "response.output_text.done",
                    item,
                    content_index=0,
                    text=part.text,
                    logprobs=part.logprobs,
                )
                yield self._event("response.content_part.done", item, content_index=0, part=part)
            case ReasoningItem(content=[part]):
                part.text = text
                done = "response.reasoning_text.done"
                yield self._event(done, item, content_index=0, text=part.text)
                yield self._event("response.content_part.done", item, content_index=0, part=part)
            case FunctionCallItem():
                item.arguments = text
                yield self._event(
                    "response.function_call_arguments.done",
                    item,
                    name=item.name,
                    arguments=item.arguments,
                )
        index = len(self._response.output) - 1
        yield self._event("response.output_item.done", output_index=index, item=item)
