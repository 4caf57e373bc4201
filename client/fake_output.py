"""What FakeServer answers: a scripted text, cut by the parameters that a server obeys.

Each word of the text is one token, and the i-th token of an output has the id i. At the end of
the text the output ends, as at a model's end-of-sequence token. Where the parameters do not
allow that, the text is repeated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvmesh.client.types import ToolCall
from kvmesh.protos import pb

DEFAULT_MAX_TOKENS = 256
# The chosen token's probability is 0.9; the k-th alternative has 0.05 / 2^k.
_CHOSEN_LOGPROB = -0.10536
_FIRST_ALTERNATIVE_LOGPROB = -2.99573
_LN_2 = 0.69315


@dataclass(frozen=True, slots=True)
class FakeAnswer:
    """An answer with more than text. Only the words of the text count as tokens."""

    text: str = ""
    reasoning: str = ""
    tool_calls: Sequence[ToolCall] = ()


@dataclass(frozen=True, slots=True)
class FakeOutput:
    """choice: all of it; pieces: the text of each token, together the choice's text"""

    choice: pb.Choice
    pieces: tuple[str, ...]

    def parts(self, index: int, had: pb.ResumedChoice | None) -> Iterator[pb.Delta]:
        """Reasoning and calls that the client has not received, without the text's tokens."""
        reasoning = self.choice.reasoning[had.reasoning_chars if had else 0 :]
        if reasoning:
            yield pb.Delta(index=index, reasoning=reasoning)
        known = list(had.tool_arguments_chars) if had else []
        for number, call in enumerate(self.choice.tool_calls):
            sent = known[number] if number < len(known) else None
            start = pb.ToolCallDelta(index=number)
            if sent is None:
                start.id, start.name = call.id, call.name
                yield pb.Delta(index=index, tool_calls=[start])
            rest = call.arguments_json[sent or 0 :]
            for piece in (rest[: len(rest) // 2], rest[len(rest) // 2 :]):
                if piece:
                    part = pb.ToolCallDelta(index=number, arguments_json=piece)
                    yield pb.Delta(index=index, tool_calls=[part])

    def logprobs(self, position: int) -> pb.Logprobs | None:
        """Of one token; None if they were not requested."""
        if not self.choice.HasField("logprobs"):
            return None
        columns = self.choice.logprobs
        k = len(columns.top) // len(columns.chosen)
        own = slice(k * position, k * (position + 1))
        return pb.Logprobs(
            chosen=[columns.chosen[position]],
            chosen_bytes=[columns.chosen_bytes[position]],
            top_token_ids=columns.top_token_ids[own],
            top=columns.top[own],
            top_bytes=columns.top_bytes[own],
        )


def fake_output(answer: str | FakeAnswer, request: pb.GenerateRequest) -> FakeOutput:
    """The output of one choice. Sampling itself is not imitated: all choices are the same."""
    params = request.sampling_params
    if isinstance(answer, str):
        answer = FakeAnswer(answer)
    words = re.findall(r"\s*\S+|\s+$", answer.text)
    max_tokens = params.max_tokens if params.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    may_be_empty = params.HasField("prompt_logprobs") or request.HasField("pin_s")
    max_tokens = max(0 if may_be_empty else 1, max_tokens)
    choice = pb.Choice(reasoning=answer.reasoning)
    starts: list[int] = []
    while not choice.finish_reason:
        count = len(starts)
        can_stop = count >= params.min_tokens and not params.ignore_eos
        if not max_tokens:
            choice.finish_reason = pb.FINISH_REASON_LENGTH
        elif count >= len(words) and (can_stop or not words):
            choice.finish_reason = pb.FINISH_REASON_STOP
        elif count == max_tokens:
            choice.finish_reason = pb.FINISH_REASON_LENGTH
        else:
            word = _word(words, count)
            starts.append(len(choice.text))
            choice.token_ids.append(count)
            if params.HasField("logprobs"):
                choice.logprobs.MergeFrom(_logprobs(count, word, params.logprobs))
            choice.text += word
            if count + 1 >= params.min_tokens:
                _stop(choice, starts[-1], params)
    if choice.finish_reason == pb.FINISH_REASON_STOP and answer.tool_calls:
        choice.finish_reason = pb.FINISH_REASON_TOOL_CALLS
        for call in answer.tool_calls:
            choice.tool_calls.add(id=call.id, name=call.name, arguments_json=call.arguments_json)
    ends = [*starts[1:], len(choice.text)] if starts else []
    pieces = tuple(choice.text[start:end] for start, end in zip(starts, ends, strict=True))
    return FakeOutput(choice, pieces)


def fake_prompt_logprobs(num_tokens: int, params: pb.SamplingParams) -> pb.Logprobs | None:
    """Of a prompt's tokens but the first, whose ids are 0, 1, ...; None if not requested."""
    if not params.HasField("prompt_logprobs"):
        return None
    columns = pb.Logprobs()
    for token_id in range(1, num_tokens):
        columns.MergeFrom(_logprobs(token_id, f" {token_id}", params.prompt_logprobs))
        columns.chosen_token_ids.append(token_id)
    return columns


def _word(words: Sequence[str], position: int) -> str:
    word = words[position % len(words)]
    return f" {word}" if position and position % len(words) == 0 else word


def _stop(choice: pb.Choice, start: int, params: pb.SamplingParams) -> None:
    """End the choice if its last token, whose text begins at `start`, stops it."""
    last = choice.token_ids[-1]
    include = params.include_stop_str_in_output
    if last in params.stop_token_ids:
        choice.text = choice.text if include else choice.text[:start]
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
        end = position + len(choice.matched_stop_string) if include else position
        choice.text = choice.text[:end]
        choice.finish_reason = pb.FINISH_REASON_STOP


def _alternative_logprob(rank: int) -> float:
    return _FIRST_ALTERNATIVE_LOGPROB - _LN_2 * rank


def _logprobs(token_id: int, text: str, num_alternatives: int) -> pb.Logprobs:
    """The chosen token, and as many alternatives, the best of which is the chosen one."""
    ranks = range(num_alternatives)
    return pb.Logprobs(
        chosen=[_CHOSEN_LOGPROB],
        chosen_bytes=[text.encode()],
        top_token_ids=[token_id + rank for rank in ranks],
        top=[_alternative_logprob(rank) if rank else _CHOSEN_LOGPROB for rank in ranks],
        top_bytes=[f"<{rank}>".encode() if rank else text.encode() for rank in ranks],
    )
