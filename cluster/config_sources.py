"""Where settings come from: a file, the environment, `--set` and flags, later ones first.

The same setting has one name in all of them: `engine.tp`, in a file `tp` below `engine`, in the
environment KVMESH_ENGINE__TP, on the command line `--set engine.tp=2`.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from kvmesh.cluster.config import ClusterConfig, build
from kvmesh.cluster.config_file import parse_value, read_file
from kvmesh.workers.errors import ConfigError, ConfigErrors
from kvmesh.workers.settings import error_of, paths_of, shown

PREFIX = "KVMESH_"
DEFAULT = "default"

SettingPath: TypeAlias = tuple[str, ...]
# The flag's name, the setting's path and its value.
Flag: TypeAlias = tuple[str, str, Any]


def _holds_entries(annotation: object) -> bool:
    """Whether a setting is a list or a mapping, whose entries have paths of their own."""
    return typing.get_origin(annotation) in (dict, tuple) or any(
        map(_holds_entries, typing.get_args(annotation))
    )


def _annotation(path: SettingPath) -> object:
    annotation: Any = ClusterConfig
    for part in path:
        annotation = annotation.model_fields[part].annotation
    return annotation


# The version is that of a file's format, so that only a file has one.
_PATHS: Final = [path for path in paths_of(ClusterConfig) if path != ("version",)]
_SECTIONS: Final = {path[:depth] for path in _PATHS for depth in range(1, len(path))}
VARIABLES: Final[Mapping[str, SettingPath]] = {
    PREFIX + "__".join(path).upper(): path for path in _PATHS
}


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration, and where each value comes from.

    sources: by path, e.g. "kvmesh.yaml:3", "KVMESH_GROUPS", "--set"; defaults are not in it
    """

    config: ClusterConfig
    sources: Mapping[SettingPath, str]

    def source(self, path: SettingPath) -> str:
        return _source_of(path, self.sources) or DEFAULT


def load(
    path: Path | None = None,
    *,
    environ: Mapping[str, str],
    sets: Sequence[str] = (),
    flags: Iterable[Flag] = (),
) -> LoadedConfig:
    """Read all sources; each overrides those before it, setting by setting.

    path: a YAML file, or None
    sets: arguments of `--set`, SETTING=VALUE
    flags: those with the value None are not set
    Raises ConfigError naming the setting or the source; ConfigErrors if several are wrong.
    """
    layers = _Layers()
    if path is not None:
        file = read_file(path)
        layers.problems += file.problems
        layers.put((), file.values, lambda at: f"{path}:{file.lines.get(at, 1)}")
    for name, text in sorted(environ.items()):
        if text and name.startswith(PREFIX):
            layers.put_variable(name, text)
    for argument in sets:
        layers.put_argument(argument)
    for name, dotted, value in flags:
        if value is not None:
            layers.put(tuple(dotted.split(".")), value, _always(name))
    return LoadedConfig(layers.build(), layers.sources)


class _Layers:
    """Values so far, where they came from, and what is wrong with the sources themselves."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[SettingPath, str] = {}
        self.problems: list[ConfigError] = []

    def put_variable(self, name: str, text: str) -> None:
        path = _path_of(name)
        if path is not None:
            self._put_text(path, text, name)
        elif "__" in name:
            close = difflib.get_close_matches(name.upper(), VARIABLES, n=1, cutoff=0.8)
            hint = f"did you mean {close[0]}?" if close else "`kvmesh config` prints all"
            self.problems.append(ConfigError(name, f"is not a setting; {hint}"))

    def put_argument(self, argument: str) -> None:
        dotted, equals, text = argument.partition("=")
        if not equals or not dotted.strip():
            self.problems.append(
                ConfigError("--set", f"must be SETTING=VALUE, e.g. engine.tp=2; got {argument!r}")
            )
            return
        self._put_text(tuple(dotted.strip().split(".")), text, "--set")

    def _put_text(self, path: SettingPath, text: str, source: str) -> None:
        try:
            self.put(path, parse_value(text), _always(source))
        except ValueError as error:
            self.problems.append(ConfigError(".".join(path), f"{error} ({source})"))

    def put(self, path: SettingPath, value: Any, source: Callable[[SettingPath], str]) -> None:
        """Set a value; mappings are merged with what is there, all else replaces it."""
        if isinstance(value, Mapping) and (value or path in _SECTIONS or not path):
            for key, inner in value.items():
                self.put((*path, key), inner, source)
        elif value is not None or path not in _SECTIONS:  # a section of comments alone is None
            holder = self._holder(path)
            if holder is None:
                return
            if path[-1] in holder:
                self.sources = {at: x for at, x in self.sources.items() if at[: len(path)] != path}
            holder[path[-1]] = value
            self.sources[path] = source(path)
            self.sources |= {at: source(at) for at in _within(path, value)}

    def _holder(self, path: SettingPath) -> dict[str, Any] | None:
        """The mapping that a setting is in; None if there is none, and that is a problem."""
        at: Any = self.values
        for depth, part in enumerate(path):
            if isinstance(at, list) and part.isdecimal() and int(part) < len(at):
                at = at[int(part)]
            elif not isinstance(at, dict):
                problem = f"has no entry {part!r}: it is {shown(at)}"
                self.problems.append(ConfigError(".".join(path[:depth]), problem))
                return None
            elif depth < len(path) - 1:
                at = at.setdefault(part, {})
            else:
                return at
        self.problems.append(ConfigError(".".join(path), "must be a mapping of settings"))
        return None

    def build(self) -> ClusterConfig:
        """Raises ConfigError with all problems."""
        try:
            config = build(self.values)
        except ConfigError as error:
            found = error.problems if isinstance(error, ConfigErrors) else (error,)
            known = {problem.field for problem in self.problems}
            self.problems += [self._located(x) for x in found if x.field not in known]
        if self.problems:
            raise error_of(self.problems)
        return config

    def _located(self, problem: ConfigError) -> ConfigError:
        source = _source_of(tuple(problem.field.split(".")), self.sources)
        return ConfigError(problem.field, problem.message + (f" ({source})" if source else ""))


def _path_of(name: str) -> SettingPath | None:
    """The setting that a variable names; below a list or a mapping, the entry as it is written."""
    if name in VARIABLES:
        return VARIABLES[name]
    for variable, path in VARIABLES.items():
        rest = name.removeprefix(f"{variable}__")
        if rest != name and _holds_entries(_annotation(path)):
            entry, *inner = rest.split("__")
            return (*path, entry, *map(str.lower, inner))
    return None


def _source_of(path: SettingPath, sources: Mapping[SettingPath, str]) -> str | None:
    """That of the setting or, for a part of a list or mapping, of what it is in."""
    return next((sources[path[:n]] for n in range(len(path), 0, -1) if path[:n] in sources), None)


def _within(path: SettingPath, value: Any) -> Iterator[SettingPath]:
    """The paths of everything in a list."""
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(value, list):
        items = ((str(index), x) for index, x in enumerate(value))
    elif isinstance(value, dict):
        items = value.items()
    for key, inner in items:
        yield (*path, key)
        yield from _within((*path, key), inner)


def _always(source: str) -> Callable[[SettingPath], str]:
    return lambda _: source
