"""Every decision in docs/adr has a status, a date and the usual sections, and is in the index."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import pytest

from tests.repo.imports import ROOT

FOLDER = ROOT / "docs" / "adr"
PAGES = sorted(FOLDER.glob("[0-9]*.md"))
MAX_WORDS = 400
STATUS = re.compile(r"proposed|accepted|rejected|superseded by (\d+)")
SECTIONS = ["Context", "Decision", "Alternatives", "Consequences"]


def header(page: Path) -> tuple[str, str, str]:
    """Title line, status and date; fails if the page does not begin with them."""
    found = re.match(r"# (.+)\n\nStatus: (.+)\nDate: (.+)\n\n", page.read_text("utf-8"))
    assert found, f"{page.name} must begin with '# N. Title', then 'Status: ...' and 'Date: ...'"
    return found[1], found[2], found[3]


def number_of(page: Path) -> int:
    return int(page.name[:4])


def test_numbers_are_consecutive() -> None:
    assert [number_of(page) for page in PAGES] == list(range(1, len(PAGES) + 1))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_decision_has_its_parts(page: Path) -> None:
    title, status, date = header(page)
    assert title.startswith(f"{number_of(page)}. "), title
    match = STATUS.fullmatch(status)
    assert match, f"{page.name}: expected a status like 'accepted', got {status!r}"
    if match[1] is not None:
        assert int(match[1]) in map(number_of, PAGES), (
            f"{page.name}: there is no decision {match[1]}"
        )
    datetime.date.fromisoformat(date)  # raises if it is not a date
    text = page.read_text("utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    words = len(text.split())
    assert words <= MAX_WORDS, f"{page.name} has {words} words; shorten it to {MAX_WORDS}"


def test_the_index_is_current() -> None:
    rows = []
    for page in PAGES:
        title, status, date = header(page)
        name = title.split(". ", 1)[1]
        rows.append(f"| {number_of(page)} | [{name}]({page.name}) | {status} | {date} |")
    index = (FOLDER / "README.md").read_text("utf-8").splitlines()
    assert [line for line in index if re.match(r"\| \d", line)] == rows
