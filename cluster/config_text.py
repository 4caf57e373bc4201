"""Settings as text: the defaults with their documentation, those in effect with their sources,
and a JSON Schema for editors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import yaml

from kvmesh.cluster.config import ClusterConfig, GroupSection
from kvmesh.cluster.config_file import SettingsDumper
from kvmesh.cluster.config_sources import LoadedConfig, SettingPath
from kvmesh.workers.quantities import MAX_WHOLE
from kvmesh.workers.settings import Settings

Here: TypeAlias = Mapping[SettingPath, str | int | bool]

# pydantic leaves the limits of some numbers in its own terms.
_KEYWORDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}


def default_yaml() -> str:
    """The default configuration with comments; loading it gives the defaults."""
    return "\n".join(_documented(ClusterConfig(), indent=0)) + "\n"


def _documented(section: Settings, indent: int) -> Iterator[str]:
    pad = "  " * indent
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        yield f"{pad}# {info.description}"
        if isinstance(value, Settings):
            yield f"{pad}{name}:"
            yield from _documented(value, indent + 1)
        else:
            yield f"{pad}{name}: {_in_one_line(plain(value))}"


def effective_yaml(loaded: LoadedConfig, here: Here = MappingProxyType({})) -> str:
    """The configuration with the source of each value; loading it gives the same one.

    here: what a value that is `auto` is on this machine
    """
    return "\n".join(_with_sources(plain(loaded.config), (), loaded, here)) + "\n"


def _with_sources(
    values: dict[str, Any], path: SettingPath, loaded: LoadedConfig, here: Here
) -> Iterator[str]:
    pad = "  " * len(path)
    for name, value in values.items():
        at, key = (*path, name), f"{pad}{_in_one_line(name)}:"
        if value and isinstance(value, dict):
            yield key
            yield from _with_sources(value, at, loaded, here)
        elif value and isinstance(value, list):
            yield key
            for index, entry in enumerate(value):
                dash = f"{pad}  - "
                for line in _with_sources(entry, (*at, str(index)), loaded, here):
                    yield dash + line.removeprefix(f"{pad}    ")
                    dash = f"{pad}    "
                if not entry:
                    yield f"{dash}{{}}  # {loaded.source((*at, str(index)))}"
        else:
            found = f"; {_in_one_line(here[at])} here" if at in here else ""
            yield f"{key} {_in_one_line(value)}  # {loaded.source(at)}{found}"


def plain(value: object) -> Any:
    """Settings as mappings, lists and scalars; of a group's, those that were set."""
    match value:
        case GroupSection():
            return {name: plain(getattr(value, name)) for name in sorted(value.model_fields_set)}
        case Settings():
            return {name: plain(inner) for name, inner in value}
        case dict():
            return {key: plain(inner) for key, inner in value.items()}
        case tuple():
            return [plain(inner) for inner in value]
        case Path():
            return str(value)
    return value


def changed(value: object) -> Any:
    """Like `plain`, without settings at their defaults; loading it gives the same settings."""
    match value:
        case GroupSection():
            return plain(value)
        case Settings():
            fields = type(value).model_fields.items()
            return {
                name: changed(inner)
                for name, info in fields
                if (inner := getattr(value, name)) != info.get_default(call_default_factory=True)
            }
        case tuple():
            return [changed(inner) for inner in value]
    return plain(value)


def block_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML that versions 1.1 and 1.2 read alike."""
    return str(yaml.dump(values, Dumper=SettingsDumper, sort_keys=False, allow_unicode=True))


def _in_one_line(value: object) -> str:
    text = yaml.dump(
        value,
        Dumper=SettingsDumper,
        default_flow_style=True,
        allow_unicode=True,
        width=float("inf"),
    )
    return str(text).removesuffix("...\n").strip()


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file."""
    schema = _standard(ClusterConfig.model_json_schema(mode="validation"))
    # An entry that sets nothing has the values of `engine`, not those defaults.
    for field in schema["$defs"]["GroupSection"]["properties"].values():
        field.pop("default", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _standard(schema: Any) -> Any:
    """A schema with the standard's keywords alone, and without what says nothing."""
    if isinstance(schema, list):
        return [_standard(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    numeric = schema.get("type") in ("integer", "number")
    return {
        _KEYWORDS.get(key, key): _standard(part)
        for key, part in schema.items()
        if (numeric or key not in _KEYWORDS)
        and part != MAX_WHOLE
        and not (key == "title" and isinstance(part, str))
    }
