"""Sizes in bytes: a number, or a string with a unit."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}


def parse_bytes(value: object) -> object:
    """A string such as ``512MiB`` in bytes; other types are left to pydantic."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError("must be a number of bytes, or one with a unit such as 512MiB or 8GB")
    return int(float(match[1]) * unit)


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
