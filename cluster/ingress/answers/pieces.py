"""Parts of an answer, as they become final."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A tool call that starts, with its name, or continues.

    arguments: the next part of their JSON text
    """

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class Pieces:
    """What some text has made final, each kind in order."""

    reasoning: str = ""
    text: str = ""
    calls: list[CallPiece] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.text or self.calls)

    def add(self, other: Pieces) -> None:
        self.reasoning += other.reasoning
        self.text += other.text
        self.calls += other.calls

    def merged_calls(self) -> list[CallPiece]:
        """One piece for each call."""
        found: dict[int, CallPiece] = {}
        for piece in self.calls:
            before = found.get(piece.index, CallPiece(piece.index))
            found[piece.index] = CallPiece(
                piece.index, before.name + piece.name, before.arguments + piece.arguments
            )
        return list(found.values())

    def without(
        self, reasoning_chars: int, text_chars: int, argument_chars: Iterable[int]
    ) -> Pieces:
        """What remains for a receiver that has this much of each.

        argument_chars: of each call that it knows. Raises ValueError if it has more than there is.
        """
        if reasoning_chars > len(self.reasoning):
            raise ValueError(f"{len(self.reasoning)} characters of reasoning")
        if text_chars > len(self.text):
            raise ValueError(f"{len(self.text)} characters")
        known = list(argument_chars)
        calls = self.merged_calls()
        if len(known) > len(calls):
            raise ValueError(f"{len(calls)} tool calls")
        rest = []
        for call, chars in zip(calls, known, strict=False):
            if chars > len(call.arguments):
                raise ValueError(f"{len(call.arguments)} characters of a tool call's arguments")
            if chars < len(call.arguments):
                rest.append(CallPiece(call.index, "", call.arguments[chars:]))
        return Pieces(
            self.reasoning[reasoning_chars:], self.text[text_chars:], rest + calls[len(known) :]
        )
