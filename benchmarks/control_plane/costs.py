"""Arithmetic on counts and CPU times."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def split_costs(
    per_token: float, tokens_per_request: int, per_request: float, tokens_per_short_request: int
) -> tuple[float, float]:
    """The cost of a token without its request, and of a request without its tokens.

    per_token: total cost / tokens, measured with requests of `tokens_per_request`
    per_request: total cost / requests, measured with requests of `tokens_per_short_request`

        per_token   = token + request / tokens_per_request
        per_request = request + token × tokens_per_short_request
    """
    if tokens_per_short_request >= tokens_per_request:
        raise ValueError(
            f"tokens_per_short_request must be less than tokens_per_request "
            f"({tokens_per_request}), got {tokens_per_short_request}"
        )
    share = tokens_per_short_request / tokens_per_request
    request = (per_request - tokens_per_short_request * per_token) / (1 - share)
    return per_token - request / tokens_per_request, request


def medians(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of each number in nested mappings, over the rounds that have it."""
    combined: dict[str, Any] = {}
    for key in dict.fromkeys(key for each in rounds for key in each):
        values = [each[key] for each in rounds if key in each]
        nested = isinstance(values[0], Mapping)
        combined[key] = medians(values) if nested else statistics.median(values)
    return combined


def ratios(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Median over rounds of ours / theirs, for each number that both have and that is not 0."""
    return medians([_divide(a, b) for a, b in zip(ours, theirs, strict=True)])


def _divide(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    quotients: dict[str, Any] = {}
    for key, value in ours.items():
        other = theirs.get(key)
        if isinstance(value, Mapping):
            quotients[key] = _divide(value, other or {})
        elif other:
            quotients[key] = value / other
    return quotients


def rounded(figures: Mapping[str, Any], digits: int = 4) -> dict[str, Any]:
    """The same with `digits` significant digits."""
    return {
        key: rounded(value, digits)
        if isinstance(value, Mapping)
        else float(f"{value:.{digits}g}")
        if isinstance(value, float)
        else value
        for key, value in figures.items()
    }
