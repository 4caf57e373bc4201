"""Threads for compiled loops, which release the interpreter.

They wait without using a CPU, unlike OpenMP's between two parallel regions.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache


@cache
def loop_threads() -> ThreadPoolExecutor:
    """The process's threads for compiled loops."""
    return ThreadPoolExecutor(thread_name_prefix="kvmesh-loop")
