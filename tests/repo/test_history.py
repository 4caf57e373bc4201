"""Commit subjects fit a line of `git log --oneline` and of a mail."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.repo.imports import ROOT

MAX_CHARACTERS = 72
# Subjects up to this commit were written before the rule.
BASE = "57d85a70906b"


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )


def test_commit_subjects_are_short() -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    if git("cat-file", "-e", f"{BASE}^{{commit}}").returncode != 0:
        pytest.skip(f"no history back to {BASE}: a shallow clone, or no clone")
    log = git("log", "--format=%h %s", f"{BASE}..HEAD")
    assert log.returncode == 0, log.stderr
    long = [
        f"{commit} has {len(subject)}: {subject}"
        for commit, _, subject in (line.partition(" ") for line in log.stdout.splitlines())
        if len(subject) > MAX_CHARACTERS
    ]
    assert not long, f"subjects over {MAX_CHARACTERS} characters:\n" + "\n".join(long)
