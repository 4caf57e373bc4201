"""Retrieval: a number hidden in real text, with a question about it at the end.

Follows Mohtashami and Jaggi (arXiv 2305.16300), but with real text around the number
instead of one repeated sentence, and through the model's chat template if it
has one.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import numpy as np

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.evaluation.model import EvaluatedModel
from kvmesh.workers.evaluation.reports import FormatPasskey, PasskeyReport
from kvmesh.workers.model.tokenizer import Tokenizer
from kvmesh.workers.request import TokenIds
from kvmesh.workers.scoring.meter import Meter

OUTPUT_TOKENS = 10

_TASK = "There is a pass key number hidden in the following text. Find it and remember it.\n\n"
_NEEDLE = "\n\nThe pass key number is {key}. Remember it. {key} is the pass key number.\n\n"
_QUESTION = "\n\nWhat is the pass key number?"
_ANSWER = "The pass key number is"


@dataclass(frozen=True, slots=True)
class PasskeyPrompt:
    """A prompt in which `key` is hidden at the relative position `depth` of the text."""

    tokens: TokenIds
    key: str
    depth: float


def measure_passkey(
    model: EvaluatedModel,
    formats: list[KVFormat],
    text: str,
    *,
    lengths: list[int],
    depths: int,
    seeds: int,
    meter: Meter,
) -> PasskeyReport:
    """formats: exact first, as returned by choose_formats.

    lengths: total tokens of prompt and output; depths: number of positions of the key, evenly
    spread; seeds: number of keys and passages of text for each position
    Raises ConfigError naming the invalid argument: lengths, text, kv_format.
    """
    maker = PasskeyPromptMaker(model.tokenizer, text)
    for fmt in formats:
        model.footprint(fmt)
    prompts: dict[int, list[PasskeyPrompt]] = {}
    for length in lengths:
        model.check_length("lengths", length)
        prompts[length] = [
            maker.make(length, (place + 0.5) / depths, seed)
            for seed in range(seeds)
            for place in range(depths)
        ]
        meter.plan(length * len(prompts[length]) * len(formats))
    figures = [
        _ask(model, fmt, length, asked, meter)
        for length, asked in prompts.items()
        for fmt in formats
    ]
    return PasskeyReport(
        model=model.name,
        model_revision=model.facts.revision,
        dtype=model.dtype,
        weight_format=model.config.weight_format,
        page_size=model.config.page_size,
        depths=depths,
        seeds=seeds,
        figures=figures,
    )


def _ask(
    model: EvaluatedModel, fmt: KVFormat, length: int, prompts: list[PasskeyPrompt], meter: Meter
) -> FormatPasskey:
    scorer = model.scorer(fmt, length)
    missed = []
    for prompt in prompts:
        output = scorer.generate(prompt.tokens, OUTPUT_TOKENS)
        if prompt.key not in model.tokenizer.decode(output):
            missed.append(prompt.depth)
        meter.advance(length)
    return FormatPasskey(fmt.name, length, len(prompts) - len(missed), len(prompts), missed)


class PasskeyPromptMaker:
    """Makes prompts from a text."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self._tokenizer = tokenizer
        self._ids = tokenizer.encode(text, add_special_tokens=False)

    def make(self, length: int, depth: float, seed: int) -> PasskeyPrompt:
        """A prompt that leaves room for the output in `length` tokens, and is not much shorter.

        The same arguments give the same prompt. Raises ConfigError(lengths) if there is no room
        for text, ConfigError(text) if the text is too short.
        """
        draw = random.Random(f"{seed} {depth} {length}")
        key = str(draw.randrange(10_000, 100_000))
        frame = len(self._prompt("", key, depth))
        room = length - OUTPUT_TOKENS - frame
        if room < frame:
            raise ConfigError(
                "lengths",
                f"{length} tokens are too few: the question alone takes {frame}, and the text"
                " must be at least as long",
            )
        if len(self._ids) < room:
            raise ConfigError(
                "text", f"must have at least {room} tokens for this prompt, got {len(self._ids)}"
            )
        start = draw.randrange(len(self._ids) - room + 1)
        # When a part of the text is encoded again, it may have a few more tokens.
        while True:
            filler = self._tokenizer.decode(self._ids[start : start + room])
            prompt = self._prompt(filler, key, depth)
            excess = len(prompt) - (length - OUTPUT_TOKENS)
            if excess <= 0:
                return PasskeyPrompt(np.array(prompt, dtype=np.int32), key, depth)
            room -= excess

    def _prompt(self, filler: str, key: str, depth: float) -> list[int]:
        at = _boundary(filler, int(depth * len(filler)))
        question = (
            _TASK + filler[:at].rstrip() + _NEEDLE.format(key=key) + filler[at:].strip() + _QUESTION
        )
        answer = self._tokenizer.encode(_ANSWER, add_special_tokens=False)
        if self._tokenizer.has_chat_template:
            messages = [{"role": "user", "content": question}]
            return self._tokenizer.encode_chat(messages) + answer
        return self._tokenizer.encode(f"{question}\n\n{_ANSWER}")


def _boundary(text: str, at: int) -> int:
    """The next end of a sentence at or after `at`, otherwise of a word, otherwise of the text."""
    for pattern in (r"[.!?]\s", r"\s"):
        if (match := re.compile(pattern).search(text, at)) is not None:
            return match.end()
    return len(text)
