"""Random JSON schemas, of what llguidance enforces."""

from __future__ import annotations

from random import Random
from typing import Any

_NAMES = ["a", "b", "name", "ключ", 'quo"te', "x y", "$ref", "type"]
_STRINGS = ["", "a", "tab\t", 'q"', "naïve", "日本"]


def random_schema(draw: Random, depth: int = 3) -> dict[str, Any]:
    """A schema that some document matches, and whose documents are mostly short."""
    kinds = [_string, _integer, _number, _enum, _const, _type]
    if depth:
        kinds += [_object, _object, _array, _any_of, _reference]
    return draw.choice(kinds)(draw, depth)


def _object(draw: Random, depth: int) -> dict[str, Any]:
    names = draw.sample(_NAMES, draw.randint(0, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: random_schema(draw, depth - 1) for name in names},
        "required": [name for name in names if draw.random() < 0.6],
        "additionalProperties": False,
    }
    if draw.random() < 0.1:
        schema["additionalProperties"] = {"type": "boolean"}
        schema["maxProperties"] = len(names) + 1
        del schema["maxProperties"]
    return schema


def _array(draw: Random, depth: int) -> dict[str, Any]:
    fewest = draw.randint(0, 2)
    schema: dict[str, Any] = {"type": "array", "items": random_schema(draw, depth - 1)}
    schema |= {"minItems": fewest, "maxItems": fewest + draw.randint(0, 2)}
    if draw.random() < 0.2:
        schema["prefixItems"] = [random_schema(draw, depth - 1)]
    return schema


def _any_of(draw: Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]}


def _reference(draw: Random, depth: int) -> dict[str, Any]:
    # A list that ends when the model likes.
    rest = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/rest"}]}
    node = {
        "type": "object",
        "properties": {"next": rest},
        "required": ["next"],
        "additionalProperties": False,
    }
    if depth < 3:  # definitions are found from the root
        return {"type": "null"}
    return {"$ref": "#/$defs/rest", "$defs": {"rest": node}}


def _string(draw: Random, depth: int) -> dict[str, Any]:
    kind = draw.choice(["length", "pattern", "format"])
    if kind == "pattern":
        pattern = draw.choice(["^[a-z]{1,4}$", "^\\d{3}-\\d{2}$", "^(ab|cd)+e?$", "^x\\.y/z$"])
        return {"type": "string", "pattern": pattern}
    if kind == "format":
        found = draw.choice(["date", "time", "date-time", "uuid", "ipv4", "not a known one"])
        return (
            {"type": "string", "format": found, "maxLength": 40}
            if found[0] == "n"
            else {
                "type": "string",
                "format": found,
            }
        )
    shortest = draw.randint(0, 3)
    return {"type": "string", "minLength": shortest, "maxLength": shortest + draw.randint(0, 5)}


def _integer(draw: Random, depth: int) -> dict[str, Any]:
    low = draw.randint(-300, 300)
    return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 2000)}


def _number(draw: Random, depth: int) -> dict[str, Any]:
    low = draw.randint(-300, 300) / 4
    return {"type": "number", "minimum": low, "exclusiveMaximum": low + draw.randint(1, 50)}


def _enum(draw: Random, depth: int) -> dict[str, Any]:
    values = [*draw.sample(_STRINGS, 2), draw.randint(0, 9), None, True]
    return {"enum": draw.sample(values, draw.randint(1, 4))}


def _const(draw: Random, depth: int) -> dict[str, Any]:
    return {"const": draw.choice([*_STRINGS, 7, {"k": [1, "x"]}, []])}


def _type(draw: Random, depth: int) -> dict[str, Any]:
    return {"type": draw.choice(["null", "boolean", ["null", "boolean"]])}
