"""Plain, modern English in every tracked source file: a word list with replacements."""

from __future__ import annotations

import re
import subprocess
from functools import cache

import pytest

from tests.repo.imports import ROOT

# Word or phrase -> what to write instead. Spaces also match line breaks and underscores, so that
# phrases are found in names too. Words with ordinary uses in code do not belong here.
WORDS = {
    "accord": "naturally, or by itself",
    "amid": "within",
    "amongst": "among",
    "anew": "again",
    "as others say": "leave it out",
    "aught": "anything",
    "begun": "started, or first token",
    "beside": "next to, or compared with",
    "betters": "improves on",
    "brought about": "caused",
    "came of it": "the result",
    "due was": "expected",
    "for ever": "forever, or repeatedly",
    "for want of": "for lack of",
    "go on": "continue",
    "goes on": "continues",
    "going on": "continuing",
    "had better": "should",
    "hear of it": "are informed",
    "henceforth": "from then on",
    "hither": "here",
    "in the making": "under construction",
    "in the place of": "instead of",
    "knows more": "say what it contains",
    "lacks but": "only needs",
    "last words": "last message",
    "lest": "so that ... not",
    "let in": "admit",
    "lets in": "admits",
    "no token id": "not a valid token id",
    "nought": "zero",
    "of late": "recently",
    "ought": "should",
    "riddle": "prompt",
    "say of itself": "report",
    "say of themselves": "report",
    "says of itself": "reports",
    "says of themselves": "report",
    "shall": "must, or will",
    "so much as": "even",
    "stranger": "unknown, or unauthenticated, peer",
    "strike out": "remove",
    "struck out": "removed",
    "thereof": "of it",
    "thither": "there",
    "told": "sent, or reported",
    "upward of": "more than",
    "went on": "continued",
    "whence": "from where",
    "wherein": "in which",
    "whilst": "while",
    "whither": "where",
    "whoever": "anyone, or the caller",
}
# Sizes are min_x and max_x: names that begin or end like this are wrong.
SIZE = re.compile(r"least|most")
SIZE_NAME = re.compile(r"_*(?:least|most)_\w+|\w+_(?:least|most)")
ALLOWED_NAMES = re.compile(r"least_squares|\w*at_(?:least|most)")

SUFFIXES = (".py", ".md", ".proto", ".toml", ".yaml")
THIS_FILE = "tests/repo/test_english.py"


def _phrase(words: str) -> str:
    return r"[\s_]+(?:#\s*)?".join(map(re.escape, words.split()))


PHRASES = re.compile(
    rf"(?<![a-z])(?:{'|'.join(map(_phrase, WORDS))})(?![a-z])", re.IGNORECASE | re.ASCII
)


@cache
def tracked_files() -> tuple[str, ...]:
    """Tracked text files without the generated stubs, relative to the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return tuple(
        name
        for name in listed.stdout.split("\0")
        if name.endswith(SUFFIXES) and "_pb2" not in name and name != THIS_FILE
    )


def faults_in(text: str) -> list[str]:
    """What to change in `text`, as "line: word -> replacement"."""
    faults = []
    for found in PHRASES.finditer(text):
        word = " ".join(re.findall("[a-z]+", found[0].lower()))
        faults.append(f"{_line_of(text, found)}: {word!r} -> {WORDS[word]}")
    for found in SIZE.finditer(text):
        name = _name_around(text, found)
        if SIZE_NAME.fullmatch(name) and not ALLOWED_NAMES.fullmatch(name):
            faults.append(f"{_line_of(text, found)}: {name} -> min_ or max_")
    return faults


def _name_around(text: str, found: re.Match[str]) -> str:
    start, end = found.span()
    while start and (text[start - 1].isalnum() or text[start - 1] == "_"):
        start -= 1
    while end < len(text) and (text[end].isalnum() or text[end] == "_"):
        end += 1
    return text[start:end]


def _line_of(text: str, found: re.Match[str]) -> int:
    return text.count("\n", 0, found.start()) + 1


def faults_of(name: str) -> list[str]:
    return [f"{name}:{fault}" for fault in faults_in((ROOT / name).read_text("utf-8"))]


def test_files_use_plain_english() -> None:
    names = tracked_files()
    assert len(names) > 200, "the tracked files are found"
    faults = [fault for name in names for fault in faults_of(name)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("An error shall say\nso.", ["1: 'shall' -> must, or will"]),
        ("x = 1  # made of\n# late", ["1: 'of late' -> recently"]),
        ("def test_it_has_begun(): ...", ["1: 'begun' -> started, or first token"]),
        ("least_bytes = busy_most", ["1: least_bytes -> min_ or max_"]),
        ('fit="least_squares"; _at_least(x); marshall(y)', []),
    ],
)
def test_words_are_found(text: str, expected: list[str]) -> None:
    assert faults_in(text)[: len(expected)] == expected
    assert bool(faults_in(text)) == bool(expected)
