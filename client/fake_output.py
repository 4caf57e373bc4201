"""What FakeServer answers: a scripted text, cut by the parameters that a server obeys.

Each word of the text is one token, and the i-th token of an output has the id i. At the end of
the text the output ends, as at a model's end-of-sequence token. Where the parameters do not
allow that, the text is repeated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvmesh.protos import pb

DEFAULT_MAX_TOKENS = 256
# The chosen token's probability is 0.9; the k-th alternative has 0.05 / 2^k.
_CHOSEN_LOGPROB = -0.10536
_FIRST_ALTERNATIVE_LOGPROB = -2.99573
_LN_2 = 0.69315


@dataclass(frozen=True, slots=True)
class FakeOutput:
    """choice: all of it; pieces: the text of each token, together the choice's text"""

    choice: pb.Choice
    pieces: tuple[str, ...]


def fake_output(answer: str, params: pb.SamplingParams) -> FakeOutput:
    """The output of one choice. Sampling itself is not imitated: all choices are the same."""
    words = re.findall(r"\s*\S+|\s+$", answer)
    max_tokens = max(1, params.max_tokens if params.HasField("max_tokens") else DEFAULT_MAX_TOKENS)
    choice = pb.Choice()
    starts: list[int] = []
    while not choice.finish_reason:
        count = len(starts)
        can_stop = count >= params.min_tokens and not params.ignore_eos
        if count >= len(words) and (can_stop or not words):
            choice.finish_reason = pb.FINISH_REASON_STOP
        elif count == max_tokens:
            choice.finish_reason = pb.FINISH_REASON_LENGTH
        else:
            word = _word(words, count)
            starts.append(len(choice.text))
            choice.token_ids.append(count)
            if params.HasField("logprobs"):
                choice.logprobs.append(_logprobs(count, word, params.logprobs))
            choice.text += word
            if count + 1 >= params.min_tokens:
                _stop(choice, starts[-1], params)
    ends = [*starts[1:], len(choice.text)] if starts else []
    pieces = tuple(choice.text[start:end] for start, end in zip(starts, ends, strict=True))
    return FakeOutput(choice, pieces)


def _word(words: Sequence[str], position: int) -> str:
    word = words[position % len(words)]
    return f" {word}" if position and position % len(words) == 0 else word


def _stop(choice: pb.Choice, start: int, params: pb.SamplingParams) -> None:
    """End the choice if its last token, whose text begins at `start`, stops it."""
    last = choice.token_ids[-1]
    if last in params.stop_token_ids:
        choice.text = choice.text[:start]
        choice.matched_stop_token_id = last
        choice.finish_reason = pb.FINISH_REASON_STOP
        return
    found = [
        (position, stop)
        for stop in params.stop
        if (position := choice.text.find(stop, max(0, start - len(stop) + 1))) >= 0
    ]
    if found:
        position, choice.matched_stop_string = min(found)
        choice.text = choice.text[:position]
        choice.finish_reason = pb.FINISH_REASON_STOP


def _logprobs(token_id: int, text: str, num_alternatives: int) -> pb.TokenLogprobs:
    """The chosen token, and as many alternatives, the best of which is the chosen one."""
    chosen = pb.TokenLogprob(token_id=token_id, text=text, logprob=_CHOSEN_LOGPROB)
    others = [
        pb.TokenLogprob(
            token_id=token_id + rank,
            text=f"<{rank}>",
            logprob=_FIRST_ALTERNATIVE_LOGPROB - _LN_2 * rank,
        )
        for rank in range(1, max(0, num_alternatives))
    ]
    return pb.TokenLogprobs(chosen=chosen, top=[chosen, *others] if num_alternatives > 0 else [])
