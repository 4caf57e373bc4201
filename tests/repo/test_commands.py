"""`make`, the hooks before a commit and CI run the same commands, so that none knows better."""

from __future__ import annotations

import re

import yaml

from tests.repo.imports import ROOT

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def recipe(target: str) -> list[str]:
    """The commands of a target."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert found is not None
    return [line.strip().replace("$(PY)", ".venv/bin/python") for line in found[1].splitlines()]


def test_hooks_run_what_lint_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}, "hooks need no network"
    assert set(recipe("lint")) <= {hook["entry"] for hook in hooks}


def test_every_test_runs_once() -> None:
    """The fast ones, the slow ones and those with Ray."""
    targets = ("test-fast", "coverage", "test-slow", "test-ray")
    assert [re.findall(r"pytest -m ('.*?'|\w+)", "".join(recipe(name))) for name in targets] == [
        ["'not (ray or slow)'"],
        ["'not (ray or slow)'"],
        ["'slow and not ray'"],
        ["ray"],
    ]
    whole = MAKEFILE[MAKEFILE.index("\ntest:") :].partition("else\n")[2].partition("endif")[0]
    assert re.findall(r"(?<=\t\$\(MAKE\) ).*", whole) == [
        "coverage",
        "test-slow test-ray",
    ]
    assert "\nmake test </dev/null\n" in (ROOT / ".ci/run").read_text("utf-8")


def test_help_names_every_target() -> None:
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", MAKEFILE, re.MULTILINE)
    assert phony is not None
    described = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))
    assert set(phony[1].replace("\\\n", " ").split()) == described
