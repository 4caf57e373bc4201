"""Converts text to token ids and back, without torch, because the ingress uses it too.

Ids come from the model's tokenizer.json through the `tokenizers` library, chat
prompts from the model's own Jinja template in a sandbox.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

from kvmesh.workers.errors import ConfigError, InvalidFieldError
from kvmesh.workers.model.chat import ChatTemplate, Conversation
from kvmesh.workers.model.facts import read_json

# A character has at most 4 bytes, hence at most 4 tokens of one byte each.
_MAX_CHARACTER_TOKENS = 4
_MAX_COMPOSED = 4
_BYTE_NAME = re.compile(r"<0x([0-9A-F]{2})>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """The tokenizer of one model.

    vocab_size: number of ids with a token, including added ones; a model's logits may be wider
    max_token_chars: no text has fewer tokens than its characters divided by this
    eos_token_id, bos_token_id: the tokenizer's own, None if it has none
    special_tokens: text -> id of the tokens that are control tokens, not text
    chat_template: its source, None without one
    """

    def __init__(self, raw: RawTokenizer, config: Mapping[str, Any], template: str | None) -> None:
        self._raw = raw
        self._literal: RawTokenizer | None = None
        self.vocab_size: int = raw.get_vocab_size(with_added_tokens=True)
        # A byte-level token's name has a character for each byte; normalisers may compose some.
        composed = 1 if raw.normalizer is None else _MAX_COMPOSED
        self.max_token_chars = composed * max(map(len, raw.get_vocab(with_added_tokens=True)))
        self.special_tokens: dict[str, int] = {
            token.content: token_id
            for token_id, token in raw.get_added_tokens_decoder().items()
            if token.special
        }
        texts = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token")}
        self.bos_token_id = self._token_id(texts["bos_token"])
        self.eos_token_id = self._token_id(texts["eos_token"])
        self.chat_template = template
        self._chat = None
        if template is not None:
            self._chat = ChatTemplate(
                template, {name: text for name, text in texts.items() if text is not None}
            )

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """The tokenizer of the model in directory `path`; raises ConfigError naming the file."""
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ConfigError("model", f"{file} is missing; convert the model's tokenizer to it")
        try:
            raw = RawTokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError("model", f"{file} cannot be read: {error}") from error
        raw.no_truncation()
        raw.no_padding()
        config_file = path / "tokenizer_config.json"
        config = read_json(config_file) if config_file.exists() else {}
        return cls(raw, config, _read_template(path, config))

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, in which the texts of special tokens become those tokens.

        add_special_tokens: begin (and end) as the model expects, for instance with its BOS
        """
        return _ids(self._raw, text, add_special_tokens)

    def encode_chat(
        self,
        chat: Conversation | Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation, or of its messages alone, through the model's template.

        add_generation_prompt: end where the model's answer begins

        Text in a message cannot become a special token: the text of a special token is
        encoded as ordinary text, separately from the rest of the prompt.
        Raises InvalidFieldError naming the part of the conversation that the template refuses,
        or `messages` if there is none.
        """
        if not isinstance(chat, Conversation):
            chat = Conversation(chat)
        if self._chat is None:
            raise InvalidFieldError(
                "messages", "need a chat template, and the model has no chat template; send text"
            )
        pieces = self._chat.render(chat, add_generation_prompt, tuple(self.special_tokens))
        ids: list[int] = []
        for piece in pieces:
            ids += (
                self._encode_literal(piece.text)
                if piece.literal
                else self.encode(piece.text, add_special_tokens=False)
            )
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        text: str = self._raw.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, in UTF-8; for a special token its name.

        A byte-level token may end inside a character.
        """
        name = self._raw.id_to_token(token_id)
        if name is None:
            return b""  # a row of the model's output that has no token
        if token_id in self._added:
            return self._added[token_id].encode()
        if "ByteLevel" in self._decoders:
            return bytes(_BYTE_OF_CHARACTER[character] for character in name)
        if "ByteFallback" in self._decoders and (found := _BYTE_NAME.fullmatch(name)):
            return bytes.fromhex(found[1])
        return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    @cached_property
    def _added(self) -> dict[int, str]:
        return {i: token.content for i, token in self._raw.get_added_tokens_decoder().items()}

    @cached_property
    def _decoders(self) -> frozenset[str]:
        """The kinds of the steps that decode tokens."""
        decoder = self._raw.decoder
        state = {} if decoder is None else json.loads(decoder.__getstate__())
        return frozenset(step["type"] for step in (state, *state.get("decoders", ())) if step)

    def stream(self, skip_special_tokens: bool = True) -> DetokenizerStream:
        """A detokeniser for one sequence of output tokens."""
        return DetokenizerStream(self, skip_special_tokens)

    def _encode_literal(self, text: str) -> list[int]:
        if self._literal is None:
            # A copy, because other threads may be using the tokenizer with its setting.
            self._literal = RawTokenizer.from_str(self._raw.to_str())
            self._literal.encode_special_tokens = True
        return _ids(self._literal, text, add_special_tokens=False)

    def _token_id(self, text: str | None) -> int | None:
        token_id: int | None = None if text is None else self._raw.token_to_id(text)
        return token_id


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


class DetokenizerStream:
    """The text of a growing sequence of tokens; emits each character once it is complete.

    A push costs O(new tokens): emitted tokens are kept only as long as the text of the next
    tokens depends on them.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._special = frozenset(tokenizer.special_tokens.values())
        # [context, already emitted | pending, not yet emitted]
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """The text completed by `ids`."""
        self._pending += ids
        whole = len(self._pending)
        shortest = max(0, whole - _MAX_CHARACTER_TOKENS)
        for count in range(whole, shortest, -1):
            text = self._text(count)
            if not text.endswith(_REPLACEMENT):
                return self._emit(count, text)
        # Longer than any character: all but the last few tokens will never be valid UTF-8.
        return self._emit(shortest, self._text(shortest)) if shortest else ""

    def flush(self) -> str:
        """The rest, at the end of the sequence; an incomplete character becomes U+FFFD."""
        return self._emit(len(self._pending), self._text(len(self._pending)))

    def _text(self, count: int) -> str:
        """The text that the first `count` pending tokens add to the context's."""
        before = self._decode(self._context)
        return self._decode(self._context + self._pending[:count])[len(before) :]

    def _emit(self, count: int, text: str) -> str:
        emitted = self._pending[:count]
        self._pending = self._pending[count:]
        # Special tokens have no text, so they cannot tell whether a leading space is kept.
        seen = [token for token in emitted if not (self._skip and token in self._special)]
        if seen:
            self._context = self._whole_suffix(seen)
        return text

    def _whole_suffix(self, ids: list[int]) -> list[int]:
        """The last few of `ids`, starting at the beginning of a character.

        Decoders with byte tokens corrupt a whole run of them if it begins inside a character."""
        for count in range(1, min(_MAX_CHARACTER_TOKENS, len(ids)) + 1):
            if _REPLACEMENT not in self._decode(ids[-count:]):
                return ids[-count:]
        return ids[-1:]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def _ids(raw: RawTokenizer, text: str, add_special_tokens: bool) -> list[int]:
    # `encode` holds the interpreter's lock while it works, for batches it is released.
    batch = raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = batch[0].ids
    return ids


def _token_text(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_template(path: Path, config: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
