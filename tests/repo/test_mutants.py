"""The tables of mutation testing name what exists."""

from __future__ import annotations

import yaml

from tests.mutants import EQUIVALENT, TARGETS, Change, in_text_only
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
