"""CONTRIBUTING.md shows the imports between folders as they are."""

from __future__ import annotations

import pytest

from tests.repo.graph import PAGE, Link, cyclic, drawing, page_with, unit_of


def test_the_page_shows_the_present_imports() -> None:
    page = PAGE.read_text("utf-8")
    assert page == page_with(drawing(), page), "run `make graph` and commit CONTRIBUTING.md"


def test_a_page_without_a_place_for_the_graph_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for the graph"):
        page_with("kernels –\n", "# Contributing\n")


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        ("ab bc", ""),
        ("ab ba bc", "ab ba"),
        ("ab bc ca cd", "ab bc ca"),
        ("ab ba cd dc bc", "ab ba cd dc"),
    ],
)
def test_the_search_for_circles_itself(links: str, expected: str) -> None:
    def pairs(words: str) -> set[Link]:
        return {(word[0], word[1]) for word in words.split()}

    assert cyclic(pairs(links)) == pairs(expected)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("kvmesh.workers.model.rope", "workers/model"),
        ("kvmesh.workers.model", "workers/model"),
        ("kvmesh.workers.rank", "workers/rank.py"),
        ("kvmesh.workers", None),
        ("kvmesh.v1.kvmesh_pb2", None),
        ("kvmesh", None),
        ("torch", None),
    ],
)
def test_the_units_themselves(module: str, expected: str | None) -> None:
    assert unit_of(module) == expected
