"""What happens to an engine in a property test: requests, steps, aborts, growth, time."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from kvmesh.workers.request import PinTerms
from kvmesh.workers.sampling_params import SamplingParams
from tests.workers.tainted_executor import BAD

PAGE = 16
CONTEXT = 11 * PAGE

# Prompts begin with some pages of a document, which many requests share.
DOCUMENTS = [[(3 * d + i * i) % BAD for i in range(5 * PAGE)] for d in range(3)]

# What a request may have besides a prompt; "fault": its first copy computes NaN.
KINDS = [
    "",
    "",
    "",
    "other output",
    "eos",
    "stop tokens",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "resumed",
    "lease",
    "timeout",
    "suspect",
    "salt",
    "too long",
    "scores",
    "scores",
    "scores alone",
    "fault",
    "fault",
    "pinned",
    "pinned",
    "pinned",
    "unpinned",
]


@dataclass(frozen=True)
class Setup:
    """Of an engine. chunk: tokens of a step; in_flight: steps"""

    sink: int
    recent: int
    rows: int
    chunk: int
    sealed_pages: int
    prefix_cache: bool
    in_flight: int
    kvp: int
    pinned_share: float


@dataclass(frozen=True)
class Submit:
    """Requests for some pages of a document and `rest` more tokens, then some steps.

    copies: how many of them, with one lease if they have one
    """

    copies: int
    document: int
    pages: int
    rest: int
    max_tokens: int
    kinds: tuple[str, str]
    steps: int
    owner: str

    def prompts(self) -> list[list[int]]:
        prompt = DOCUMENTS[self.document][: self.pages * PAGE] + [self.rest] * self.rest or [2]
        if "fault" not in self.kinds:
            return [prompt] * self.copies
        faulty = [*prompt[: PAGE + 5], BAD, *prompt[PAGE + 5 :]]
        return [faulty] + [prompt] * max(2, self.copies - 1)

    @property
    def pin(self) -> PinTerms | None:
        if "pinned" in self.kinds:
            return PinTerms(self.owner, 1.0 + 7 * (self.rest > 0))
        return PinTerms(self.owner, 0.0) if "unpinned" in self.kinds else None

    def params(self, max_tokens: int) -> SamplingParams:
        kinds = self.kinds
        if "scores alone" in kinds:
            max_tokens = 0
        return SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            top_k=5 if "other output" in kinds else 0,
            min_tokens=min(3, max_tokens) if "min_tokens" in kinds else 0,
            ignore_eos="eos" not in kinds,
            stop_token_ids=(3, 13, 23) if "stop tokens" in kinds else (),
            repetition_penalty=1.5 if "repetition_penalty" in kinds else 1.0,
            presence_penalty=0.5 if "presence_penalty" in kinds else 0.0,
            prompt_logprobs=1 if {"scores", "scores alone"} & set(kinds) else None,
            frequency_penalty=-0.5 if "frequency_penalty" in kinds else 0.0,
        )


@dataclass(frozen=True)
class Steps:
    count: int


@dataclass(frozen=True)
class Abort:
    index: int


@dataclass(frozen=True)
class Grow:
    """A lease gets more pages."""

    index: int
    pages: int


@dataclass(frozen=True)
class Wait:
    seconds: float


Call = Submit | Steps | Abort | Grow | Wait


def random_setup(chance: Random) -> Setup:
    return Setup(
        sink=chance.choice([0, 0, 1, 2]),
        recent=chance.choice([0, 0, 1, 2]),
        rows=chance.randrange(2, 5),
        chunk=chance.choice([5, 16, 40, 64]),
        sealed_pages=chance.randrange(4, 15),
        prefix_cache=chance.random() < 0.8,
        in_flight=chance.choice([1, 2, 2]),
        kvp=chance.choice([1, 1, 2, 3, 4]),
        pinned_share=chance.choice([0.5, 0.9, 1.0]),
    )


def random_call(chance: Random) -> Call:
    what = chance.random()
    if what < 0.5:
        return Submit(
            copies=chance.choice([1, 1, 1, 2, 3]),
            document=chance.choice([0, 0, 0, 1, 1, 2]),
            pages=chance.choice([0, 1, 1, 2, 2, 3, 5]),
            rest=chance.choice([0, 0, 0, 1, 7, PAGE - 1]),
            max_tokens=chance.choice([1, 6, PAGE + 1, 3 * PAGE, 6 * PAGE, CONTEXT]),
            kinds=(chance.choice(KINDS), chance.choice(KINDS)),
            steps=chance.randrange(5),
            owner=chance.choice("aab"),
        )
    if what < 0.75:
        return Steps(chance.choice([1, 2, 5, 20, 40, 60]))
    if what < 0.85:
        return Abort(chance.randrange(10))
    if what < 0.96:
        return Grow(chance.randrange(10), chance.randrange(1, 5))
    return Wait(chance.choice([0.5, 2.0]))
