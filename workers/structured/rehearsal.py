"""Tries a grammar before any engine has it: whether it compiles, begins, and stays affordable.

With a vocabulary of single bytes, so that a process without a model can do it in milliseconds.
"""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass
from functools import cache

from llguidance import LLMatcher, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.structured.grammar import Grammar
from kvmesh.workers.structured.limits import MAX_GRAMMAR_CHARS, rehearsal_limits

_WALKS = 3
_STEPS = 150
MAX_COMPILE_S = 5.0
MAX_WALK_S = 2.0


@dataclass(frozen=True, slots=True)
class _Bytes:
    """256 tokens of one byte, and an end of sequence."""

    tokens: list[bytes]
    eos_token_id: int = 256
    bos_token_id: int | None = None
    special_token_ids: tuple[int, ...] = (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@cache
def _alphabet() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes([*(bytes([i]) for i in range(256)), b"end"])), 257)


def rehearse(grammar: Grammar, field: str) -> None:
    """Raise InvalidFieldError naming the field if no engine could follow the grammar.

    Walks through it at random, from a fixed seed, since some grammars become expensive only
    after a while.
    """
    text = grammar.text()
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidFieldError(
            field, f"must have at most {MAX_GRAMMAR_CHARS:,} characters as a grammar"
        )
    began = time.monotonic()
    matcher = LLMatcher(_alphabet(), text, log_level=0, limits=rehearsal_limits())
    _check(matcher, field)
    if time.monotonic() - began > MAX_COMPILE_S:
        raise InvalidFieldError(field, f"takes more than {MAX_COMPILE_S:g} s to compile")
    draw = random.Random(0)
    began = time.monotonic()
    for _ in range(_WALKS):
        walk = matcher.deep_copy()
        for _ in range(_STEPS):
            mask = walk.compute_bitmask()
            _check(walk, field)
            allowed = [token for token in range(256) if mask[token >> 3] >> (token & 7) & 1]
            if not allowed:
                break
            walk.consume_token(draw.choice(allowed))
            _check(walk, field)
            if time.monotonic() - began > MAX_WALK_S:
                raise InvalidFieldError(field, "takes too long to follow")
        if not (allowed or walk.is_accepting()):
            raise InvalidFieldError(field, "matches no output that can be completed")


def _check(matcher: LLMatcher, field: str) -> None:
    if matcher.is_error():
        raise InvalidFieldError(field, f"cannot be enforced: {_reason(matcher.get_error())}")


def _reason(error: str) -> str:
    """The library's reason in one line, without its state."""
    if error.startswith(("NoExtension", "parser stopped")):
        return "no output matches"
    if "coerce_one_of" in error:
        return "oneOf needs branches of which no value can match two; use anyOf"
    shown = re.split(r"\n<state>|\n<non-verbose|\n +\d+ \|", error)[0]
    shown = re.sub(r"^(at )?\d+\(\d+\): (failed to compile JSON schema: )?", "", shown)
    return " ".join(shown.split())[:300]
