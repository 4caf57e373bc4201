"""Reads JSON character by character, and calls that are JSON objects."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection

from kvmesh.cluster.ingress.answers.characters import Malformed, Reading
from kvmesh.cluster.ingress.answers.scanner import CallScanner

MAX_DEPTH = 64
_NAMES = ("name",)
_ARGUMENTS = ("arguments", "parameters")
_HEX = frozenset("0123456789abcdefABCDEF")
_DIGITS = frozenset("0123456789")

_BELIEVABLE = re.compile(r'\{\s*(?:\}|"(?:\\.|[^"\\])*"\s*:\s*\S)')

Note = Callable[[str], None]


def read_string(scanner: CallScanner) -> Reading[str]:
    """A JSON string, decoded."""
    raw = ""

    def note(character: str) -> None:
        nonlocal raw
        raw += character

    yield from _string(scanner, note)
    found: str = json.loads(raw)
    if not found.isascii() and any("\ud800" <= character <= "\udfff" for character in found):
        raise Malformed  # half a character
    return found


def read_value(scanner: CallScanner, note: Note, depth: int = 0) -> Reading[None]:
    """Any value. note: gets its characters as soon as they are known to be valid"""
    character = yield from scanner.peek()
    if depth > MAX_DEPTH:
        raise Malformed
    if character == '"':
        yield from _string(scanner, note)
    elif character == "{":
        yield from _members(scanner, note, depth)
    elif character == "[":
        yield from _items(scanner, note, depth)
    elif character and (character == "-" or character in _DIGITS):
        yield from _number(scanner, note)
    else:
        for word in ("true", "false", "null"):
            if character == word[0]:
                yield from scanner.expect(word)
                note(word)
                return
        raise Malformed


def _string(scanner: CallScanner, note: Note) -> Reading[None]:
    yield from scanner.expect('"')
    note('"')
    while True:
        character = yield from scanner.read()
        if character == "\\":
            escape = yield from scanner.read()
            if escape == "u":
                for _ in range(4):
                    digit = yield from scanner.read()
                    if digit not in _HEX:
                        raise Malformed
                    escape += digit
            elif not escape or escape not in '"\\/bfnrt':
                raise Malformed
            character += escape
        elif not character or (character < " " and character not in "\n\t\r"):
            raise Malformed
        elif character < " ":
            # Models write newlines as they are; the arguments must be JSON all the same.
            character = json.dumps(character)[1:-1]
        note(character)
        if character == '"':
            return


def _number(scanner: CallScanner, note: Note) -> Reading[None]:
    text = ""
    while (character := (yield from scanner.peek())) and character in "+-.eE0123456789":
        text += yield from scanner.read()
    try:
        json.loads(text)
    except ValueError:
        raise Malformed from None
    note(text)


def _space(scanner: CallScanner, note: Note) -> Reading[None]:
    while (character := (yield from scanner.peek())) and character in " \t\n\r":
        note((yield from scanner.read()))


def _members(scanner: CallScanner, note: Note, depth: int) -> Reading[None]:
    yield from scanner.expect("{")
    note("{")
    yield from _space(scanner, note)
    if (yield from scanner.peek()) != "}":
        while True:
            yield from _string(scanner, note)
            yield from _space(scanner, note)
            yield from scanner.expect(":")
            note(":")
            yield from _space(scanner, note)
            yield from read_value(scanner, note, depth + 1)
            yield from _space(scanner, note)
            if (yield from scanner.peek()) != ",":
                break
            note((yield from scanner.read()))
            yield from _space(scanner, note)
    yield from scanner.expect("}")
    note("}")


def _items(scanner: CallScanner, note: Note, depth: int) -> Reading[None]:
    yield from scanner.expect("[")
    note("[")
    yield from _space(scanner, note)
    if (yield from scanner.peek()) != "]":
        while True:
            yield from read_value(scanner, note, depth + 1)
            yield from _space(scanner, note)
            if (yield from scanner.peek()) != ",":
                break
            note((yield from scanner.read()))
            yield from _space(scanner, note)
    yield from scanner.expect("]")
    note("]")


class ArgumentsStream:
    """Streams a call's arguments, once enough of them is there to believe in it."""

    def __init__(self, scanner: CallScanner, name: str | None) -> None:
        self._scanner = scanner
        self._name = name
        self._held = ""
        self._index: int | None = None

    def name(self, name: str) -> None:
        self._name = name
        self._release()

    def note(self, text: str) -> None:
        if self._index is not None:
            self._scanner.put_arguments(self._index, text)
            return
        self._held += text
        self._release()

    def end(self) -> None:
        """The call is complete. Raises Malformed if it has no name or no arguments."""
        if self._index is None:
            if self._name is None or not self._held:
                raise Malformed
            self._start(self._name)
        self._scanner.end_call()

    def _release(self) -> None:
        # The beginning of a first value, or an empty object: by then it is hardly anything else.
        if self._name is not None and _BELIEVABLE.match(self._held):
            self._start(self._name)

    def _start(self, name: str) -> None:
        self._index = self._scanner.start_call(name)
        self._scanner.put_arguments(self._index, self._held)
        self._held = ""


def read_arguments(scanner: CallScanner, name: str) -> Reading[None]:
    """The arguments' object of a call whose name is known."""
    if (yield from scanner.peek()) != "{":
        raise Malformed
    stream = ArgumentsStream(scanner, name)
    yield from read_value(scanner, stream.note)
    stream.end()


def read_call(scanner: CallScanner, names: Collection[str] | None = None) -> Reading[None]:
    """A call as an object with a name and arguments, in any order, and perhaps other keys.

    names: the only ones that count, None for any. A closing brace that is missing is forgiven.
    """
    stream = ArgumentsStream(scanner, None)
    yield from _read_members(scanner, stream, names)
    stream.end()


def _read_members(
    scanner: CallScanner, stream: ArgumentsStream, names: Collection[str] | None
) -> Reading[None]:
    yield from scanner.expect("{")
    found_arguments = False
    while True:
        yield from scanner.skip_space()
        key = yield from read_string(scanner)
        yield from scanner.skip_space()
        yield from scanner.expect(":")
        yield from scanner.skip_space()
        if key in _NAMES:
            name = yield from read_string(scanner)
            if not name.strip() or (names is not None and name not in names):
                raise Malformed
            stream.name(name)
        elif key in _ARGUMENTS:
            if found_arguments:
                raise Malformed
            found_arguments = True
            yield from _arguments(scanner, stream)
        elif key == "function" and (yield from scanner.peek()) == "{":
            found_arguments = True
            yield from _read_members(scanner, stream, names)
        else:
            yield from read_value(scanner, _forget)
        yield from scanner.skip_space()
        character = yield from scanner.peek()
        if character != ",":
            break
        yield from scanner.read()
    if character == "}":
        yield from scanner.read()
    elif not found_arguments:
        raise Malformed


def _arguments(scanner: CallScanner, stream: ArgumentsStream) -> Reading[None]:
    """An object; or one as a string, as some models write it; or null for none."""
    character = yield from scanner.peek()
    if character == '"':
        text = yield from read_string(scanner)
        try:
            if not isinstance(json.loads(text), dict):
                raise Malformed
        except (ValueError, RecursionError):
            raise Malformed from None
        stream.note(text)
    elif character == "n":
        yield from scanner.expect("null")
        stream.note("{}")
    elif character == "{":
        yield from read_value(scanner, stream.note)
    else:
        raise Malformed


def _forget(text: str) -> None:
    """A value that does not matter."""
