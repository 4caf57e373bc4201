"""The bodies of requests: from JSON to checked values, or to an error that names the field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar

import msgspec
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from kvmesh.cluster.errors import UnsupportedFieldError
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.workers.errors import InvalidFieldError

# What official clients may send, and what has no effect here.
Ignored = Annotated[Any, Field(default=None, description="Accepted, without effect")]


def _refuse(value: object) -> object:
    if value is not None:
        raise PydanticCustomError("unsupported", "unsupported")
    return value


# What it would be wrong to ignore.
Unsupported = Annotated[
    Any, AfterValidator(_refuse), Field(default=None, description="Refused, unless null")
]

_EXPECTED = {
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "list_type": "must be a list",
    "model_type": "must be an object",
    "string_type": "must be a string",
}
_MAX_SHOWN_CHARS = 80


@cache
def _field_names(kind: type[BaseModel]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in kind.model_fields.items())


def _fail_fast(schema: Any) -> None:
    """Have each list and object in a schema stop at its first error."""
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "dict"):
            schema["fail_fast"] = True
        for part in schema.values():
            _fail_fast(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


class RequestBody(BaseModel):
    """A part of a request. Unknown fields are errors; a number is not taken for a string.

    Only the first error is reported, so none is collected for every element of a list or object:
    16 MiB can have millions, and the interpreter's lock is held meanwhile.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _know_all_fields(cls, values: object) -> object:
        if isinstance(values, dict):
            known = _field_names(cls)
            for name in values:
                if name not in known:
                    raise PydanticCustomError("unknown_field", "unknown field", {"name": name})
        return values


Body = TypeVar("Body", bound=RequestBody)


def read_body(kind: type[Body], data: bytes) -> Body:
    """A request from JSON. Raises InvalidFieldError, naming the field.

    A million token ids take about 100 ms, in which the interpreter's lock is held.
    """
    try:
        values = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        refuse("request", f"must be JSON in UTF-8: {error}")
    except RecursionError:
        refuse("request", "is nested too deeply")
    if not isinstance(values, dict):
        refuse("request", "must be a JSON object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _first(error) from None


def path_of(parts: Sequence[str | int]) -> str:
    """A field's path as OpenAI writes it: ``messages[0].content``."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        # In brackets pydantic names the kind of a value, which is not part of its path.
        elif not part.startswith("["):
            path += f".{part}" if path else part
    return path


def _first(error: ValidationError) -> InvalidFieldError:
    found: Any = error.errors(include_url=False)[0]
    path = path_of(found["loc"]) or "request"
    match found["type"]:
        case "missing":
            return InvalidFieldError(path, "is required")
        case "unknown_field":
            path = path_of((*found["loc"], found["ctx"]["name"]))
            return UnsupportedFieldError(path, "is not a field that this server knows")
        case "unsupported":
            return UnsupportedFieldError(path, "is not supported by this server")
    return InvalidFieldError(path, f"{_expected(found)}, got {_shown(found['input'])}")


def _expected(found: Mapping[str, Any]) -> str:
    if found["type"] in _EXPECTED:
        return _EXPECTED[found["type"]]
    message = str(found["msg"]).removeprefix("Value error, ")
    # "Input should be ..." follows the name of the field.
    return re.sub(r"^\w+ should ", "must ", message)


def _shown(value: object) -> str:
    text = msgspec.json.encode(value).decode() if not isinstance(value, BaseModel) else "…"
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[: _MAX_SHOWN_CHARS - 1]}…"
