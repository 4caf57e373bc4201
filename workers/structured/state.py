"""Where one sequence's output is within its constraint."""

from __future__ import annotations

import codecs
import enum
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from kvmesh.workers.constraint import OutputConstraint, Reasoning
from kvmesh.workers.structured.vocabulary import Vocabulary

Bits = npt.NDArray[np.int32]

MAX_CHARACTER_TOKENS = 4  # of a byte each


class _Phase(enum.Enum):
    UNDECIDED = enum.auto()  # nothing yet, or the beginning of the start marker
    THINKING = enum.auto()
    OVER = enum.auto()


class ReasoningBudget:
    """Counts the tokens of reasoning, and forces its end when there are enough.

    tokens: the bytes of each token of the vocabulary
    end_ids: the tokens of the end marker
    """

    def __init__(self, reasoning: Reasoning, tokens: list[bytes], end_ids: list[int]) -> None:
        self._start, self._end = reasoning.start.encode(), reasoning.end.encode()
        self._max_tokens = reasoning.max_tokens
        self._tokens = tokens
        self._end_ids = end_ids
        self._phase = _Phase.THINKING if reasoning.started else _Phase.UNDECIDED
        self._seen = b""  # as much as can be part of a marker
        self._count = 0
        self._forced: list[int] = []
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._force_if_due()

    def accept(self, token_id: int) -> None:
        if self._phase is _Phase.OVER:
            return
        if self._phase is _Phase.THINKING:
            self._count += 1
        self._forced = self._forced[1:]
        self._seen += self._tokens[token_id]
        self._characters.decode(self._tokens[token_id])
        if self._phase is _Phase.UNDECIDED:
            text = self._seen.lstrip()
            if text.startswith(self._start):
                self._phase = _Phase.THINKING
                self._seen = text[len(self._start) :]
            elif not self._start.startswith(text):
                self._phase = _Phase.OVER
        if self._phase is _Phase.THINKING:
            if self._end in self._seen:
                self._phase = _Phase.OVER
            else:
                self._seen = self._seen[-len(self._end) :]
        self._force_if_due()

    @property
    def forced(self) -> int | None:
        """The token that must come next, if one must."""
        return self._forced[0] if self._forced else None

    def _force_if_due(self) -> None:
        if self._phase is not _Phase.THINKING or self._max_tokens is None or self._forced:
            return
        over = self._count - self._max_tokens
        # Not in the middle of a character: no grammar would allow that.
        in_character = bool(self._characters.getstate()[0])
        if over >= MAX_CHARACTER_TOKENS or (over >= 0 and not in_character):
            self._forced = self._end_ids


class OutputState:
    """Follows one sequence. `accept` belongs to the engine's thread, `write_mask` to the one that
    makes masks; they never run at the same time.

    matcher: of the constraint's grammar, for this sequence alone; None without a grammar
    fault: why the output cannot be continued, None as long as it can
    """

    def __init__(
        self, constraint: OutputConstraint, vocabulary: Vocabulary, matcher: LLMatcher | None
    ) -> None:
        self._matcher = matcher
        self._untold: list[int] = []  # tokens that the matcher does not know yet
        self._budget: ReasoningBudget | None = None
        if (reasoning := constraint.reasoning) is not None:
            end_ids = vocabulary.tokenizer.encode(reasoning.end, add_special_tokens=False)
            self._budget = ReasoningBudget(reasoning, vocabulary.tokens, end_ids)
        self.fault: str | None = None

    @property
    def has_grammar(self) -> bool:
        return self._matcher is not None

    @property
    def needs_mask(self) -> bool:
        """Whether not every token may come next."""
        return self.has_grammar or (self._budget is not None and self._budget.forced is not None)

    def accept(self, token_id: int) -> None:
        """The sequence has got a token."""
        if self._budget is not None:
            self._budget.accept(token_id)
        if self._matcher is not None:
            self._untold.append(token_id)

    def accept_all(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            self.accept(token_id)

    def catch_up(self) -> LLMatcher | None:
        """The matcher at the latest token, if it is to make the mask."""
        if self._matcher is None:
            return None
        if self._untold:
            untold, self._untold = self._untold, []
            self._matcher.consume_tokens(untold)
        self.note_fault()
        forced = None if self._budget is None else self._budget.forced
        return None if self.fault or forced is not None else self._matcher

    def write_mask(self, bits: Bits) -> None:
        """If the matcher is not to make it: the forced token's, or every token's after a fault.

        bits: [vocab / 32] int32
        """
        forced = None if self._budget is None else self._budget.forced
        if self.fault is not None or forced is None:
            bits[:] = -1
        else:
            bits[:] = 0
            bits.view(np.uint32)[forced // 32] = 1 << forced % 32

    def note_fault(self) -> None:
        if self._matcher is not None and self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            self.fault = f"the output cannot be continued within its grammar: {reason}"
