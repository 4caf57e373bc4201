"""What a sequence's output must be, as engines take it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How a model thinks before it answers.

    start, end: the texts around it
    started: the prompt ends within it; otherwise the output may begin with `start`
    max_tokens: after which `end` is forced; None: no limit
    """

    start: str
    end: str
    started: bool
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class OutputConstraint:
    """grammar: of the whole output, reasoning included, as llguidance reads it; "" for none
    reasoning: only if it has a limit; the grammar knows about it by itself
    """

    grammar: str = ""
    reasoning: Reasoning | None = None
