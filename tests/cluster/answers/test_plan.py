"""What a request asks of its answer, as a grammar for the engine and a form for the reader."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher

from kvmesh.cluster.ingress.answers.model_form import ModelForm
from kvmesh.cluster.ingress.answers.plan import (
    NO_PLAN,
    AnswerPlan,
    AnswerSpec,
    StructuredSpec,
    ToolMode,
    plan_answer,
)
from kvmesh.cluster.ingress.answers.reader import AnswerReader
from kvmesh.cluster.ingress.answers.syntaxes import SYNTAXES
from kvmesh.workers.constraint import Reasoning
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.structured import rehearsal
from kvmesh.workers.structured.rehearsal import _alphabet

PARAMETERS = {
    "type": "object",
    "properties": {"text": {"type": "string", "maxLength": 6}, "n": {"enum": [1, 2]}},
    "required": ["text"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": 'od"d', "description": "", "parameters": {}}},
]
ENDINGS = frozenset(b'"}]<>')
THINKING = Reasoning("<think>", "</think>", started=True)


def model(syntax: str, template: str = "<think> tools") -> ModelForm:
    return ModelForm(("<think>", "</think>"), SYNTAXES[syntax], {})


def walk(plan: AnswerPlan, seed: int, begin: str = "", steps: int = 2000) -> str:
    """A random answer within the plan's grammar that begins so and has ended by itself."""
    assert plan.constraint is not None
    draw = Random(seed)
    matcher = LLMatcher(_alphabet(), plan.constraint.grammar, log_level=0)
    answer = bytearray(begin.encode())
    assert matcher.consume_tokens(list(answer))
    for _ in range(steps):
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(257) if mask[token >> 3] >> (token & 7) & 1]
        # Endings are rare among the characters of a string.
        likely = [token for token in allowed if token in ENDINGS and draw.random() < 0.5]
        token = draw.choice(likely or allowed)
        if token == 256 or (256 in allowed and draw.random() < 0.3):
            return answer.decode()
        assert matcher.consume_token(token), matcher.get_error()
        answer.append(token)
    pytest.fail(f"it does not end: {answer!r}")


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("reasoning", [None, THINKING])
def test_forced_calls_are_read_as_such(syntax: str, reasoning: Reasoning | None) -> None:
    spec = AnswerSpec(is_chat=True, tools=TOOLS, mode=ToolMode.REQUIRED)
    plan = plan_answer(spec, model(syntax), reasoning)
    several = 0
    for seed in range(12):
        answer = walk(plan, seed, "I see</think>" if reasoning else "")
        reader = AnswerReader(plan.form)
        pieces = reader.push(answer)
        pieces.add(reader.finish())
        calls = pieces.merged_calls()
        assert (pieces.text, reader.ends_in_calls) == ("", True), answer
        assert pieces.reasoning == ("I see" if reasoning else "")
        assert calls
        several += len(calls) > 1
        for call in calls:
            arguments = json.loads(call.arguments)
            assert isinstance(arguments, dict)
            assert call.name in ("f", 'od"d')
            if call.name == "f":
                jsonschema.validate(arguments, PARAMETERS)
    assert several


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_named_tool_is_called_once(syntax: str) -> None:
    spec = AnswerSpec(is_chat=True, tools=TOOLS, mode=ToolMode.REQUIRED, named="f")
    plan = plan_answer(spec, model(syntax), None)
    for seed in range(6):
        reader = AnswerReader(plan.form)
        pieces = reader.push(walk(plan, seed))
        pieces.add(reader.finish())
        assert [call.name for call in pieces.merged_calls()] == ["f"]


def test_with_auto_the_answer_is_structured_or_calls() -> None:
    structured = StructuredSpec("choice", ["yes", "no"])
    spec = AnswerSpec(structured, is_chat=True, tools=TOOLS, mode=ToolMode.AUTO)
    plan = plan_answer(spec, model("hermes"), None)
    answers = {walk(plan, seed)[:11] for seed in range(40)}
    assert answers <= {"yes", "no", "<tool_call>"}
    assert len(answers) > 1


def test_without_anything_to_enforce_there_is_no_constraint() -> None:
    nothing = plan_answer(AnswerSpec(), model("hermes"), None)
    assert (nothing.constraint, bool(nothing.form)) == (None, bool(NO_PLAN.form))
    spec = AnswerSpec(is_chat=True, tools=TOOLS, mode=ToolMode.AUTO)
    plan = plan_answer(spec, model("hermes"), THINKING)
    assert plan.constraint is None
    assert plan.form.reasoning == THINKING
    limited = plan_answer(
        AnswerSpec(is_chat=True, max_reasoning_tokens=3), model("hermes"), THINKING
    )
    assert limited.constraint is not None
    assert limited.constraint.grammar == ""
    assert limited.constraint.reasoning is not None
    assert limited.constraint.reasoning.max_tokens == 3


REFUSED: list[tuple[str, Any, str]] = [
    ("json_schema", {"not": {}}, 'Unimplemented keys: ["not"]'),
    ("json_schema", {"not": {}, "x-guidance": {"lenient": True}}, 'Unimplemented keys: ["not"]'),
    ("json_schema", False, "schema is false"),
    ("json_schema", [1], "must be an object or boolean"),
    ("json_schema", {"$ref": "#"}, "no output matches"),
    ("json_schema", {"$ref": "https://example.org/x"}, "example.org"),
    ("json_schema", {"type": "strng"}, "strng"),
    ("json_schema", {"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
    ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
    ("json_schema", {"type": "string", "pattern": "(?=a)"}, "look-ahead"),
    ("json_schema", {"oneOf": [{"type": "object"}, {"type": "object"}]}, "oneOf"),
    ("json_schema", {"const": "a" * 300_000}, "characters as a grammar"),
    ("regex", "(?=a)", "look-ahead"),
    ("regex", r"(a)\1", "backreferences"),
    ("regex", "[", "unclosed"),
    ("regex", r"[^\x00-\x{10FFFF}]", "no output matches"),
    ("regex", "(?:[a-z]{1,500}){1,500}z", "too many"),
    ("regex", r"(x{1,1000}){1,1000}(y{1,1000}){1,1000}", "too many"),
    ("grammar", "start: <|im_end|>", "special tokens"),
    ("grammar", "start: <[3]>", "special tokens"),
    ("grammar", "start: @output", "references"),
    ("grammar", '%llguidance {"no_forcing": false}\nstart: "a"', "%llguidance"),
    ("grammar", "nothing", "neither Lark nor GBNF"),
    ("grammar", "start: missing", "missing"),
    ("grammar", "root ::= root", "no output matches"),
]


@pytest.mark.parametrize("text", ["x@whole", "@answer", "@body", "a@regex", 'say "@json"'])
def test_texts_that_look_like_names_of_grammars_stay_as_they_are(text: str) -> None:
    reasoning = Reasoning("<think>", "</think>", started=True)
    for kind, value in (("choice", (text,)), ("regex", re.escape(text))):
        spec = AnswerSpec(StructuredSpec(kind, value))
        constraint = plan_answer(spec, model("hermes"), reasoning).constraint
        assert constraint is not None
        matcher = LLMatcher(_alphabet(), constraint.grammar, log_level=0)
        output = [*f"so</think>{text}".encode(), 256]
        assert matcher.consume_tokens(output), matcher.get_error()


def test_a_rule_of_gbnf_may_be_called_start() -> None:
    for grammar in (
        'root ::= start [start]\nstart ::= "start"  # the start',
        'start ::= "start"\nroot ::= start [start]',
    ):
        spec = AnswerSpec(StructuredSpec("grammar", grammar))
        constraint = plan_answer(spec, model("hermes"), None).constraint
        assert constraint is not None
        for text, fits in (("starts", True), ("startx", False), ("rule-starts", False)):
            matcher = LLMatcher(_alphabet(), constraint.grammar, log_level=0)
            assert matcher.consume_tokens([*text.encode(), 256]) == fits, text


@pytest.mark.parametrize(("kind", "value", "reason"), REFUSED)
def test_what_cannot_be_enforced_is_refused_by_name(kind: str, value: Any, reason: str) -> None:
    with pytest.raises(InvalidFieldError, match=r"structured_output\.") as caught:
        plan_answer(AnswerSpec(StructuredSpec(kind, value)), model("hermes"), None)
    assert caught.value.field == f"structured_output.{kind}"
    assert reason in caught.value.message
    assert "\n" not in caught.value.message


def test_a_grammar_that_takes_too_long_to_follow_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rehearsal, "MAX_WALK_S", -1.0)
    spec = AnswerSpec(StructuredSpec("grammar", 'start: s\ns: s s | "a" | s s s'))
    with pytest.raises(InvalidFieldError, match="takes too long") as caught:
        plan_answer(spec, model("hermes"), None)
    assert caught.value.field == "structured_output.grammar"


TAKEN: list[tuple[str, Any]] = [
    ("json_schema", True),
    ("json_schema", {"type": "string", "format": "no known one"}),
    ("json_schema", {"type": "object", "properties": {"format": {"const": {"format": "x"}}}}),
    ("json_schema", {"type": "string", "maxLength": 10**7}),
    ("json_object", True),
    ("regex", "^a/b\n$"),
    ("regex", "(a{1000}){1000}"),
    ("regex", "((((a{50}){50}){50}){50})"),
    ("regex", "(a|aa)+b"),
    ("regex", "(x+x+)+y"),
    ("regex", "[ab]*a[ab]{30}"),
    ("grammar", 'root ::= "yes" | [0-9]+ ws\nws ::= " "*'),
    ("grammar", 'start: "<tool>" /<.>/ // <no token>\n'),
    ("choice", ["", 'quo"te', "line\nbreak \\ é\u2028"]),
]


@pytest.mark.parametrize(("kind", "value"), TAKEN)
def test_what_only_looks_expensive_is_taken(kind: str, value: Any) -> None:
    plan = plan_answer(AnswerSpec(StructuredSpec(kind, value)), model("hermes"), None)
    assert plan.constraint is not None
    assert json.loads(plan.constraint.grammar)


@pytest.mark.parametrize(
    ("spec", "form", "field"),
    [
        (AnswerSpec(max_reasoning_tokens=1), model("hermes"), "max_reasoning_tokens"),
        (
            AnswerSpec(is_chat=True, max_reasoning_tokens=1),
            ModelForm.of("{{ messages }}", {}),
            "max_reasoning_tokens",
        ),
        (
            AnswerSpec(is_chat=True, tools=TOOLS, mode=ToolMode.REQUIRED),
            ModelForm.of("{{ messages }}", {}),
            "prompt.chat.tool_choice",
        ),
        (
            AnswerSpec(
                is_chat=True,
                tools=[{"function": {"name": "f", "parameters": {"type": "array"}}}],
                mode=ToolMode.REQUIRED,
            ),
            model("hermes"),
            "prompt.chat.tools[0].parameters_json",
        ),
        (
            AnswerSpec(
                is_chat=True,
                tools=[TOOLS[0], {"function": {"name": "g", "parameters": {"not": {}}}}],
                mode=ToolMode.REQUIRED,
            ),
            model("hermes"),
            "prompt.chat.tools[1].parameters_json",
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused(spec: AnswerSpec, form: ModelForm, field: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        plan_answer(spec, form, None)
    assert caught.value.field.removeprefix("sampling_params.") == field


@pytest.mark.parametrize(
    "text", ["\n" * 200_000, 'start: "' + '\\"' * 100_000, "start: /" * 25_000]
)
def test_long_grammars_are_refused_in_linear_time(text: str) -> None:
    """What takes the square of the length would run for minutes here, and hold every stream up."""
    with pytest.raises(InvalidFieldError, match=r"structured_output\.grammar"):
        plan_answer(AnswerSpec(StructuredSpec("grammar", text)), model("hermes"), None)
