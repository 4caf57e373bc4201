"""Threads for compiled loops, which release the interpreter.

They wait without using a CPU, unlike OpenMP's between two parallel regions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise

import torch


@cache
def loop_threads() -> ThreadPoolExecutor:
    """The process's threads for compiled loops."""
    return ThreadPoolExecutor(thread_name_prefix="kvmesh-loop")


def in_parts(count: int, max_parts: int, work: Callable[[int, int], object]) -> None:
    """work(first, end) for ranges that make up [0, count), one on each of torch's threads.

    max_parts: how many are worth a thread
    """
    parts = max(1, min(torch.get_num_threads(), max_parts, count))
    ends = [count * (part + 1) // parts for part in range(parts)]
    in_ranges([*pairwise((0, *ends))], work)


def in_ranges(ranges: Sequence[tuple[int, int]], work: Callable[[int, int], object]) -> None:
    """work(first, end) for each range, the first one in this thread.

    It returns, and raises what one of them raised, when all have ended: loops have the addresses of
    memory that callers may free then.
    """
    others = [loop_threads().submit(work, *each) for each in ranges[1:]]
    try:
        work(*ranges[0])
    finally:
        wait(others)
    for other in others:
        other.result()
