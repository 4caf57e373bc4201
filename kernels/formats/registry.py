"""Every KV format by name. A new one is one line here, plus a folder if its encoding is new.

Those to serve have kernels for GPUs and compiled loops for CPUs. Those to compare with have plain
torch alone: they are served and evaluated by name, slowly (`formats/comparison`).
"""

from __future__ import annotations

import difflib
from dataclasses import replace

from kvmesh.kernels.formats.affine.side import Affine
from kvmesh.kernels.formats.base import InKeys, KVFormat, Side
from kvmesh.kernels.formats.codebook.side import Codebook
from kvmesh.kernels.formats.comparison.grouped.side import Grouped
from kvmesh.kernels.formats.comparison.nuq.side import NonUniform
from kvmesh.kernels.formats.comparison.static8.side import Static8
from kvmesh.kernels.formats.comparison.turboquant.side import LloydMax
from kvmesh.kernels.formats.exact.side import Exact
from kvmesh.kernels.formats.fp8.side import Fp8

DEFAULT = "default"
# What `default` means: the first of these that can store a model's pages. It is that of few bits
# which costs the model on which it is worst the least (docs/kv_formats.md).
DEFAULTS = ("k8v4", "int8")


def _channels(width: int) -> Side:
    """Keys on a grid per channel and page, fitted by least squares."""
    return Affine(width, along="channel", fit="least_squares", scale="e5m3")


def _rotated(width: int) -> Side:
    """Rotated values: on a grid per token, or below 4 bits on unbiased uniform levels."""
    if width >= 4:
        return Affine(width, fit="least_squares", scale="e5m3", rotated=True, values=True)
    return Codebook(width, scale="e5m3", rotated=True, values=True)


_SERVED: tuple[KVFormat, ...] = (
    KVFormat(
        "exact",
        Exact(),
        Exact(values=True),
        "the compute dtype, unquantised",
        aliases=("0", "none", "auto"),
    ),
    KVFormat(
        "int8",
        Affine(8),
        Affine(8, values=True),
        "one grid per token and head, like LMDeploy's policy 8",
        aliases=("8",),
    ),
    KVFormat(
        "fp8",
        Fp8(centred=True),
        Fp8(values=True),
        "e4m3, one scale per page and head, centred keys",
    ),
    *(
        KVFormat(
            name,
            _channels(k_width),
            _rotated(v_width),
            "keys on a grid per channel and page, rotated values",
            sink_pages=1,
            recent_pages=recent_pages,
            aliases=aliases,
        )
        for name, k_width, v_width, recent_pages, aliases in (
            ("k8v4", 8, 4, 1, (DEFAULT,)),
            ("k4v4", 4, 4, 2, ()),
            ("k4v2", 4, 2, 2, ("42",)),  # replaces LMDeploy's policy 42
            ("k3v2", 3, 2, 4, ()),
            ("k2v2", 2, 2, 4, ()),
        )
    ),
    KVFormat(
        "int4",
        Affine(4),
        Affine(4, values=True),
        "one grid per token and head, like LMDeploy's policy 4",
        aliases=("4",),
    ),
)

_COMPARISON: tuple[KVFormat, ...] = (
    KVFormat(
        "k3v3",
        _channels(3),
        _rotated(3),
        "like k4v2 at the same size, which is better",
        sink_pages=1,
        recent_pages=2,
        comparison=True,
    ),
    *(
        KVFormat(
            f"kivi{width}",
            Grouped(width, along="channel", run=32),
            Grouped(width, run=32, values=True),
            "KIVI: keys per channel and 32 tokens, values per token and 32 channels",
            recent_pages=2,
            comparison=True,
        )
        for width in (4, 2)
    ),
    *(
        KVFormat(
            f"{name}{width}",
            Grouped(width, fit=fit),
            Grouped(width, fit=fit, values=True),
            summary,
            recent_pages=2,
            comparison=True,
        )
        for name, fit, summary in (
            ("g64-int", "range", "one grid per token and 64 channels, like transformers' Quanto"),
            ("g64-hqq", "half_quadratic", "the same grid, fitted like transformers' HQQ cache"),
        )
        for width in (4, 2)
    ),
    *(
        KVFormat(
            f"nuq{width}",
            NonUniform(width),
            NonUniform(width, values=True),
            "KVQuant: calibrated levels, separate outliers, keys before RoPE",
            sink_pages=1,
            comparison=True,
        )
        for width in (4, 3, 2)
    ),
    KVFormat(
        "int8-static",
        Static8(),
        Static8(values=True),
        "calibrated ranges per head and channel",
        comparison=True,
    ),
    KVFormat(
        "int8-static-layer",
        Static8(per="layer"),
        Static8(per="layer", values=True),
        "LMDeploy's offline int8: calibrated ranges per layer",
        comparison=True,
    ),
    KVFormat(
        "turboquant-sign",
        LloydMax(3, residual="sign", rotated=True),
        LloydMax(2, rotated=True, values=True),
        "LMDeploy's policy 42: 3-bit levels and a residual sign",
        comparison=True,
    ),
    KVFormat(
        "turboquant-qjl",
        LloydMax(3, residual="qjl", rotated=True),
        LloydMax(2, rotated=True, values=True),
        "TurboQuant as published: 3-bit levels and a projected residual sign",
        comparison=True,
    ),
)
_FORMATS = (*_SERVED, *_COMPARISON)

_BY_NAME: dict[str, KVFormat] = {name: fmt for fmt in _FORMATS for name in (fmt.name, *fmt.aliases)}


def format_names(*, comparison: bool = True) -> tuple[str, ...]:
    """The formats' own names, in the registry's order; with those for comparison, or without."""
    return tuple(fmt.name for fmt in (_FORMATS if comparison else _SERVED))


def format_of_model(fmt: KVFormat, values_in_keys: int) -> KVFormat:
    """The format for pages of a model in whose keys the first so many channels are their values,
    which its keys' side then stores; the format itself for 0.

    Raises ValueError naming those that can store such pages.
    """
    if fmt.values_in_keys == values_in_keys:
        return fmt
    if not fmt.treats_sides_alike:
        usable = ", ".join(other.name for other in _FORMATS if other.treats_sides_alike)
        raise ValueError(
            f"{fmt.name} stores keys and values differently, and this model's values are a part "
            f"of its keys (latent attention); use one of {usable}"
        )
    return replace(fmt, v=InKeys(channels=values_in_keys, values=True))


def format_of_name(name: str | int, values_in_keys: int) -> KVFormat:
    """The format that a name means for a model, see `format_of_model`.

    Raises ValueError for a name that is not known, or a format that cannot store the pages.
    """
    if str(name).strip().lower() != DEFAULT:
        return format_of_model(get_format(name), values_in_keys)
    formats = [get_format(each) for each in DEFAULTS]
    possible = [fmt for fmt in formats if fmt.treats_sides_alike or not values_in_keys]
    return format_of_model(possible[0], values_in_keys)


def get_format(name: str | int) -> KVFormat:
    """The format with that name or alias; LMDeploy's policy numbers may be ints.

    Raises ValueError listing the known names.
    """
    fmt = _BY_NAME.get(str(name).strip().lower())
    if fmt is None:
        similar = similar_format(name)
        hint = f", did you mean {similar}?" if similar else ","
        raise ValueError(
            f"kv format: {name!r} is not known{hint} expected one of {', '.join(format_names())}"
        )
    return fmt


def is_for_comparison(name: str) -> bool:
    """Whether a format of that name is known and is slow, because plain torch reads its pages."""
    return name in _BY_NAME and _BY_NAME[name].comparison


def similar_format(name: object) -> str | None:
    """The format that a name probably means that is not known."""
    known = [*format_names(), *(x for x in _BY_NAME if not x.isdigit())]
    close = difflib.get_close_matches(str(name).strip().lower(), known, n=1, cutoff=0.6)
    return _BY_NAME[close[0]].name if close else None
