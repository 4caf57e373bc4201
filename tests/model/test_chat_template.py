"""Tools, variables and continued messages in templates, compared with transformers."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.model.chat import ChatTemplate, ChatTemplates, ControlTexts, Conversation

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
CONTROLS = ControlTexts(("<|start|>", "<|end|>"))
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
    pieces = ChatTemplate(SOURCE, {}, controls=CONTROLS).render(chat, generation)
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
    pieces = ChatTemplate(SOURCE, {}, controls=CONTROLS).render(chat, True)
    assert "".join(piece.text for piece in pieces).endswith("a\uf8f2 b<|end|>")
    assert [piece.text for piece in pieces if piece.literal] == ["\uf8f2", "<|end|>"]


def test_names_in_tools_cannot_become_special_tokens() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"<|end|>": {}}}}
    pieces = ChatTemplate(SOURCE, {}, controls=CONTROLS).render(
        Conversation(MESSAGES, [tool]), True
    )
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
        ChatTemplate(source, {"bos_token": "<s>"}).render(chat, True)
    assert caught.value.field == field


@pytest.mark.parametrize("value", [0, "x", None, [], {}])
def test_whatever_a_template_cannot_use_is_a_refusal(value: object) -> None:
    source = "{{ 1 / budget }}{{ budget.split('a')[7] }}{{ budget['x'].y }}"
    with pytest.raises(InvalidFieldError, match="chat template 'default'") as caught:
        ChatTemplate(source, {}).render(Conversation(MESSAGES, (), {"budget": value}), True)
    assert caught.value.field == "messages"


def test_the_names_that_a_template_reads() -> None:
    assert ChatTemplate(SOURCE, {"eos_token": "<e>"}).names == {"tools", "enable_thinking"}


# Everything that transformers adds to Jinja.
EXTENSIONS = [
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}x{% endfor %}",
    "{{ messages | tojson(indent=2, separators=(',', ':'), sort_keys=True) }}",
    "{{ messages | tojson(ensure_ascii=True) }}{{ strftime_now('%') }}",
    "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{% endfor %}{{n.i}}",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[0].content) }}{{ dict(a=1) }}",
    "{{ tools is none }}{{ tools is defined }}{{ documents is none }}",
    "{{ bos_token }}{{ messages[0].content | trim | upper | replace('O', 0) }}{{ eos_token }}",
    "{{ messages[0]['content'].split('n')[0].strip() ~ messages | length }}",
]


@pytest.mark.parametrize("source", EXTENSIONS)
def test_extensions_of_transformers_work_as_there(source: str) -> None:
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    (theirs,), _ = render_jinja_template([MESSAGES], chat_template=source, **variables)
    pieces = ChatTemplate(source, variables).render(Conversation(MESSAGES), False)
    assert "".join(piece.text for piece in pieces) == theirs


PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


@pytest.mark.parametrize(
    ("source", "reads_parts"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{{ m['content'] | trim }}{% endfor %}", False),
        (
            "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}",
            True,
        ),
        (
            "{% for m in messages %}{% set c = m['content'] %}{% if c is string %}{{ c }}"
            "{% else %}{% for p in c %}<{{ p['text'] }}>{% endfor %}{% endif %}{% endfor %}",
            True,
        ),
        (
            "{% macro show(content) %}{% for p in content %}<{{p.text}}>{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
            True,
        ),
        ("{{ messages | map(attribute='content') | join }}", False),
    ],
)
def test_parts_go_to_templates_that_read_them(source: str, reads_parts: bool) -> None:
    chat = Conversation([{"role": "user", "content": PARTS}])
    (piece,) = ChatTemplate(source, {}).render(chat, True)
    assert piece.text == ("<one><two>" if reads_parts else "one\ntwo")


def test_the_last_part_is_continued() -> None:
    chat = Conversation([{"role": "assistant", "content": PARTS}], continue_final_message=True)
    source = "{% for m in messages %}{% for p in m.content %}{{p.text}}{% endfor %}<e>{% endfor %}"
    (piece,) = ChatTemplate(source, {}).render(chat, True)
    assert piece.text == "onetwo"
    assert rendered(chat).endswith("one\ntwo")


NAMED = ChatTemplates({"rag": "rag{{ messages[0].content }}", "tool_use": "{{ tools }}"}, {})


def test_named_templates_are_chosen_or_offered() -> None:
    (piece,) = NAMED.render(Conversation(MESSAGES, template_name="rag"), True)
    assert piece.text == "ragone"
    (piece,) = NAMED.render(Conversation(MESSAGES, [TOOL]), True)
    assert "'name': 'f'" in piece.text
    for name in ("", "default", "RAG"):
        with pytest.raises(InvalidFieldError, match="rag, tool_use") as caught:
            NAMED.render(Conversation(MESSAGES, template_name=name), True)
        assert caught.value.field == "chat_template_name"


def test_a_given_template_is_used() -> None:
    templates = ChatTemplates({}, {"bos_token": "<s>"})
    chat = Conversation(MESSAGES, template="{{ bos_token }}{{ messages[0].content }}")
    assert templates.render(chat, True)[0].text == "<s>one"
    with pytest.raises(InvalidFieldError, match="no chat template"):
        templates.render(Conversation(MESSAGES), True)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ raise_exception('users first') }}", "users first"),
        ("{{ missing.name }}", "missing"),
        ("{{ messages[99].content }}", "."),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ 'a' * 10 ** 400 }}", "OverflowError"),
        ("{{ strftime_now(5) }}", "TypeError"),
        ("{{ range(10 ** 9) | list }}", "OverflowError|range too big"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_any_failure_names_the_template(source: str, reason: str, given: bool) -> None:
    templates = ChatTemplates({"default": source}, {})
    chat = Conversation(MESSAGES, template=source if given else "")
    with pytest.raises(InvalidFieldError, match=reason) as caught:
        templates.render(chat, True)
    assert ("the given chat template" if given else "template 'default'") in caught.value.message


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% nonsense %}", "{{ 'a' | nonsense }}"])
def test_a_malformed_template_is_refused_when_it_is_used(source: str) -> None:
    templates = ChatTemplates({"default": source, "good": "{{ messages[0].content }}"}, {})
    with pytest.raises(InvalidFieldError, match="'default' is malformed") as caught:
        templates.render(Conversation(MESSAGES), True)
    assert caught.value.field == "messages"
    with pytest.raises(InvalidFieldError, match="the given chat template is malformed") as caught:
        templates.render(Conversation(MESSAGES, template=source), True)
    assert caught.value.field == "chat_template"
    assert templates.render(Conversation(MESSAGES, template_name="good"), True)


def test_a_given_template_has_a_maximum_length() -> None:
    with pytest.raises(InvalidFieldError, match="1,048,576") as caught:
        NAMED.render(Conversation(MESSAGES, template="x" * (1 << 20) + "y"), True)
    assert caught.value.field == "chat_template"
