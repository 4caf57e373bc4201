"""The stream of a response: items that open, grow and close, in numbered events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import msgspec

from kvmesh.cluster.openai import sse
from kvmesh.cluster.openai.call import EventSource
from kvmesh.cluster.openai.chat import ChatToken, chat_logprobs
from kvmesh.cluster.openai.response_items import (
    MessageItem,
    OutputItem,
    OutputText,
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
    part: OutputText | None = None
    delta: str | None = None
    text: str | None = None
    logprobs: list[ChatToken] | None = None


class ResponseStream:
    """Makes the stream of one response from the events of its generation."""

    def __init__(self, body: ResponseBody, request_id: str) -> None:
        self._body = body
        self._request_id = request_id
        self._sent = 0
        self._response = new_response(body, request_id, body.model or "")

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
                yield from self._text(event.delta)
            case "choice_finished":
                yield from self._finish(event.choice_finished.finish_reason)
            case "usage":
                self._response.charge(event.usage)
                yield self._event(f"response.{self._response.status}", response=self._response)
            case _:
                if (comment := sse.comment(event)) is not None:
                    yield comment

    def _event(self, kind: str, **fields: object) -> bytes:
        event = ResponseEvent(type=kind, sequence_number=self._sent, **fields)  # type: ignore[arg-type]
        self._sent += 1
        return sse.named(kind, event)

    def _text(self, delta: pb.Delta) -> Iterator[bytes]:
        tokens = chat_logprobs(delta.logprobs).content if delta.HasField("logprobs") else []
        if not delta.text and not tokens:
            return
        if not self._response.output:
            yield from self._open()
        item = self._response.output[-1]
        part = item.content[0]
        part.text += delta.text
        part.logprobs.extend(tokens)
        yield self._event(
            "response.output_text.delta",
            **self._place(item),
            content_index=0,
            delta=delta.text,
            logprobs=tokens,
        )

    def _open(self) -> Iterator[bytes]:
        item = MessageItem(f"msg_{self._request_id}", "in_progress", [])
        self._response.output = [item]
        yield self._event("response.output_item.added", output_index=0, item=item)
        item.content = [OutputText(logprobs=[])]
        yield self._event(
            "response.content_part.added",
            **self._place(item),
            content_index=0,
            part=item.content[0],
        )

    def _finish(self, reason: pb.FinishReason.ValueType) -> Iterator[bytes]:
        if not self._response.output:
            yield from self._open()
        item = self._response.output[-1]
        part = item.content[0]
        place = self._place(item)
        yield self._event(
            "response.output_text.done",
            **place,
            content_index=0,
            text=part.text,
            logprobs=part.logprobs,
        )
        yield self._event("response.content_part.done", **place, content_index=0, part=part)
        self._response.end(reason)
        yield self._event("response.output_item.done", output_index=0, item=item)

    def _place(self, item: OutputItem) -> dict[str, object]:
        return {"item_id": item.id, "output_index": len(self._response.output) - 1}
