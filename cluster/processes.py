"""Nothing is left behind: finding and ending the processes a cluster started."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys

import psutil

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies (Linux).

    Otherwise those would be the system's, and could no longer be told from others'.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(keep: frozenset[int], timeout_s: float = 3.0) -> list[str]:
    """End every descendant but those in `keep`: politely, then not. Names of what had to be ended.

    keep: process ids that were there before
    """
    me = psutil.Process()
    ended: list[str] = []
    for forceful in (False, True):
        left = [child for child in me.children(recursive=True) if child.pid not in keep]
        for child in left:
            with contextlib.suppress(psutil.Error):
                ended.append(child.name())
                child.send_signal(signal.SIGKILL if forceful else signal.SIGTERM)
        # Also reaps those whose parent this process has become.
        psutil.wait_procs(left, timeout=timeout_s)
    return ended


def descendants() -> frozenset[int]:
    return frozenset(child.pid for child in psutil.Process().children(recursive=True))
