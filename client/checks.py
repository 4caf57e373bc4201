"""Checks of arguments that several parts of the SDK take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from numbers import Real
from typing import Any, Final, TypeAlias

from kvmesh.client.errors import InvalidRequestError

# What the contract allows for a request's timeout_s.
MAX_SECONDS: Final = 30 * 24 * 3600

# Of a gRPC call: keys and values, in order.
Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]

_METADATA_KEY = re.compile("[0-9a-z_.-]+")


def check_seconds(name: str, value: object, *, zero: bool = False, none: bool = False) -> None:
    """Raise InvalidRequestError, naming the parameter, unless `value` is a number of seconds.

    zero: whether 0 is one
    none: whether None is allowed, for no limit
    """
    if none and value is None:
        return
    seconds: Any = value
    is_number = not isinstance(value, bool) and isinstance(value, Real)
    # Comparisons that are also false for NaN.
    if not (is_number and (seconds > 0 or (zero and seconds == 0)) and seconds <= MAX_SECONDS):
        expected = f"{'at least' if zero else 'above'} 0 and at most {MAX_SECONDS:,}"
        others = ", or None for no limit" if none else ""
        raise InvalidRequestError.of(
            name, f"expected a number of seconds, {expected}{others}; got {value!r:.60}"
        )


def check_metadata(values: Mapping[str, str | bytes]) -> Metadata:
    """`values` as gRPC takes them; raises InvalidRequestError, naming the key that it refuses."""
    if not isinstance(values, Mapping):
        raise InvalidRequestError.of(
            "metadata", f"expected a mapping from keys to values, got {values!r:.60}"
        )
    for key, value in values.items():
        if not isinstance(key, str) or not _METADATA_KEY.fullmatch(key):
            raise InvalidRequestError.of(
                "metadata", f"keys consist of lower-case letters, digits, _, . and -, not {key!r}"
            )
        name = f"metadata.{key}"
        if key == "authorization" or key.startswith("grpc-"):
            raise InvalidRequestError.of(name, "is set by the SDK; a key is given as api_key")
        if key.endswith("-bin"):
            if not isinstance(value, bytes):
                raise InvalidRequestError.of(name, f"expected bytes, got {value!r:.60}")
        elif not isinstance(value, str) or not all(" " <= letter <= "~" for letter in value):
            raise InvalidRequestError.of(name, f"expected printable ASCII, got {value!r:.60}")
    return tuple(values.items())
