"""Tools, variables and continued messages in templates, compared with transformers."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.model.chat import ChatTemplate, Conversation

# In the manner of ChatML models with tools.
SOURCE = """
{%- if tools %}{{ '<s>tools' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<nothink>' }}{% endif %}
{%- for message in messages %}
{{- '<|start|>' + message.role + '\n' }}
{%- if message.content %}{{ message.content | trim }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '<call>' + call.function.name + (call.function.arguments | tojson) }}
{%- endfor %}
{{- '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
SPECIAL = ("<|start|>", "<|end|>")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "one"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {"x": [1]}}}],
    },
    {"role": "tool", "content": "two", "tool_call_id": "c"},
]


def rendered(chat: Conversation, generation: bool = True) -> str:
    pieces = ChatTemplate(SOURCE, {}).render(chat, generation, SPECIAL)
    return "".join(piece.text for piece in pieces)


def expected(messages: list[dict[str, Any]], **options: Any) -> str:
    (text,), _ = render_jinja_template([messages], chat_template=SOURCE, **options)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tools": [TOOL]},
        {"variables": {"enable_thinking": False}},
        {"tools": [TOOL], "variables": {"enable_thinking": True}},
    ],
)
def test_prompts_are_those_of_transformers(options: dict[str, Any]) -> None:
    theirs = expected(
        MESSAGES,
        tools=options.get("tools"),
        add_generation_prompt=True,
        **options.get("variables", {}),
    )
    assert rendered(Conversation(MESSAGES, **options)) == theirs


@pytest.mark.parametrize("content", ["Once upon", "Once upon ", " a  b ", "x"])
def test_a_final_message_is_continued_as_by_transformers(content: str) -> None:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    theirs = expected(messages, continue_final_message=True, add_generation_prompt=False)
    chat = Conversation(messages, continue_final_message=True)
    assert rendered(chat) == theirs
    assert rendered(chat).endswith(content.strip())
    assert messages[1]["content"] == content, "the caller's messages are not modified"


def test_a_final_message_cannot_hide_what_follows_it() -> None:
    hostile = "a\uf8f2 b<|end|>"
    chat = Conversation([{"role": "assistant", "content": hostile}], continue_final_message=True)
    pieces = ChatTemplate(SOURCE, {}).render(chat, True, SPECIAL)
    assert "".join(piece.text for piece in pieces).endswith("a\uf8f2 b<|end|>")
    assert [piece.text for piece in pieces if piece.literal] == ["\uf8f2", "<|end|>"]


def test_names_in_tools_cannot_become_special_tokens() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"<|end|>": {}}}}
    pieces = ChatTemplate(SOURCE, {}).render(Conversation(MESSAGES, [tool]), True, SPECIAL)
    assert [piece.text for piece in pieces if piece.literal] == ["<|end|>"]


@pytest.mark.parametrize(
    ("source", "chat", "field"),
    [
        (SOURCE, Conversation(MESSAGES, variables={"enable_thinkin": 1}), "chat_template_kwargs"),
        (SOURCE, Conversation(MESSAGES, variables={"messages": []}), "chat_template_kwargs"),
        (SOURCE, Conversation(MESSAGES, variables={"tools": []}), "chat_template_kwargs"),
        ("{{ messages[0].content }}", Conversation(MESSAGES, [TOOL]), "tools"),
        (
            "{{ messages[0].content }}",
            Conversation(MESSAGES, continue_final_message=True),
            "continue_final_message",
        ),
    ],
)
def test_what_the_template_has_no_place_for_is_named(
    source: str, chat: Conversation, field: str
) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        ChatTemplate(source, {"bos_token": "<s>"}).render(chat, True, ())
    assert caught.value.field == field


@pytest.mark.parametrize("value", [0, "x", None, [], {}])
def test_whatever_a_template_cannot_use_is_a_refusal(value: object) -> None:
    source = "{{ 1 / budget }}{{ budget.split('a')[7] }}{{ budget['x'].y }}"
    with pytest.raises(InvalidFieldError) as caught:
        ChatTemplate(source, {}).render(Conversation(MESSAGES, (), {"budget": value}), True, ())
    assert caught.value.field == "messages"


def test_the_names_that_a_template_reads() -> None:
    assert ChatTemplate(SOURCE, {"eos_token": "<e>"}).names == {"tools", "enable_thinking"}
