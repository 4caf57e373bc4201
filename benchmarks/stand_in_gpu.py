"""A stand-in for an H100's Triton driver, on a machine without a GPU: it records launches.

Everything before a launch is real: the operators, the launchers, Triton's binder and its choice
of the variant to compile. Kernels do not run, so tensors (on the CPU) hold meaningless numbers.

    with StandInGpu() as gpu:
        paged_attention(q, hot, sealed, batch, ...)
    gpu.launches   [Launch(kernel="merge_kernel", grid=(4, 32, 1), ...), ...]
    gpu.compiled   names of the kernels, one for each variant that Triton asked to compile
    gpu.looked_up  names of the kernels, one for each launch whose variant Triton looked up; others
                   were made by the handle of one before (`kernels/direct.py`)

`compiles` picks what "to compile" means: nothing (the variant is only noted: a microsecond), or
for real, with ptxas. The functions of a process that set TRITON_INTERPRET cannot be used.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType, SimpleNamespace
from typing import Any, Self
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, _triton_jit_function_registry

from kvmesh.kernels import gpu as kernels_gpu
from kvmesh.kernels.attention import dense, triton_attention
from kvmesh.kernels.attention.dense import DenseAttention
from kvmesh.kernels.direct import BoundKernels
from kvmesh.workers.parallel import linears

CAPABILITY, PROCESSORS, SHARED_BYTES = 90, 132, 227 * 1024  # an H100 SXM


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel."""

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int

    @property
    def programs(self) -> int:
        x, y, z = self.grid
        return x * y * z


def _runs_kernels(_: torch.Tensor) -> bool:
    return True


class _NotedKernel(CompiledKernel):  # type: ignore[misc]
    """Of a variant that was only noted, what launches need: its handle is Triton's."""

    def __init__(self, source: Any, run: Callable[..., None]) -> None:
        self.src, self.name = source, source.fn.__name__
        self.module = self.function = 1
        self.packed_metadata = ()
        self._run = run


class StandInGpu:
    """Triton's active driver while the context lasts, and the record of what reached it.

    compiles: compile variants with ptxas instead of only noting them; they are in `kernels`
    capability: 90 for sm_90
    """

    def __init__(self, *, compiles: bool = False, capability: int = CAPABILITY) -> None:
        self.launches: list[Launch] = []
        self.compiled: list[str] = []
        self.looked_up: list[str] = []
        self.kernels: list[Any] = []
        self._capability = capability
        self._compiles = compiles
        self._stack = ExitStack()
        self.utils = SimpleNamespace(
            get_device_properties=lambda _device: {
                "multiprocessor_count": PROCESSORS,
                "max_shared_mem": SHARED_BYTES,
            },
            load_binary=lambda *_: (1, 1, 0, 0, 1024),
        )

    def __enter__(self) -> Self:
        if triton.knobs.runtime.interpret:
            raise RuntimeError(
                "TRITON_INTERPRET is set: the interpreter has no driver to stand in for"
            )
        before = driver._active
        self._stack.callback(driver.set_active, before)
        driver.set_active(self)
        kernels_gpu._gpu_of.cache_clear()
        self._stack.callback(kernels_gpu._gpu_of.cache_clear)
        # Functions remember the driver's target and their variants from their first launch on.
        for function in _triton_jit_function_registry.values():
            function.device_caches.clear()
        BoundKernels.forget_handles()
        self._stack.enter_context(mock.patch.object(JITFunction, "run", self._run()))
        self._stack.enter_context(mock.patch.object(triton.compiler, "compile", self._compile))
        # A function, as calls of a mock are host work of their own.
        self._stack.enter_context(mock.patch.object(kernels_gpu, "runs_kernels", _runs_kernels))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for function in _triton_jit_function_registry.values():
            function.device_caches.clear()
        BoundKernels.forget_handles()

    def clear(self) -> None:
        """Forget the record, not the variants."""
        self.launches.clear()
        self.compiled.clear()
        self.looked_up.clear()

    def _run(self) -> Callable[..., Any]:
        run, looked_up = JITFunction.run, self.looked_up

        def run_and_note(function: Any, *args: Any, **kwargs: Any) -> Any:
            looked_up.append(function.fn.__name__)
            return run(function, *args, **kwargs)

        return run_and_note

    # What Triton asks of a driver.

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return self._launcher(source.fn.__name__, metadata.num_warps)

    def _launcher(self, name: str, num_warps: int) -> Callable[..., None]:
        record = self.launches

        def launch(x: int, y: int, z: int, *_: object) -> None:
            if 0 in (x, y, z):
                raise RuntimeError(f"{name} was launched with an empty grid {x, y, z}")
            record.append(Launch(name, (x, y, z), num_warps))

        return launch

    _real_compile = staticmethod(triton.compiler.compile)

    def _compile(self, source: Any, target: GPUTarget, options: dict[str, Any]) -> Any:
        name = source.fn.__name__
        self.compiled.append(name)
        if self._compiles:
            self.kernels.append(self._real_compile(source, target=target, options=options))
            return self.kernels[-1]
        return _NotedKernel(source, self._launcher(name, options["num_warps"]))


_FREE = frozenset(
    {
        "_unsafe_view",
        "alias",
        "as_strided",
        "chunk",
        "detach",
        "diagonal",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "lift_fresh",
        "new_empty",
        "numpy_T",
        "permute",
        "reshape",
        "resolve_conj",
        "resolve_neg",
        "select",
        "set_",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unfold",
        "unsqueeze",
        "view",
    }
)
_READS = ("_local_scalar_dense", "is_nonzero", "equal")


class TorchOps(TorchDispatchMode):
    """Counts operators of torch that launch a kernel on a GPU, and those that wait for one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launched: Counter[str] = Counter()
        self.waited: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in _READS:
            self.waited[name] += 1
        elif name not in _FREE:
            self.launched[name] += 1
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class HostWork:
    """calls: of Python and C functions; allocated_bytes: the most that was held at a time beyond
    what was held before. Both are the same in every run, unlike times."""

    calls: int
    allocated_bytes: int


def host_work(work: Callable[[], object]) -> HostWork:
    """Run `work` twice, once for each count."""
    calls = calls_in(work)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        work()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return HostWork(calls, peak - before)


def calls_in(work: Callable[[], object]) -> int:
    """Calls of Python and C functions."""
    calls = 0

    def note(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def last_call(function: Callable[..., Any], work: Callable[[], object]) -> Callable[[], Any]:
    """The last call of a function in this work, to be made again."""
    found: dict[str, Any] = {}
    code = function.__code__

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code is code:
            found.update(frame.f_locals)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return lambda: function(**found)


@contextmanager
def products_counted() -> Iterator[Counter[str]]:
    """Matrix products, and attention to far keys, are counted and not computed: their time on a
    CPU is not the host's work."""
    counts: Counter[str] = Counter()

    def project(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **_: bool
    ) -> Any:
        counts["linear"] += 1
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    def add_product(target: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        counts["linear"] += 1

    def attend(q: torch.Tensor, k: torch.Tensor, _v: torch.Tensor, _scale: float) -> Any:
        counts["attention"] += 1
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)

    counted = DenseAttention("counted", attend)
    with (
        mock.patch.object(triton_attention, "dense_attention", return_value=counted),
        mock.patch.object(dense, "dense_attention", return_value=counted),
        mock.patch.object(linears, "project", project),
        mock.patch.object(linears, "add_product", add_product),
    ):
        yield counts
