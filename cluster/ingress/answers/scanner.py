"""Reads tool calls character by character, whatever the pieces in which they come.

A syntax (syntaxes.py) is a generator that asks for one character after the other. What it has
read is kept until a call has turned out to be one: if it turns out not to be,
`Malformed` is raised and the text is returned as text. Nothing is lost or returned twice.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmesh.cluster.ingress.answers.characters import CharacterReader, Reading
from kvmesh.cluster.ingress.answers.pieces import CallPiece, Pieces


class CallScanner(CharacterReader):
    """Text in, text and calls out.

    syntax: reads a whole answer
    complete_calls: how many have ended well
    """

    def __init__(self, syntax: Callable[[CallScanner], Reading[None]]) -> None:
        super().__init__()
        self._out = Pieces()
        self._space = ""  # after text: dropped if a call follows
        self._after_call = False  # nothing but whitespace has come since
        self._started_calls = 0
        self._open_call: int | None = None
        self.complete_calls = 0
        self._reading: Reading[None] | None = syntax(self)
        next(self._reading)

    def push(self, text: str) -> Pieces:
        for character in text:
            self._send(character)
        return self._take()

    def finish(self) -> Pieces:
        """The rest, at the end of the text."""
        self._send(None)
        self._out.text += self._space
        self._space = ""
        return self._take()

    @property
    def all_complete(self) -> bool:
        """Whether there are calls, and none that was cut off."""
        return 0 < self._started_calls == self.complete_calls

    def _send(self, character: str | None) -> None:
        if self._reading is not None:
            try:
                self._reading.send(character)
            except StopIteration:
                self._reading = None

    def _take(self) -> Pieces:
        out, self._out = self._out, Pieces()
        return out

    # For syntaxes

    def text_until(self, *markers: str) -> Reading[str]:
        """Return text up to one of the markers; the marker, or "" at the end of the text.

        The marker counts as read: if what follows it is not a call, it is text.
        """
        held = ""
        while (character := (yield from self.peek())) != "":
            yield from self.read()
            self._raw.clear()
            held += character
            while held and not any(marker.startswith(held) for marker in markers):
                self._put_text(held[0])
                held = held[1:]
            if held in markers:
                self._raw.append(held)
                return held
        self._put_text(held)
        return ""

    def give_up(self) -> None:
        """What was read is no call, but text; unless the text ended within a call."""
        raw = "".join(self._raw)
        if self._ended and self._open_call is not None and not self._ahead:
            self._out.calls.append(CallPiece(self._open_call, "", raw))
        else:
            self._put_text(raw)
        self._raw.clear()
        self._open_call = None

    def accept(self) -> None:
        """What was read belongs to calls."""
        self._raw.clear()

    def start_call(self, name: str) -> int:
        self._space = ""
        self._open_call = self._started_calls
        self._started_calls += 1
        self._out.calls.append(CallPiece(self._open_call, name))
        self._raw.clear()
        return self._open_call

    def put_arguments(self, index: int, text: str) -> None:
        self._out.calls.append(CallPiece(index, "", text))
        self._raw.clear()

    def end_call(self) -> None:
        self.complete_calls += 1
        self._open_call = None
        self._after_call = True
        self._raw.clear()

    def _put_text(self, text: str) -> None:
        for character in text:
            if not character.isspace():
                self._out.text += self._space + character
                self._space = ""
                self._after_call = False
            elif not self._after_call:
                self._space += character
