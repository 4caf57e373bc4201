"""Tokens of the output with their log-probabilities, from the contract's columns."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvmesh.v1 import kvmesh_pb2 as pb

MIN_LOGPROB = -9999.0  # as OpenAI shows it, since JSON has no infinity


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """One token. text: its bytes; logprob: None for the first of a prompt"""

    text: bytes
    logprob: float | None
    top: Sequence[tuple[bytes, float]] = ()


def scored(columns: pb.Logprobs) -> Iterator[ScoredToken]:
    """The tokens of a delta or a choice."""
    width = len(columns.top) // max(len(columns.chosen), 1)
    for index, (text, logprob) in enumerate(zip(columns.chosen_bytes, columns.chosen, strict=True)):
        part = slice(index * width, (index + 1) * width)
        top = [
            (a, finite(b)) for a, b in zip(columns.top_bytes[part], columns.top[part], strict=True)
        ]
        yield ScoredToken(text, finite(logprob), top)


def finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def shown(text: bytes) -> str:
    """A token as a string; ``bytes:\\xe2\\x80`` for a part of a character, as OpenAI shows it."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


class TextOffsets:
    """Where tokens are in a text, in characters; a part of a character is at its beginning.

    start: of the first token
    """

    def __init__(self, start: int = 0) -> None:
        self._next = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, text: bytes) -> int:
        """The offset of the next token."""
        at = self._next
        self._next += len(self._decoder.decode(text))
        return at
