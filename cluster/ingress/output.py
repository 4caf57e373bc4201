"""What a request sends to its client: deltas in, events out, many tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvmesh.cluster.errors import RequestDeadlineError
from kvmesh.cluster.ingress import wire
from kvmesh.cluster.ingress.choice import ChoiceOutput, RunningChoice
from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.cluster.ingress.prompt_scores import PromptScores
from kvmesh.cluster.ingress.reply_queue import ReplyQueue
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.plan import TokenScores
from kvmesh.workers.request import EndReason, PrefillProgress, SequenceDelta

MUCH_UNREAD = 256  # deltas of a choice


class RequestOutput:
    """The choices of a request, and what their reader has not taken yet.

    Deltas are only collected when they arrive. They become events when the reader takes them,
    one event per choice however many tokens have come, or when the request needs its choices
    up to date.

    queue: of the stream
    call_id: of a choice's tool call, both by index
    scores: of the prompt
    """

    def __init__(
        self,
        choices: Sequence[RunningChoice],
        codec: TextCodec,
        queue: ReplyQueue,
        call_id: Callable[[int, int], str],
        scores: PromptScores,
    ) -> None:
        self.choices = choices
        self.scores = scores
        self.queue = queue
        self._codec = codec
        self._call_id = call_id
        self._cut: list[RunningChoice] = []
        # Of each choice. Lists of deltas alone give the garbage collector nothing to walk.
        self._deltas: list[list[SequenceDelta]] = [[] for _ in choices]

    def put(self, choice: RunningChoice, delta: SequenceDelta) -> None:
        """Collect a delta of a choice."""
        self._deltas[choice.index].append(delta)
        self.queue.wake()

    def put_scores(self, scores: TokenScores) -> None:
        """Log-probabilities of the next tokens of the prompt."""
        self.scores.put(scores)
        self.queue.wake()

    def note_progress(self, sequence: str, progress: PrefillProgress) -> None:
        """How far a sequence is computed, which is sent if it leads the others."""
        if self.queue.status.computed(sequence, progress):
            self.queue.send_status()

    def add(self, event: pb.GenerateStreamResponse) -> None:
        self.queue.put((event,))
        self.queue.wake()

    def take(self) -> list[pb.GenerateStreamResponse]:
        """All events so far. Raises RequestDeadlineError, see `absorb`."""
        self.absorb()
        return self.queue.take(over=not self.unfinished)

    def take_cut(self) -> list[RunningChoice]:
        """Choices that a stop string, or an answer that is long enough, has ended; each once.

        Their sequences still run.
        """
        cut, self._cut = self._cut, []
        return cut

    def absorb(self) -> None:
        """Turn the deltas into events.

        Raises RequestDeadlineError if the engine has ended the request without any output.
        """
        self.queue.put(self.scores.take())
        for choice in self.choices:
            if deltas := self._deltas[choice.index]:
                self._deltas[choice.index] = []
                self.queue.status.generating()
                if choice.finish is None:  # otherwise they follow a stop string
                    self._accept(choice, deltas)

    @property
    def unread(self) -> bool:
        """Whether much has come that nobody has taken."""
        return any(len(deltas) >= MUCH_UNREAD for deltas in self._deltas)

    def catch_up(self) -> None:
        """Send the text that a resuming client lacks."""
        for choice in self.choices:
            if not choice.already_finished:
                self._emit(choice, choice.owed())
        self.queue.wake()

    def end_all(self, reason: EndReason) -> None:
        """End every choice that has not finished."""
        self.absorb()
        for choice in self.unfinished:
            self._emit(choice, choice.end(reason))

    @property
    def unfinished(self) -> list[RunningChoice]:
        return [choice for choice in self.choices if choice.finish is None]

    @property
    def num_tokens(self) -> int:
        """Of all choices."""
        return sum(len(choice.token_ids) for choice in self.choices)

    def _accept(self, choice: RunningChoice, deltas: list[SequenceDelta]) -> None:
        output = choice.accept(deltas)
        if choice.finish is not None:
            if choice.finish.reason is EndReason.DEADLINE and not self._has_tokens():
                raise RequestDeadlineError()
            if choice.cut:
                self._cut.append(choice)
        self._emit(choice, output)

    def _has_tokens(self) -> bool:
        """Whether any choice has some, also in deltas that are yet to be absorbed."""
        waiting = (delta.token_ids for deltas in self._deltas for delta in deltas)
        return self.num_tokens > 0 or any(waiting)

    def _emit(self, choice: RunningChoice, output: ChoiceOutput) -> None:
        if output:
            skip = choice.rules.skip_special_tokens
            delta = wire.delta(choice.index, output, self._codec, self._call_id, skip)
            self.queue.put((pb.GenerateStreamResponse(delta=delta),))
        if choice.finish is not None:
            finished = wire.choice_finished(choice.index, choice.finish)
            self.queue.put((pb.GenerateStreamResponse(choice_finished=finished),))
