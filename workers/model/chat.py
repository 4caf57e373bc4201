"""Chat templates: render a conversation to prompt text, in a sandbox.

The template belongs to the model, the messages to the user. A message that contains the
text of a special token ("<|im_end|>") must not become that token, or it could speak in
another role's name. Such a text is replaced by a placeholder of private-use characters
before the template is rendered. Afterwards the prompt is cut at the placeholders, and
their texts are encoded as ordinary text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvmesh.workers.errors import ConfigError, InvalidFieldError

# A placeholder is <open> digits <close>; private-use characters have no meaning elsewhere.
_OPEN, _CLOSE = "\uf8f0", "\uf8f1"
# After the message that is to be continued. Without its space, the template has stripped it.
_END = "\uf8f2 "
# What a template raises on purpose, or because of what it was given.
_REFUSALS = (
    TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError,
    RecursionError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PromptPiece:
    """A part of a prompt; literal: special tokens' texts in it are ordinary text."""

    text: str
    literal: bool


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat as templates take it.

    messages: each with `role` and `content`, perhaps `tool_calls`, `tool_call_id` and `name`
    tools: functions that the model may call
    variables: the template's own, such as enable_thinking
    continue_final_message: let the model continue the last message
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: bool = False


class ChatTemplate:
    """A model's Jinja template, compiled once; `variables` are bos_token, eos_token, ...

    names: of the variables that the template reads and no message contains
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self.names = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except TemplateError as error:
            raise ConfigError("model", f"has a malformed chat template: {error}") from error
        self._variables = dict(variables)
        self.names -= {*variables, *environment.globals, "messages", "add_generation_prompt"}

    def render(
        self, chat: Conversation, add_generation_prompt: bool, special_tokens: Sequence[str]
    ) -> list[PromptPiece]:
        """The prompt in pieces; a single piece unless a message contains a special token's text.

        Raises InvalidFieldError naming the part of the conversation, for instance `messages` with
        the template's own reason.
        """
        self._check_names(chat)
        guard = _Guard(special_tokens)
        messages = [guard.protect(message) for message in chat.messages]
        if chat.continue_final_message:
            messages[-1]["content"] += _END
            add_generation_prompt = False
        variables = {**guard.protect(chat.variables), **self._variables}
        if chat.tools:
            variables["tools"] = guard.protect(chat.tools)
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **variables
            )
        except _REFUSALS as error:
            raise InvalidFieldError(
                "messages", f"are refused by the model's chat template: {error}"
            ) from error
        return guard.restore(_before_end(text) if chat.continue_final_message else text)

    def _check_names(self, chat: Conversation) -> None:
        if chat.tools and "tools" not in self.names:
            raise InvalidFieldError("tools", "have no place in the model's chat template")
        names = self.names - {"tools"}
        for name in chat.variables:
            if name not in names:
                raise InvalidFieldError(
                    "chat_template_kwargs",
                    f"has {name!r}, but the model's chat template reads "
                    f"{', '.join(sorted(names)) or 'none'}",
                )


def _before_end(text: str) -> str:
    """The prompt up to the end of the last message's content."""
    before, found, after = text.rpartition(_END.strip())
    if not found:
        raise InvalidFieldError(
            "continue_final_message", "is not possible: the template leaves the last message out"
        )
    return before if after.startswith(" ") else before.rstrip()


class _Guard:
    """Replaces special tokens' texts by placeholders, and restores them."""

    def __init__(self, special_tokens: Sequence[str]) -> None:
        # Longest first, so that no token matches as a shorter one that it begins with.
        texts = sorted((*special_tokens, _OPEN, _CLOSE, _END.strip()), key=len, reverse=True)
        self._pattern = re.compile("|".join(re.escape(text) for text in texts if text))
        self._taken: list[str] = []

    def protect(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._pattern.sub(self._stand_in, value)
        if isinstance(value, Mapping):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.protect(item) for item in value]
        return value

    def _stand_in(self, match: re.Match[str]) -> str:
        self._taken.append(match.group())
        return f"{_OPEN}{len(self._taken) - 1}{_CLOSE}"

    def restore(self, text: str) -> list[PromptPiece]:
        if not self._taken:
            return [PromptPiece(text, literal=False)]
        pieces: list[PromptPiece] = []
        for index, part in enumerate(re.split(f"{_OPEN}(\\d+){_CLOSE}", text)):
            literal = index % 2 == 1
            if literal:
                part = self._taken[int(part)]
            if part:
                pieces.append(PromptPiece(part, literal))
        return pieces


def _to_json(value: Any, indent: int | None = None) -> str:
    # Unlike Jinja's own filter this does not escape for HTML, because prompts are not HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
