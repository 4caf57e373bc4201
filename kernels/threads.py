"""Threads for compiled loops, which release the interpreter.

They wait without using a CPU, unlike OpenMP's between two parallel regions.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    others = [loop_threads().submit(work, first, end) for first, end in pairwise(ends)]
    work(0, ends[0])
    for other in others:
        other.result()
