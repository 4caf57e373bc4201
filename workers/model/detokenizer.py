"""The text of output, token by token: decode(prompt + output) without decode(prompt)."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence, Set
from typing import TYPE_CHECKING

from kvmesh.workers.model.token_bytes import TokenBytes

if TYPE_CHECKING:
    from kvmesh.workers.request import TokenIds

_MAX_CHARACTER_BYTES = 4


def _replace_bytes(error: UnicodeError) -> tuple[str, int]:
    """Each byte that belongs to no character becomes U+FFFD, as in SentencePiece."""
    assert isinstance(error, UnicodeDecodeError)
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


codecs.register_error("kvmesh_replace_bytes", _replace_bytes)


class DetokenizerStream:
    """Emits each character once it is complete.

    Bytes that are not valid UTF-8 become U+FFFD, and never change what is around them. (The
    library's ByteFallback replaces a whole run of byte tokens if one of them is invalid, which
    no stream can do whose characters were already sent.)

    hidden: tokens that have no text
    prompt: the tokens before; an incomplete character at their end is continued
    """

    def __init__(
        self,
        pieces: TokenBytes,
        hidden: Set[int] = frozenset(),
        prompt: Sequence[int] | TokenIds = (),
    ) -> None:
        self._pieces = pieces
        self._hidden = hidden
        errors = "kvmesh_replace_bytes" if pieces.by_bytes else "replace"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._at_start = True
        self._replaced = ""  # what the end of the prompt shows for an incomplete character
        self._follow(prompt)

    def push(self, ids: Iterable[int]) -> str:
        """The text completed by `ids`."""
        return self._without_replaced(self._decoder.decode(self._bytes(ids)))

    def flush(self) -> str:
        """The rest, at the end of the sequence; an incomplete character becomes U+FFFD."""
        return self._without_replaced(self._decoder.decode(b"", final=True))

    def _bytes(self, ids: Iterable[int]) -> bytes:
        found = []
        for token in ids:
            if token not in self._hidden:
                found.append(
                    self._pieces.first(token) if self._at_start else self._pieces.of(token)
                )
                self._at_start = False
        return b"".join(found)

    def _follow(self, prompt: Sequence[int] | TokenIds) -> None:
        """Take the prompt as emitted, reading only its end."""
        tail: list[bytes] = []
        size = 0
        for at in reversed(range(len(prompt))):
            token = int(prompt[at])
            if token in self._hidden:
                continue
            self._at_start = False
            tail.append(self._pieces.of(token))
            size += len(tail[-1])
            if size >= _MAX_CHARACTER_BYTES:
                break
        self._decoder.decode(b"".join(reversed(tail))[-_MAX_CHARACTER_BYTES:])
        pending, _ = self._decoder.getstate()
        self._replaced = pending.decode(errors=self._decoder.errors)

    def _without_replaced(self, text: str) -> str:
        """Without what the prompt's text already has in place of an incomplete character."""
        if text and self._replaced:
            text = text.removeprefix(self._replaced)
            self._replaced = ""
        return text
