"""How much of what long contexts say is found, followed and counted, by KV format."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.evaluation.long_tasks import LONG_TASKS, LongTask, TaskText
from kvmesh.workers.evaluation.model import EvaluatedModel
from kvmesh.workers.evaluation.reports import FormatRuler, RulerReport
from kvmesh.workers.model.tokenizer import Tokenizer
from kvmesh.workers.request import TokenIds
from kvmesh.workers.scoring.meter import Meter

MIN_UNITS = 100  # fewer sentences or words hide nothing
TRIAL_UNITS = 200  # of a text from which the tokens of a unit are estimated


@dataclass(frozen=True, slots=True)
class RulerPrompt:
    """tokens: [n] int32; answers: see `TaskText`"""

    tokens: TokenIds
    answers: tuple[str, ...]

    def score(self, output: str) -> float:
        """Share of the answers that the output has."""
        return sum(answer in output for answer in self.answers) / len(self.answers)


def measure_ruler(
    model: EvaluatedModel,
    formats: list[KVFormat],
    *,
    tasks: list[str],
    lengths: list[int],
    samples: int,
    seed: int,
    meter: Meter,
) -> RulerReport:
    """formats: exact first, as returned by choose_formats.

    lengths: total tokens of prompt and output; samples: of each task and length
    Raises ConfigError naming the invalid argument: tasks, lengths, kv_format.
    """
    chosen = [_task(name) for name in tasks]
    for fmt in formats:
        model.footprint(fmt)
    prompts: dict[tuple[int, str], list[RulerPrompt]] = {}
    for length in lengths:
        model.check_length("lengths", length)
        for task in chosen:
            prompts[length, task.name] = [
                ruler_prompt(model.tokenizer, task, length, f"{seed} {number}")
                for number in range(samples)
            ]
        meter.plan(length * samples * len(chosen) * len(formats))
    figures = []
    for length in lengths:
        for fmt in formats:
            scorer = model.scorer(fmt, length)
            for task in chosen:
                scores = []
                for prompt in prompts[length, task.name]:
                    output = scorer.generate(prompt.tokens, task.output_tokens)
                    scores.append(prompt.score(model.tokenizer.decode(output)))
                    meter.advance(length)
                figures.append(
                    FormatRuler(fmt.name, length, task.name, float(np.mean(scores)), _error(scores))
                )
    return RulerReport(
        model=model.name,
        model_revision=model.facts.revision,
        dtype=model.dtype,
        weight_format=model.config.weight_format,
        page_size=model.config.page_size,
        rope=None if model.config.rope is None else str(model.config.rope),
        samples=samples,
        seed=seed,
        figures=figures,
    )


def ruler_prompt(tokenizer: Tokenizer, task: LongTask, length: int, seed: str) -> RulerPrompt:
    """A prompt that leaves room for the answer in `length` tokens, and is not much shorter.

    The same arguments give the same prompt, and the facts depend on the seed alone. Raises
    ConfigError(lengths) if there is no room for a text that hides anything.
    """

    def make(units: int) -> tuple[list[int], TaskText]:
        text = task.make(random.Random(f"{task.name} {seed}"), units)
        return _encoded(tokenizer, text), text

    room = length - task.output_tokens
    frame, trial = len(make(0)[0]), len(make(TRIAL_UNITS)[0])
    of_unit = (trial - frame) / TRIAL_UNITS
    units = math.ceil((room - frame) / of_unit)
    while units >= MIN_UNITS:
        tokens, text = make(units)
        if (excess := len(tokens) - room) <= 0:
            return RulerPrompt(np.array(tokens, np.int32), text.answers)
        units -= math.ceil(excess / of_unit)
    raise ConfigError(
        "lengths",
        f"{length} tokens are too few for {task.name}, which takes at least "
        f"{math.ceil(frame + MIN_UNITS * of_unit) + task.output_tokens}",
    )


def _encoded(tokenizer: Tokenizer, text: TaskText) -> list[int]:
    question = f"{text.body}\n\n{text.question}"
    if tokenizer.has_chat_template:
        lead = tokenizer.encode(text.lead, add_special_tokens=False)
        return tokenizer.encode_chat([{"role": "user", "content": question}]) + lead
    return tokenizer.encode(f"{question}\n\n{text.lead}")


def _error(scores: list[float]) -> float | None:
    """Standard error of the mean; None of one sample."""
    if len(scores) < 2:
        return None
    return float(np.std(scores, ddof=1)) / math.sqrt(len(scores))


def _task(name: str) -> LongTask:
    if name not in LONG_TASKS:
        raise ConfigError("tasks", f"must be of {', '.join(LONG_TASKS)}; got {name!r}")
    return LONG_TASKS[name]
