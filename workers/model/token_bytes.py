"""What each token adds to a text, in bytes, for every decoder of the `tokenizers` library.

Decoders treat the first token of a text in their own way: they drop the space that the tokenizer
puts before a text. All others add the same bytes wherever they are, and a text is the
concatenation of these: that is what makes detokenising exact and its cost constant.
"""

from __future__ import annotations

import json
import re
from functools import cached_property

from tokenizers import Tokenizer as RawTokenizer

_BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_ANCHORS = ("a", "e", "A", "1", "▁a", "##a")


class TokenBytes:
    """Bytes by token id.

    by_bytes: whether invalid bytes are replaced one by one, not in sequences
        that could be the start of a character
    """

    def __init__(self, raw: RawTokenizer) -> None:
        self._raw = raw
        self._kinds = _decoder_kinds(raw)
        self.by_bytes = "ByteFallback" in self._kinds
        self._found: dict[int, bytes] = {}

    def of(self, token_id: int) -> bytes:
        """What the token adds after others; b"" for an id without a token.

        Perhaps a part of a character.
        """
        found = self._found.get(token_id)
        if found is None:
            found = self._found[token_id] = self._compute(token_id)
        return found

    def first(self, token_id: int) -> bytes:
        """What the token adds at the beginning of a text."""
        if "ByteLevel" in self._kinds:
            return self.of(token_id)
        text = self._decode([token_id])
        return self.of(token_id) if _REPLACEMENT in text else text.encode()

    def _compute(self, token_id: int) -> bytes:
        name = self._raw.id_to_token(token_id)
        if name is None:
            return b""
        if "ByteLevel" in self._kinds:
            # As the library does it: a name with a character that stands for no byte, such as
            # an added token's, stands for itself.
            try:
                return bytes(_BYTE_OF_CHARACTER[character] for character in name)
            except KeyError:
                return str(name).encode()
        if self.by_bytes and (byte := _BYTE_NAME.fullmatch(name)):
            return bytes.fromhex(byte[1])
        anchor, before, after = self._anchor
        text = self._decode([*anchor, token_id, *anchor])
        return text[len(before) : len(text) - len(after)].encode()

    @cached_property
    def _anchor(self) -> tuple[list[int], str, str]:
        """An ordinary token, its text at the beginning of a text, and after other tokens."""
        vocabulary = self._raw.get_vocab(with_added_tokens=False)
        names = [*(name for name in _ANCHORS if name in vocabulary), *vocabulary]
        for name in names:
            token = vocabulary[name]
            first, both = self._decode([token]), self._decode([token, token])
            if first.isalnum() and both.startswith(first) and len(both) > len(first):
                return [token], first, both[len(first) :]
        return [], "", ""

    def _decode(self, ids: list[int]) -> str:
        text: str = self._raw.decode(ids, skip_special_tokens=False)
        return text


def _decoder_kinds(raw: RawTokenizer) -> frozenset[str]:
    """The kinds of the steps that decode tokens, nested ones as well."""
    decoder = raw.decoder
    if decoder is None:
        return frozenset()
    kinds: set[str] = set()
    steps = [json.loads(decoder.__getstate__())]
    while steps:
        step = steps.pop()
        kinds.add(step["type"])
        steps += step.get("decoders", ())
    return frozenset(kinds)


def _byte_of_character() -> dict[str, int]:
    """The bytes that byte-level tokens' names stand for.

    Printable Latin-1 characters stand for themselves, and the characters from 256 on for the
    other bytes in order: OpenAI's encoder of GPT-2 introduced it.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + index): byte for index, byte in enumerate(others)},
    }


_BYTE_OF_CHARACTER = _byte_of_character()
