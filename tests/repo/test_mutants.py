"""The tables of mutation testing name what exists."""

from __future__ import annotations

import yaml

from tests.mutants import (
    EQUIVALENT,
    TARGETS,
    Change,
    in_text_only,
    on_gpus_only,
    weakens_an_assertion,
)
from tests.repo.imports import ROOT


def test_targets_and_their_tests_exist() -> None:
    for target in TARGETS.values():
        missing = [path for path in (target.path, *target.tests) if not (ROOT / path).is_file()]
        assert not missing


def test_code_that_is_said_to_have_equivalent_mutants_exists() -> None:
    sources = [(ROOT / target.path).read_text("utf-8") for target in TARGETS.values()]
    lines = [" ".join(source.split()) for source in sources]
    for entry in yaml.safe_load(EQUIVALENT.read_text("utf-8")):
        assert entry.keys() == {"function", "was", "becomes", "why"}
        was = " ".join(entry["was"].split())
        assert any(was in source for source in lines), f"there is no {entry['was']!r}"
        assert not in_text_only(Change(entry["function"], entry["was"], entry["becomes"]))


def test_mutants_of_messages_alone_are_recognised() -> None:
    assert in_text_only(Change("f", 'raise E("no room")', 'raise E("XXno roomXX")'))
    assert in_text_only(Change("f", 'x = float("inf")', 'x = float("INF")'))
    assert not in_text_only(Change("f", 'raise E("no room")', "raise E(None)"))


def test_mutants_that_only_a_gpu_tells_apart_are_recognised() -> None:
    was = 'self._host = columns.to("cpu", non_blocking=True)'
    for becomes in ('"cpu", ', '"cpu", non_blocking=None', "None, non_blocking=True"):
        assert on_gpus_only(Change("f", was, f"self._host = columns.to({becomes})"))
    assert not on_gpus_only(Change("f", was, "self._host = None"))
    assert on_gpus_only(
        Change("f", "x = ones(n, dtype=a, device=self._d)", "x = ones(n, dtype=a, )")
    )
    assert not on_gpus_only(Change("f", "x = ones(n, dtype=a, device=d)", "x = ones(n, device=d)"))


def test_mutants_of_lengths_that_are_equal_are_recognised() -> None:
    was = "for a, b in zip(x, y, strict=True):"
    assert weakens_an_assertion(Change("f", was, "for a, b in zip(x, y, ):"))
    assert weakens_an_assertion(Change("f", was, "for a, b in zip(x, y, strict=False):"))
    assert weakens_an_assertion(Change("f", "x, y, strict=True", "x, y, strict=None"))
    assert not weakens_an_assertion(Change("f", was, "for a, b in zip(x, None, strict=True):"))
    assert not weakens_an_assertion(Change("f", "zip(x, y, )", "zip(x, y)"))
