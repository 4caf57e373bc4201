"""Generated long texts whose answers are known, and what is measured with them."""

from __future__ import annotations

import io
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from kvmesh.cluster.cli.eval_tables import ruler_table
from kvmesh.cluster.cli.ruler_plot import plot_ruler
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.evaluation.long_tasks import LONG_TASKS
from kvmesh.workers.evaluation.model import EvaluatedModel, choose_formats
from kvmesh.workers.evaluation.reports import FormatRuler, RulerReport
from kvmesh.workers.evaluation.ruler import RulerPrompt, measure_ruler, ruler_prompt
from kvmesh.workers.scoring.meter import Meter
from tests.model.small import make_small_model, make_small_tokenizer

TASKS = tuple(LONG_TASKS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedModel:
    folder = tmp_path_factory.mktemp("ruler")
    make_small_model(
        "LlamaForCausalLM",
        folder,
        vocab_size=make_small_tokenizer(folder),
        num_hidden_layers=1,
        max_position_embeddings=16384,
    )
    config = EngineConfig(model=str(folder), page_size=16, device="cpu", threads_per_rank=1)
    return EvaluatedModel(config)


@pytest.mark.parametrize("name", TASKS)
def test_a_text_has_its_answers_once_whatever_its_length(name: str) -> None:
    short, long = (LONG_TASKS[name].make(random.Random("7"), units) for units in (100, 2000))
    assert (short.question, short.lead, short.answers) == (long.question, long.lead, long.answers)
    other = LONG_TASKS[name].make(random.Random("8"), 100)
    assert other.answers != short.answers
    for text in (short, long):
        assert len(set(text.answers)) == len(text.answers)
        assert not any(answer in text.question + text.lead for answer in text.answers)
        assert all(answer in text.body for answer in text.answers)
    assert len(long.body) > 10 * len(short.body) / 2


def test_variables_have_their_value_by_a_chain_whose_order_is_that_of_the_text() -> None:
    text = LONG_TASKS["variables"].make(random.Random("1"), 300)
    values: dict[str, str] = {}
    for sentence in text.body.split("."):
        words = sentence.split()
        if words[:1] == ["Variable"]:
            value = words[-1]
            values[words[1]] = value if value.isdecimal() else values[value]
    wanted = text.question.split()[-1].rstrip("?")
    assert {name for name, value in values.items() if value == wanted} == {*text.answers}
    assert len(values) == 12


@pytest.mark.parametrize("name", ["common-words", "frequent-words"])
def test_the_words_that_are_asked_for_come_most_often(name: str) -> None:
    for units in (100, 137, 900):
        text = LONG_TASKS[name].make(random.Random("3"), units)
        words = [word for word in text.body.split() if word.isalpha()]
        assert len(words) == units
        counts = Counter(words)
        wanted = [counts.pop(answer) for answer in text.answers]
        assert min(wanted) > max(counts.values()), "no other comes as often"


@pytest.mark.parametrize("name", TASKS)
def test_a_prompt_nearly_fills_its_length(name: str, model: EvaluatedModel) -> None:
    task, length = LONG_TASKS[name], 12_000
    prompt = ruler_prompt(model.tokenizer, task, length, "0")
    room = length - task.output_tokens
    assert 0.98 * room < len(prompt.tokens) <= room
    assert (prompt.tokens == ruler_prompt(model.tokenizer, task, length, "0").tokens).all()
    with pytest.raises(ConfigError, match=f"are too few for {name}, which takes at least"):
        ruler_prompt(model.tokenizer, task, 120, "0")


def test_a_score_is_the_share_of_the_answers() -> None:
    prompt = RulerPrompt(np.zeros(1, np.int32), ("12345", "678"))
    assert [prompt.score(x) for x in ("12345 and 678", "678.", "none")] == [1.0, 0.5, 0.0]


@pytest.mark.slow
def test_a_report_has_a_figure_for_each_task_length_and_format(model: EvaluatedModel) -> None:
    report = measure_ruler(
        model,
        choose_formats(["int8"]),
        tasks=["frequent-words"],
        lengths=[1500],
        samples=2,
        seed=0,
        meter=Meter(),
    )
    assert [(row.kv_format, row.task, row.length) for row in report.figures] == [
        ("exact", "frequent-words", 1500),
        ("int8", "frequent-words", 1500),
    ]
    assert all(0 <= row.score <= 1 and row.error is not None for row in report.figures)
    with pytest.raises(ConfigError, match="must be of multi-key"):
        measure_ruler(model, [], tasks=["other"], lengths=[], samples=1, seed=0, meter=Meter())


def test_a_report_as_a_table_and_as_a_plot(tmp_path: Path) -> None:
    figures = [
        FormatRuler(name, length, task, score, error)
        for length in (4096, 8192)
        for name, score, error in (("exact", 0.75, 0.08), ("int8", 0.5, None))
        for task in ("multi-key", "variables")
    ]
    report = RulerReport("m", "1", "float32", "exact", 64, "yarn, factor 2", 10, 3, figures)
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(ruler_table(report))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "yarn, factor 2: 10 prompts a figure, seed 3" in " ".join(printed.split())
    assert printed.count("0.75 ±0.08") == 4 and printed.count("int8") == 2
    plot_ruler(report, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
