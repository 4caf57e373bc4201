"""From what a request asks of the answer to a constraint for the engine and a form to read."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvmesh.cluster.ingress.answers.model_form import ModelForm
from kvmesh.cluster.ingress.answers.reader import PLAIN, AnswerForm
from kvmesh.cluster.ingress.answers.syntaxes import MAX_CALLS, ToolSyntax
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.workers.constraint import OutputConstraint, Reasoning
from kvmesh.workers.structured import grammar
from kvmesh.workers.structured.grammar import Grammar, Marker
from kvmesh.workers.structured.rehearsal import rehearse

TOOLS = "prompt.chat.tools"
CHOICE = "prompt.chat.tool_choice"


class ToolMode(enum.Enum):
    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class StructuredSpec:
    """kind: of StructuredOutput; value: what it has. JSON is parsed."""

    kind: str
    value: Any

    @property
    def field(self) -> str:
        return f"structured_output.{self.kind}"


@dataclass(frozen=True, slots=True)
class AnswerSpec:
    """What a request asks of its answer.

    is_chat: only chats have reasoning and tools
    tools: as templates get them
    named: the one tool to call, with REQUIRED
    continued: the last message, if the answer continues it
    """

    structured: StructuredSpec | None = None
    is_chat: bool = False
    tools: Sequence[Mapping[str, Any]] = ()
    mode: ToolMode = ToolMode.NONE
    named: str | None = None
    parallel: bool = True
    max_reasoning_tokens: int | None = None
    continued: str | None = None

    @property
    def needs_grammar(self) -> bool:
        return self.structured is not None or self.mode is ToolMode.REQUIRED

    def key(self) -> str:
        """Equal for equal ones."""
        parts = (self.structured and (self.structured.kind, self.structured.value), self.tools)
        scalars = (self.is_chat, self.mode.value, self.named, self.parallel, self.continued)
        return json.dumps([parts, scalars, self.max_reasoning_tokens])


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    form: AnswerForm = PLAIN
    constraint: OutputConstraint | None = None


NO_PLAN = AnswerPlan()


def plan_answer(spec: AnswerSpec, model: ModelForm, reasoning: Reasoning | None) -> AnswerPlan:
    """With a grammar it may take seconds, if it is refused in the end; call it in a thread.

    reasoning: as the prompt has left it
    Raises InvalidFieldError naming the field.
    """
    if spec.max_reasoning_tokens is not None:
        if model.think is None or not spec.is_chat:
            why = "the model shows no reasoning" if spec.is_chat else "the prompt is not a chat"
            refuse("sampling_params.max_reasoning_tokens", f"must not be set: {why}")
        if reasoning is not None:
            reasoning = replace(reasoning, max_tokens=spec.max_reasoning_tokens)
    syntax = _syntax(spec, model)
    answer = _answer(spec, syntax, grammar.literal, rehearsed=True)
    text = ""
    if answer is not None:
        # Again with the model's own tokens, which the rehearsal does not have.
        answer = _answer(spec, syntax, model.marker)
        assert answer is not None
        if reasoning is not None:
            answer = grammar.after_reasoning(answer, reasoning, model.marker)
        text = answer.text()
    limited = reasoning if reasoning is not None and reasoning.max_tokens is not None else None
    return AnswerPlan(
        AnswerForm(
            reasoning,
            syntax,
            [tool["function"]["name"] for tool in spec.tools],
            spec.parallel,
            model.markers(reasoning, syntax),
        ),
        OutputConstraint(text, limited) if text or limited else None,
    )


def _syntax(spec: AnswerSpec, model: ModelForm) -> ToolSyntax | None:
    if spec.mode is ToolMode.NONE:
        return None
    if model.syntax is None and spec.mode is ToolMode.REQUIRED:
        refuse(CHOICE, "needs to know how the model writes calls; set model.tool_parser")
    return model.syntax


def _answer(
    spec: AnswerSpec, syntax: ToolSyntax | None, marker: Marker, *, rehearsed: bool = False
) -> Grammar | None:
    """The grammar of the answer after any reasoning, None if it may be anything."""
    body = None
    if spec.structured is not None and spec.mode is not ToolMode.REQUIRED:
        body = _structured(spec.structured)
        if rehearsed:
            rehearse(body, spec.structured.field)
    calls = None
    if syntax is not None and (spec.mode is ToolMode.REQUIRED or body is not None):
        calls = _calls(spec, syntax, marker, rehearsed)
        if rehearsed:
            rehearse(calls, TOOLS)
    if body is None or calls is None:
        return body or calls
    return grammar.lark("start: @body | @calls\n", body=body, calls=calls)


def _structured(spec: StructuredSpec) -> Grammar:
    match spec.kind:
        case "json_schema":
            return grammar.json_schema(spec.value)
        case "json_object":
            return grammar.json_schema({"type": "object"})
        case "regex":
            return grammar.regex(spec.value)
        case "choice":
            return grammar.choice(spec.value)
    try:
        return grammar.context_free(spec.value)
    except Exception as error:  # the library's converter raises nothing narrower
        refuse(spec.field, f"is neither Lark nor GBNF: {error}")


def _calls(spec: AnswerSpec, syntax: ToolSyntax, marker: Marker, rehearsed: bool) -> Grammar:
    rules, parts = [], {}
    for index, tool in enumerate(spec.tools):
        function = tool["function"]
        if spec.named is not None and function["name"] != spec.named:
            continue
        parts[f"arguments{index}"] = grammar.json_schema(
            _object_schema(function["parameters"], f"{TOOLS}[{index}].parameters_json")
        )
        if rehearsed:
            rehearse(parts[f"arguments{index}"], f"{TOOLS}[{index}].parameters_json")
        rules.append(syntax.call(function["name"], f"@arguments{index}", marker))
    count = MAX_CALLS if spec.parallel and spec.named is None else 1
    text = f"start: {syntax.calls(count, marker)}\ncall: {' | '.join(rules)}\n"
    return grammar.lark(text, **parts)


def _object_schema(schema: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """A tool's parameters as a schema of objects only: arguments are nothing else."""
    if "type" not in schema and not schema.keys() & {"$ref", "anyOf", "allOf", "oneOf"}:
        return {"type": "object", **schema}
    if schema.get("type", "object") not in ("object", ["object"]):
        refuse(field, f"must have the type object, got {json.dumps(schema['type'])}")
    return schema
