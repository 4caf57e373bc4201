"""Hooks before a commit and `make lint` run the same commands, so that neither knows better."""

from __future__ import annotations

import re

import yaml

from tests.repo.imports import ROOT


def lint_commands() -> set[str]:
    """The commands of `make lint`."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe is not None
    return {line.strip().replace("$(PY)", ".venv/bin/python") for line in recipe[1].splitlines()}


def test_hooks_run_what_lint_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}, "hooks need no network"
    assert lint_commands() <= {hook["entry"] for hook in hooks}
