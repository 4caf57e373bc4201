"""Finding and ending the processes that a cluster has started."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import signal
import sys
from collections.abc import Collection

import psutil

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


def children_named(names: Collection[str]) -> dict[str, psutil.Process]:
    """Direct children of this process by the names of their executables."""
    found: dict[str, psutil.Process] = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() in names:
                found[child.name()] = child
    return found


def is_dead(process: psutil.Process) -> bool:
    """Whether it has ended, even if nobody has waited for it yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def settle() -> None:
    """Call when a process of the control plane has started: what it has made so far stays.

    The garbage collector then no longer walks it, which takes it a tenth of a second.
    """
    gc.collect()
    gc.freeze()


def return_memory() -> None:
    """Give the memory that was freed back to the system, which glibc does not by itself.

    Call it after what took much. It takes milliseconds, in which other threads run.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries have none
        trim(0)


def descendants() -> frozenset[int]:
    """Process ids of all descendants of this process."""
    return frozenset(child.pid for child in psutil.Process().children(recursive=True))
