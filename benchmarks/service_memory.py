"""What a running service takes: `kvmesh serve`, by process.

    python -m benchmarks.service_memory [--rounds N] [--json FILE] [-- OPTION …]

Each round starts the service, waits until it is ready, makes a few requests, looks at its
processes five seconds later, and stops it again. Reported are medians over the rounds, by kind of
process:

  PSS     its memory, with a share of what it has in common with others, also with other programs
  USS     what would be free without it
  alone   of all together: what their PSS would be if no other program had the same files in memory
  CPU s   of all processes from the start to ready, also of those that have ended

OPTION: more of `kvmesh serve`, such as --model or --set engine.tp=2
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.control_plane.__main__ import HERE, commit_of, conditions
from benchmarks.control_plane.processes import kind_of
from kvmesh.client import Client, Message

RESULTS = HERE / "benchmarks" / "results" / "service_memory.json"
MIB = 1 << 20
SETTLE_S = 5.0
COMMAND_LINE = "command line"
# Of the rest, by the titles of processes or by their command lines.
_PARTS_OF_RAY = (
    ("Serve's controller", re.compile(r"ray::ServeController\b")),
    ("Serve's proxies", re.compile(r"ray::(ProxyActor|HAProxyManager)\b")),
    ("idle workers", re.compile(r"ray::IDLE")),
    ("GCS", re.compile(r"/gcs_server ")),
    ("raylet", re.compile(r"/raylet ")),
    ("Ray's agents", re.compile(r"DashboardAgent|RuntimeEnvAgent|/agent/main\.py|/agent\.py")),
    ("Ray's dashboard", re.compile(r"/dashboard\.py|dashboard")),
    ("Ray's monitors", re.compile(r"monitor\.py")),
    ("chat templates", re.compile(r"template_process")),
)

console = Console(stderr=True)


def part_of(title: str) -> str:
    """What a process of the service is, by its title or its command line."""
    kind = kind_of(title)
    if kind != "rest":
        return kind
    return next((name for name, pattern in _PARTS_OF_RAY if pattern.search(title)), "others")


@dataclass(frozen=True, slots=True)
class Round:
    """Bytes by kind of process, how many there are of each, and the CPU time of the start."""

    pss: Counter[str]
    uss: Counter[str]
    processes: Counter[str]
    alone: int
    start_cpu_s: float


def measure(options: Sequence[str]) -> Round:
    """One start of the service, with requests."""
    with running(options) as (service, target):
        start_cpu_s = cpu_s(service)
        with Client(target) as client:
            for prompt in ("Once upon a time", "The sea at night is"):
                client.generate(prompt, max_tokens=64, ignore_eos=True)
            client.chat([Message("user", "Why is the sky blue?")], max_tokens=32)
        time.sleep(SETTLE_S)
        processes = [service, *service.children(recursive=True)]
        found = Round(
            Counter(), Counter(), Counter(), alone_bytes([x.pid for x in processes]), start_cpu_s
        )
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                memory = process.memory_full_info()
                title = " ".join(process.cmdline())
                part = COMMAND_LINE if process == service else part_of(title)
                found.pss[part] += memory.pss
                found.uss[part] += memory.uss
                found.processes[part] += 1
        return found


@contextlib.contextmanager
def running(options: Sequence[str]) -> Iterator[tuple[psutil.Process, str]]:
    """A service that is ready, on free ports and without keys, and where it listens."""
    command = [sys.executable, "-c", "from kvmesh.cluster.cli import main; main()", "serve"]
    command += ["--port", "0", "--http-port", "0", "--auth", "none", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            line = service.stdout.readline()
            if not line.startswith("ready at "):
                raise SystemExit(f"the service did not start; it said {line!r}")
            yield psutil.Process(service.pid), line.split()[2]
        finally:
            service.terminate()


def cpu_s(service: psutil.Process) -> float:
    """CPU seconds of its processes, and of their children that have ended."""
    total = 0.0
    for process in (service, *service.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    return total


_MAPPING = re.compile(r"^(\w+)-(\w+) \S+ (\w+) (\S+) (\d+)", re.MULTILINE)
_PRESENT, _OF_FILE = np.uint64(1 << 63), np.uint64(1 << 61)  # proc_pid_pagemap(5)


def alone_bytes(processes: Sequence[int]) -> int:
    """What is theirs, and each page once that they have mapped of a file."""
    anonymous = 0
    of_files: dict[tuple[str, str], set[int]] = {}
    page_size = mmap.PAGESIZE
    for process in processes:
        directory = Path(f"/proc/{process}")
        with contextlib.suppress(OSError), (directory / "pagemap").open("rb") as pagemap:
            rollup = (directory / "smaps_rollup").read_text()
            anonymous += int(rollup.partition("Pss_Anon:")[2].split()[0]) << 10
            for first, end, offset, device, inode in _MAPPING.findall(
                (directory / "maps").read_text()
            ):
                if inode != "0":
                    start, stop = int(first, 16) // page_size, int(end, 16) // page_size
                    pagemap.seek(start * 8)
                    entries = np.frombuffer(pagemap.read((stop - start) * 8), dtype=np.uint64)
                    mapped = ((entries & _PRESENT) != 0) & ((entries & _OF_FILE) != 0)
                    numbers = np.flatnonzero(mapped) + int(offset, 16) // page_size
                    of_files.setdefault((device, inode), set()).update(numbers.tolist())
    return anonymous + page_size * sum(map(len, of_files.values()))


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians, in MiB; kinds of process with the most memory first."""

    def median_mib(counts: list[int]) -> float:
        return round(statistics.median(counts) / MIB, 1)

    parts = dict.fromkeys(part for each in rounds for part in each.pss)
    by_part = {
        part: {
            "pss_mib": median_mib([each.pss[part] for each in rounds]),
            "uss_mib": median_mib([each.uss[part] for each in rounds]),
            "processes": max(each.processes[part] for each in rounds),
        }
        for part in parts
    }
    totals = [each.pss.total() / MIB for each in rounds]
    return {
        "pss_mib": round(statistics.median(totals), 1),
        "alone_mib": median_mib([each.alone for each in rounds]),
        "pss_mib_of_rounds": [round(total, 1) for total in totals],
        "start_cpu_s": round(statistics.median(each.start_cpu_s for each in rounds), 2),
        "parts": dict(sorted(by_part.items(), key=lambda item: -item[1]["pss_mib"])),
    }


def table_of(found: dict[str, Any]) -> Table:
    table = Table(title="memory of kvmesh serve, MiB")
    table.add_column("")
    for name in ("processes", "PSS", "USS"):
        table.add_column(name, justify="right")
    for part, row in found["parts"].items():
        figures = (f"{row[name]:.0f}" for name in ("processes", "pss_mib", "uss_mib"))
        table.add_row(part, *figures)
    table.add_section()
    table.add_row("all", "", f"{found['pss_mib']:.0f}", "")
    table.add_row("alone", "", f"{found['alone_mib']:.0f}", "")
    table.caption = f"{found['start_cpu_s']:.1f} s of CPU from the start to ready"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help=f"such as {RESULTS.relative_to(HERE)}")
    parser.add_argument("options", nargs="*", help="of kvmesh serve")
    arguments = parser.parse_args()
    rounds = []
    for number in range(arguments.rounds):
        console.log(f"round {number + 1} of {arguments.rounds}")
        rounds.append(measure(arguments.options))
    found = {**conditions(), "commit": commit_of(HERE), **summary(rounds)}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    Console().print(table_of(found))


if __name__ == "__main__":
    main()
