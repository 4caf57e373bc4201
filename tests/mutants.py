"""Mutation testing: small changes of a module that its tests do not notice.

    make mutants ARGS='scheduler prefix_cache'      or: python -m tests.mutants scheduler

mutmut changes one expression at a time, in a copy of the repository below build/, and runs the
tests that reach it. What survives and is not in tests/equivalent_mutants.yaml is printed, and
is a test to write, or an entry with the reason why no test can tell the two apart.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.repo.imports import ROOT

WORK = ROOT / "build" / "mutants"
EQUIVALENT = Path(__file__).parent / "equivalent_mutants.yaml"


class Target(NamedTuple):
    """A module, and the fast tests that are meant to notice its faults."""

    path: str
    tests: tuple[str, ...]


def _workers(module: str, *tests: str) -> Target:
    return Target(f"workers/{module}.py", tuple(f"tests/workers/test_{name}.py" for name in tests))


def _ingress(module: str, *tests: str) -> Target:
    paths = (f"tests/cluster/test_{name}.py" for name in tests)
    return Target(f"cluster/ingress/{module}.py", tuple(paths))


def _client(module: str, *tests: str) -> Target:
    return Target(f"client/{module}.py", tuple(f"tests/client/test_{name}.py" for name in tests))


ENGINE = (
    "arena",
    "prefix_cache",
    "sizes",
    "scheduler",
    "sequence",
    "engine",
    "engine_thread",
    "blame",
    "step_budget",
)
LEADER = ("lease_book", "lease_book_machine", "leader_machine", "engine_thread", "leader", "blame")
ROUTING = tuple(
    f"tests/routing/test_{name}.py"
    for name in (
        "ledger",
        "dealt_ledger",
        "queue",
        "fairness",
        "leases",
        "choice",
        "admission",
        "placement",
        "expectations",
        "long_prompts",
        "leaving",
        "router",
        "lost_growth",
        "properties",
    )
)
TARGETS = {
    "scheduler": _workers("scheduler", *ENGINE),
    "engine": Target(
        "workers/engine.py",
        (
            *_workers("", "device_limits", *ENGINE).tests,
            "tests/workers/structured/test_engine_output.py",
        ),
    ),
    "engine_stats": _workers("engine_stats", *ENGINE),
    "step_pipeline": _workers("step_pipeline", "overlap", *ENGINE),
    "page_tables": _workers("page_tables", "page_tables", *ENGINE),
    "step_draft": _workers("step_draft", "step_draft", *ENGINE),
    "request_check": _workers("request_check", "request_check", "prompt_scores"),
    "deadlines": _workers("deadlines", "deadlines"),
    "sequence": _workers("sequence", *ENGINE),
    "prefix_cache": _workers("prefix_cache", *ENGINE),
    "dealt_arena": _workers("dealt_arena", *ENGINE),
    "arena": _workers("arena", *ENGINE),
    "sizes": _workers("sizes", *ENGINE),
    "sampler": _workers("sampler", "sampler_reference", "sampler"),
    "leader": _workers("leader", *LEADER),
    "engine_thread": _workers("engine_thread", *LEADER),
    "lease_book": _workers("lease_book", *LEADER),
    "blame": _workers("blame", *LEADER),
    "channel": _workers("channel", "channel"),
    "step_limit": _workers("step_limit", "step_limit", "channel"),
    "cached_blocks": _workers("cached_blocks", "cached_blocks", "leader"),
    "pool_plan": _workers("pool_plan", "pool_plan", "engine"),
    "shared_prefixes": _workers("shared_prefixes", "shared_prefixes"),
    "worker": _workers("worker", "worker"),
    "ledger": Target("cluster/routing/ledger.py", ROUTING),
    "leases": Target("cluster/routing/leases.py", ROUTING),
    "shared_blocks": Target("cluster/routing/shared_blocks.py", ROUTING),
    "audit": Target("cluster/routing/audit.py", ROUTING),
    "queue": Target("cluster/routing/queue.py", ROUTING),
    "placement": Target("cluster/routing/placement.py", ROUTING),
    "admission": Target("cluster/routing/admission.py", ROUTING),
    "choice": Target(
        "cluster/ingress/choice.py",
        ("tests/cluster/test_choice.py", "tests/cluster/answers/test_choices.py"),
    ),
    "engine_links": _ingress("engine_links", "engine_links", "generation"),
    "generation": _ingress("generation", "one_generation"),
    "validate": _ingress("validate", "validate"),
    "router_link": _ingress("router_link", "router_link"),
    "failovers": _ingress("failovers", "failovers"),
    "attempt": _ingress("attempt", "one_generation"),
    "client_flows": _client("flows", "retries", "cursor", "streams"),
    "client_failures": _client("failures", "errors", "retries"),
    "stream_state": _client(
        "stream_state", "stream_state", "streams", "cursor", "answers", "iteration"
    ),
}


class Change(NamedTuple):
    """What a mutant replaces, as its diff says, without indentation."""

    function: str
    was: str
    becomes: str


def mutate(name: str, children: int, *, resume: bool) -> dict[str, str]:
    """Test a module's mutants: the outcome of each, by mutmut's name of the mutant.

    resume: continue a run that was interrupted, with the code and the tests that it had
    """
    target, work = TARGETS[name], WORK / name
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    if not work.exists():
        _copy_tracked_files(work)
        with (work / "pyproject.toml").open("a") as file:
            file.write(_settings(target))
    command = ["run", "--max-children", str(children)]
    subprocess.run([*MUTMUT, *command], cwd=work, check=True, stdout=sys.stderr)
    lines = _output(work, *MUTMUT, "results", "--all", "true").splitlines()
    found = [line.strip().rpartition(": ") for line in lines if "__mutmut_" in line]
    return {mutant: outcome for mutant, _, outcome in found}


MUTMUT = [sys.executable, "-m", "mutmut"]


def _settings(target: Target) -> str:
    """The module is named by its path through kvmesh/, whose links are copied as folders.

    A mutant that takes five times as long as its tests and a second is one whose tests wait for
    what never comes.
    """
    arguments = ["-p", "no:cacheprovider", "--hypothesis-profile=mutants", "-m"]
    return f"""
[tool.mutmut]
source_paths = ["kvmesh/{target.path}"]
also_copy = ["kvmesh"]
pytest_add_cli_args = {[*arguments, "not (ray or slow)"]}
pytest_add_cli_args_test_selection = {[*target.tests]}
timeout_multiplier = 5.0
"""


def _copy_tracked_files(work: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, work / name, follow_symlinks=False)


def _output(work: Path, *command: str) -> str:
    return subprocess.run(command, cwd=work, check=True, capture_output=True, text=True).stdout


SHOW_ALL = """
import sys
from mutmut.__main__ import show
for mutant in sys.argv[1:]:
    show.callback(mutant)
"""


def changes_of(work: Path, mutants: list[str]) -> list[Change]:
    """What each of them changes, from its diff."""
    if not mutants:
        return []
    shown = _output(work, sys.executable, "-c", SHOW_ALL, *mutants)
    diffs = re.split(r"^# .*__mutmut_\d+: survived$", shown, flags=re.MULTILINE)[1:]
    return [_change(*pair) for pair in zip(mutants, diffs, strict=True)]


def _change(mutant: str, diff: str) -> Change:
    was, becomes = (
        " ".join(
            line.strip() for line in re.findall(rf"^\{sign}(?!\{sign})(.*)$", diff, re.MULTILINE)
        )
        for sign in "-+"
    )
    function = mutant.rpartition(".")[2].rpartition("__mutmut_")[0]
    return Change(function.removeprefix("x").lstrip("_").replace("ǁ", ".").strip("."), was, becomes)


def in_text_only(change: Change) -> bool:
    """It changes what a message or a log says, or a name in upper case that means the same."""
    if change.was.startswith("logger."):
        return True
    literal = r"\"[^\"]*\"|'[^']*'"
    was, becomes = (re.sub(literal, "''", text) for text in (change.was, change.becomes))
    return was == becomes


def weakens_an_assertion(change: Change) -> bool:
    """It lets `zip` accept what is not as long; that it is as long is never in doubt."""
    was, becomes = (re.sub(r",\s*(strict=\w+)?\s*(\)|$)", ")", text) for text in change[1:])
    return was == becomes and "strict=True" in change.was


def on_gpus_only(change: Change) -> bool:
    """It changes how something gets to a GPU or back, or where it is; here all is on the CPU."""
    where = r"[\s,]|(non_blocking|device)=[\w.]+|\"cpu\"|(?<=\.to\()None"
    was, becomes = (re.sub(where, "", text) for text in (change.was, change.becomes))
    return was == becomes or "torch.cuda." in change.was


def kind_of(change: Change, equivalent: set[Change]) -> str:
    """What there is to say of a mutant that has survived."""
    if in_text_only(change):
        return "in text only"
    if change in equivalent or weakens_an_assertion(change):
        return "equivalent"
    return "on GPUs only" if on_gpus_only(change) else "survived"


def listed_as_equivalent() -> set[Change]:
    entries = yaml.safe_load(EQUIVALENT.read_text("utf-8"))
    return {Change(x["function"], x["was"], x["becomes"]) for x in entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("modules", nargs="*", help=", ".join(TARGETS))
    parser.add_argument("--children", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    arguments = parser.parse_args()
    if unknown := {*arguments.modules} - TARGETS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    equivalent = listed_as_equivalent()
    left = 0
    for name in arguments.modules or TARGETS:
        outcomes = mutate(name, arguments.children, resume=arguments.resume)
        alive = [mutant for mutant, outcome in outcomes.items() if outcome == "survived"]
        changes = changes_of(WORK / name, alive)
        kinds = [kind_of(change, equivalent) for change in changes]
        real = [change for change, kind in zip(changes, kinds, strict=True) if kind == "survived"]
        left += len(real)
        counts = Counter(x for x in outcomes.values() if x != "survived") + Counter(kinds)
        print(
            f"{name}: {len(outcomes)} mutants, " + ", ".join(f"{n} {x}" for x, n in counts.items())
        )
        for change in real:
            print(f"  {change.function}\n    - {change.was}\n    + {change.becomes}")
    sys.exit(left > 0)


if __name__ == "__main__":
    main()
