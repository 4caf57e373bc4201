"""The base of all settings, and what is wrong with values that are not valid ones.

Values come from files, the environment and Python. All that is wrong with them is reported at
once, each by the path of its setting, with what would be right.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kvmesh.workers.errors import ConfigError, ConfigErrors

_MAX_SHOWN_CHARS = 80
# What pydantic says in the terms of Python, in those of a configuration file.
_EXPECTED = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping",
    "model_attributes_type": "must be a mapping of settings",
    "model_type": "must be a mapping of settings",
    "path_type": "must be a path",
    "string_type": "must be text",
    "tuple_type": "must be a list",
}


class Settings(BaseModel):
    """Immutable settings. Unknown names are errors, and defaults are validated too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ConflictError(ValueError):
    """Raised by a validator: values that are valid, and not together.

    problems: with the whole paths of their fields
    """

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = tuple(problems)


def section_in(annotation: object) -> type[Settings] | None:
    """The settings in a field's annotation, such as those of a list's entries."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next(filter(None, map(section_in, typing.get_args(annotation))), None)


def paths_of(settings: type[Settings], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all settings that are not sections; lists and mappings are one setting."""
    for name, info in settings.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Settings):
            yield from paths_of(info.annotation, (*above, name))
        else:
            yield (*above, name)


def error_of(problems: Sequence[ConfigError]) -> ConfigError:
    """The error to raise for one or more problems."""
    return problems[0] if len(problems) == 1 else ConfigErrors(problems)


def problems_of(error: ValidationError, settings: type[Settings]) -> list[ConfigError]:
    """Everything that pydantic found in values for `settings`."""
    problems: list[ConfigError] = []
    for found in error.errors(include_url=False):
        cause = found.get("ctx", {}).get("error")
        if isinstance(cause, ConflictError):
            problems.extend(cause.problems)
            continue
        # In brackets pydantic names the kind of a value, which is not part of its path.
        path = [str(part) for part in found["loc"] if not str(part).startswith("[")]
        problems.append(ConfigError(".".join(path) or "config", _message(found, path, settings)))
    return problems


def _message(found: Mapping[str, Any], path: Sequence[str], settings: type[Settings]) -> str:
    match found["type"]:
        case "missing":
            return "is required"
        case "extra_forbidden":
            suggestion = suggest(path, settings)
            return "is not a setting; " + (
                f"did you mean {suggestion}?" if suggestion else "`kvmesh config` prints all"
            )
    message = str(found["msg"]).removeprefix("Value error, ")
    # "Input should be ..." and "String should match ..." follow the name of the field.
    message = re.sub(r"^\w+ should ", "must ", message)
    message = _EXPECTED.get(found["type"], f"{message[0].lower()}{message[1:]}")
    return f"{message}, got {shown(found['input'])}"


def shown(value: object) -> str:
    """A value as in YAML, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[: _MAX_SHOWN_CHARS - 1]}…"


def suggest(path: Sequence[str], settings: type[Settings]) -> str | None:
    """The setting that was probably meant by one that does not exist.

    It is in the same section, or has the same name in another one.
    """
    section = settings
    for part in path[:-1]:
        info = section.model_fields.get(part)
        section = (info and section_in(info.annotation)) or section
    name = path[-1].lower().replace("-", "_")
    if close := difflib.get_close_matches(name, section.model_fields, n=1, cutoff=0.5):
        return ".".join((*path[:-1], close[0]))
    known = list(paths_of(settings))
    elsewhere = {at[-1]: ".".join(at) for at in reversed(known)}  # the first of several
    close = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8)
    return elsewhere[close[0]] if close else None
