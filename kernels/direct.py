"""Launching a Triton kernel by its handle, without looking its variant up again.

For every launch Triton derives from all arguments which variant of a kernel is meant: from a
tensor its dtype and whether it begins at a multiple of 16 bytes, from a number its type and
whether it is 1 or a multiple of 16. On the host that takes several times as long as a launch. A
`BoundKernel` has all arguments but a few tensors from the start, so that these alone decide on
the variant; its first launch goes through Triton, which returns the compiled kernel, and later
ones with tensors alike through that one. Triton's interpreter returns none: there every launch is
Triton's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

ALIGNMENT = 16  # of bytes, which Triton has variants for
Grid = tuple[int, int, int]


class BoundKernel:
    """A kernel with all arguments but its first ones, which are tensors."""

    __slots__ = ("_fixed", "_handles", "_kernel", "_options", "_pointers")

    def __init__(self, kernel: Any, fixed: tuple[Any, ...], options: dict[str, Any]) -> None:
        """fixed: the arguments after the tensors, by position, constants included; options: of a
        launch, such as num_warps"""
        self._kernel = kernel
        self._fixed = fixed
        self._options = options
        self._pointers: tuple[Any, ...] = ()
        self._handles: dict[Any, Any] = {}

    def __call__(self, grid: Grid, *tensors: torch.Tensor) -> None:
        """Launch it for these tensors, all on the current device."""
        pointers = [x.data_ptr() for x in tensors]
        variant = _variant(tensors, pointers)
        handle = self._handles.get(variant)
        if handle is not None:
            handle[grid](*pointers, *self._pointers)
            return
        compiled = self._kernel[grid](*tensors, *self._fixed, **self._options)
        if compiled is not None:
            self._handles[variant] = compiled
            # The driver takes addresses as they are, and asks about those of tensors.
            self._pointers = _addresses(self._fixed)


@dataclass(frozen=True, slots=True)
class BoundLaunch:
    """One of `BoundLaunches`.

    kernel, fixed, options: as of a `BoundKernel`; takes: which of the launches' tensors are its
    """

    kernel: Any
    fixed: tuple[Any, ...]
    options: dict[str, Any]
    grid: Grid
    takes: slice


class BoundLaunches:
    """Launches one after the other, which look at the tensors that they are for once."""

    __slots__ = ("_launches", "_ready")

    def __init__(self, launches: Iterable[BoundLaunch]) -> None:
        self._launches = tuple(launches)
        self._ready: dict[Any, tuple[Any, ...]] = {}

    def __iter__(self) -> Iterator[BoundLaunch]:
        return iter(self._launches)

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Launch them for these tensors, all on the current device."""
        pointers = [x.data_ptr() for x in tensors]
        variant = _variant(tensors, pointers)
        ready = self._ready.get(variant)
        if ready is None:
            self._launch_first(variant, tensors)
            return
        for run, takes, fixed in ready:
            run(*pointers[takes], *fixed)

    def _launch_first(self, variant: Any, tensors: tuple[torch.Tensor, ...]) -> None:
        """One by one, remembering how to for tensors alike."""
        found = []
        for launch in self._launches:
            arguments = (*tensors[launch.takes], *launch.fixed)
            compiled = launch.kernel[launch.grid](*arguments, **launch.options)
            if compiled is not None:
                found.append((compiled[launch.grid], launch.takes, _addresses(launch.fixed)))
        if len(found) == len(self._launches):
            self._ready[variant] = tuple(found)


class BoundKernels(dict[tuple[Any, ...], BoundKernel]):
    """A kernel's bound launches by their fixed arguments: `kernels[fixed](grid, *tensors)`. They
    are kept, so there must be few: shapes of a model, not of a batch."""

    _all: list[BoundKernels] = []  # noqa: RUF012  # every one of the process

    def __init__(self, kernel: Any, **options: Any) -> None:
        super().__init__()
        self._kernel = kernel
        self._options = options
        self._all.append(self)

    def __missing__(self, fixed: tuple[Any, ...]) -> BoundKernel:
        found = self[fixed] = BoundKernel(self._kernel, fixed, self._options)
        return found

    @classmethod
    def forget_handles(cls) -> None:
        """After a change of Triton's driver; callers hold no `BoundKernel` of before."""
        for kernels in cls._all:
            kernels.clear()


def _variant(tensors: tuple[torch.Tensor, ...], pointers: list[int]) -> tuple[Any, ...]:
    """What of tensors Triton compiles variants for, and their device."""
    return (
        tensors[0].get_device(),
        *[x.dtype for x in tensors],
        *[pointer % ALIGNMENT for pointer in pointers],
    )


def _addresses(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors, also in tuples, as their addresses."""
    return tuple(
        x.data_ptr()
        if isinstance(x, torch.Tensor)
        else _addresses(x)
        if isinstance(x, tuple)
        else x
        for x in arguments
    )
