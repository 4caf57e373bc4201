"""Random sequences of calls, and the few of them that are enough to fail.

Hypothesis draws a seed, stores it if it fails, and prints it. The calls are drawn from it here
and not by Hypothesis, whose examples are mostly short, and variants of one another: of 100
there were 20 different ones, hardly any of which came to what is rare. See `Exercised`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from hypothesis import Phase, note, settings
from hypothesis import strategies as st

Call = TypeVar("Call")

# Of the profile: a running test has settings of its own.
PHASES = settings().phases
SEEDS = st.integers(0, 2**63)
MAX_TRIES = 150


def scenarios(count: int) -> settings:
    """That many scenarios; of a seed there is nothing to shrink."""
    phases = [x for x in PHASES if x not in (Phase.target, Phase.shrink)]
    return settings(max_examples=count, phases=phases)


def check(run: Callable[[Sequence[Call]], None], calls: Sequence[Call]) -> None:
    """Run the calls. If that raises, print and raise what as few of them as possible do."""
    try:
        run(calls)
    except Exception:
        if Phase.shrink not in PHASES:
            raise
        fewest = _fewest(run, calls)
        note("calls:\n" + "\n".join(f"    {call}" for call in fewest))
        run(fewest)
        raise  # those passed, so the outcome depends on something else


def _fewest(run: Callable[[Sequence[Call]], None], calls: Sequence[Call]) -> Sequence[Call]:
    """Remove ever smaller parts while the rest still raises."""
    tries, size = 0, len(calls) // 2
    while size and tries < MAX_TRIES:
        start = 0
        while start < len(calls) and tries < MAX_TRIES:
            fewer = [*calls[:start], *calls[start + size :]]
            tries += 1
            if _raises(run, fewer):
                calls = fewer
            else:
                start += size
        size //= 2
    return calls


def _raises(run: Callable[[Sequence[Call]], None], calls: Sequence[Call]) -> bool:
    try:
        run(calls)
    except Exception:
        return True
    return False
