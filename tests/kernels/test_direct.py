"""Launches by a handle are those that Triton would make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kvmesh.kernels.direct import BoundKernel, BoundKernels, BoundLaunch, BoundLaunches

GRID = (3, 2, 1)


class Pair(NamedTuple):
    ids: torch.Tensor
    starts: torch.Tensor


class Handle:
    def __init__(self, launches: list[Any]) -> None:
        self._launches = launches

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments: self._launches.append(("handle", grid, arguments))


class Kernel:
    """As Triton's: it returns a handle, or nothing if it is interpreted."""

    def __init__(self, *, interpreted: bool = False) -> None:
        self.launches: list[Any] = []
        self._handle = None if interpreted else Handle(self.launches)

    def __getitem__(self, grid: object) -> Callable[..., Handle | None]:
        def launch(*arguments: object, **options: object) -> Handle | None:
            self.launches.append((options, grid, arguments))
            return self._handle

        return launch

    @property
    def by_handle(self) -> list[bool]:
        return [how == "handle" for how, _, _ in self.launches]


def test_later_launches_pass_the_same_arguments_as_addresses() -> None:
    kernel = Kernel()
    pair, x, y = Pair(torch.zeros(4), torch.zeros(5)), torch.zeros(16), torch.ones(16)
    bound = BoundKernel(kernel, (pair, 7, 0.5, "form"), {"num_warps": 4})
    bound(GRID, x, y)
    bound(GRID, y, x)
    through_triton, by_handle = kernel.launches
    assert through_triton == ({"num_warps": 4}, GRID, (x, y, pair, 7, 0.5, "form"))
    addresses = (pair.ids.data_ptr(), pair.starts.data_ptr())
    assert by_handle == (
        "handle",
        GRID,
        (y.data_ptr(), x.data_ptr(), addresses, 7, 0.5, "form"),
    )


def test_another_variant_is_looked_up_once() -> None:
    kernel = Kernel()
    bound = BoundKernel(kernel, (), {})
    aligned = torch.zeros(16)
    tensors = (aligned, aligned[1:], aligned.to(torch.bfloat16))
    for x in (*tensors, *tensors, aligned[2:]):
        bound(GRID, x)
    assert kernel.by_handle == [False] * 3 + [True] * 3 + [False]


def test_an_interpreted_kernel_is_always_launched_by_triton() -> None:
    kernel = Kernel(interpreted=True)
    bound = BoundKernel(kernel, (1,), {})
    x = torch.zeros(4)
    for _ in range(3):
        bound(GRID, x)
    assert kernel.launches == [({}, GRID, (x, 1))] * 3


def test_launches_of_the_same_tensors_each_take_some_of_them() -> None:
    first, second = Kernel(), Kernel()
    launches = BoundLaunches(
        [
            BoundLaunch(first, (7,), {}, GRID, slice(0, 2)),
            BoundLaunch(second, (8,), {}, (1, 1, 1), slice(2, 3)),
        ]
    )
    x, y, z = torch.zeros(16), torch.ones(16), torch.zeros(32)
    launches(x, y, z[:16])
    launches(y, x, z[16:])
    assert first.launches == [
        ({}, GRID, (x, y, 7)),
        ("handle", GRID, (y.data_ptr(), x.data_ptr(), 7)),
    ]
    assert second.launches[1] == ("handle", (1, 1, 1), (z[16:].data_ptr(), 8))
    for _ in range(2):
        launches(x, y, z[1:])  # another variant
    for kernel in (first, second):
        assert kernel.by_handle == [False, True, False, True]


def test_launches_of_interpreted_kernels_are_triton_s() -> None:
    kernel = Kernel(interpreted=True)
    launches = BoundLaunches([BoundLaunch(kernel, (1,), {}, GRID, slice(0, 1))])
    for _ in range(2):
        launches(torch.zeros(16))
    assert kernel.by_handle == [False, False]


def test_launches_are_kept_by_their_fixed_arguments_until_the_driver_changes() -> None:
    kernel = Kernel()
    kernels = BoundKernels(kernel, num_warps=2)
    assert kernels[1, 2] is kernels[1, 2]
    assert kernels[1, 2] is not kernels[2, 2]
    for _ in range(2):
        kernels[1, 2](GRID, torch.zeros(4))
    BoundKernels.forget_handles()
    kernels[1, 2](GRID, torch.zeros(4))
    assert kernel.by_handle == [False, True, False]
