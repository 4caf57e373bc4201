"""What an answer has to match, as OpenAI and vLLM write it, as the contract's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from kvmesh.cluster.errors import UnsupportedFieldError
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.openai.body import Ignored, RequestBody
from kvmesh.cluster.openai.messages import json_text
from kvmesh.v1 import kvmesh_pb2 as pb


class SchemaFormat(RequestBody):
    """A schema with its name. strict: answers match it in any case"""

    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    name: Ignored = None
    description: Ignored = None
    strict: Ignored = None

    def to_contract(self, path: str) -> pb.StructuredOutput:
        if self.schema_ is None:
            refuse(path, "is required")
        return pb.StructuredOutput(json_schema=json_text(self.schema_))


class ResponseFormat(RequestBody):
    """As in chat completions: the schema is in a field of its own."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    def to_contract(self) -> pb.StructuredOutput | None:
        match self.type:
            case "json_object":
                return pb.StructuredOutput(json_object=True)
            case "json_schema":
                schema = self.json_schema or SchemaFormat()
                return schema.to_contract("response_format.json_schema.schema")
        return None


class TextFormat(SchemaFormat):
    """As in responses: the schema is next to the type."""

    type: Literal["text", "json_object", "json_schema"]

    def to_format(self) -> pb.StructuredOutput | None:
        match self.type:
            case "json_object":
                return pb.StructuredOutput(json_object=True)
            case "json_schema":
                return self.to_contract("text.format.schema")
        return None


class StructuredOutputs(RequestBody):
    """As in vLLM: one of its fields. json: a schema, or its text"""

    json_: dict[str, Any] | str | bool | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None

    def to_contract(self) -> pb.StructuredOutput:
        found = pb.StructuredOutput()
        given = 0
        if self.json_ is not None:
            found.json_schema = self.json_ if isinstance(self.json_, str) else json_text(self.json_)
            given += 1
        for name in ("regex", "grammar", "json_object"):
            if (value := getattr(self, name)) not in (None, False):
                setattr(found, name, value)
                given += 1
        if self.choice is not None:
            found.choice.values.extend(self.choice)
            given += 1
        if given != 1:
            refuse("structured_outputs", f"must have one of its fields; {given} are set")
        return found


RENAMES = (
    (r"^structured_output\.json_schema", "response_format.json_schema.schema"),
    (r"^structured_output(?=[.[]|$)", "response_format"),
)
VLLM_RENAMES = (
    (r"^structured_output\.json_schema", "structured_outputs.json"),
    (r"^structured_output(?=[.[]|$)", "structured_outputs"),
)
RESPONSE_RENAMES = (
    (r"^structured_output\.json_schema", "text.format.schema"),
    (r"^structured_output(?=[.[]|$)", "text.format"),
)


def add_format(request: pb.GenerateRequest, found: pb.StructuredOutput | None) -> None:
    """Raises InvalidFieldError if the request has a format already."""
    if found is None:
        return
    if request.HasField("structured_output"):
        refuse("structured_outputs", "must not be set together with another format")
    request.structured_output.CopyFrom(found)


class NamedFunction(RequestBody):
    name: str


class ChoiceOfTool(RequestBody):
    """A tool that has to be called; its name is next to the type in responses."""

    type: str
    function: NamedFunction | None = None
    name: str | None = None


def _kind(choice: object) -> str:
    return "[mode]" if isinstance(choice, str) else "[tool]"


ToolChoiceField = Annotated[
    Annotated[str, Tag("[mode]")] | Annotated[ChoiceOfTool, Tag("[tool]")], Discriminator(_kind)
]

_MODES = {
    "auto": pb.ToolChoice.MODE_AUTO,
    "none": pb.ToolChoice.MODE_NONE,
    "required": pb.ToolChoice.MODE_REQUIRED,
}


def tool_choice_of(choice: str | ChoiceOfTool) -> pb.ToolChoice:
    """Raises InvalidFieldError(tool_choice)."""
    if isinstance(choice, str):
        if choice not in _MODES:
            refuse("tool_choice", f"must be auto, none, required or a tool, got {choice!r}")
        return pb.ToolChoice(mode=_MODES[choice])
    if choice.type != "function":
        raise UnsupportedFieldError(
            "tool_choice.type", f"must be function; {choice.type!r} is not supported"
        )
    name = choice.function.name if choice.function is not None else choice.name
    if not name:
        refuse("tool_choice.function.name", "is required")
    return pb.ToolChoice(name=name)
