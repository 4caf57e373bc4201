"""Finding and ending the processes that a cluster has started."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import signal
import sys
from collections.abc import Collection

import psutil

from kvmesh.workers.freed_memory import return_memory

FULL_COLLECTION_S = 60.0
_NEVER = 1 << 30  # a threshold of the garbage collector
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose parent dies (Linux only).

    Otherwise init would become their parent, and they could no longer be found.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(keep: frozenset[int], timeout_s: float = 3.0) -> list[str]:
    """Terminate, then kill, every descendant except those in `keep`. Returns their names.

    keep: process ids of descendants that were there before
    """
    me = psutil.Process()
    ended: list[str] = []
    for kill in (False, True):
        left = [child for child in me.children(recursive=True) if child.pid not in keep]
        for child in left:
            with contextlib.suppress(psutil.Error):
                ended.append(child.name())
                child.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        # This also reaps the orphans that this process has adopted.
        psutil.wait_procs(left, timeout=timeout_s)
    return ended


def children_named(names: Collection[str], keep: frozenset[int]) -> dict[str, psutil.Process]:
    """Direct children of this process by the names of their executables, except those in `keep`.

    keep: process ids of descendants that were there before, some of them dead perhaps
    """
    found: dict[str, psutil.Process] = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.pid not in keep and child.name() in names:
                found[child.name()] = child
    return found


def is_dead(process: psutil.Process) -> bool:
    """Whether it has ended, even if nobody has waited for it yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def settle(collect_s: float = FULL_COLLECTION_S) -> None:
    """Call on the event loop when a process of the control plane has started.

    What it has made so far stays, and the garbage collector no longer walks it, which takes it a
    tenth of a second. All that is made later it walks at regular times, and not whenever many
    requests have come: with hundreds of streams that takes tens of milliseconds, in which no
    stream continues, and finds little, as requests leave no cycles behind. What the start took and
    freed, up to 30 MB for a tokenizer, is given back.

    collect_s: between two full collections
    """
    gc.collect()
    gc.freeze()
    return_memory()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _NEVER)
    loop = asyncio.get_running_loop()

    def collect() -> None:
        gc.collect()
        loop.call_later(collect_s, collect)

    loop.call_later(collect_s, collect)


def descendants() -> frozenset[int]:
    """Process ids of all descendants of this process."""
    return frozenset(child.pid for child in psutil.Process().children(recursive=True))
