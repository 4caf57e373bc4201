"""The cluster's processes by kind, and their CPU time and memory."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

# By the title that Ray gives a process, or its command line.
_KINDS = (
    ("ingress", re.compile(r"ServeReplica:\w+:ingress\b")),
    ("router", re.compile(r"ServeReplica:\w+:router\b")),
    ("leader", re.compile(r"ServeReplica:\w+:engine-\d+\b")),
    ("haproxy", re.compile(r"(^|/)haproxy\b")),
    ("rank", re.compile(r"ray::RankActor\b")),
)
KINDS = (*(name for name, _ in _KINDS), "rest")


def kind_of(title: str) -> str:
    """One of KINDS; `rest` is Ray itself and Serve's controller and proxies."""
    program = title.partition(" -")[0]
    return next((name for name, pattern in _KINDS if pattern.search(program)), "rest")


@dataclass(slots=True)
class CpuTimes:
    """CPU seconds since each process began.

    by_process: (kind, seconds) by process id
    by_thread: of each thread of the leader
    busy: of the whole machine
    """

    by_process: dict[int, tuple[str, float]]
    by_thread: dict[int, float]
    busy: float


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU seconds between two CpuTimes. Processes that ended in between are not counted."""

    by_kind: dict[str, float]
    by_thread: dict[int, float]
    busy: float


def spent_between(before: CpuTimes, after: CpuTimes) -> Spent:
    by_kind = dict.fromkeys(KINDS, 0.0)
    for pid, (kind, seconds) in after.by_process.items():
        by_kind[kind] += seconds - before.by_process.get(pid, (kind, 0.0))[1]
    by_thread = {
        thread: seconds - before.by_thread.get(thread, 0.0)
        for thread, seconds in after.by_thread.items()
    }
    return Spent(by_kind, by_thread, after.busy - before.busy)


class ClusterProcesses:
    """Descendants of this process, except those in `others` and their children."""

    def __init__(self, others: frozenset[int]) -> None:
        self._others = others
        # There are no ranks where the leader answers in their place.
        if missing := set(KINDS) - {"rank"} - set(self.counts()):
            raise RuntimeError(
                f"no process of the cluster has the title of {' or '.join(sorted(missing))}; "
                "update the patterns in processes.py"
            )

    def counts(self) -> dict[str, int]:
        """How many there are of each kind."""
        return dict(Counter(kind for _, kind in self._found()))

    def cpu_times(self) -> CpuTimes:
        times = CpuTimes({}, {}, _busy())
        for process, kind in self._found():
            with contextlib.suppress(psutil.Error):
                used = process.cpu_times()
                times.by_process[process.pid] = kind, used.user + used.system
                if kind == "leader":
                    for thread in process.threads():
                        times.by_thread[thread.id] = thread.user_time + thread.system_time
        return times

    def of_kind(self, kind: str) -> list[int]:
        """Their process ids."""
        return [process.pid for process, found in self._found() if found == kind]

    def memory_bytes(self) -> dict[str, dict[str, int]]:
        """RSS and PSS by kind; RSS counts shared pages once for each process."""
        memory: dict[str, Counter[str]] = {"rss": Counter(), "pss": Counter()}
        for process, kind in self._found():
            with contextlib.suppress(psutil.Error):
                found = process.memory_full_info()
                memory["rss"][kind] += found.rss
                memory["pss"][kind] += found.pss
        return {name: dict(by_kind) for name, by_kind in memory.items()}

    def reset_peaks(self) -> None:
        """Forget the processes' peaks of resident memory (Linux, proc(5): clear_refs)."""
        for process, _ in self._found():
            with contextlib.suppress(OSError):
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")

    def peak_bytes(self) -> dict[str, int]:
        """The largest resident memory of a process of each kind, now or since `reset_peaks`."""
        peaks: Counter[str] = Counter()
        for process, kind in self._found():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
                if found is not None:  # a process that ends has none
                    peaks[kind] = max(peaks[kind], int(found[1]) << 10)
        return dict(peaks)

    def _found(self) -> Iterator[tuple[psutil.Process, str]]:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if not self._others & {process.pid, process.ppid()}:
                    yield process, kind_of(" ".join(process.cmdline()))


def _busy() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)
