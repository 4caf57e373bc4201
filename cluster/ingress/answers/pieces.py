"""Parts of an answer, as they become final."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
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

    @classmethod
    def joined(cls, parts: Sequence[Pieces]) -> Pieces:
        """Those of a long text: adding one by one copies what there is each time."""
        return cls(
            "".join([part.reasoning for part in parts]),
            "".join([part.text for part in parts]),
            [call for part in parts for call in part.calls],
        )

    def add(self, other: Pieces) -> None:
        self.reasoning += other.reasoning
        self.text += other.text
        self.calls += other.calls

    def merged_calls(self) -> list[CallPiece]:
        """One piece for each call."""
        found: defaultdict[int, list[CallPiece]] = defaultdict(list)
        for piece in self.calls:
            found[piece.index].append(piece)
        return [
            CallPiece(
                index,
                "".join([piece.name for piece in pieces]),
                "".join([piece.arguments for piece in pieces]),
            )
            for index, pieces in found.items()
        ]

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
