"""What of a JSON schema is enforced."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLMatcher

from kvmesh.workers.structured import grammar

_COLOUR = {"type": "string", "format": "colour"}  # a format that only annotates


@pytest.mark.parametrize("name", ["default", "example", "examples", "enum", "const", "format"])
@pytest.mark.parametrize("holder", ["properties", "patternProperties", "$defs", "definitions"])
def test_what_a_schema_names_is_no_keyword(holder: str, name: str) -> None:
    reference = {"anyOf": [{"$ref": f"#/{holder}/{name}"}]}
    schema = {"type": "object", holder: {name: _COLOUR}, "additionalProperties": reference}
    assert _complaint(schema) == ""


def test_a_property_may_be_called_properties() -> None:
    inner = {"type": "object", "format": "colour", "properties": {"enum": _COLOUR}}
    assert _complaint({"type": "object", "properties": {"properties": inner}}) == ""


def test_what_is_data_stays_as_it_is() -> None:
    data = {"format": "colour", "properties": {"format": "colour"}}
    for schema in ({"const": data}, {"enum": [data]}, {"properties": {"const": {"const": data}}}):
        written = grammar.json_schema(schema).parts["json"]
        assert isinstance(written, dict)
        assert {**written, "x-guidance": None} == {**schema, "x-guidance": None}


def _complaint(schema: Any) -> str:
    return LLMatcher.validate_grammar(grammar.json_schema(schema).text())
