"""A model's tokens as grammars see them: the bytes that each adds to the text."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from llguidance import LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What llguidance reads."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    bos_token_id: int | None = None

    def __call__(self, text: bytes | str) -> list[int]:
        """Only for forced tokens, and every grammar here forbids forcing."""
        return []


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """tokens: the bytes of each, empty for those that no text contains
    size: of the model's logits, which may be more than the tokens
    """

    parser: LLTokenizer
    tokens: list[bytes]
    size: int
    tokenizer: Tokenizer

    @classmethod
    def load(cls, path: Path, size: int, eos_token_ids: Collection[int]) -> Vocabulary:
        """Of the model in directory `path`; takes about a second.

        Special tokens, ends of sequence, and ids beyond the tokenizer's are never text: of
        those a grammar allows the ends of sequence where it may end, and nothing else.
        Raises InvalidFieldError for a model without an end of sequence.
        """
        if not eos_token_ids:
            raise InvalidFieldError(
                "structured_output", "cannot be enforced: the model has no end-of-sequence token"
            )
        tokenizer = Tokenizer.load(path)
        special = {*tokenizer.special_tokens.values(), *eos_token_ids}
        tokens = [_bytes_of(tokenizer, token_id) for token_id in range(size)]
        never = [i for i, token in enumerate(tokens) if not token or i in special]
        ends = sorted(eos_token_ids)
        listed = [token or f"<unused {i}>".encode() for i, token in enumerate(tokens)]
        wrapped = TokenizerWrapper(_Tokens(listed, never, ends[0]))
        parser = LLTokenizer(wrapped, n_vocab=size, eos_token=ends)
        return cls(parser, tokens, size, tokenizer)


def _bytes_of(tokenizer: Tokenizer, token_id: int) -> bytes:
    try:
        return tokenizer.token_bytes(token_id)
    except KeyError:
        return b""  # a name that is not made of the encoding's characters: no text has it
