"""What property tests have exercised: counted, required, and shown at the end of a run.

A property holds trivially while what it is about never happens. So a property test counts
that, and fails if a whole run has seen too little of it:

    SEEN = Exercised("engine", {"prefix hits": 300, "preemptions": 100})

    @SEEN.required
    @given(...)
    def test_output_depends_on_the_prompt_alone(...):
        ...
        SEEN.add("prefix hits")
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import ClassVar, ParamSpec

import hypothesis
from hypothesis import currently_in_test_context

P = ParamSpec("P")


class Exercised:
    """Counts of one property test.

    name: of the property, for the summary
    floors: event -> how often a run must see it at least. Far below what runs usually see; 0 for
        what is shown, but too rare to be required of every run
    """

    all: ClassVar[list[Exercised]] = []

    def __init__(self, name: str, floors: Mapping[str, int]) -> None:
        self.name = name
        self.floors = floors
        self.counts: Counter[str] = Counter()
        self.all.append(self)

    def add(self, event: str, times: int = 1) -> None:
        """Raises KeyError for an event without a floor."""
        assert self.floors[event] >= 0
        self.counts[event] += times
        if times and currently_in_test_context():
            hypothesis.event(event)  # for --hypothesis-show-statistics

    def required(self, test: Callable[P, None]) -> Callable[P, None]:
        """The test, followed by a check that it has seen enough.

        By chance one run may see too little of what is rare; then there are two more.
        """

        @functools.wraps(test)
        def checked(*args: P.args, **kwargs: P.kwargs) -> None:
            self.counts.clear()
            for _ in range(3):
                test(*args, **kwargs)
                if not self.missing():
                    break
            rare = {event: self.counts[event] for event in self.missing()}
            assert not rare, f"happened too rarely: {rare}, expected at least {dict(self.floors)}"

        return checked

    def missing(self) -> list[str]:
        return [event for event, floor in self.floors.items() if self.counts[event] < floor]

    @classmethod
    def shown(cls) -> list[str]:
        """A line for each test that has run."""
        return [str(exercised) for exercised in cls.all if exercised.counts]

    def __str__(self) -> str:
        counts = (f"{self.counts[event]:,} {event}" for event in self.floors)
        return f"{self.name}: {', '.join(counts)}"
