"""From counts and CPU times to figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def split_costs(
    per_token: float, tokens_a_request: int, per_request: float, tokens_a_short_request: int
) -> tuple[float, float]:
    """(of a token alone, of a request alone), in the unit of the arguments.

    per_token: all costs over all tokens, of requests of `tokens_a_request`
    per_request: all costs over all requests, of those of `tokens_a_short_request`

        per_token   = token + request / tokens_a_request
        per_request = request + token × tokens_a_short_request
    """
    if tokens_a_short_request >= tokens_a_request:
        raise ValueError(
            f"short requests must be shorter than the others, "
            f"got {tokens_a_short_request} and {tokens_a_request} tokens"
        )
    share = tokens_a_short_request / tokens_a_request
    request = (per_request - tokens_a_short_request * per_token) / (1 - share)
    return per_token - request / tokens_a_request, request


def medians(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each number in nested mappings, over the rounds that have it."""
    combined: dict[str, Any] = {}
    for key in dict.fromkeys(key for each in rounds for key in each):
        values = [each[key] for each in rounds if key in each]
        nested = isinstance(values[0], Mapping)
        combined[key] = medians(values) if nested else statistics.median(values)
    return combined


def ratios(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Median over rounds of ours / theirs, for each number that both have and is not 0."""
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
