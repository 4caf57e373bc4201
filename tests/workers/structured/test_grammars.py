"""Which grammars an engine keeps compiled."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher
from msgspec.structs import replace

from kvmesh.workers.constrained_outputs import ConstrainedOutputs
from kvmesh.workers.constraint import OutputConstraint
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.sequence import Sequence
from kvmesh.workers.sizes import PageGeometry
from kvmesh.workers.structured import grammar, grammars
from kvmesh.workers.structured.grammars import Grammars
from kvmesh.workers.structured.state import OutputState
from tests.workers.memory_executor import MemoryExecutor
from tests.workers.structured.tiny import model_path, tokenizer


def test_grammars_are_kept_while_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_it(parser: Any, text: str, **options: Any) -> LLMatcher:
        compiled.append(text)
        return LLMatcher(parser, text, **options)

    monkeypatch.setattr(grammars, "LLMatcher", compile_it)
    monkeypatch.setattr(grammars, "_KEPT", 2)
    rank = replace(
        MemoryExecutor(16, 0, 0, 40).describe()[0],
        model_path=str(model_path()),
        vocab_size=tokenizer().vocab_size,
        eos_token_ids=(2,),
    )
    made = Grammars(rank)
    a, b, c = (grammar.regex(pattern).text() for pattern in "abc")
    for text in (a, b, a, c, a, b):
        assert made.prepare(OutputConstraint(text), []).result(60).has_grammar
    assert compiled == [a, b, c, b]
    for _ in range(2):
        with pytest.raises(InvalidFieldError, match="cannot be enforced"):
            made.prepare(OutputConstraint("start: ("), []).result(60)
    assert compiled[4:] == ["start: ("] * 2, "those that are none are not kept"


def test_a_model_without_an_end_of_sequence_is_refused_grammars() -> None:
    rank = replace(
        MemoryExecutor(16, 0, 0, 40).describe()[0],
        model_path=str(model_path()),
        vocab_size=tokenizer().vocab_size,
        eos_token_ids=(),
    )
    prepared = Grammars(rank).prepare(OutputConstraint("start: /a/"), [])
    with pytest.raises(InvalidFieldError, match="no end-of-sequence token"):
        prepared.result(60)


def test_nobody_waits_for_the_grammar_of_a_sequence_that_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    never: Future[OutputState] = Future()
    monkeypatch.setattr(Grammars, "prepare", lambda *_: never)
    outputs = ConstrainedOutputs(MemoryExecutor(16, 0, 0, 40).describe()[0])
    item = EngineRequest(
        "r",
        np.array([1], np.int32),
        SamplingParams(max_tokens=2),
        constraint=OutputConstraint("start: /a/"),
    )
    seq = Sequence(item, PageGeometry(16, 0, 0, 4, 1), 100)
    outputs.add(seq)
    outputs.remove(seq)
    outputs.remove(seq)
    assert never.cancelled() and not outputs.preparing
