"""The model's tokenizer as the ingress uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from kvmesh.cluster.config import ReasoningParser, ToolParser
from kvmesh.cluster.ingress.answers.model_form import ModelForm
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.model.chat import Conversation, PromptPiece
from kvmesh.workers.model.facts import eos_token_ids, read_json, unused_token_ids
from kvmesh.workers.model.template_process import TemplateProcess, TemplateTimeoutError
from kvmesh.workers.model.text_part import placeholder_tokens
from kvmesh.workers.model.tokenizer import Tokenizer
from kvmesh.workers.request import TokenIds

CHAT_TIMEOUT_S = 10.0


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

    def render_chat(self, chat: Conversation) -> list[PromptPiece]:
        """The text of a conversation, up to where the assistant's reply starts or continues.

        At any time by one thread for the model's own templates, and by one for those that
        requests bring. Raises InvalidFieldError naming the part that the chat template refuses.
        """

    def encode_pieces(self, pieces: Sequence[PromptPiece]) -> TokenIds:
        """Token ids of a rendered conversation."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, in UTF-8; perhaps a part of a character."""

    def special_text(self, token_id: int) -> str:
        """The name of a special token, "" for others."""

    def stream(self, prompt: Sequence[int] | TokenIds, skip_special_tokens: bool) -> TextStream:
        """A new incremental decoder of what follows a prompt."""

    def raw_text(self, ids: Sequence[int]) -> str:
        """The text of tokens, with special tokens' names."""

    @property
    def form(self) -> ModelForm:
        """How the model writes reasoning and tool calls."""

    @property
    def chat_template_names(self) -> tuple[str, ...]:
        """Of the model's own templates."""

    @property
    def max_token_chars(self) -> int:
        """No text has fewer tokens than its characters divided by this."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def unused_token_ids(self) -> frozenset[int]:
        """Ids without a token, in the middle of the vocabulary or after its end."""

    @property
    def placeholder_tokens(self) -> Mapping[int, str]:
        """Ids that stand for what is not text, and the keys of config.json that say so."""


class ModelCodec:
    """`TextCodec` over the tokenizer of the model in directory `path`, which needs no weights.

    chat_timeout_s: for a chat template, after which the chat is refused
    """

    def __init__(
        self,
        path: Path,
        tool_parser: ToolParser = "auto",
        reasoning_parser: ReasoningParser = "auto",
        chat_timeout_s: float = CHAT_TIMEOUT_S,
    ) -> None:
        self._tokenizer = Tokenizer.load(path)
        self._chat_timeout_s = chat_timeout_s
        templates = self._tokenizer.chat_templates
        self.form = ModelForm.of(
            templates.for_tools, self._tokenizer.special_tokens, tool_parser, reasoning_parser
        )
        # Apart, so that templates that requests bring do not delay other chats.
        self._own = TemplateProcess(templates, chat_timeout_s)
        self._given = TemplateProcess(templates, chat_timeout_s)
        self.chat_template_names = templates.names
        self.eos_token_ids = eos_token_ids(path)
        self.unused_token_ids = frozenset(unused_token_ids(path))
        self.placeholder_tokens = placeholder_tokens(read_json(path / "config.json"))
        self.max_token_chars = self._tokenizer.max_token_chars

    def encode(self, text: str) -> TokenIds:
        return self._tokenizer.encode_array(text)

    def prepare(self) -> None:
        """Start what the first chat would wait for, without waiting."""
        if self.chat_template_names:
            self._own.start()

    def close(self) -> None:
        self._own.close()
        self._given.close()

    def render_chat(self, chat: Conversation) -> list[PromptPiece]:
        try:
            return (self._given if chat.template else self._own).render(chat)
        except TemplateTimeoutError:
            raise InvalidFieldError(
                "messages", f"took {chat.template_label} more than {self._chat_timeout_s:g} s"
            ) from None

    def encode_pieces(self, pieces: Sequence[PromptPiece]) -> TokenIds:
        return self._tokenizer.encode_pieces(pieces)

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def raw_text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def special_text(self, token_id: int) -> str:
        return self._tokenizer.special_text(token_id)

    def stream(self, prompt: Sequence[int] | TokenIds, skip_special_tokens: bool) -> TextStream:
        return self._tokenizer.stream(skip_special_tokens, prompt)
