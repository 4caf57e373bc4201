"""Encodes long texts in pieces, so that memory and the interpreter's lock are not held for all.

A library's encoding of a text takes 400 bytes a token, and its ids become a list of Python's
integers at once. So a long text is cut where no token can reach across: between a letter and a
space before a letter, or punctuation. Tokenizers split there before they merge anything, and
whether this one does is tried at each cut with the text around it. A text without such places, or
a tokenizer that disagrees, is encoded whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from kvmesh.workers.request import TokenIds

Encode = Callable[[str], list[int]]

PIECE_CHARS = 1 << 16
_SEARCH_CHARS = 1 << 12  # in which a cut is looked for
_TRIES = 4
_AROUND_CHARS = 256
_PLACE = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_]|[.,;:!?()。，、！？；：])")


def encode_in_pieces(text: str, first: Encode, rest: Encode) -> TokenIds:
    """Ids of `text`, the same as those of `first(text)`.

    first: encodes a text's beginning, with what comes before a text; rest: any text after it
    """
    starts = [0, *_cuts(text, rest)]
    parts = []
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        encode = rest if start else first
        parts.append(np.array(encode(text[start:end]), dtype=np.int32))
    return np.concatenate(parts)


def _cuts(text: str, encode: Encode) -> Iterator[int]:
    """Places where the text can be cut, about PIECE_CHARS apart."""
    wanted = PIECE_CHARS
    while wanted + _SEARCH_CHARS < len(text):
        found = next(_places(text, wanted, encode), None)
        if found is not None:
            yield found
        wanted = (wanted if found is None else found) + PIECE_CHARS


def _places(text: str, start: int, encode: Encode) -> Iterator[int]:
    matches = _PLACE.finditer(text, start, start + _SEARCH_CHARS)
    for _, match in zip(range(_TRIES), matches, strict=False):
        at = match.start()
        left, right = text[at - _AROUND_CHARS : at], text[at : at + _AROUND_CHARS]
        if encode(left + right) == encode(left) + encode(right):
            yield at
