"""What callers may give an LLM: one of something or several, options, settings."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from numbers import Integral
from pathlib import Path
from typing import Any, Final, TypeVar

from kvmesh.client.errors import InvalidRequestError
from kvmesh.client.options import Message
from kvmesh.cluster.config import ClusterConfig, build
from kvmesh.cluster.config_file import read_file
from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.errors import ConfigError, ConfigErrors
from kvmesh.workers.settings import error_of

L = TypeVar("L")
R = TypeVar("R")

# LMDeploy's numbers for KV caches, which are aliases of formats (kernels/formats/registry.py).
QUANT_POLICIES: Final = (0, 4, 8, 42)
# Of a configuration, what only a cluster of several groups has.
_OF_GROUPS: Final = ("groups", "autoscaling")


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return isinstance(_first(prompt), Message | Mapping)


def is_one(prompts: Any) -> bool:
    """Whether this is a single prompt: a text, token ids, or messages; otherwise several.

    Nothing at all is several: no prompts.
    """
    return isinstance(prompts, str | bytes | Mapping) or isinstance(
        _first(prompts), Message | Mapping | Integral
    )


def _first(values: Any) -> Any:
    """The first of them, if they can be iterated over again."""
    if isinstance(values, Sized) and isinstance(values, Iterable):
        return next(iter(values), None)
    return None


def several(name: str, values: Any) -> Iterable[Any]:
    """Raises InvalidRequestError, naming the argument, for what cannot be iterated over."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        what = "SamplingParams, for all or for each" if name == "sampling_params" else "a list"
        raise InvalidRequestError.of(name, f"must be {what}; got {values!r:.60}")
    return values


def pairs(name: str, left: Iterable[L], right: Iterable[R]) -> Iterator[tuple[L, R]]:
    """Each with its own. Raises InvalidRequestError if there are not as many: at once if both have
    a length, otherwise after the last pair. name: of the argument that has `right`
    """
    wrong = InvalidRequestError.of(name, "must be as many as the prompts")
    if isinstance(left, Sized) and isinstance(right, Sized) and len(left) != len(right):
        raise InvalidRequestError.of(
            name, f"must be as many as the prompts, {len(left):,}; got {len(right):,}"
        )

    def zipped() -> Iterator[tuple[L, R]]:
        others = iter(right)
        for one in left:
            try:
                yield one, next(others)
            except StopIteration:
                raise wrong from None
        if next(others, None) is not None:
            raise wrong

    return zipped()


def merged(params: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a generation, by name. Raises InvalidRequestError for params that are none."""
    if params is not None and not isinstance(params, Mapping):
        raise InvalidRequestError.of(
            "sampling_params", f"must be kvmesh.SamplingParams(...); got {params!r:.60}"
        )
    return {**(params or {}), **options}


def offline_config(
    config: str | os.PathLike[str] | Mapping[str, Any] | None,
    model: str | os.PathLike[str] | None,
    kv_format: str | int | None,
    quant_policy: int | None,
    settings: Mapping[str, Any],
) -> ClusterConfig:
    """The settings of an LLM; see there. Raises ConfigError."""
    engine = {name: value for name, value in settings.items() if value is not None}
    chosen = _format(kv_format, quant_policy)
    if chosen is not None:
        engine["kv_format"] = chosen
    values = _values(config)
    if model is not None:
        values["model"] = os.fspath(model)
    base = values.get("engine") or {}
    values["engine"] = {**base, **engine} if isinstance(base, Mapping) else base
    for name in _OF_GROUPS:
        values.pop(name, None)
    try:
        return build(values)
    except ConfigError as error:
        problems = error.problems if isinstance(error, ConfigErrors) else (error,)
        raise error_of([_as_argument(x, engine) for x in problems]) from None


def _format(kv_format: str | int | None, quant_policy: int | None) -> str | int | None:
    if quant_policy is None:
        return kv_format
    if kv_format is not None:
        raise ConfigError("quant_policy", "cannot be combined with kv_format, which says the same")
    if type(quant_policy) is not int or quant_policy not in QUANT_POLICIES:
        raise ConfigError(
            "quant_policy",
            f"must be 0, 4, 8 or 42, as LMDeploy has it; got {quant_policy!r}. "
            "kv_format has all formats",
        )
    return get_format(quant_policy).name


def _values(config: str | os.PathLike[str] | Mapping[str, Any] | None) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    file = read_file(Path(config))
    if file.problems:
        raise error_of(file.problems)
    return file.values


def _as_argument(problem: ConfigError, arguments: Iterable[str]) -> ConfigError:
    """A problem with a setting of the engine by the name of the argument that set it."""
    name = problem.field.removeprefix("engine.")
    message = problem.message.replace("did you mean engine.", "did you mean ")
    return ConfigError(name, message) if name in arguments else problem
