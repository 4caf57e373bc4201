"""One choice of a request: its tokens, its text, and what ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvmesh.cluster.errors import ResumeMismatchError
from kvmesh.cluster.ingress.answers.pieces import CallPiece, Pieces
from kvmesh.cluster.ingress.answers.reader import PLAIN, AnswerForm, AnswerReader
from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.cluster.ingress.resume import ResumedChoice
from kvmesh.cluster.ingress.stop_strings import StopStrings
from kvmesh.cluster.ingress.validate import TextRules
from kvmesh.workers.request import EndReason, SampledLogprobs, SequenceDelta, TokenIds
from kvmesh.workers.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class ChoiceFinish:
    """Why a choice ended, and the stop string or stop token if one ended it.

    in_calls: whether the answer ends in complete tool calls
    """

    reason: EndReason
    stop_string: str | None = None
    stop_token_id: int | None = None
    in_calls: bool = False


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """New output of a choice. offset: number of output tokens before it"""

    offset: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[SampledLogprobs, ...]
    reasoning: str = ""
    calls: tuple[CallPiece, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.token_ids or self.text or self.reasoning or self.calls)


class RunningChoice:
    """Turns a sequence's tokens into text, up to a stop string, and the text into an answer.

        tokens ──► text ──► up to a stop string ──► reasoning, text, tool calls

    Tokens are processed one at a time, so that the text after a given token does
    not depend on how tokens were grouped in messages. A resumed choice is
    replayed from its tokens.
    rules: what of the text is shown, and which strings end it
    resumed: what the client already has
    prompt: the tokens before
    form: what the answer consists of
    grammar: whether the output has one, which alone decides where it ends
    Raises ResumeMismatchError if the client has more text than those tokens decode to, or
    tokens after the end of the output.
    """

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        rules: TextRules,
        codec: TextCodec,
        resumed: ResumedChoice,
        prompt: Sequence[int] | TokenIds = (),
        form: AnswerForm = PLAIN,
        grammar: bool = False,
    ) -> None:
        self.index = index
        self.params = params
        self.rules = rules
        self.token_ids: list[int] = []
        self.finish: ChoiceFinish | None = None
        self.cut = False  # by its text, which the engine does not know
        self._grammar = grammar
        self._eos = frozenset(() if params.ignore_eos and not grammar else codec.eos_token_ids)
        self._codec = codec
        self._text = codec.stream(prompt, rules.skip_special_tokens)
        self._stops = StopStrings(rules.stop)
        self._markers = form.markers
        self._reader = AnswerReader(form) if form else None
        self.already_finished = resumed.finished
        self._replay(resumed)
        self._num_resumed = len(self.token_ids)

    @property
    def num_new_tokens(self) -> int:
        """Of the output, besides what the client already had."""
        return len(self.token_ids) - self._num_resumed

    def _replay(self, resumed: ResumedChoice) -> None:
        parts: list[Pieces] = []
        for token_id in resumed.token_ids:
            if self.finish is not None:
                raise ResumeMismatchError(
                    f"the resumed output ends at token {len(self.token_ids)}, but it has "
                    f"{len(resumed.token_ids)} tokens"
                )
            stop_token = self._stop_token(token_id)
            parts.append(self._take(token_id, is_stop_token=stop_token))
            if stop_token and self.finish is None:
                self.finish = ChoiceFinish(EndReason.STOP, stop_token_id=token_id)
            elif len(self.token_ids) >= self.params.max_tokens and self.finish is None:
                self.finish = ChoiceFinish(EndReason.LENGTH)
        if resumed.finished and self.finish is None:
            # It ended for a reason that its tokens do not show, e.g. a deadline.
            self.finish = ChoiceFinish(EndReason.ABORT)
        if self.finish is not None:
            parts.append(self._rest())
        try:
            self._owed = Pieces.joined(parts).without(
                resumed.reasoning_chars, resumed.text_chars, resumed.tool_arguments_chars
            )
        except ValueError as error:
            raise ResumeMismatchError(
                f"the resumed tokens decode to {error}, but the client has received more"
            ) from None

    def owed(self) -> ChoiceOutput:
        """Output of the resumed tokens that the client has not received."""
        owed, self._owed = self._owed, Pieces()
        return self._output(len(self.token_ids), owed)

    def accept(self, deltas: Sequence[SequenceDelta]) -> ChoiceOutput:
        """Add tokens from the engine; sets `finish` at the end of the output.

        Tokens after a stop string are dropped.
        """
        offset, pieces = len(self.token_ids), Pieces()
        logprobs: list[SampledLogprobs] = []
        for delta in deltas:
            for position, token_id in enumerate(delta.token_ids):
                if self.finish is not None:
                    break
                last = position == len(delta.token_ids) - 1
                is_stop_token = last and delta.matched_stop_token == token_id
                pieces.add(self._take(token_id, is_stop_token=is_stop_token))
                logprobs.extend(delta.logprobs[position : position + 1])
            if delta.finish_reason is not None and self.finish is None:
                self.finish = ChoiceFinish(
                    delta.finish_reason, stop_token_id=delta.matched_stop_token
                )
        if self.finish is not None:
            pieces.add(self._rest())
        return self._output(offset, pieces, tuple(logprobs))

    def end(self, reason: EndReason) -> ChoiceOutput:
        """End the choice for a reason other than its tokens."""
        self.finish = ChoiceFinish(reason)
        return self._output(len(self.token_ids), self._rest())

    def _output(
        self, offset: int, pieces: Pieces, logprobs: tuple[SampledLogprobs, ...] = ()
    ) -> ChoiceOutput:
        return ChoiceOutput(
            offset,
            tuple(self.token_ids[offset:]),
            pieces.text,
            logprobs,
            pieces.reasoning,
            tuple(pieces.merged_calls()),
        )

    def _stop_token(self, token_id: int) -> bool:
        enough = len(self.token_ids) + 1 >= self.params.min_tokens
        if token_id in self._eos and (enough or self._grammar):
            return True
        return enough and token_id in self.params.stop_token_ids

    def _take(self, token_id: int, *, is_stop_token: bool) -> Pieces:
        """What is final after this token; a stop token adds nothing, unless it is included.

        A special token that is also a stop token may be what a stop string names.
        """
        self.token_ids.append(token_id)
        special = self._codec.special_text(token_id)
        adds_text = not is_stop_token or self.rules.include_stop
        hidden = special if self.rules.skip_special_tokens or not adds_text else ""
        text = ""
        if adds_text and (marker := self._markers.get(token_id)) is not None:
            text, hidden = self._text.flush() + marker, ""
        elif adds_text:
            text = self._text.push((token_id,))
        text = self._scan(text, hidden, may_end=not is_stop_token or bool(special))
        if self._reader is None:
            return Pieces(text=text)
        pieces = self._reader.push(text)
        if not is_stop_token and self._reader.has_enough() and self.finish is None:
            self.finish = ChoiceFinish(EndReason.STOP)
            self.cut = True
        return pieces

    def _scan(self, text: str, hidden: str = "", *, may_end: bool = True) -> str:
        enough = len(self.token_ids) >= self.params.min_tokens
        final, matched = self._stops.push(text, hidden, may_end=may_end and enough)
        if matched is not None:
            self.finish = ChoiceFinish(EndReason.STOP, stop_string=matched)
            self.cut = True
            if self.rules.include_stop:
                final += matched
        return final

    def _rest(self) -> Pieces:
        """At the end: what decoder, search for stop strings and reader have held back."""
        assert self.finish is not None
        text = ""
        if self.finish.stop_string is None:
            text = self._scan(self._text.flush()) + self._stops.flush()
        if self._reader is None:
            return Pieces(text=text)
        pieces = self._reader.push(text)
        pieces.add(self._reader.finish())
        if self.finish.reason is EndReason.STOP and self._reader.ends_in_calls:
            self.finish = replace(self.finish, in_calls=True)
        return pieces


def choice_seed(seed: int, index: int) -> int:
    """A choice's seed: the request's own for the first, mixed (SplitMix64) for the others."""
    if index == 0:
        return seed
    mask = (1 << 64) - 1
    mixed = (seed + index * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31)
