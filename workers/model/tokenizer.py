"""Converts text to token ids and back, without torch, because the ingress uses it too.

Ids come from the model's tokenizer.json through the `tokenizers` library, chat
prompts from the model's own Jinja template in a sandbox.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer as RawTokenizer

from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.chat import (
    DEFAULT,
    ChatTemplates,
    ControlTexts,
    Conversation,
    PromptPiece,
)
from kvmesh.workers.model.detokenizer import DetokenizerStream
from kvmesh.workers.model.facts import read_json
from kvmesh.workers.model.long_text import PIECE_CHARS, encode_in_pieces
from kvmesh.workers.model.token_bytes import TokenBytes

if TYPE_CHECKING:
    from kvmesh.workers.request import TokenIds

_MAX_COMPOSED = 4
# What templates may read, as transformers names it.
_TOKEN_NAMES = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

# What an added token looks like that is not only a frequent word or a run of spaces.
_MARKER = re.compile(r"<.+>|\[.+\]").fullmatch


class Tokenizer:
    """The tokenizer of one model.

    vocab_size: number of ids with a token, including added ones; a model's logits may be wider
    max_token_chars: no text has fewer tokens than its characters divided by this
    eos_token_id, bos_token_id: the tokenizer's own, None if it has none
    special_tokens: text -> id of the tokens that are control tokens, not text
    """

    def __init__(
        self, raw: RawTokenizer, config: Mapping[str, Any], templates: Mapping[str, str]
    ) -> None:
        self._raw = raw
        self._literal: RawTokenizer | None = None
        self.vocab_size: int = raw.get_vocab_size(with_added_tokens=True)
        # A byte-level token's name has a character for each byte; normalisers may compose some.
        composed = 1 if raw.normalizer is None else _MAX_COMPOSED
        self.max_token_chars = composed * max(map(len, raw.get_vocab(with_added_tokens=True)))
        added = raw.get_added_tokens_decoder()
        self.special_tokens: dict[str, int] = {
            token.content: token_id for token_id, token in added.items() if token.special
        }
        self._special_texts = {token_id: text for text, token_id in self.special_tokens.items()}
        self._special_ids = frozenset(self._special_texts)
        self._pieces = TokenBytes(raw)
        texts = {name: _token_text(config.get(name)) for name in _TOKEN_NAMES}
        self.bos_token_id = self._token_id(texts["bos_token"])
        self.eos_token_id = self._token_id(texts["eos_token"])
        variables: dict[str, Any] = {name: text for name, text in texts.items() if text is not None}
        if isinstance(extra := config.get("additional_special_tokens"), list):
            variables["additional_special_tokens"] = [_token_text(token) for token in extra]
        markers = [x.content for x in added.values() if not x.special and _MARKER(x.content)]
        controls = ControlTexts((*self.special_tokens,), tuple(markers))
        self.chat_templates = ChatTemplates(templates, variables, controls)

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
        return cls(raw, config, _read_templates(path, config))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, in which the texts of special tokens become those tokens.

        add_special_tokens: begin (and end) as the model expects, for instance with its BOS; once,
            also if the text begins with it, as a rendered chat may
        """
        ids = _ids(self._raw, text, add_special_tokens)
        start = self._start_ids
        if add_special_tokens and start and ids[len(start) : 2 * len(start)] == start:
            del ids[: len(start)]
        return ids

    def encode_array(self, text: str) -> TokenIds:
        """`encode(text)`, as int32, with little memory for a long text."""
        if len(text) < 2 * PIECE_CHARS or self._has_end_ids:
            return np.array(self.encode(text), dtype=np.int32)
        return encode_in_pieces(text, self.encode, partial(_ids, self._raw))

    def encode_chat(
        self,
        chat: Conversation | Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation, or of its messages alone, through the model's template.

        add_generation_prompt: end where the model's answer begins

        Text in a message cannot become a special token, nor a marker of the template: the text of
        such a token is encoded as ordinary text, separately from the rest of the prompt.
        Raises InvalidFieldError naming the part of the conversation that the template refuses,
        or `messages` if there is none.
        """
        if not isinstance(chat, Conversation):
            chat = Conversation(chat)
        pieces = self.chat_templates.render(chat, add_generation_prompt)
        ids: list[int] = self.encode_pieces(pieces).tolist()
        return ids

    @property
    def has_chat_template(self) -> bool:
        """Whether a chat can be encoded without naming a template."""
        return DEFAULT in self.chat_templates.names

    def encode_pieces(self, pieces: Sequence[PromptPiece]) -> TokenIds:
        """Ids of a rendered chat, int32."""
        parts = [np.array([], dtype=np.int32)]
        for piece in pieces:
            raw = self._literal_tokenizer() if piece.literal else self._raw
            encode = partial(_ids, raw)
            parts.append(encode_in_pieces(piece.text, encode, encode))
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        text: str = self._raw.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text after others, in UTF-8; for a special token its name.

        It may end inside a character. b"" for an id that has no token.
        """
        return self._pieces.of(token_id)

    def special_text(self, token_id: int) -> str:
        """The name of a special token, "" for others."""
        return self._special_texts.get(token_id, "")

    def stream(
        self, skip_special_tokens: bool = True, prompt: Sequence[int] | TokenIds = ()
    ) -> DetokenizerStream:
        """A detokeniser for one sequence of output tokens after a prompt."""
        hidden = self._special_ids if skip_special_tokens else frozenset()
        return DetokenizerStream(self._pieces, hidden, prompt)

    @cached_property
    def _start_ids(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        bare = _ids(self._raw, "a", add_special_tokens=False)
        whole = _ids(self._raw, "a", add_special_tokens=True)
        return next((whole[:at] for at in range(len(whole)) if whole[at:][: len(bare)] == bare), [])

    @cached_property
    def _has_end_ids(self) -> bool:
        """Whether the tokenizer puts special tokens after a text."""
        bare = _ids(self._raw, "a", add_special_tokens=False)
        return _ids(self._raw, "a", add_special_tokens=True) != [*self._start_ids, *bare]

    def _literal_tokenizer(self) -> RawTokenizer:
        """It takes the texts of added tokens for ordinary text."""
        if self._literal is None:
            # Not by `encode_special_tokens`, which leaves out those that are not called special.
            described = json.loads(self._raw.to_str())
            described["added_tokens"] = []
            self._literal = RawTokenizer.from_str(json.dumps(described))
        return self._literal

    def _token_id(self, text: str | None) -> int | None:
        token_id: int | None = None if text is None else self._raw.token_to_id(text)
        return token_id


def _ids(raw: RawTokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
    # `encode` holds the interpreter's lock while it works, for batches it is released.
    batch = raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = batch[0].ids
    return ids


def _token_text(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The model's chat templates by name, from all places where transformers looks for them."""
    found: dict[str, str] = {}
    declared = config.get("chat_template")
    if isinstance(declared, str):
        found[DEFAULT] = declared
    elif isinstance(declared, dict):
        found.update({str(name): str(source) for name, source in declared.items()})
    elif isinstance(declared, list):  # of {"name": ..., "template": ...}
        found.update({str(entry["name"]): str(entry["template"]) for entry in declared})
    for name, file in (
        (DEFAULT, path / "chat_template.jinja"),
        *(
            (each.stem, each)
            for each in sorted((path / "additional_chat_templates").glob("*.jinja"))
        ),
    ):
        if file.exists():
            found[name] = file.read_text(encoding="utf-8")
    return found
