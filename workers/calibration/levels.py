"""Optimal levels of a quantiser for weighted numbers: one-dimensional k-means, solved exactly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Numbers in the same of this many bins over their range are treated as equal.
_BINS = 1024

Floats = npt.NDArray[np.float64]


def best_levels(numbers: Floats, weights: Floats, count: int) -> Floats:
    """The `count` levels with the smallest weighted squared error, [count], ascending.

    numbers, weights: [n]; weights ≥ 0
    In one dimension clusters are intervals, so dynamic programming finds the global optimum,
    independent of any initialisation (Wu 1991; Wang & Song, Ckmeans.1d.dp, 2011).
    """
    if not weights.sum() > 0.0:
        weights = np.ones_like(numbers)
    low, high = numbers.min(), numbers.max()
    bins = np.clip((numbers - low) * (_BINS / max(high - low, 1e-30)), 0, _BINS - 1).astype(int)
    moments = [np.bincount(bins, weights * numbers**power, minlength=_BINS) for power in range(3)]
    # Prefix sums over bins: the sums of an interval are differences.
    kept = moments[0] > 0.0
    sums: list[Floats] = [np.concatenate(([0.0], np.cumsum(x[kept]))) for x in moments]
    mass, first, second = sums
    starts = _intervals(mass, first, second, count)
    edges = np.append(starts, len(mass) - 1)
    levels = np.diff(first[edges]) / np.diff(mass[edges])
    # With fewer distinct numbers than levels, the last level is repeated.
    return np.concatenate((levels, np.full(count - len(levels), levels[-1])))


def _intervals(mass: Floats, first: Floats, second: Floats, count: int) -> npt.NDArray[np.int64]:
    """Where each of the optimal intervals of bins starts, from the prefix sums over bins."""
    size = len(mass) - 1
    count = min(count, size)
    # cost[i, j]: the error of one level for the bins [i, j); infinite unless i < j
    m, f, s = (x[None, :] - x[:, None] for x in (mass, first, second))
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(np.tri(size + 1, dtype=bool), np.inf, s - f * f / m)
    best = cost[0]
    choices = []
    for _ in range(count - 1):
        total = best[:, None] + cost
        choices.append(total.argmin(0))
        best = total.min(0)
    starts, end = [], size
    for choice in reversed(choices):
        end = int(choice[end])
        starts.append(end)
    return np.array([0, *reversed(starts)], dtype=np.int64)
