"""Text that arrives in pieces, read character by character."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")
# Asks for characters; gets None at the end of the text, once and for all.
Reading: TypeAlias = Generator[None, str | None, T]

MAX_NAME_CHARS = 256
_SPACE = " \t\n\r"


class Malformed(Exception):
    """What was read is not what it should be."""


class CharacterReader:
    """Characters that were read are kept, until it is known what they are."""

    def __init__(self) -> None:
        self._raw: list[str] = []  # read, and not known yet
        self._ahead: deque[str] = deque()  # arrived, and not read yet
        self._ended = False

    def peek(self) -> Reading[str]:
        """The next character, "" at the end of the text."""
        if not self._ahead and not self._ended:
            character = yield
            if character is None:
                self._ended = True
            else:
                self._ahead.append(character)
        return self._ahead[0] if self._ahead else ""

    def read(self) -> Reading[str]:
        character = yield from self.peek()
        if character:
            self._raw.append(self._ahead.popleft())
        return character

    def skip_space(self) -> Reading[None]:
        while (character := (yield from self.peek())) and character in _SPACE:
            yield from self.read()

    def expect(self, text: str) -> Reading[None]:
        for wanted in text:
            if (yield from self.peek()) != wanted:
                raise Malformed
            yield from self.read()

    def optional(self, text: str) -> Reading[bool]:
        """Read a text if it comes next, and nothing otherwise."""
        for index, wanted in enumerate(text):
            if (yield from self.peek()) != wanted:
                for _ in range(index):
                    self._ahead.appendleft(self._raw.pop())
                return False
            yield from self.read()
        return True

    def read_name(self, ends: str) -> Reading[str]:
        """Characters of a name, up to one of `ends`, which is not read."""
        name = ""
        while (character := (yield from self.peek())) and character not in ends:
            if len(name) == MAX_NAME_CHARS or character.isspace():
                raise Malformed
            name += yield from self.read()
        if not character or not name:
            raise Malformed
        return name
