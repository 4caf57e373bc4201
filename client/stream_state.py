"""What a streamed generation has received: the result so far, and the cursor."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvmesh.client import responses
from kvmesh.client.cursor import decode_cursor, encode_cursor
from kvmesh.client.errors import ClosedError, ProtocolError
from kvmesh.client.types import (
    Completion,
    Delta,
    Prefilling,
    PromptLogprobs,
    Queued,
    Started,
    StreamEvent,
    ToolCallDelta,
    Usage,
)
from kvmesh.protos import pb


@dataclass(slots=True)
class _ChoiceState:
    """choice: all that was received, except for texts"""

    choice: pb.Choice
    # In a message, adding to a long text would copy it.
    text: list[str] = field(default_factory=list)
    text_chars: int = 0
    reasoning: list[str] = field(default_factory=list)
    reasoning_chars: int = 0
    arguments: list[list[str]] = field(default_factory=list)  # of each call

    @classmethod
    def of(cls, choice: pb.Choice) -> _ChoiceState:
        """What another stream has received."""
        state = cls(choice, [choice.text], len(choice.text))
        state.reasoning, state.reasoning_chars = [choice.reasoning], len(choice.reasoning)
        state.arguments = [[call.arguments_json] for call in choice.tool_calls]
        choice.ClearField("text")
        choice.ClearField("reasoning")
        for call in choice.tool_calls:
            call.ClearField("arguments_json")
        return state

    def add(self, delta: pb.Delta) -> None:
        self.text.append(delta.text)
        self.text_chars += len(delta.text)
        self.reasoning.append(delta.reasoning)
        self.reasoning_chars += len(delta.reasoning)
        for piece in delta.tool_calls:
            if piece.index == len(self.arguments):
                self.choice.tool_calls.add(id=piece.id, name=piece.name)
                self.arguments.append([])
            self.arguments[piece.index].append(piece.arguments_json)
        self.choice.token_ids.extend(delta.token_ids)
        self.choice.logprobs.MergeFrom(delta.logprobs)

    @property
    def finished(self) -> bool:
        return self.choice.finish_reason != pb.FINISH_REASON_UNSPECIFIED

    def received(self) -> pb.Choice:
        choice = pb.Choice(text="".join(self.text), reasoning="".join(self.reasoning))
        choice.MergeFrom(self.choice)
        for call, arguments in zip(choice.tool_calls, self.arguments, strict=True):
            call.arguments_json = "".join(arguments)
        return choice


class StreamState:
    """Folds a stream's events, across all of its connections, into one result.

    queued, started, prefilling: the latest of each event, or None
    usage: set once the stream has ended normally
    resumes: how often the stream was resumed after a lost connection
    continues: whether another stream started it, which is the case after `of_cursor`
    """

    def __init__(self, request: pb.GenerateRequest, *, continues: bool = False) -> None:
        self._request = request
        self._choices: dict[int, _ChoiceState] = {}
        self._usage: pb.Usage | None = None
        self._connections = 0
        self._prompt_logprobs = pb.Logprobs()
        self.continues = continues
        self.queued: Queued | None = None
        self.started: Started | None = None
        self.prefilling: Prefilling | None = None
        self.usage: Usage | None = None

    @classmethod
    def of_cursor(cls, text: str) -> StreamState:
        """The state of another stream that had `cursor`.

        Raises InvalidRequestError for a text that is no cursor.
        """
        request, received = decode_cursor(text)
        state = cls(request, continues=True)
        state._prompt_logprobs.CopyFrom(received.prompt_logprobs)
        for choice in received.choices:
            state._choices[choice.index] = _ChoiceState.of(choice)
        return state

    @property
    def cursor(self) -> str:
        """Where the stream is now."""
        return encode_cursor(self._request, self._received())

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def ended(self) -> bool:
        return self.usage is not None

    @property
    def resumes(self) -> int:
        return max(0, self._connections - 1)

    def request_to_send(self) -> pb.GenerateRequest:
        """The request for the next connection: the caller's, or one that resumes."""
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        if request.HasField("resume"):
            request.resume.prompt_logprobs_received = len(self._prompt_logprobs.chosen)
            for index, state in sorted(self._choices.items()):
                request.resume.choices.add(
                    index=index,
                    token_ids=state.choice.token_ids,
                    text_chars=state.text_chars,
                    finished=state.finished,
                    reasoning_chars=state.reasoning_chars,
                    tool_arguments_chars=[sum(map(len, found)) for found in state.arguments],
                )
        return request

    def feed(self, event: pb.GenerateStreamResponse) -> StreamEvent | None:
        """Process one event; returns what the caller may want to see, if anything.

        Raises ProtocolError for output that is out of order, missing or repeated.
        """
        if self.usage is not None:
            raise self._broken("an event after usage")
        match event.WhichOneof("event"):
            case "queued":
                self.queued = responses.mirror(Queued, event.queued)
                return self.queued
            case "started":
                return self._start(event.started)
            case "prefilling":
                self.prefilling = responses.mirror(Prefilling, event.prefilling)
                return self.prefilling
            case "prompt_logprobs":
                self._prompt_logprobs.MergeFrom(event.prompt_logprobs)
                return PromptLogprobs(responses.prompt_logprobs(event.prompt_logprobs))
            case "delta":
                return self._delta(event.delta)
            case "choice_finished":
                return self._finish(event.choice_finished)
            case "usage":
                return self._end(event.usage)
            case _:
                return None  # a sign of life, or a newer server's event, which is safe to skip

    def completion(self) -> Completion:
        """The whole result; raises ClosedError before the stream has ended."""
        if self.usage is None or self.started is None:
            raise ClosedError("the stream has not ended yet", request_id=self.request_id)
        return responses.completion(self._received())

    def _received(self) -> pb.GenerateResponse:
        return pb.GenerateResponse(
            request_id=self.started.request_id if self.started else self.request_id,
            model=self.started.model if self.started else "",
            seed=self._request.sampling_params.seed,
            choices=[state.received() for _, state in sorted(self._choices.items())],
            usage=self._usage,
            prompt_logprobs=self._prompt_logprobs,
        )

    def _start(self, started: pb.Started) -> Started:
        self._connections += 1
        # What the contract requires of a request that resumes this stream.
        self._request.sampling_params.seed = started.seed
        self._request.resume.model_revision = started.model_revision
        self._request.resume.SetInParent()
        self.started = responses.mirror(Started, started)
        return self.started

    def _delta(self, delta: pb.Delta) -> Delta:
        state = self._live_choice(delta.index)
        received_tokens = len(state.choice.token_ids)
        if delta.token_offset != received_tokens:
            raise self._broken(
                f"choice {delta.index} has {received_tokens} tokens, "
                f"but the delta starts at token {delta.token_offset}"
            )
        known = len(state.arguments)
        for piece in delta.tool_calls:
            if piece.index > known:
                raise self._broken(
                    f"choice {delta.index} has {known} tool calls, but call {piece.index} continues"
                )
            known += piece.index == known
        state.add(delta)
        return Delta(
            index=delta.index,
            text=delta.text,
            token_ids=tuple(delta.token_ids),
            logprobs=responses.logprobs(delta.token_ids, delta.logprobs),
            reasoning=delta.reasoning,
            tool_calls=tuple(responses.mirror(ToolCallDelta, call) for call in delta.tool_calls),
        )

    def _finish(self, finished: pb.ChoiceFinished) -> Delta:
        state = self._live_choice(finished.index)
        # The fields of ChoiceFinished are among those of Choice.
        for field_, value in finished.ListFields():
            setattr(state.choice, field_.name, value)
        return Delta(
            index=finished.index,
            text="",
            finish_reason=responses.finish_reason(finished.finish_reason),
            finish_reason_number=finished.finish_reason,
            matched_stop=responses.matched_stop(finished),
        )

    def _end(self, usage: pb.Usage) -> Usage:
        if self.started is None or not self._choices:
            raise self._broken("usage before any output")
        unfinished = [index for index, state in self._choices.items() if not state.finished]
        if unfinished:
            raise self._broken(f"usage before choice {unfinished[0]} finished")
        self._usage = usage
        self.usage = responses.mirror(Usage, usage)
        return self.usage

    def _live_choice(self, index: int) -> _ChoiceState:
        if self.started is None:
            raise self._broken("output before started")
        state = self._choices.setdefault(index, _ChoiceState(pb.Choice(index=index)))
        if state.finished:
            raise self._broken(f"output of choice {index} after it finished")
        return state

    def _broken(self, what: str) -> ProtocolError:
        return ProtocolError(
            f"the stream violates the contract: {what}", request_id=self._request.request_id
        )
