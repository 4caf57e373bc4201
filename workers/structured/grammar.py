"""Grammars of llguidance from what a request asks for.

A grammar is a list of named parts, each with rules of its own, which refer to other parts by
@name; the first one is the whole. Nothing is forced: at every position all tokens are allowed
whose text the grammar allows, whether or not a tokenizer would have chosen them. Forced texts
would be tokenised within a step, however long they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from kvmesh.workers.constraint import Reasoning
from kvmesh.workers.structured.limits import JSON_WHITESPACE

# How the text of a marker is written in Lark: as text, or as the special token that it is.
Marker: TypeAlias = Callable[[str], str]

_HEADER = '%llguidance {"no_forcing": true}\n'
_JSON_OPTIONS = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": JSON_WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,
}
# Formats that are enforced. By JSON Schema's own rules others only annotate.
_TIMES = frozenset({"date-time", "time", "date", "duration"})
_FORMATS = _TIMES | {"email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"}
# What is data and not a schema.
_DATA = frozenset({"const", "enum", "default", "examples", "example"})
# What has schemas under names of the user's choice, which are no keywords.
_NAMED = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}
)
# What has no special tokens: strings, regular expressions, comments. Those that do not end are
# taken to the end of their line, so that no text takes longer than its length.
_LARK_TEXT = re.compile(r'"(?:\\.|[^"\\\n])*+"?|//[^\n]*|/(?:\\.|[^/\\\n])++/?|#[^\n]*')
# The name of another grammar, or what has none.
_LARK_NAME = re.compile(rf"(?:{_LARK_TEXT.pattern})|@(\w+)")
# The library's own test for it takes the square of the length, in one call that nothing interrupts.
# It also takes GBNF's `start ::=` for Lark.
_LARK_START = re.compile(r"^[ \t]*(%llguidance\b|start[ \t]*:(?!:=))", re.MULTILINE)
# In GBNF: what names no rule, or else the name `start`.
_GBNF_START = re.compile(
    r'("(?:\\.|[^"\\\n])*+"?|\[(?:\\.|[^\]\\\n])*+\]?|#[^\n]*)|(?<![\w-])start(?![\w-])'
)


@dataclass(frozen=True, slots=True)
class Grammar:
    """parts: name -> Lark rules, or a JSON schema; the first is the whole, and has rules, since
    only rules can say that nothing is forced"""

    parts: Mapping[str, str | Mapping[str, Any]]

    def text(self) -> str:
        """As llguidance reads it."""
        return json.dumps({"grammars": [_entry(*part) for part in self.parts.items()]})

    def named(self, name: str) -> dict[str, str | Mapping[str, Any]]:
        """The parts, to be referred to by this name and names that begin with it."""
        first = next(iter(self.parts))
        names = {old: name if old == first else f"{name}_{old}" for old in self.parts}
        return {names[old]: _renamed(part, names) for old, part in self.parts.items()}


def json_schema(schema: Any) -> Grammar:
    """JSON of the schema, with some whitespace wherever JSON may have it. schema: parsed JSON"""
    enforced = _enforced(schema)
    # A boolean schema has no place for options; anything else is refused when it is compiled.
    found = enforced if isinstance(enforced, Mapping) else {"allOf": [enforced]}
    return Grammar({"whole": "start: @json\n", "json": {**found, "x-guidance": _JSON_OPTIONS}})


def regex(pattern: str) -> Grammar:
    """The whole output matches."""
    converted = json.loads(LLMatcher.grammar_from_regex(pattern))
    return Grammar({"regex": converted["grammars"][0]["lark_grammar"]})


def choice(values: Sequence[str]) -> Grammar:
    return lark("start: " + " | ".join(map(literal, values)))


def _of_gbnf(text: str) -> str:
    """In Lark, where the rule `start` is the whole, which GBNF calls `root`."""
    return gbnf_to_lark(_GBNF_START.sub(lambda found: found[1] or "rule-start", text))


def context_free(text: str) -> Grammar:
    """Lark or GBNF. Raises ValueError if it is neither, or has what requests may not use."""
    rules = text if _LARK_START.search(text) else _of_gbnf(text)
    rules = rules.replace("%llguidance {}", "")
    bare = _LARK_TEXT.sub("", rules)
    if "%llguidance" in bare:
        raise ValueError("%llguidance is not allowed")
    if found := re.search(r"<[^>\s]*>?", bare):
        raise ValueError(f"special tokens are not allowed, got {found[0]}")
    if found := re.search(r"@\w+", bare):
        raise ValueError(f"references to other grammars are not allowed, got {found[0]}")
    return lark(rules)


def lark(rules: str, **parts: Grammar) -> Grammar:
    """Rules that refer to other grammars by their names."""
    named = {name: part for key, value in parts.items() for name, part in value.named(key).items()}
    return Grammar({"whole": rules, **named})


def after_reasoning(answer: Grammar, reasoning: Reasoning, marker: Marker) -> Grammar:
    """`answer` after some reasoning: all of it, or, if it has not started, as the model likes."""
    end = marker(reasoning.end)
    # Special tokens end a text by themselves; a text ends at the first marker only if it is lazy.
    lazy = "" if end.startswith("<") else "[lazy]"
    start = "start: thought LINES @answer\n"
    if not reasoning.started:
        start = f"start: @answer | SPACE {marker(reasoning.start)} thought LINES @answer\n"
        start += "SPACE: /[ \\n]{0,4}/\n"
    return lark(
        f"{start}thought{lazy}: THOUGHT {end}\nTHOUGHT: /(?s:.*)/\nLINES: /\\n{{0,3}}/\n",
        answer=answer,
    )


def literal(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text)


def _entry(name: str, part: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"name": name, "lark_grammar": _HEADER + part}
    return {"name": name, "json_schema": part}


def _renamed(part: str | Mapping[str, Any], names: Mapping[str, str]) -> str | Mapping[str, Any]:
    if not isinstance(part, str):
        return part
    return _LARK_NAME.sub(
        lambda found: found[0] if found[1] is None else "@" + names.get(found[1], found[1]), part
    )


def _enforced(schema: Any) -> Any:
    """The schema without formats that only annotate."""
    if isinstance(schema, list):
        return [_enforced(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: _enforced_part(key, value)
        for key, value in schema.items()
        if not (key == "format" and isinstance(value, str) and value not in _FORMATS)
    }


def _enforced_part(key: str, value: Any) -> Any:
    if key in _DATA:
        return value
    if key in _NAMED and isinstance(value, Mapping):
        return {name: _enforced(part) for name, part in value.items()}
    return _enforced(value)
