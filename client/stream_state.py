"""What a streamed generation has received: the result so far, and the cursor."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvmesh.client.errors import ClosedError, ProtocolError
from kvmesh.client.responses import finish_reason, logprobs, matched_stop, mirror
from kvmesh.client.types import (
    Choice,
    Completion,
    Delta,
    FinishReason,
    Prefilling,
    Queued,
    Started,
    StreamEvent,
    TokenLogprobs,
    Usage,
)
from kvmesh.protos import pb


@dataclass(slots=True)
class _ChoiceState:
    text: list[str] = field(default_factory=list)
    text_chars: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    finish_reason_number: int = 0
    matched_stop: str | int | None = None


class StreamState:
    """Folds a stream's events, across all of its connections, into one result.

    queued, started, prefilling: the latest of each event, or None
    usage: set once the stream has ended normally
    resumes: how often the stream was resumed after a lost connection
    """

    def __init__(self, request: pb.GenerateRequest) -> None:
        self._request = request
        self._choices: dict[int, _ChoiceState] = {}
        self._connections = 0
        self.queued: Queued | None = None
        self.started: Started | None = None
        self.prefilling: Prefilling | None = None
        self.usage: Usage | None = None

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
        if self.started is None:
            return request
        request.sampling_params.seed = self.started.seed
        request.resume.model_revision = self.started.model_revision
        for index, choice in sorted(self._choices.items()):
            request.resume.choices.add(
                index=index,
                token_ids=choice.token_ids,
                text_chars=choice.text_chars,
                finished=choice.finish_reason is not None,
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
                self.queued = mirror(Queued, event.queued)
                return self.queued
            case "started":
                self._connections += 1
                self.started = mirror(Started, event.started)
                return self.started
            case "prefilling":
                self.prefilling = mirror(Prefilling, event.prefilling)
                return self.prefilling
            case "delta":
                return self._delta(event.delta)
            case "choice_finished":
                return self._finish(event.choice_finished)
            case "usage":
                self._end(event.usage)
            case None:
                pass  # a sign of life, or a newer server's event, which is safe to skip
        return None

    def completion(self) -> Completion:
        """The whole result; raises ClosedError before the stream has ended."""
        if self.usage is None or self.started is None:
            raise ClosedError("the stream has not ended yet", request_id=self.request_id)
        return Completion(
            request_id=self.started.request_id,
            model=self.started.model,
            seed=self.started.seed,
            choices=tuple(
                _choice(index, choice) for index, choice in sorted(self._choices.items())
            ),
            usage=self.usage,
        )

    def _delta(self, delta: pb.Delta) -> Delta:
        choice = self._live_choice(delta.index)
        if delta.token_offset != len(choice.token_ids):
            raise self._broken(
                f"choice {delta.index} has {len(choice.token_ids)} tokens, "
                f"but the delta starts at token {delta.token_offset}"
            )
        entries = logprobs(delta.token_ids, delta.logprobs)
        choice.text.append(delta.text)
        choice.text_chars += len(delta.text)
        choice.token_ids.extend(delta.token_ids)
        choice.logprobs.extend(entries)
        return Delta(
            index=delta.index,
            text=delta.text,
            token_ids=tuple(delta.token_ids),
            logprobs=entries,
        )

    def _finish(self, finished: pb.ChoiceFinished) -> Delta:
        choice = self._live_choice(finished.index)
        choice.finish_reason = finish_reason(finished.finish_reason)
        choice.finish_reason_number = finished.finish_reason
        choice.matched_stop = matched_stop(finished)
        return Delta(
            index=finished.index,
            text="",
            finish_reason=choice.finish_reason,
            finish_reason_number=choice.finish_reason_number,
            matched_stop=choice.matched_stop,
        )

    def _end(self, usage: pb.Usage) -> None:
        if self.started is None or not self._choices:
            raise self._broken("usage before any output")
        unfinished = [i for i, choice in self._choices.items() if choice.finish_reason is None]
        if unfinished:
            raise self._broken(f"usage before choice {unfinished[0]} finished")
        self.usage = mirror(Usage, usage)

    def _live_choice(self, index: int) -> _ChoiceState:
        if self.started is None:
            raise self._broken("output before started")
        choice = self._choices.setdefault(index, _ChoiceState())
        if choice.finish_reason is not None:
            raise self._broken(f"output of choice {index} after it finished")
        return choice

    def _broken(self, what: str) -> ProtocolError:
        return ProtocolError(
            f"the stream violates the contract: {what}", request_id=self._request.request_id
        )


def _choice(index: int, state: _ChoiceState) -> Choice:
    assert state.finish_reason is not None
    return Choice(
        index=index,
        text="".join(state.text),
        token_ids=tuple(state.token_ids),
        finish_reason=state.finish_reason,
        finish_reason_number=state.finish_reason_number,
        matched_stop=state.matched_stop,
        logprobs=tuple(state.logprobs),
    )
