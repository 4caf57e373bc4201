"""Memory that a process has freed, and its C library keeps."""

from __future__ import annotations

import ctypes


def return_memory() -> None:
    """Give the memory that was freed back to the system, which glibc does not by itself.

    Call it after what took much. It takes milliseconds, in which other threads run.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries have none
        trim(0)
