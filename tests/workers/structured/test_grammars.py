"""Which grammars an engine keeps compiled."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLMatcher
from msgspec.structs import replace

from kvmesh.workers.constraint import OutputConstraint
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.structured import grammar, grammars
from kvmesh.workers.structured.grammars import Grammars
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
