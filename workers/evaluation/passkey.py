"""Retrieval: a number hidden in real text, asked for at the end.

After Mohtashami and Jaggi (arXiv 2305.16300), with real text about the number
instead of one sentence repeated, and through the model's chat template where it
has one.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import numpy as np

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.evaluation.meter import Meter
from kvmesh.workers.evaluation.model import EvaluatedModel
from kvmesh.workers.evaluation.reports import FormatPasskey, PasskeyReport
from kvmesh.workers.model.tokenizer import Tokenizer
from kvmesh.workers.request import TokenIds

OUTPUT_TOKENS = 10

_TASK = "There is a pass key number hidden in the following text. Find it and remember it.\n\n"
_NEEDLE = "\n\nThe pass key number is {key}. Remember it. {key} is the pass key number.\n\n"
_QUESTION = "\n\nWhat is the pass key number?"
_ANSWER = "The pass key number is"


@dataclass(frozen=True, slots=True)
class Riddle:
    """A prompt that hides `key` after the share `depth` of its text."""

    prompt: TokenIds
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
    """formats: exact first, as choose_formats gives them.

    lengths: tokens of prompt and output together; depths: places of the number, evenly
    spread; seeds: numbers and passages of text for each
    Raises ConfigError naming what is at fault: lengths, text, kv_format.
    """
    maker = RiddleMaker(model.tokenizer, text)
    for fmt in formats:
        model.footprint(fmt)
    riddles: dict[int, list[Riddle]] = {}
    for length in lengths:
        model.check_length("lengths", length)
        riddles[length] = [
            maker.make(length, (place + 0.5) / depths, seed)
            for seed in range(seeds)
            for place in range(depths)
        ]
        meter.plan(length * len(riddles[length]) * len(formats))
    figures = [
        _ask(model, fmt, length, asked, meter)
        for length, asked in riddles.items()
        for fmt in formats
    ]
    return PasskeyReport(
        model=model.name,
        model_revision=model.facts.revision,
        dtype=model.dtype,
        page_size=model.config.page_size,
        depths=depths,
        seeds=seeds,
        figures=figures,
    )


def _ask(
    model: EvaluatedModel, fmt: KVFormat, length: int, riddles: list[Riddle], meter: Meter
) -> FormatPasskey:
    scorer = model.scorer(fmt, length)
    missed = []
    for riddle in riddles:
        output = scorer.generate(riddle.prompt, OUTPUT_TOKENS)
        if riddle.key not in model.tokenizer.decode(output):
            missed.append(riddle.depth)
        meter.advance(length)
    return FormatPasskey(fmt.name, length, len(riddles) - len(missed), len(riddles), missed)


class RiddleMaker:
    """Makes prompts out of a text."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self._tokenizer = tokenizer
        self._ids = tokenizer.encode(text, add_special_tokens=False)

    def make(self, length: int, depth: float, seed: int) -> Riddle:
        """A prompt of at most `length` tokens less the output's, and hardly fewer.

        The same arguments make the same prompt. Raises ConfigError(lengths) if there is no room
        for text, ConfigError(text) if there is not enough of it.
        """
        draw = random.Random(f"{seed} {depth} {length}")
        key = str(draw.randrange(10_000, 100_000))
        frame = len(self._prompt("", key, depth))
        room = length - OUTPUT_TOKENS - frame
        if room < frame:
            raise ConfigError(
                "lengths", f"{length} tokens leave no text around a question of {frame}"
            )
        if len(self._ids) < room:
            raise ConfigError(
                "text", f"has {len(self._ids)} tokens, which is less than a prompt's {room}"
            )
        start = draw.randrange(len(self._ids) - room + 1)
        # Cut out of a text and encoded anew, the same tokens can become a few more.
        while True:
            filler = self._tokenizer.decode(self._ids[start : start + room])
            prompt = self._prompt(filler, key, depth)
            excess = len(prompt) - (length - OUTPUT_TOKENS)
            if excess <= 0:
                return Riddle(np.array(prompt, dtype=np.int32), key, depth)
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
    """The end of the first sentence that ends at or after `at`, or of a word, or the text's."""
    for pattern in (r"[.!?]\s", r"\s"):
        if (match := re.compile(pattern).search(text, at)) is not None:
            return match.end()
    return len(text)
