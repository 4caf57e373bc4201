"""A stream's events in one reply, for calls without a stream."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvmesh.v1 import kvmesh_pb2 as pb


@dataclass(slots=True)
class _WholeChoice:
    """choice: all but its texts. A message keeps every value that a text has had until it is
    freed, so adding to one takes memory that grows with the square of the output."""

    choice: pb.Choice
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    arguments: list[list[str]] = field(default_factory=list)  # of each call

    def add(self, delta: pb.Delta) -> None:
        self.text.append(delta.text)
        self.reasoning.append(delta.reasoning)
        for piece in delta.tool_calls:
            if piece.index == len(self.arguments):
                self.choice.tool_calls.add(id=piece.id, name=piece.name)
                self.arguments.append([])
            self.arguments[piece.index].append(piece.arguments_json)
        self.choice.token_ids.extend(delta.token_ids)
        self.choice.logprobs.MergeFrom(delta.logprobs)

    def finish(self, finished: pb.ChoiceFinished) -> None:
        self.choice.finish_reason = finished.finish_reason
        match finished.WhichOneof("matched_stop"):
            case "matched_stop_string":
                self.choice.matched_stop_string = finished.matched_stop_string
            case "matched_stop_token_id":
                self.choice.matched_stop_token_id = finished.matched_stop_token_id

    def whole(self) -> pb.Choice:
        self.choice.text = "".join(self.text)
        self.choice.reasoning = "".join(self.reasoning)
        for call, arguments in zip(self.choice.tool_calls, self.arguments, strict=True):
            call.arguments_json = "".join(arguments)
        return self.choice


class WholeReply:
    """Takes events as they come, of which it keeps what the reply needs."""

    def __init__(self) -> None:
        self._reply = pb.GenerateResponse()
        self._choices: dict[int, _WholeChoice] = {}

    def add(self, event: pb.GenerateStreamResponse) -> None:
        match event.WhichOneof("event"):
            case "started":
                self._reply.request_id = event.started.request_id
                self._reply.model = event.started.model
                self._reply.seed = event.started.seed
            case "delta":
                self._choice(event.delta.index).add(event.delta)
            case "prompt_logprobs":
                self._reply.prompt_logprobs.MergeFrom(event.prompt_logprobs)
            case "choice_finished":
                self._choice(event.choice_finished.index).finish(event.choice_finished)
            case "usage":
                self._reply.usage.CopyFrom(event.usage)

    def reply(self) -> pb.GenerateResponse:
        """Once, after the last event."""
        self._reply.choices.extend(self._wholes())
        return self._reply

    def _wholes(self) -> Iterable[pb.Choice]:
        return (state.whole() for _, state in sorted(self._choices.items()))

    def _choice(self, index: int) -> _WholeChoice:
        if index not in self._choices:
            self._choices[index] = _WholeChoice(pb.Choice(index=index))
        return self._choices[index]
