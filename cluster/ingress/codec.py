"""The model's tokenizer as the ingress uses it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from kvmesh.workers.model.chat import Conversation
from kvmesh.workers.model.facts import eos_token_ids
from kvmesh.workers.model.tokenizer import Tokenizer
from kvmesh.workers.request import TokenIds


class TextStream(Protocol):
    """An incremental decoder: tokens in, text out."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that is final after these tokens."""

    def flush(self) -> str:
        """The remaining text, at the end."""


class TextCodec(Protocol):
    """The model's tokenizer."""

    def encode(self, text: str) -> TokenIds:
        """Token ids of a prompt, after the special tokens that the model starts with."""

    def encode_chat(self, chat: Conversation) -> TokenIds:
        """Token ids of a conversation, up to where the assistant's reply starts or continues.

        Raises InvalidFieldError naming the part that the chat template refuses.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, in UTF-8; perhaps a part of a character."""

    def stream(self) -> TextStream:
        """A new incremental decoder."""

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def max_token_chars(self) -> int:
        """No text has fewer tokens than its characters divided by this."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


class ModelCodec:
    """`TextCodec` over the tokenizer of the model in directory `path`, which needs no weights."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer.load(path)
        self.eos_token_ids = eos_token_ids(path)
        self.max_token_chars = self._tokenizer.max_token_chars
        self.has_chat_template = self._tokenizer.has_chat_template

    def encode(self, text: str) -> TokenIds:
        return np.array(self._tokenizer.encode(text), dtype=np.int32)

    def encode_chat(self, chat: Conversation) -> TokenIds:
        return np.array(self._tokenizer.encode_chat(chat), dtype=np.int32)

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def stream(self) -> TextStream:
        return self._tokenizer.stream()
