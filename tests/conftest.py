"""Setup for all tests, before anything imports torch or Triton for the first time.

Waiting threads sleep instead of spinning, which would slow a shared machine tenfold. Compiled loops
are kept on disk, like those of engines, so that one process compiles for all. Without a GPU the
Triton kernels run in Triton's interpreter, which has to be enabled before the first import of
Triton anywhere in the suite. Property tests have no deadlines: a busy machine is not a bug. The
garbage collector runs rarely: each time it would walk torch, transformers and thousands of tests.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import os
import signal
import sys
from pathlib import PurePath
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from kvmesh.workers.cache_directory import keep_compiled_loops
from kvmesh.workers.threads import wait_passively

wait_passively(os.environ)
keep_compiled_loops(os.environ)
gc.set_threshold(20_000, 20, 100)
# Shells start background jobs with Ctrl-C ignored, and commands that tests interrupt inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # there is a process for each core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.exercised import Exercised  # noqa: E402


def _has_gpu() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False  # torch, whose import takes seconds, need not be asked
    import torch

    return torch.cuda.is_available()


if not _has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"

# Without Phase.explain, which reruns a failing example for minutes to say little.
SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink)
untimed = settings(
    deadline=None,
    phases=SHRINKING,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("untimed", untimed)
# For mutation testing: the same examples in every run, and no interest in the smallest.
settings.register_profile(
    "mutants", untimed, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("untimed")

elsewhere: list[str] = []  # what property tests in other processes have exercised


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvmesh")
    group.addoption("--fuzz-cases", type=int, default=1000, help="mutated requests to send")
    group.addoption("--fuzz-seed", type=int, default=0, help="which ones")
    group.addoption(
        "--soak-minutes",
        type=float,
        default=0.0,
        help="how long the soak test loads a cluster; without this option it is skipped",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Have gRPC do nothing when a process forks: it reads that once, when it is imported.

    Ray forks to start its processes, and what gRPC does in a child, after the calls of earlier
    tests, now and then aborts it. Processes that tests start are as users start them.
    """
    if config.getoption("markexpr") == "ray":
        os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
        importlib.import_module("grpc")
        del os.environ["GRPC_ENABLE_FORK_SUPPORT"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object | None:
    """With --dist=loadgroup, tests that share a cluster stay in one process.

    pytest-xdist reads the groups of this mode from a place where pytest 9.2 has none any more.
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class ByCluster(LoadScopeScheduling):  # type: ignore[misc, unused-ignore]
        """Those of a folder; of tests/cluster/e2e itself, those of a file."""

        def _split_scope(self, nodeid: str) -> str:
            file = PurePath(nodeid.partition("::")[0])
            return str(file if file.parent.name == "e2e" else file.parent)

    return ByCluster(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Check what the tests have imported, and keep it from slowing each of them down.

    Ray reads once, when it is imported, whether it has to send tokens. Imported by a module of
    tests, it sends none to the first cluster that the tests start, and waits for that without end.
    """
    if "ray" in sys.modules:
        raise pytest.UsageError("a module of tests imports Ray: import it within a function")
    gc.freeze()
    # To loggers that do not propagate pytest adds its handlers at every test, three times each.
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in ("torch", "transformers"):
            logging.getLogger(name).propagate = True


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["exercised"] = Exercised.shown()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """One of pytest-xdist's processes has run its share of the tests."""
    elsewhere.extend(getattr(node, "workeroutput", {}).get("exercised", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := [*Exercised.shown(), *elsewhere]:
        terminalreporter.section("exercised by property tests")
        for line in sorted(lines):
            terminalreporter.write_line(line)
