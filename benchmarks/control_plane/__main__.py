"""What the path itself costs: everything is real but the ranks, which answer at once.

    python -m benchmarks.control_plane [--baseline CHECKOUT] [--rounds N] [--seconds S]
                                       [--ingress N [N ...]] [--json FILE]

Each round starts a cluster of this checkout, measures it and stops it, then does the same with
the baseline. One group, closed-loop clients, 32 prompt and 256 output tokens; every output token
is checked:

  idle        one stream at a time                   time to first token
  64, 256     streams; steps take 0.1 ms             tokens/s, CPU per token, health checks
  short       64 streams of one token                CPU per request, its tokens excluded
  64_paced, 256_paced   steps take 20 ms             the same, and time to first token

CPU per token is all CPU time of the window divided by its tokens, so requests are included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.control_plane.costs import medians, ratios, rounded

console = Console(stderr=True)
HERE = Path(__file__).parents[2].absolute()
RESULTS = HERE / "benchmarks" / "results" / "control_plane.json"
SIDE_TIMEOUT_S = 1800.0


def environment_of(checkout: Path, directory: Path, environ: dict[str, str]) -> dict[str, str]:
    """The environment of a side: the checkout's `kvmesh` next to our `benchmarks`.

    directory: empty, and the side's working directory; a link in it stands for the checkout,
        because the checkout itself would bring its own `benchmarks`. Ray's workers
        inherit the path.
    """
    (directory / "kvmesh").symlink_to(checkout / "kvmesh")
    return {
        **environ,
        "PYTHONPATH": os.pathsep.join([str(directory), str(HERE)]),
        "XDG_CONFIG_HOME": str(directory / "config"),
    }


def measure_once(checkout: Path, ingress: int, seconds: float) -> dict[str, Any]:
    """One cluster of `checkout`, in a process of its own; see side.py."""
    with tempfile.TemporaryDirectory(prefix="kvmesh-bench-") as name:
        directory = Path(name)
        output = directory / "figures.json"
        command = [sys.executable, "-m", "benchmarks.control_plane.side", str(output)]
        command += ["--ingress", str(ingress), "--seconds", str(seconds)]
        done = subprocess.run(
            command,
            cwd=directory,
            env=environment_of(checkout, directory, dict(os.environ)),
            stderr=subprocess.PIPE,
            text=True,
            timeout=SIDE_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0 or not output.exists():
            raise SystemExit(f"the run of {checkout} failed:\n{done.stderr}")
        figures: dict[str, Any] = json.loads(output.read_text())
        return figures


def measure(
    checkouts: dict[str, Path], rounds: int, ingress: Sequence[int], seconds: float
) -> dict[str, Any]:
    """Alternating rounds of all checkouts, by the number of ingress processes."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        f"ingress_{count}": {name: [] for name in checkouts} for count in ingress
    }
    for number in range(rounds):
        for count in ingress:
            for name, checkout in checkouts.items():
                console.log(f"round {number + 1} of {rounds}: {name}, {count} ingress")
                figures = measure_once(checkout, count, seconds)
                found[f"ingress_{count}"][name].append(figures)
    return {key: _summary(sides) for key, sides in found.items()}


def _summary(sides: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        name: {"median": rounded(medians(each)), "rounds": [rounded(one) for one in each]}
        for name, each in sides.items()
    }
    if "baseline" in sides:
        summary["ratio"] = rounded(ratios(sides["this"], sides["baseline"]))
    return summary


def commit_of(checkout: Path) -> str:
    """Its commit, marked if the measured files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "cluster", "workers", "client", "protos")
    return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")


def conditions() -> dict[str, Any]:
    processor = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "device": f"{processor}, {len(os.sched_getaffinity(0))} cores",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in ("ray", "grpcio", "protobuf")},
    }


# Path of a figure in a side's result, its label, and the factor to its unit.
ROWS: tuple[tuple[str, str, float], ...] = (
    ("phases.64.tokens_per_s", "tokens/s, 64 streams", 1),
    ("phases.256.tokens_per_s", "tokens/s, 256 streams", 1),
    ("phases.64_paced.tokens_per_s", "tokens/s, 64 streams, 20 ms steps, of 3,200", 1),
    ("phases.256_paced.tokens_per_s", "tokens/s, 256 streams, 20 ms steps, of 12,800", 1),
    *(
        (f"phases.{phase}.cpu_us_per_token.{part}", f"µs CPU per token, {phase}: {part}", 1.0)
        for phase in ("64", "64_paced", "256_paced")
        for part in (
            *("ingress", "leader", "leader_engine", "leader_loop", "router", "haproxy", "rest"),
        )
    ),
    ("phases.64.executor_us_per_token", "of leader_engine: the ranks' replacement", 1),
    ("phases.64.tokens_per_message", "tokens per message, 64", 1),
    ("phases.64_paced.tokens_per_message", "tokens per message, 64_paced", 1),
    ("phases.256_paced.tokens_per_message", "tokens per message, 256_paced", 1),
    ("per_request_us.ingress", "µs CPU per request: ingress", 1),
    ("per_request_us.router", "µs CPU per request: router", 1),
    ("per_request_us.leader", "µs CPU per request: leader", 1),
    ("phases.idle.first_token_s", "ms to first token, idle", 1e3),
    ("phases.64_paced.first_token_s", "ms to first token, 64_paced", 1e3),
    ("phases.256_paced.first_token_s", "ms to first token, 256_paced", 1e3),
    ("phases.256.health_max_s", "ms of the slowest health check, 256", 1e3),
    ("phases.256_paced.health_max_s", "ms of the slowest health check, 256_paced", 1e3),
    ("start_s", "s from start to ready", 1),
    ("memory_bytes.rss", "MB RSS of all processes", 1e-6),
    ("memory_bytes.pss", "MB PSS of all processes", 1e-6),
    ("processes", "processes", 1),
)


def figure(side: dict[str, Any], path: str) -> float | None:
    """The figure at a dotted path; a mapping gives the sum of its numbers."""
    found: Any = side
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return float(sum(found.values())) if isinstance(found, dict) else found


def show(results: dict[str, Any]) -> None:
    for key, summary in results.items():
        table = Table(title=key)
        table.add_column("median")
        names = [name for name in ("baseline", "this") if name in summary]
        for name in names:
            table.add_column(name, justify="right")
        for path, label, factor in ROWS:
            cells = [figure(summary[name]["median"], path) for name in names]
            table.add_row(label, *("" if c is None else f"{c * factor:,.4g}" for c in cells))
        Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--baseline", type=Path, help="another checkout to compare with, in alternating rounds"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each window")
    parser.add_argument("--ingress", type=int, nargs="+", default=[1], help="ingress processes")
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    checkouts = {"this": HERE}
    if arguments.baseline is not None:
        checkouts["baseline"] = arguments.baseline.absolute()
    report = {
        **conditions(),
        "commits": {name: commit_of(checkout) for name, checkout in checkouts.items()},
        "seconds": arguments.seconds,
        "results": measure(checkouts, arguments.rounds, arguments.ingress, arguments.seconds),
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report["results"])


if __name__ == "__main__":
    main()
