"""Numbers, sizes and durations of settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from kvmesh.workers.quantities import (
    MAX_SECONDS,
    MAX_WHOLE,
    Bytes,
    Number,
    Seconds,
    Switch,
    Tokens,
    WholeNumber,
)


def read(kind: Any, value: object) -> Any:
    return TypeAdapter(kind).validate_python(value)


def refused(kind: Any, value: object) -> str:
    with pytest.raises(ValidationError) as caught:
        read(kind, value)
    return caught.value.errors()[0]["msg"]


@pytest.mark.parametrize(
    ("value", "size_bytes"),
    [
        (7, 7),
        (1e9, 10**9),
        ("7", 7),
        ("1e9", 10**9),
        ("1_000_000", 10**6),
        ("3b", 3),
        ("1KB", 1000),
        ("1kB", 1000),
        ("1Ki", 1024),
        ("1KiB", 1024),
        ("1kib", 1024),
        ("500MB", 500 * 10**6),
        ("500Mi", 500 << 20),
        ("500MiB", 500 << 20),
        ("8GB", 8 * 10**9),
        ("8Gi", 8 << 30),
        (" 8 GiB ", 8 << 30),
        ("2TB", 2 * 10**12),
        ("2Ti", 2 << 40),
        ("1.5 KiB", 1536),
        (".5Ki", 512),
        ("0.3GiB", 322122547),  # rounded down
        ("9007199254740993", 9007199254740993),  # more than a float holds
        (str(MAX_WHOLE), MAX_WHOLE),
    ],
)
def test_bytes(value: object, size_bytes: int) -> None:
    assert read(Bytes, value) == size_bytes


@pytest.mark.parametrize(
    "value",
    # A single letter means powers of 1000 to some, and of 1024 to others.
    [True, False, None, [], {}, "", "many", "8G", "8g", "8 GX", "1.5.2MiB", "8GiB8", "1__0",
     1.5, "1.5", "1.5B", math.nan, math.inf, "nan", "inf", "0x10", "٨"],
)  # fmt: skip
def test_what_is_no_size_is_refused_with_the_units(value: object) -> None:
    message = refused(Bytes, value)
    for unit in ("B", "KB", "MB", "GB", "TB", "1000", "Ki", "Mi", "Gi", "Ti", "KiB", "GiB", "1024"):
        assert unit in message


@pytest.mark.parametrize(
    "value", [0, -1, "-1GiB", "0", "0.0001Ki", MAX_WHOLE + 1, "1e999", "9e99TB"]
)
def test_sizes_have_a_range(value: object) -> None:
    assert "should be" in refused(Bytes, value)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (30, 30.0),
        (0.5, 0.5),
        ("30", 30.0),
        ("30s", 30.0),
        ("250ms", 0.25),
        ("5m", 300.0),
        ("1.5h", 5400.0),
        ("1 h", 3600.0),
        ("2d", 172800.0),
        ("1e3", 1000.0),
        (MAX_SECONDS, MAX_SECONDS),
    ],
)
def test_seconds(value: object, seconds: float) -> None:
    assert read(Seconds, value) == seconds


@pytest.mark.parametrize(
    "value", [True, None, "soon", "5 fortnights", "1h30m", "5min", math.nan, math.inf, ".inf"]
)
def test_what_is_no_duration_is_refused_with_the_units(value: object) -> None:
    assert refused(Seconds, value).endswith("one with a unit: ms, s, m, h or d")


@pytest.mark.parametrize("value", [0, -1, "-5m", "1e999", MAX_SECONDS * 2, "1e9d"])
def test_durations_have_a_range(value: object) -> None:
    assert "should be" in refused(Seconds, value)


def test_numbers() -> None:
    assert read(WholeNumber, "32") == read(WholeNumber, 32.0) == 32
    assert read(Number, "0.5") == read(Number, 0.5) == 0.5
    for value in (True, None, "many", "1.5", 1.5, math.inf, "2KB"):
        assert refused(WholeNumber, value) == "Value error, must be a whole number"
    for value in (True, None, "many", math.nan, -math.inf, "2KB"):
        assert refused(Number, value) == "Value error, must be a finite number"
    assert "finite" in refused(Number, "1e999")


def test_numbers_are_not_switches() -> None:
    assert [read(Switch, value) for value in (True, "true", "off", "no")] == [
        True,
        True,
        False,
        False,
    ]
    for value in (0, 1, 1.0, None):
        assert refused(Switch, value) == "Value error, must be true or false"


@pytest.mark.parametrize("kind", [Bytes, Tokens, WholeNumber, Number, Seconds])
def test_numbers_beyond_all_floats_are_refused(kind: Any) -> None:
    for value in (10**400, "1e999"):
        refused(kind, value)
