"""Compiles grammars in threads of their own, and keeps those that were used last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from llguidance import LLMatcher

from kvmesh.workers.constraint import OutputConstraint
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.executor import RankDescription
from kvmesh.workers.structured.limits import parser_limits
from kvmesh.workers.structured.state import OutputState
from kvmesh.workers.structured.vocabulary import Vocabulary

_KEPT = 128
_THREADS = 2


class Grammars:
    """The grammars of an engine.

    rank: whose model's vocabulary is loaded when the first constraint comes
    """

    def __init__(self, rank: RankDescription) -> None:
        self._rank = rank
        self._vocabulary: Vocabulary | None = None
        self._threads = ThreadPoolExecutor(_THREADS, "kvmesh-grammars")
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def prepare(self, constraint: OutputConstraint, output: Sequence[int]) -> Future[OutputState]:
        """The state after `output`. Raises InvalidFieldError through the future."""
        return self._threads.submit(self._state, constraint, output)

    def _state(self, constraint: OutputConstraint, output: Sequence[int]) -> OutputState:
        vocabulary = self._loaded()
        matcher = self._matcher(constraint.grammar, vocabulary) if constraint.grammar else None
        state = OutputState(constraint, vocabulary, matcher)
        state.accept_all(output)
        state.catch_up()
        return state

    def _loaded(self) -> Vocabulary:
        with self._lock:
            if self._vocabulary is None:
                rank = self._rank
                self._vocabulary = Vocabulary.load(
                    Path(rank.model_path), rank.vocab_size, rank.eos_token_ids
                )
            return self._vocabulary

    def _matcher(self, grammar: str, vocabulary: Vocabulary) -> LLMatcher:
        """A matcher of its own for the caller."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
        if found is None:
            found = LLMatcher(vocabulary.parser, grammar, log_level=0, limits=parser_limits())
            if found.is_error():
                reason = found.get_error().partition("\n")[0]
                raise InvalidFieldError("structured_output", f"cannot be enforced: {reason}")
            with self._lock:
                self._compiled[grammar] = found
                while len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
        return found.deep_copy()
