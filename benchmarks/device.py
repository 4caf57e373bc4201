"""The GPU that a benchmark runs on: its clock, its bandwidth, its conditions.

Without a GPU the same functions run on the CPU, so that a benchmark's logic can be tested;
their times mean nothing there.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COPY_BYTES = 2**31 if DEVICE == "cuda" else 2**20
ROUNDS = 15 if DEVICE == "cuda" else 1


def seconds(step: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median time of one call; the launches are captured, so that host time does not count."""
    if DEVICE == "cpu":
        return statistics.median(_seconds_of(step) for _ in range(rounds))
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    times: list[float] = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _seconds_of(step: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    step()
    return time.perf_counter() - start_s


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def free_bytes() -> int | None:
    """Memory that the device can still allocate, or None if memory is not the limit.

    First releases unused memory, including that of graphs in reference cycles.
    """
    gc.collect()
    if DEVICE == "cpu":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def clocks() -> str:
    """Clocks of processors and memory, power drawn and allowed, according to nvidia-smi."""
    if DEVICE == "cpu":
        return ""
    query = "--query-gpu=clocks.sm,clocks.mem,power.draw,power.limit"
    here = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
    for where in ([here], []):  # nvidia-smi does not accept the UUID of a part of a GPU
        done = subprocess.run(
            ["nvidia-smi", *where, query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return done.stdout.strip()
    return "unknown"


def conditions() -> dict[str, Any]:
    """The conditions of a measurement, recorded with its figures."""
    on_gpu = DEVICE == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "capability": list(torch.cuda.get_device_capability()) if on_gpu else None,
        "clocks": clocks(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def _cpu_name() -> str:
    """The name in Linux, and how many of its cores this process may use."""
    name = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
