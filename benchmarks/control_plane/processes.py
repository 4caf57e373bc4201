"""The cluster's processes by what they are, and what they have cost so far."""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import psutil

# By the title that Ray gives a process, or its command line.
_KINDS = (
    ("ingress", re.compile(r"ServeReplica:\w+:ingress\b")),
    ("router", re.compile(r"ServeReplica:\w+:router\b")),
    ("leader", re.compile(r"ServeReplica:\w+:engine-\d+\b")),
    ("haproxy", re.compile(r"(^|/)haproxy\b")),
)
KINDS = (*(name for name, _ in _KINDS), "rest")


def kind_of(title: str) -> str:
    """One of KINDS; `rest` is Ray itself, Serve's controller and its helpers."""
    program = title.partition(" -")[0]
    return next((name for name, pattern in _KINDS if pattern.search(program)), "rest")


@dataclass(slots=True)
class CpuTimes:
    """CPU seconds since the processes began.

    by_kind: of all processes of a kind
    by_thread: of each thread of the leader
    busy: of the whole machine
    """

    by_kind: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    by_thread: dict[int, float] = field(default_factory=dict)
    busy: float = 0.0

    def since(self, before: CpuTimes) -> CpuTimes:
        return CpuTimes(
            defaultdict(float, {kind: self.by_kind[kind] - before.by_kind[kind] for kind in KINDS}),
            {
                thread: seconds - before.by_thread.get(thread, 0.0)
                for thread, seconds in self.by_thread.items()
            },
            self.busy - before.busy,
        )


class ClusterProcesses:
    """Descendants of this process, except those in `others`."""

    def __init__(self, others: frozenset[int]) -> None:
        self._kinds: list[tuple[psutil.Process, str]] = []
        for process in psutil.Process().children(recursive=True):
            if process.pid in others:
                continue
            with contextlib.suppress(psutil.Error):
                self._kinds.append((process, kind_of(" ".join(process.cmdline()))))
        self.counts = Counter(kind for _, kind in self._kinds)
        if missing := set(KINDS) - set(self.counts):
            raise RuntimeError(
                f"no process of the cluster is {' or '.join(sorted(missing))} by its title; "
                "processes.py must know how it is called now"
            )

    def cpu_times(self) -> CpuTimes:
        times = CpuTimes(busy=_busy())
        for process, kind in self._kinds:
            with contextlib.suppress(psutil.NoSuchProcess):
                spent = process.cpu_times()
                times.by_kind[kind] += spent.user + spent.system
                if kind == "leader":
                    for thread in process.threads():
                        times.by_thread[thread.id] = thread.user_time + thread.system_time
        return times

    def memory_bytes(self) -> dict[str, dict[str, int]]:
        """RSS and PSS by kind; shared pages count once in PSS, once a process in RSS."""
        memory: dict[str, Counter[str]] = {"rss": Counter(), "pss": Counter()}
        for process, kind in self._kinds:
            with contextlib.suppress(psutil.NoSuchProcess):
                found = process.memory_full_info()
                memory["rss"][kind] += found.rss
                memory["pss"][kind] += found.pss
        return {name: dict(by_kind) for name, by_kind in memory.items()}


def _busy() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)
