"""The version is in pyproject.toml, and the changelog says what is in it."""

from __future__ import annotations

import re
import tomllib

from tests.repo.imports import ROOT


def test_the_changelog_describes_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    page = (ROOT / "CHANGELOG.md").read_text("utf-8")
    headings = re.findall(r"^## \[([^]]+)\](.*)$", page, re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    newest, date = headings[1]
    assert newest == version
    assert re.fullmatch(r" – \d{4}-\d\d-\d\d", date)
