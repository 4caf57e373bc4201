"""Every KV format by name. Adding one is a folder and a line here."""

from __future__ import annotations

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.exact.format import EXACT
from kvmesh.kernels.formats.per_token.format import INT4, INT8

_FORMATS: tuple[KVFormat, ...] = (
    EXACT,
    INT8,
    INT4,
)

_BY_NAME: dict[str, KVFormat] = {name: fmt for fmt in _FORMATS for name in (fmt.name, *fmt.aliases)}


def format_names() -> tuple[str, ...]:
    """The formats' own names, in the registry's order."""
    return tuple(fmt.name for fmt in _FORMATS)


def get_format(name: str | int) -> KVFormat:
    """The format of that name or alias; LMDeploy's policy numbers work as numbers too.

    Raises ValueError that lists the names there are.
    """
    fmt = _BY_NAME.get(str(name).strip().lower())
    if fmt is None:
        raise ValueError(f"kv format: {name!r} is not known; there are {', '.join(format_names())}")
    return fmt
