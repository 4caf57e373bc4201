"""YAML files of settings, read strictly: every problem has its line, and no key counts twice.

Scalars are read by the rules of YAML 1.2: `off` and `no` are text, and 1e9 is a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from kvmesh.workers.errors import ConfigError

MAX_FILE_BYTES = 16 << 20
# Aliases may repeat a part of a file as often as this allows.
MAX_NODES = 100_000

_NULL, _BOOL, _INT, _FLOAT, _MERGE, _TEXT, _LIST, _MAP = (
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "merge", "str", "seq", "map")
)
# The core schema of YAML 1.2 (section 10.3.2), and merge keys, which it does not have.
SCALARS: Final = {
    _NULL: r"~|null|Null|NULL|",
    _BOOL: r"true|True|TRUE|false|False|FALSE",
    _INT: r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    _FLOAT: r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    _MERGE: r"<<",
}


class _Loader(yaml.SafeLoader):
    """Composes nodes whose scalars have the tags of YAML 1.2."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class SettingsDumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True


for _tag, _pattern in SCALARS.items():
    for _cls in (_Loader, SettingsDumper):
        _cls.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), None)


@dataclass(slots=True)
class SettingsFile:
    """What a file says.

    lines: by the path of a value, where it stands, counted from 1
    problems: keys that occur twice and the like; `values` has the rest
    """

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)
    problems: list[ConfigError] = field(default_factory=list)


def read_file(path: Path) -> SettingsFile:
    """Raises ConfigError if there are no settings to read."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError("config", f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError("config", f"cannot read {path}: line {line} is not UTF-8") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError("config", f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        node = yaml.compose(text, _Loader)
        if node is None:
            return SettingsFile()
        if not isinstance(node, yaml.MappingNode):
            if node.tag == _NULL:
                return SettingsFile()
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
            raise ConfigError("config", f"{path} must contain a mapping of settings, got {kind}")
        reader = _Reader(str(path))
        values = reader.mapping(node, ())
    except yaml.YAMLError as error:
        raise ConfigError("config", f"{path} is not valid YAML: {_in_one_line(error)}") from None
    except RecursionError:
        raise ConfigError("config", f"{path} is nested too deeply") from None
    return SettingsFile(values, reader.lines, reader.problems)


def parse_value(text: str) -> Any:
    """A value of the environment or the command line.

    null, and what begins like a list, a mapping or a quoted text, is YAML; all else is text as
    it stands, which settings read as a number where they expect one. Raises ValueError.
    """
    if re.fullmatch(SCALARS[_NULL], text):
        return None
    if not text.lstrip().startswith(("[", "{", '"', "'")):
        return text
    reader = _Reader("the value")
    try:
        value = reader.value(yaml.compose(text, _Loader), ())
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"is not valid YAML: {_in_one_line(error)}") from None
    if reader.problems:
        raise ValueError(str(reader.problems[0]))
    return value


def _in_one_line(error: Exception) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    context = f"{error.context}, " if error.context else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {context}{error.problem}"


class _Reader:
    """Makes values of nodes, and notes their lines and what is wrong.

    source: what is read, for messages
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self.lines: dict[tuple[str, ...], int] = {}
        self.problems: list[ConfigError] = []
        self._open: set[int] = set()  # the nodes around the current one
        self._visited = 0

    def value(self, node: yaml.Node | None, path: tuple[str, ...]) -> Any:
        if node is None:  # no document
            return None
        self._visited += 1
        if self._visited > MAX_NODES:
            raise _wrong(node, "aliases repeat too much")
        if id(node) in self._open:
            raise _wrong(node, "an alias is within what it repeats")
        self._open.add(id(node))
        try:
            return self._value(node, path)
        finally:
            self._open.remove(id(node))

    def _value(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        self.lines[path] = node.start_mark.line + 1
        match node:
            case yaml.MappingNode(tag=tag) if tag == _MAP:
                return self.mapping(node, path)
            case yaml.SequenceNode(tag=tag) if tag == _LIST:
                return [self.value(x, (*path, str(i))) for i, x in enumerate(node.value)]
            case yaml.ScalarNode():
                return _scalar(node)
        raise _wrong(node, f"the tag {node.tag} is not known")

    def mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Any]:
        """A mapping; what it merges counts less than its own keys."""
        values: dict[str, Any] = {}
        seen: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise _wrong(key_node, "a key must be a single word")
            if key_node.tag == _MERGE:
                merged.append(value_node)
                continue
            key = key_node.value
            if key in seen:
                self.problems.append(
                    ConfigError(
                        ".".join((*path, key)),
                        f"is set twice in {self._source}, on line {seen[key]} and on line {line}",
                    )
                )
                continue
            seen[key] = line
            values[key] = self.value(value_node, (*path, key))
            self.lines[(*path, key)] = line
        for source in merged:
            for key, value in self._merged(source, path):
                values.setdefault(key, value)
        return values

    def _merged(self, node: yaml.Node, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        """Keys and values of `<<: *name` or `<<: [*name, *name]`; earlier ones count more."""
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(source, yaml.MappingNode):
                raise _wrong(source, "<< merges mappings only")
            kept = dict(self.lines)
            yield from self.value(source, path).items()
            # Where a key has been set counts, and not where it would have been merged from.
            self.lines |= kept


def _scalar(node: yaml.ScalarNode) -> Any:
    make = _VALUES.get(node.tag)
    if make is None:
        raise _wrong(node, f"the tag {node.tag} is not known")
    if node.tag in SCALARS and not re.fullmatch(SCALARS[node.tag], node.value):
        raise _wrong(node, f"{node.value!r} does not fit the tag {node.tag}")
    return make(node.value)


def _whole(text: str) -> int | float:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    try:
        return int(text.removeprefix("0o"), base)
    except ValueError:  # more digits than Python converts
        return float(text)


_VALUES: Final[Mapping[str, Callable[[str], Any]]] = {
    _TEXT: str,
    _NULL: lambda text: None,
    _BOOL: lambda text: text.lower() == "true",
    _INT: _whole,
    _FLOAT: lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
}


def _wrong(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
