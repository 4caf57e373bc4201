"""Chat templates: render a conversation to prompt text, with transformers' own renderer.

It has a sandbox, but no limit on time or memory: template_process.py has those.
transformers is imported when the first chat is rendered, as it takes a second.

The template belongs to the model, the messages to the user. A message that contains the
text of a control token ("<|im_end|>") must not become that token, or it could speak in
another role's name. Such a text is replaced by a placeholder of private-use characters
before the template is rendered. Afterwards the prompt is cut at the placeholders, and
their texts are encoded as ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes

from kvmesh.workers.errors import InvalidFieldError

# A placeholder is <open> digits <close>; private-use characters have no meaning elsewhere.
_OPEN, _CLOSE = "\uf8f0", "\uf8f1"
# After the message that is to be continued. Without its space, the template has stripped it.
_END = "\uf8f2 "
DEFAULT = "default"
FOR_TOOLS = "tool_use"  # as transformers names it
GIVEN_LABEL = "the given chat template"
MAX_TEMPLATE_CHARS = 1 << 20


@dataclass(frozen=True, slots=True)
class PromptPiece:
    """A part of a prompt; literal: the texts of tokens in it are ordinary text."""

    text: str
    literal: bool


@dataclass(frozen=True, slots=True)
class ControlTexts:
    """Texts for which a tokenizer has control tokens.

    special: of its special tokens
    markers: of other added tokens, "<tool_call>" for instance; in DeepSeek's models those of roles
    """

    special: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat as templates take it.

    messages: each with `role` and `content` (text, or a list of parts as OpenAI's API has it),
        perhaps `tool_calls`, `tool_call_id` and `name`
    tools: functions that the model may call
    variables: the template's own, such as enable_thinking
    continue_final_message: let the model continue the last message
    template: source of a template to use, "" for one of the model's own
    template_name: which of these, "" for its default
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: bool = False
    template: str = ""
    template_name: str = ""

    @property
    def template_label(self) -> str:
        """The template in words, for those who do not know the model's."""
        if self.template:
            return GIVEN_LABEL
        return f"the model's chat template {self.template_name}".rstrip()


class ChatTemplates:
    """A model's templates, by name; one without a name is DEFAULT.

    variables: that all of them may read: bos_token, eos_token, ...
    controls: of the model's tokenizer
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        variables: Mapping[str, Any],
        controls: ControlTexts = ControlTexts(),
    ) -> None:
        self._sources = dict(sources)
        self._variables = dict(variables)
        self._controls = controls
        self._known: dict[str, ChatTemplate] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sources)

    @property
    def for_tools(self) -> str | None:
        """The source of the template that chats with tools use by default; None without one."""
        return self._sources.get(FOR_TOOLS, self._sources.get(DEFAULT))

    @property
    def parts(self) -> tuple[dict[str, str], dict[str, Any], ControlTexts]:
        """What these were made of."""
        return dict(self._sources), dict(self._variables), self._controls

    def render(self, chat: Conversation, add_generation_prompt: bool) -> list[PromptPiece]:
        """The prompt in pieces; a single piece unless a message contains a control token's text.

        Raises InvalidFieldError naming the part of the conversation, for instance `messages` with
        the template's own reason.
        """
        return self._chosen(chat).render(chat, add_generation_prompt)

    def _chosen(self, chat: Conversation) -> ChatTemplate:
        if chat.template:
            if len(chat.template) > MAX_TEMPLATE_CHARS:
                raise InvalidFieldError(
                    "chat_template",
                    f"must have at most {MAX_TEMPLATE_CHARS:,} characters, "
                    f"got {len(chat.template):,}",
                )
            return self._template(chat.template, "")
        name = self._name_for(chat)
        if name not in self._known:
            self._known[name] = self._template(self._sources[name], name)
        return self._known[name]

    def _template(self, source: str, name: str) -> ChatTemplate:
        return ChatTemplate(source, self._variables, name, self._controls)

    def _name_for(self, chat: Conversation) -> str:
        offered = ", ".join(self._sources)
        if chat.template_name:
            if chat.template_name not in self._sources:
                expected = f"expected one of {offered}" if offered else "it has none"
                raise InvalidFieldError(
                    "chat_template_name",
                    f"{chat.template_name!r:.60} is not a template of the model; {expected}",
                )
            return chat.template_name
        if chat.tools and FOR_TOOLS in self._sources:
            return FOR_TOOLS
        if DEFAULT in self._sources:
            return DEFAULT
        if self._sources:
            raise InvalidFieldError(
                "chat_template_name",
                f"must be one of {offered}: the model has several chat templates, but no default",
            )
        raise InvalidFieldError(
            "messages",
            "need a chat template, and the model has no chat template; send text, or a template "
            "as chat_template",
        )


class ChatTemplate:
    """A Jinja template; `variables` are bos_token, eos_token, ...

    name: of one of the model's own, "" for one that a request has brought
    controls: special tokens are its own to write, and so are the markers that it contains
    Compiled by the first use; raises InvalidFieldError then if that fails.
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, Any],
        name: str = DEFAULT,
        controls: ControlTexts = ControlTexts(),
    ) -> None:
        self._source = source
        self._variables = dict(variables)
        written = (source, *map(str, variables.values()))
        markers = (x for x in controls.markers if any(x in text for text in written))
        self._controls = ControlTexts(controls.special, tuple(markers))
        self._is_given = not name
        self._label = f"the model's chat template {name!r}" if name else GIVEN_LABEL
        self._names: frozenset[str] | None = None
        self._reads_parts = False

    @property
    def names(self) -> frozenset[str]:
        """Of the variables that the template reads and no message contains."""
        if self._names is None:
            self._parse()
        assert self._names is not None
        return self._names

    def _parse(self) -> None:
        # The environment, with all extensions, is only reachable through a compiled template.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            environment = _compile_jinja_template(self._source).environment
            tree = environment.parse(self._source)
        except Exception as error:
            field = "chat_template" if self._is_given else "messages"
            raise InvalidFieldError(
                field, f"cannot be used: {self._label} is malformed: {_reason(error)}"
            ) from error
        names = frozenset(meta.find_undeclared_variables(tree))
        own = {*self._variables, *environment.globals, "messages", "add_generation_prompt"}
        self._names = names - own
        self._reads_parts = _reads_parts(tree)

    def render(self, chat: Conversation, add_generation_prompt: bool) -> list[PromptPiece]:
        """See ChatTemplates.render."""
        from transformers.utils.chat_template_utils import render_jinja_template

        self._check_names(chat)
        guard = _Guard(self._controls)
        messages = [guard.message(self._fitting(message)) for message in chat.messages]
        if chat.continue_final_message:
            _mark_end(messages[-1])
            add_generation_prompt = False
        variables = {**guard.protect(chat.variables), **self._variables}
        try:
            (text,), _ = render_jinja_template(
                [messages],
                tools=guard.protect(list(chat.tools)) or None,
                chat_template=self._source,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except Exception as error:  # whatever the template does
            raise InvalidFieldError(
                "messages", f"are refused by {self._label}: {_reason(error)}"
            ) from error
        return guard.restore(_before_end(text) if chat.continue_final_message else text)

    def _fitting(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Parts joined by line breaks, unless the template reads them."""
        content = message.get("content")
        if isinstance(content, str) or content is None or self._reads_parts:
            return message
        return {**message, "content": "\n".join(part["text"] for part in content)}

    def _check_names(self, chat: Conversation) -> None:
        if chat.tools and "tools" not in self.names:
            raise InvalidFieldError("tools", f"have no place in {self._label}")
        names = self.names - {"tools"}
        for name in chat.variables:
            if name not in names:
                raise InvalidFieldError(
                    "chat_template_kwargs",
                    f"has {name!r}, but {self._label} reads {', '.join(sorted(names)) or 'none'}",
                )


def _reason(error: Exception) -> str:
    """What went wrong in a template, in one line; its own words if it has raised them."""
    text = " ".join(str(error).split())
    if isinstance(error, TemplateSyntaxError):
        return f"line {error.lineno}: {text}"
    if isinstance(error, TemplateError):
        return text
    if isinstance(error, MemoryError):
        return "it needs more memory than it may have"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _reads_parts(tree: nodes.Template) -> bool:
    """Whether the template goes through a message's content part by part."""

    def is_content(node: nodes.Node, names: frozenset[str]) -> bool:
        while isinstance(node, nodes.Filter) and node.node is not None:
            node = node.node
        match node:
            case nodes.Getattr(attr="content"):
                return True
            case nodes.Getitem(arg=nodes.Const(value="content")):
                return True
            case nodes.Name(name=name):
                return name in names
        return False

    names = {"content"}  # of variables, or of a macro's parameter
    for assigned in tree.find_all(nodes.Assign):
        if isinstance(assigned.target, nodes.Name) and is_content(assigned.node, frozenset()):
            names.add(assigned.target.name)
    return any(is_content(loop.iter, frozenset(names)) for loop in tree.find_all(nodes.For))


def _mark_end(message: dict[str, Any]) -> None:
    """Put _END after the content of a message."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _END
    else:
        content[-1]["text"] += _END


def _before_end(text: str) -> str:
    """The prompt up to the end of the last message's content."""
    before, found, after = text.rpartition(_END.strip())
    if not found:
        raise InvalidFieldError(
            "continue_final_message", "is not possible: the template leaves the last message out"
        )
    return before if after.startswith(" ") else before.rstrip()


class _Guard:
    """Replaces control tokens' texts by placeholders, and restores them."""

    def __init__(self, controls: ControlTexts) -> None:
        special = (*controls.special, _OPEN, _CLOSE, _END.strip())
        self._special = _any_of(special)
        self._all = _any_of((*special, *controls.markers))
        self._taken: list[str] = []

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Of the assistant's, markers stay: the model wrote them, and templates split it there."""
        pattern = self._special if message.get("role") == "assistant" else self._all
        found: dict[str, Any] = self._protect(message, pattern)
        return found

    def protect(self, value: Any) -> Any:
        return self._protect(value, self._all)

    def _protect(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return pattern.sub(self._stand_in, value)
        if isinstance(value, Mapping):
            return {
                self._protect(key, pattern): self._protect(item, pattern)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._protect(item, pattern) for item in value]
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


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    # Longest first, so that no token matches as a shorter one that it begins with.
    return re.compile("|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True))))
