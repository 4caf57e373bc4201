"""What a request asks of its answer, from the wire to checked values."""

from __future__ import annotations

import json
from typing import Any

from kvmesh.cluster.ingress.answers.plan import CHOICE, AnswerSpec, StructuredSpec, ToolMode
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.model.chat import Conversation
from kvmesh.workers.sampling_params import RANGES
from kvmesh.workers.structured.limits import MAX_GRAMMAR_CHARS

MAX_VALUES = 10_000

_MODES = {
    pb.ToolChoice.MODE_AUTO: ToolMode.AUTO,
    pb.ToolChoice.MODE_NONE: ToolMode.NONE,
    pb.ToolChoice.MODE_REQUIRED: ToolMode.REQUIRED,
}


def answer_spec(request: pb.GenerateRequest, chat: Conversation | None) -> AnswerSpec:
    """chat: the prompt, if it is one. Raises InvalidFieldError naming the field."""
    structured = None
    if request.HasField("structured_output"):
        structured = _structured(request.structured_output)
    max_reasoning_tokens = None
    if request.sampling_params.HasField("max_reasoning_tokens"):
        max_reasoning_tokens = request.sampling_params.max_reasoning_tokens
        RANGES["min_tokens"].check("sampling_params.max_reasoning_tokens", max_reasoning_tokens)
    if chat is None:
        return AnswerSpec(structured, max_reasoning_tokens=max_reasoning_tokens)
    wire = request.prompt.chat
    mode, named = tool_choice(wire)
    return AnswerSpec(
        structured,
        is_chat=True,
        tools=chat.tools,
        mode=mode,
        named=named,
        parallel=wire.parallel_tool_calls if wire.HasField("parallel_tool_calls") else True,
        max_reasoning_tokens=max_reasoning_tokens,
        continued=str(chat.messages[-1]["content"]) if chat.continue_final_message else None,
    )


def tool_choice(chat: pb.Chat) -> tuple[ToolMode, str | None]:
    """Whether tools are called, and which one if it has to be a certain one."""
    kind = chat.tool_choice.WhichOneof("kind")
    names = [tool.name for tool in chat.tools]
    if kind is None and chat.HasField("tool_choice"):
        refuse(CHOICE, "must have a mode or a name")
    if kind == "name":
        if chat.tool_choice.name not in names:
            refuse(
                f"{CHOICE}.name",
                f"must be the name of one of the tools ({', '.join(names) or 'none is given'}); "
                f"got {chat.tool_choice.name!r}",
            )
        return ToolMode.REQUIRED, chat.tool_choice.name
    mode = ToolMode.AUTO
    if kind == "mode":
        if chat.tool_choice.mode not in _MODES:
            refuse(f"{CHOICE}.mode", f"must be AUTO, NONE or REQUIRED, got {chat.tool_choice.mode}")
        mode = _MODES[chat.tool_choice.mode]
    if not names:
        if mode is ToolMode.REQUIRED:
            refuse(CHOICE, "must not be REQUIRED without tools")
        mode = ToolMode.NONE
    return mode, None


def _structured(wire: pb.StructuredOutput) -> StructuredSpec:
    kind = wire.WhichOneof("kind")
    if kind is None:
        refuse("structured_output", "must have json_schema, regex, grammar, choice or json_object")
    spec = StructuredSpec(kind, getattr(wire, kind))
    match kind:
        case "choice":
            values = list(wire.choice.values)
            if not values:
                refuse(f"{spec.field}.values", "must not be empty")
            if len(values) > MAX_VALUES:
                refuse(
                    f"{spec.field}.values", f"must have at most {MAX_VALUES:,}, got {len(values):,}"
                )
            _check_length(sum(map(len, values)), f"{spec.field}.values")
            return StructuredSpec(kind, values)
        case "json_object":
            if not wire.json_object:
                refuse(spec.field, "must be true; leave structured_output out for any output")
        case "json_schema":
            _check_length(len(wire.json_schema), spec.field)
            return StructuredSpec(kind, _json(wire.json_schema, spec.field))
        case _:
            _check_length(len(spec.value), spec.field)
            if not spec.value:
                refuse(spec.field, "must not be empty")
    return spec


def _json(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        refuse(field, f"must be JSON: {error}")


def _check_length(chars: int, field: str) -> None:
    if chars > MAX_GRAMMAR_CHARS:
        refuse(field, f"must have at most {MAX_GRAMMAR_CHARS:,} characters, got {chars:,}")
