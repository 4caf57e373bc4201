"""One choice of a request: its tokens, its text, and what ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvmesh.cluster.errors import ResumeMismatchError
from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.cluster.ingress.stop_strings import StopStrings
from kvmesh.cluster.ingress.validate import ResumedChoice, TextRules
from kvmesh.workers.request import EndReason, SampledLogprobs, SequenceDelta, TokenIds
from kvmesh.workers.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class ChoiceFinish:
    """Why a choice ended, and the stop string or stop token if one ended it."""

    reason: EndReason
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """New output of a choice. offset: number of output tokens before it"""

    offset: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[SampledLogprobs, ...]

    def __bool__(self) -> bool:
        return bool(self.token_ids or self.text)


class RunningChoice:
    """Turns a sequence's tokens into text, up to a stop string.

    Tokens are processed one at a time, so that the text after a given token does
    not depend on how tokens were grouped in messages. A resumed choice is
    replayed from its tokens.
    rules: what of the text is shown, and which strings end it
    resumed: what the client already has
    prompt: the tokens before
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
    ) -> None:
        self.index = index
        self.params = params
        self.rules = rules
        self.token_ids: list[int] = []
        self.finish: ChoiceFinish | None = None
        self._eos = frozenset(() if params.ignore_eos else codec.eos_token_ids)
        self._codec = codec
        self._text = codec.stream(prompt, rules.skip_special_tokens)
        self._stops = StopStrings(rules.stop)
        self._owed_text = ""
        self.already_finished = resumed.finished
        self._replay(resumed)

    def _replay(self, resumed: ResumedChoice) -> None:
        text = ""
        for token_id in resumed.token_ids:
            if self.finish is not None:
                raise ResumeMismatchError(
                    f"the resumed output ends at token {len(self.token_ids)}, but it has "
                    f"{len(resumed.token_ids)} tokens"
                )
            stop_token = self._stop_token(token_id)
            text += self._take(token_id, is_stop_token=stop_token)
            if stop_token and self.finish is None:
                self.finish = ChoiceFinish(EndReason.STOP, stop_token_id=token_id)
            elif len(self.token_ids) >= self.params.max_tokens and self.finish is None:
                self.finish = ChoiceFinish(EndReason.LENGTH)
        if resumed.finished and self.finish is None:
            # It ended for a reason that its tokens do not show, e.g. a deadline.
            self.finish = ChoiceFinish(EndReason.ABORT)
        if self.finish is not None and self.finish.stop_string is None:
            text += self._rest()
        if resumed.text_chars > len(text):
            raise ResumeMismatchError(
                f"the resumed tokens decode to {len(text)} characters, but the client "
                f"received {resumed.text_chars}"
            )
        self._owed_text = text[resumed.text_chars :]

    def owed(self) -> ChoiceOutput:
        """Text of the resumed tokens that the client has not received."""
        owed, self._owed_text = self._owed_text, ""
        return ChoiceOutput(len(self.token_ids), (), owed, ())

    def accept(self, deltas: Sequence[SequenceDelta]) -> ChoiceOutput:
        """Add tokens from the engine; sets `finish` at the end of the output.

        Tokens after a stop string are dropped.
        """
        offset, text = len(self.token_ids), ""
        logprobs: list[SampledLogprobs] = []
        for delta in deltas:
            for position, token_id in enumerate(delta.token_ids):
                if self.finish is not None:
                    break
                last = position == len(delta.token_ids) - 1
                is_stop_token = last and delta.matched_stop_token == token_id
                text += self._take(token_id, is_stop_token=is_stop_token)
                logprobs.extend(delta.logprobs[position : position + 1])
            if delta.finish_reason is not None and self.finish is None:
                self.finish = ChoiceFinish(
                    delta.finish_reason, stop_token_id=delta.matched_stop_token
                )
                text += self._rest()
        return ChoiceOutput(offset, tuple(self.token_ids[offset:]), text, tuple(logprobs))

    def end(self, reason: EndReason) -> ChoiceOutput:
        """End the choice for a reason other than its tokens."""
        self.finish = ChoiceFinish(reason)
        return ChoiceOutput(len(self.token_ids), (), self._rest(), ())

    def _stop_token(self, token_id: int) -> bool:
        enough = len(self.token_ids) + 1 >= self.params.min_tokens
        return enough and (token_id in self._eos or token_id in self.params.stop_token_ids)

    def _take(self, token_id: int, *, is_stop_token: bool) -> str:
        """Text that is final after this token; a stop token adds none, unless it is included.

        A special token that is also a stop token may be what a stop string names.
        """
        self.token_ids.append(token_id)
        special = self._codec.special_text(token_id)
        adds_text = not is_stop_token or self.rules.include_stop
        text = self._text.push((token_id,)) if adds_text else ""
        hidden = special if self.rules.skip_special_tokens or not adds_text else ""
        return self._scan(text, hidden, may_end=not is_stop_token or bool(special))

    def _scan(self, text: str, hidden: str = "", *, may_end: bool = True) -> str:
        enough = len(self.token_ids) >= self.params.min_tokens
        final, matched = self._stops.push(text, hidden, may_end=may_end and enough)
        if matched is not None:
            self.finish = ChoiceFinish(EndReason.STOP, stop_string=matched)
            if self.rules.include_stop:
                final += matched
        return final

    def _rest(self) -> str:
        """At the end: the text that the decoder and the search for stop strings have held back."""
        return self._scan(self._text.flush()) + self._stops.flush()
