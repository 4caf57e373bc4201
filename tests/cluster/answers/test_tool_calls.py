"""Tool calls as models write them, whole and in pieces, well-formed and not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given

from kvmesh.cluster.ingress.answers.pieces import Pieces
from kvmesh.cluster.ingress.answers.reader import AnswerForm, AnswerReader
from kvmesh.cluster.ingress.answers.syntaxes import SYNTAXES, detect
from kvmesh.workers.constraint import Reasoning
from tests.exercised import Exercised
from tests.scenarios import SEEDS, scenarios

TOOLS = ("f", "g")
Calls = list[tuple[str, str]]


def read(
    syntax: str, pieces: Iterator[str] | list[str], *, thinks: bool = False, parallel: bool = True
) -> Pieces:
    reasoning = Reasoning("<think>", "</think>", started=False) if thinks else None
    reader = AnswerReader(AnswerForm(reasoning, SYNTAXES[syntax], TOOLS, parallel))
    total = Pieces()
    for piece in pieces:
        total.add(reader.push(piece))
    total.add(reader.finish())
    return total


def calls_of(pieces: Pieces) -> Calls:
    return [(call.name, call.arguments) for call in pieces.merged_calls()]


DEEP = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
DEEP_END = "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
NESTED = '{"a": [1, 2.5e3, {"b": "x\\"}{"}], "c": null}'

# (syntax, answer, text, calls)
ANSWERS: list[tuple[str, str, str, Calls]] = [
    ("hermes", "plain text \n", "plain text \n", []),
    (
        "hermes",
        f'Let me see.\n<tool_call>\n{{"name": "f", "arguments": {NESTED}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n',
        "Let me see.",
        [("f", NESTED), ("g", "{}")],
    ),
    (
        "hermes",
        '<tool_call>{"arguments": {"x": 12}, "name": "f"}</tool_call> and so on',
        "and so on",
        [("f", '{"x": 12}')],
    ),
    (
        "hermes",
        '<tool_call>{"name":"g","arguments":"{\\"z\\": 1}"}</tool_call>',
        "",
        [("g", '{"z": 1}')],
    ),
    (
        "hermes",
        '<tool_call>{"type":"function","function":{"name":"f","parameters":{"q":1}}}</tool_call>',
        "",
        [("f", '{"q":1}')],
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    # A raw newline in a string is no JSON, but models write it.
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"t": "a\nb"}}</tool_call>',
        "",
        [("f", '{"t": "a\\nb"}')],
    ),
    # What is missing at the end is forgiven.
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}}\n<tool_call>{"name": "g", "arguments": {}}',
        "",
        [("f", "{}"), ("g", "{}")],
    ),
    ("llama", '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (
        "llama",
        '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"b": [true]}}\n',
        "",
        [("f", "{}"), ("g", '{"b": [true]}')],
    ),
    (
        "llama",
        '<|python_tag|>{"name": "other", "parameters": {"a": 1}}',
        "",
        [("other", '{"a": 1}')],
    ),
    (
        "llama",
        'I will.<|python_tag|>{"name": "f", "parameters": {"a": 1}}',
        "I will.",
        [("f", '{"a": 1}')],
    ),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}, '
        '"id": "abcdefghi"}]',
        "",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    (
        "mistral-v11",
        'So:[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{"b": 2}',
        "So:",
        [("f", '{"a": 1}'), ("g", '{"b": 2}')],
    ),
    ("mistral-v11", '[TOOL_CALLS]f{"a": 1}', "", [("f", '{"a": 1}')]),
    (
        "deepseek",
        f'Yes.{DEEP}function<｜tool▁sep｜>f\n```json\n{{"a": 1}}\n```<｜tool▁call▁end｜>\n'
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{{}}\n```{DEEP_END}",
        "Yes.",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    (
        "deepseek-v31",
        f'{DEEP}f<｜tool▁sep｜>{{"a": 1}}<｜tool▁call▁end｜>'
        f"<｜tool▁call▁begin｜>g<｜tool▁sep｜>{{}}{DEEP_END}",
        "",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
]
# What is no call: all of it is text.
NO_CALLS = [
    ("hermes", "<tool_call>{bad json}</tool_call> x"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {\'a\': 1}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": \'x\'}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>'),
    ("hermes", '<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": " ", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": "no"}</tool_call>'),
    ("hermes", "<tool_call>"),
    ("hermes", "a <tool"),
    ("hermes", "<tool_call> " + "[" * 100),
    ("llama", '  {"name": "unknown", "parameters": {"a": 1}}'),
    ("llama", '{"x": {"name": "f"}}'),
    ("llama", "<|python_tag|>print(1)"),
    ("llama", 'See {"name": "f", "parameters": {}}'),
    ("mistral", "ok [TOOL_CALLS] what is this"),
    ("mistral", "[TOOL_CALLS][1, 2]"),
    ("mistral", "[TOOL_CALLS]" + "n" * 300 + "{}"),
    ("deepseek", "<｜tool▁calls▁begin｜>nothing"),
    ("deepseek", f"{DEEP}function<｜tool▁sep｜>f\n```json\nnull\n```{DEEP_END}"),
]


@pytest.mark.parametrize(("syntax", "answer", "text", "calls"), ANSWERS)
def test_calls_are_read_apart_from_text(syntax: str, answer: str, text: str, calls: Calls) -> None:
    found = read(syntax, [answer])
    assert (found.text, calls_of(found)) == (text, calls)
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize(("syntax", "answer"), NO_CALLS)
def test_what_is_no_call_stays_text(syntax: str, answer: str) -> None:
    found = read(syntax, [answer])
    assert (found.text, found.calls) == (answer, [])


def test_what_breaks_within_a_call_is_returned_once() -> None:
    found = read("hermes", ['<tool_call>{"name": "f", "arguments": {"a": 1, b}}</tool_call>'])
    assert calls_of(found) == [("f", '{"a": 1, ')]
    assert found.text == "b}}</tool_call>"


def test_a_call_that_is_cut_has_the_arguments_so_far() -> None:
    answer = '<tool_call>{"name": "f", "arguments": {"a": "x", "b": 123'
    found = read("hermes", [answer])
    assert (found.text, calls_of(found)) == ("", [("f", '{"a": "x", "b": 123')])


def test_arguments_are_streamed() -> None:
    reader = AnswerReader(AnswerForm(None, SYNTAXES["hermes"], TOOLS))
    assert not reader.push('<tool_call>{"name": "f", "arguments": {"te')
    first = reader.push('xt": "on')
    assert [(call.name, call.arguments) for call in first.merged_calls()] == [("f", '{"text": "on')]
    assert calls_of(reader.push("ce upon")) == [("", "ce upon")]
    assert not reader.ends_in_calls
    reader.push('"}}')
    assert reader.ends_in_calls


def test_without_parallel_calls_the_first_one_is_enough() -> None:
    answer = "".join(f'<tool_call>{{"name": "{n}", "arguments": {{}}}}</tool_call>' for n in "fg")
    reader = AnswerReader(AnswerForm(None, SYNTAXES["hermes"], TOOLS, parallel=False))
    found = reader.push(answer)
    assert reader.has_enough()
    found.add(reader.finish())
    assert (found.text, calls_of(found)) == ("", [("f", "{}")])


SEEN = Exercised("pieces of answers", {"splits": 500, "with calls": 200, "with reasoning": 100})


@SEEN.required
@scenarios(60)
@given(SEEDS)
def test_pieces_do_not_matter(seed: int) -> None:
    draw = Random(seed)
    syntax, answer = draw.choice([(x, y) for x, y, *_ in ANSWERS] + NO_CALLS)
    if draw.random() < 0.3:  # damaged somewhere
        at = draw.randrange(len(answer))
        answer = answer[:at] + draw.choice(["", "<", "{", '"', "\n", "x"]) + answer[at + 1 :]
    thinks = draw.random() < 0.5
    if thinks:
        thought = draw.choice(["", "I think\n\n", "a < b\n", "<tool_call>"])
        answer = f"{draw.choice(['', chr(10)])}<think>\n{thought}</think>\n\n{answer}"
    whole = read(syntax, [answer], thinks=thinks)
    for _ in range(12):
        cuts = sorted(draw.randrange(len(answer) + 1) for _ in range(draw.randint(0, 12)))
        ends = [*cuts, len(answer)]
        pieces = [answer[a:b] for a, b in zip([0, *cuts], ends, strict=True)]
        found = read(syntax, pieces, thinks=thinks)
        assert (found.reasoning, found.text) == (whole.reasoning, whole.text)
        assert calls_of(found) == calls_of(whole)
        SEEN.add("splits")
        SEEN.add("with calls", bool(whole.calls))
        SEEN.add("with reasoning", bool(whole.reasoning))
    # Nothing is lost, but whitespace and the markers of calls.
    kept = whole.text + "".join(f"{call.name}{call.arguments}" for call in whole.merged_calls())
    if not whole.calls:
        assert whole.text.split() == answer.rpartition("</think>")[2].split() if thinks else True
    assert len(kept) <= len(answer) + answer.count("\n") + 2 * answer.count("null")


TEMPLATES = {
    "hermes": "{% if tools %}<tool_call>{% endif %}",
    "mistral": "{{ '[TOOL_CALLS]' }}{% for tool in tools %}",
    "mistral-v11": "{{ '[TOOL_CALLS]' + name + '[ARGS]' }}{% for tool in tools %}",
    "deepseek": "{{'<｜tool▁calls▁begin｜>'}} ```json {{ tools }}",
    "deepseek-v31": "{{'<｜tool▁calls▁begin｜>'}} {{ tools }}",
    "llama": "{%- for t in tools %}{{ t | tojson }}{% endfor %}",
}


@pytest.mark.parametrize(("name", "template"), TEMPLATES.items())
def test_a_template_shows_the_syntax(name: str, template: str) -> None:
    found = detect(template, ())
    assert found is not None
    assert found.name == name


def test_a_template_without_tools_shows_none() -> None:
    assert detect("{{ messages }}", ()) is None
    mistral = detect("[TOOL_CALLS] {{ tools }}", ("[ARGS]",))
    assert mistral is not None
    assert mistral.name == "mistral-v11"
