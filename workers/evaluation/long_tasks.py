"""Tasks for long contexts with answers that can be checked, drawn from a seed.

After RULER (Hsieh et al., arXiv 2404.06654), in words of our own: what is to be found is among
plain sentences, or in a long list. A task makes a text of any number of units, so that a prompt can
have any length; the facts do not depend on it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# fmt: off
_NAMES = (
    "amber", "basalt", "cedar", "delta", "ember", "fjord", "garnet", "harbor", "indigo",
    "jasper", "kelp", "lagoon", "maple", "nectar", "opal", "prairie", "quartz", "raven",
    "saffron", "tundra", "umber", "velvet", "willow", "zephyr",
)
_NOUNS = (
    "ferry", "bakery", "lantern", "orchard", "river", "market", "teacher", "wagon", "kitchen",
    "garden", "bridge", "letter", "window", "farmer", "station", "meadow", "violin", "basket",
    "tower", "village",
)
# fmt: on
_VERBS = ("passed", "reached", "left", "repaired", "watched", "described", "painted", "visited")
_PLACES = ("hill", "harbour", "mill", "square", "forest", "road", "church", "lake", "school")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True, slots=True)
class TaskText:
    """body: what is long; question: asked after it; lead: how the answer begins
    answers: texts that the output must have, all of them, in any order"""

    body: str
    question: str
    lead: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LongTask:
    """make: a text of that many units, the same for the same state of the generator
    output_tokens: that an answer may take"""

    name: str
    output_tokens: int
    make: Callable[[random.Random, int], TaskText]


def _sentence(draw: random.Random) -> str:
    noun, other = draw.choice(_NOUNS), draw.choice(_NOUNS)
    return f"The {noun} {draw.choice(_VERBS)} the {other} near the {draw.choice(_PLACES)}."


def _among(draw: random.Random, facts: Sequence[str], units: int) -> str:
    """The facts, in order, at random places between as many plain sentences."""
    places = sorted(draw.randrange(units + 1) for _ in facts)
    parts: list[str] = []
    for index in range(units + 1):
        while places and places[0] == index:
            parts.append(facts[len(facts) - len(places)])
            places.pop(0)
        if index < units:
            parts.append(_sentence(draw))
    return " ".join(parts)


def _numbers(draw: random.Random, count: int) -> list[str]:
    return [str(number) for number in draw.sample(range(10_000, 100_000), count)]


def _one_key_of_many(draw: random.Random, units: int) -> TaskText:
    """As multi-key needles: 16 records alike, one of which is asked for."""
    names, numbers = draw.sample(_NAMES, 16), _numbers(draw, 16)
    wanted = draw.randrange(16)
    facts = [
        f"The access code of {name} is {number}."
        for name, number in zip(names, numbers, strict=True)
    ]
    return TaskText(
        _among(draw, facts, units),
        f"What is the access code of {names[wanted]}?",
        f"The access code of {names[wanted]} is",
        (numbers[wanted],),
    )


def _all_values_of_a_key(draw: random.Random, units: int) -> TaskText:
    """As multi-value needles: four records of one name, among those of others."""
    name, *others = draw.sample(_NAMES, 5)
    numbers = _numbers(draw, 8)
    facts = [f"A locker that belongs to {name} is {number}." for number in numbers[:4]]
    facts += [
        f"A locker that belongs to {other} is {number}."
        for other, number in zip(others, numbers[4:], strict=True)
    ]
    draw.shuffle(facts)
    return TaskText(
        _among(draw, facts, units),
        f"Which four lockers belong to {name}?",
        f"The four lockers that belong to {name} are",
        tuple(numbers[:4]),
    )


def _variables(draw: random.Random, units: int) -> TaskText:
    """As variable tracking: chains of assignments, and which variables have the first value."""
    letters = draw.sample([a + b for a in "ABCDEFGH" for b in "KLMNPQRS"], 12)
    values = _numbers(draw, 3)
    chains = [letters[:4], letters[4:8], letters[8:]]
    facts: list[list[str]] = []
    for chain, value in zip(chains, values, strict=True):
        facts.append([f"Variable {chain[0]} is set to {value}."])
        facts[-1] += [
            f"Variable {name} is set to the value of variable {before}."
            for before, name in itertools.pairwise(chain)
        ]
    # Mixed, while each chain stays in order.
    turns = draw.sample([0, 1, 2] * 4, 12)
    mixed = [facts[turn].pop(0) for turn in turns]
    return TaskText(
        _among(draw, mixed, units),
        f"Which four variables have the value {values[0]}?",
        f"The four variables with the value {values[0]} are",
        tuple(chains[0]),
    )


def _common_words(draw: random.Random, units: int) -> TaskText:
    """As common words: of a list, those that come ten times as often as the others."""
    names = draw.sample(_NAMES, len(_NAMES))
    common = names[:3]
    round_of = common * 10 + names[3:]  # 51 words
    words = (round_of * (units // len(round_of) + 1))[:units]
    draw.shuffle(words)
    return TaskText(
        " ".join(f"{index}. {word}" for index, word in enumerate(words, 1)),
        "Which three words come most often in the list above?",
        "The three words that come most often are",
        tuple(common),
    )


def _frequent_words(draw: random.Random, units: int) -> TaskText:
    """As frequent words: of made-up words, whose frequencies fall as 1 / rank², the first three."""
    made: dict[str, None] = {}
    while len(made) < 40:
        syllables = (draw.choice(_CONSONANTS) + draw.choice(_VOWELS) for _ in range(3))
        made["".join(syllables)] = None
    words = list(made)
    weights = [1 / rank**2 for rank in range(1, len(words) + 1)]
    counts = [int(units * weight / sum(weights)) for weight in weights]
    counts[0] += units - sum(counts)
    text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    draw.shuffle(text)
    return TaskText(
        " ".join(text),
        "Which three words come most often in the text above?",
        "The three words that come most often are",
        tuple(words[:3]),
    )


LONG_TASKS = {
    task.name: task
    for task in (
        LongTask("multi-key", 12, _one_key_of_many),
        LongTask("multi-value", 40, _all_values_of_a_key),
        LongTask("variables", 32, _variables),
        LongTask("common-words", 24, _common_words),
        LongTask("frequent-words", 32, _frequent_words),
    )
}
