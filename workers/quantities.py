"""Numbers, sizes and durations of settings: each as a number, or as text such as ``8GiB``.

A boolean is not a number, nor a number a boolean, and text is a number only if it reads as one
in a unit that is known; anything else is refused with the forms that are accepted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

MAX_WHOLE = (1 << 63) - 1
MAX_SECONDS = 1e9  # 31 years; longer waits overflow some clocks

_BYTE_UNITS: Mapping[str, Fraction] = {
    unit: Fraction(size)
    for power, prefix in enumerate("KMGT", 1)
    for unit, size in (
        (f"{prefix}B", 1000**power),
        (f"{prefix}i", 1024**power),
        (f"{prefix}iB", 1024**power),
    )
} | {"B": Fraction(1)}
_SECOND_UNITS: Mapping[str, Fraction] = {
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}
# Three digits of exponent cover every float, and keep exact arithmetic short.
_DIGITS = r"\d+(?:_\d+)*"
_NUMBER = rf"[+-]?(?:{_DIGITS}(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{{1,3}})?"
_AMOUNT = re.compile(rf"\s*({_NUMBER})\s*([A-Za-z]*)\s*", re.ASCII)


def reader_of(
    expected: str, units: Mapping[str, Fraction], *, whole: bool
) -> Callable[[object], object]:
    """A function that makes a number of a setting's value, for pydantic to check further.

    whole: fractions are refused, those of a larger unit rounded down
    The function raises ValueError, saying what was expected.
    """
    sizes = {unit.lower(): size for unit, size in units.items()} | {"": Fraction(1)}

    def read(value: object) -> int | float:
        amount, size = _amount(value, sizes)
        if amount is None or (whole and size == 1 and amount.denominator != 1):
            raise ValueError(f"must be {expected}")
        return math.floor(amount * size) if whole else _float(amount * size)

    return read


def _amount(value: object, sizes: Mapping[str, Fraction]) -> tuple[Fraction | None, Fraction]:
    """The number in a value, or None, and the size of its unit."""
    if isinstance(value, str):
        found = _AMOUNT.fullmatch(value)
        size = sizes.get(found[2].lower()) if found else None
        return (Fraction(found[1]), size) if found and size else (None, Fraction(1))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, Fraction(1)
    if isinstance(value, float) and not math.isfinite(value):  # it cannot be asked of all ints
        return None, Fraction(1)
    return Fraction(value), Fraction(1)


def _float(amount: Fraction) -> float:
    try:
        return float(amount)
    except OverflowError:
        return math.inf if amount > 0 else -math.inf  # pydantic refuses it


def _pattern(units: Mapping[str, Fraction]) -> str:
    """Text that editors accept; the readers also ignore case and spaces around it."""
    return rf"^[+]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)? ?({'|'.join(units)})?$"


def _no_number(value: object) -> object:
    if not isinstance(value, bool | str):
        raise ValueError("must be true or false")
    return value


def _kind_of(value: object) -> str:
    """In brackets, so that it is no part of the path in an error."""
    return "[auto]" if value == AUTO else "[given]"


AUTO: Final = "auto"
Auto = Annotated[Literal["auto"], Tag("[auto]")]
Switch = Annotated[bool, BeforeValidator(_no_number)]
AutoSwitch = Annotated[Auto | Annotated[Switch, Tag("[given]")], Discriminator(_kind_of)]
WholeNumber = Annotated[
    int, Field(le=MAX_WHOLE), BeforeValidator(reader_of("a whole number", {}, whole=True))
]
_TOKEN_UNITS: Mapping[str, Fraction] = {"k": Fraction(1 << 10), "M": Fraction(1 << 20)}
Tokens = Annotated[
    int,
    Field(ge=1, le=MAX_WHOLE),
    BeforeValidator(
        reader_of(
            "a whole number of tokens, or one with a unit: k (times 1024) or M (times 1024²)",
            _TOKEN_UNITS,
            whole=True,
        ),
        json_schema_input_type=Annotated[int, Field(ge=1)]
        | Annotated[str, Field(pattern=_pattern(_TOKEN_UNITS))],
    ),
]
# A number of things, at least one.
AutoCount = Annotated[
    Auto | Annotated[WholeNumber, Field(ge=1), Tag("[given]")], Discriminator(_kind_of)
]
Number = Annotated[
    float,
    Field(allow_inf_nan=False),
    BeforeValidator(reader_of("a finite number", {}, whole=False)),
]
Bytes = Annotated[
    int,
    Field(gt=0, le=MAX_WHOLE),
    BeforeValidator(
        reader_of(
            "a whole number of bytes, or one with a unit: B, KB, MB, GB, TB (powers of 1000), "
            "Ki, Mi, Gi, Ti or KiB, MiB, GiB, TiB (powers of 1024)",
            _BYTE_UNITS,
            whole=True,
        ),
        json_schema_input_type=Annotated[int, Field(gt=0)]
        | Annotated[str, Field(pattern=_pattern(_BYTE_UNITS))],
    ),
]
Seconds = Annotated[
    float,
    Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False),
    BeforeValidator(
        reader_of(
            "a finite number of seconds, or one with a unit: ms, s, m, h or d",
            _SECOND_UNITS,
            whole=False,
        ),
        json_schema_input_type=Annotated[float, Field(gt=0)]
        | Annotated[str, Field(pattern=_pattern(_SECOND_UNITS))],
    ),
]
