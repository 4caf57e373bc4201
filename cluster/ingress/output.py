"""What a request sends to its client: deltas in, events out, many tokens at a time.

With nothing else to send, a stream repeats its status, so that neither people nor proxies give
it up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvmesh.cluster.errors import RequestDeadlineError
from kvmesh.cluster.ingress import wire
from kvmesh.cluster.ingress.choice import ChoiceOutput, RunningChoice
from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.cluster.ingress.prompt_scores import PromptScores
from kvmesh.cluster.ingress.stream_status import StreamStatus
from kvmesh.cluster.ingress.waker import Waker
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.plan import TokenScores
from kvmesh.workers.request import EndReason, SequenceDelta

SILENCE_S = 4.0  # the contract's 5 s, less what the way may take


class RequestOutput:
    """The choices of a request, and the events that its reader has not taken yet.

    Deltas are only collected when they arrive. They become events when the reader takes them,
    one event per choice however many tokens have come, or when the request needs its choices
    up to date.

    on_cut: called when a stop string, or an answer that is long enough, has ended a choice
    call_id: of a choice's tool call, both by index
    status: what to send when there is nothing else
    scores: of the prompt
    silence_s: from the last event until the status is sent again
    """

    def __init__(
        self,
        choices: Sequence[RunningChoice],
        codec: TextCodec,
        waker: Waker,
        on_cut: Callable[[RunningChoice], None],
        call_id: Callable[[int, int], str],
        status: StreamStatus,
        scores: PromptScores,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.choices = choices
        self.scores = scores
        self._codec = codec
        self._waker = waker
        self._on_cut = on_cut
        self._call_id = call_id
        self._deltas: list[tuple[RunningChoice, SequenceDelta]] = []
        self._events: list[pb.GenerateStreamResponse] = []
        self._ready = asyncio.Event()
        self._woken = False  # or about to be
        self._status = status
        self._status_due = False
        self._silence_s = silence_s
        self._sent_s = 0.0  # the event loop's time
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """The reader is there; from now on it is never left in silence."""
        self._sent_s = asyncio.get_running_loop().time()
        self._break_silence()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def put(self, choice: RunningChoice, delta: SequenceDelta) -> None:
        """Collect a delta of a choice."""
        self._deltas.append((choice, delta))
        self.wake()

    def put_scores(self, scores: TokenScores) -> None:
        """Log-probabilities of the next tokens of the prompt."""
        self.scores.put(scores)
        self.wake()

    def add(self, event: pb.GenerateStreamResponse) -> None:
        self._events.append(event)
        self.wake()

    def send_status(self) -> None:
        """Send the status, unless there is output to send by then."""
        self._status_due = True
        self.wake()

    def wake(self) -> None:
        """Wake the reader, when its turn comes."""
        if not self._woken:
            self._woken = True
            self._waker.wake(self._ready)

    async def wait(self) -> None:
        """Until the reader is woken."""
        await self._ready.wait()
        self._ready.clear()
        self._woken = False

    def take(self) -> list[pb.GenerateStreamResponse]:
        """All events so far. Raises RequestDeadlineError, see `absorb`."""
        self.absorb()
        events, self._events = self._events, []
        if self._status_due:
            self._status_due = False
            if not events and self.unfinished:
                events.append(self._status.event())
        if events:
            self._sent_s = asyncio.get_running_loop().time()
        return events

    def absorb(self) -> None:
        """Turn the deltas into events.

        Raises RequestDeadlineError if the engine has ended the request without any output.
        """
        self._events += self.scores.take()
        deltas, self._deltas = self._deltas, []
        if deltas:
            self._status.generating()
        found: dict[RunningChoice, list[SequenceDelta]] = {}
        for choice, delta in deltas:
            if choice.finish is None:  # otherwise they follow a stop string
                found.setdefault(choice, []).append(delta)
        for choice, its in found.items():
            output = choice.accept(its)
            if choice.finish is not None:
                if choice.finish.reason is EndReason.DEADLINE and not self.has_tokens:
                    raise RequestDeadlineError()
                if choice.cut:
                    self._on_cut(choice)
            self._emit(choice, output)

    def catch_up(self) -> None:
        """Send the text that a resuming client lacks."""
        for choice in self.choices:
            if not choice.already_finished:
                self._emit(choice, choice.owed())
        self.wake()

    def end_all(self, reason: EndReason) -> None:
        """End every choice that has not finished."""
        self.absorb()
        for choice in self.unfinished:
            self._emit(choice, choice.end(reason))

    @property
    def unfinished(self) -> list[RunningChoice]:
        return [choice for choice in self.choices if choice.finish is None]

    @property
    def has_tokens(self) -> bool:
        return any(choice.token_ids for choice in self.choices)

    def _break_silence(self) -> None:
        """Send the status if nothing was sent for long. One timer, whatever is sent meanwhile."""
        loop = asyncio.get_running_loop()
        due = self._sent_s + self._silence_s
        if due <= loop.time():
            self.send_status()
            due = loop.time() + self._silence_s
        self._timer = loop.call_at(due, self._break_silence)

    def _emit(self, choice: RunningChoice, output: ChoiceOutput) -> None:
        if output:
            skip = choice.rules.skip_special_tokens
            delta = wire.delta(choice.index, output, self._codec, self._call_id, skip)
            self._events.append(pb.GenerateStreamResponse(delta=delta))
        if choice.finish is not None:
            finished = wire.choice_finished(choice.index, choice.finish)
            self._events.append(pb.GenerateStreamResponse(choice_finished=finished))
