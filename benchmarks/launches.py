"""What a step launches on a GPU and what it costs the host, counted without a GPU.

    python -m benchmarks.launches [--format int8] [--case NAME ...] [--rounds N] [--workload STEPS]
        [--output FILE] [--check FILE]

Steps of a Llama-3-8B's attention geometry (its matrices are small) run through `ModelRunner` over
a stand-in for an H100's Triton driver (`stand_in_gpu.py`). Per case, for one rank of `tp`:

    a layer    launches of Triton kernels and of torch's operators that one more layer adds
    step       those of a whole step with one layer
    fill       programs of the largest launch of attention, per multiprocessor
    compiled   variants that Triton had to compile in the step, after warm-up
    looked up  launches of a layer whose variant Triton looks up; the others are made by a handle
    calls      of Python and C functions that one more layer, its attention, and the rest of a step
               cost
    host kB    the most that the host allocates in a step
    µs a layer, of its attention, a step   median host time on this machine; not in the table that
               is compared. The driver's own time, a few µs for each launch, is not in it

`--workload` also runs so many steps of sequences that come, grow, share prefixes, seal and go, and
fails if a kernel is compiled in any of them. `--check` fails if a count exceeds that of a
committed table. Counts are the same in every run; times are not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.random_model import ModelShape, random_model
from benchmarks.stand_in_gpu import (
    PROCESSORS,
    StandInGpu,
    TorchOps,
    calls_in,
    host_work,
    last_call,
    products_counted,
)
from kvmesh.kernels.attention import paged_attention
from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.executor import Allocation
from kvmesh.workers.last_tokens import LastTokens
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.plan import PENDING, Chunk, RowStart, StepPlan, TableUpdate
from kvmesh.workers.runner import ModelRunner
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.sizes import PageGeometry

torch.set_num_threads(1)  # on a busy machine, threads that wait for each other take all the time

PAGE_SIZE = 64
VOCAB = 1024
GREEDY = SamplingParams(temperature=0.0)
NUCLEUS = SamplingParams(temperature=0.7, top_p=0.9, seed=3)


@dataclass(frozen=True)
class Case:
    """sequences: (tokens before the step, new tokens); shared: so many first tokens are the same

    kv_format: None for the one that is asked for
    ahead: the step was decided before the tokens of the one before were known
    deterministic: as `engine.deterministic`, but for the products, which are counted
    """

    name: str
    tp: int
    sequences: tuple[tuple[int, int], ...]
    shared: int = 0
    params: SamplingParams = GREEDY
    kv_format: str | None = None
    ahead: bool = False
    deterministic: bool = False


def _decode(*lengths: int) -> tuple[tuple[int, int], ...]:
    return tuple((length, 1) for length in lengths)


def _spread(count: int, length: int) -> tuple[int, ...]:
    """Lengths from a quarter of `length` to `length`."""
    return tuple(length // 4 + 3 * length // 4 * i // max(1, count - 1) for i in range(count))


MILLION = 2**20
CASES = (
    Case("decode 1 x 4k", 1, _decode(4096)),
    Case("decode 1 x 4k, k4v4", 1, _decode(4096), kv_format="k4v4"),
    Case("decode 1 x 1M", 1, _decode(MILLION)),
    Case("decode 1 x 1M", 8, _decode(MILLION)),
    Case("decode 256 x 4k", 1, _decode(*_spread(256, 4096))),
    Case("decode 256 x 4k, top-p", 1, _decode(*_spread(256, 4096)), params=NUCLEUS),
    Case("decode 256 x 4k, ahead", 1, _decode(*_spread(256, 4096)), ahead=True),
    Case("decode 256 x 4k, deterministic", 1, _decode(*_spread(256, 4096)), deterministic=True),
    Case("decode 1M + 15 short", 8, _decode(MILLION, *_spread(15, 4096))),
    Case("decode 1M + 255 short", 8, _decode(MILLION, *_spread(255, 4096))),
    Case("decode 64 x 8k, shared 4k", 1, _decode(*_spread(64, 32768)[21:], *(8192,) * 21), 4096),
    Case("prefill 512 at 0", 8, ((0, 512),)),
    Case("prefill 512 at 1M", 8, ((MILLION, 512),)),
    Case("prefill 8192 at 32k", 1, ((32768, 8192),)),
    Case("15 decode + chunk of 497", 1, (*_decode(*_spread(15, 4096)), (8192, 497))),
)


class Counted:
    """A rank whose sequences have the case's lengths, and the plans of its steps."""

    def __init__(self, case: Case, kv_format: str, layers: int) -> None:
        shape = ModelShape(
            "counted", layers, 32 // case.tp, 8 // case.tp, 128, 256, 512, VOCAB, 2 * MILLION
        )
        fmt = get_format(kv_format)
        model = random_model(shape, torch.bfloat16, torch.device("cpu"), kv_format)
        # A sequence holds a hot page for every new page of its chunk.
        chunk = max(new for _, new in case.sequences)
        self._geometry = PageGeometry(PAGE_SIZE, fmt.sink_pages, fmt.recent_pages, 1, 1)
        self._hot_each = self._geometry.hot_per_sequence() + chunk // PAGE_SIZE + 2
        self._pages = (max(n + new for n, new in case.sequences) + 3 * chunk) // PAGE_SIZE + 2
        self._case = case
        self._lengths = [length for length, _ in case.sequences]
        self._step = 0
        rows = len(case.sequences)
        self.runner = ModelRunner(
            model,
            fmt,
            Allocation(rows * self._hot_each, rows * 64, rows, self._pages),
            Communicator.single(),
            page_size=PAGE_SIZE,
            sink_pages=fmt.sink_pages,
            recent_pages=fmt.recent_pages,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            samples=True,
            cuda_graphs=False,
            deterministic=case.deterministic,
        )

    def plan(self) -> StepPlan:
        """The next step of every sequence. Sealed pages have few ids: kernels do not run."""
        case, geometry = self._case, self._geometry
        first, self._step = self._step == 0, self._step + 1
        row_starts, chunks, hot, sealed, seals = [], [], [], [], []
        for row, (length, (_, new)) in enumerate(zip(self._lengths, case.sequences, strict=True)):
            end = length + new
            before, due = geometry.sealed_range(length), geometry.sealed_range(end)
            if first:
                row_starts.append(RowStart(row, case.params, length, b""))
                sealed += [(row, page, self._sealed_id(row, page)) for page in before]
                kept = {*range(geometry.sink_pages), *range(before.stop, length // PAGE_SIZE + 1)}
                hot += [(row, page, self._hot_id(row, page)) for page in sorted(kept)]
            for page in range(-(-length // PAGE_SIZE), -(-end // PAGE_SIZE)):
                hot.append((row, page, self._hot_id(row, page)))
            for page in range(before.stop, due.stop):
                sealed.append((row, page, self._sealed_id(row, page)))
                seals.append((self._hot_id(row, page), self._sealed_id(row, page), page))
            known = first or not case.ahead
            tokens = np.full(new, 7, dtype=np.int32).tobytes() if known else PENDING
            chunks.append(Chunk(row, length, tokens, True))
            self._lengths[row] = end
        return StepPlan(
            self._step,
            row_starts,
            chunks,
            _table(hot),
            _table(sealed),
            [hot_id for hot_id, _, _ in seals],
            [sealed_id for _, sealed_id, _ in seals],
            [page for _, _, page in seals],
        )

    def _hot_id(self, row: int, page: int) -> int:
        return row * self._hot_each + page % self._hot_each

    def _sealed_id(self, row: int, page: int) -> int:
        if page * PAGE_SIZE < self._case.shared:
            return page
        return row * 64 + (page + row) % 64


def _table(entries: list[tuple[int, int, int]]) -> TableUpdate:
    return TableUpdate(*([entry[i] for entry in entries] for i in range(3)))


@dataclass(frozen=True)
class Row:
    """The figures of a case, as in the file's description."""

    case: str
    tp: int
    kernels_a_layer: int
    torch_a_layer: int
    kernels_a_step: int
    torch_a_step: int
    waits_a_step: int
    fill: float
    compiled: int
    looked_up_a_layer: int
    calls_a_layer: int
    calls_a_step: int
    calls_of_attention: int
    host_bytes: int


@dataclass(frozen=True)
class Times:
    """Median host times in microseconds."""

    layer_us: float
    step_us: float
    attention_us: float


@dataclass(frozen=True)
class _Counts:
    kernels: Counter[str]
    torch_ops: Counter[str]
    waits: int
    programs: dict[str, int]
    compiled: int
    looked_up: int
    calls: int
    attention_calls: int
    host_bytes: int
    host_s: float
    attention_s: float


@contextmanager
def _valid_tokens() -> Iterator[None]:
    """The sampling kernel does not run: here it leaves tokens that the next step can look up."""
    put = LastTokens.put

    def put_zeros(tokens: LastTokens, rows: torch.Tensor, sampled: torch.Tensor) -> None:
        sampled.numpy()[:] = 0
        put(tokens, rows, sampled)

    with mock.patch.object(LastTokens, "put", put_zeros):
        yield


def _count(case: Case, kv_format: str, layers: int, rounds: int) -> _Counts:
    with (
        StandInGpu() as gpu,
        products_counted() as products,
        _valid_tokens() if case.ahead else nullcontext(),
        torch.inference_mode(),
    ):
        counted = Counted(case, kv_format, layers)
        for _ in range(2):
            counted.runner.execute(counted.plan())
        gpu.clear()
        products.clear()
        plan = counted.plan()
        with TorchOps() as ops:
            attend = last_call(paged_attention, lambda: counted.runner.execute(plan))
        ops.launched.update(products)
        kernels = Counter(launch.kernel for launch in gpu.launches)
        programs: Counter[str] = Counter()
        for launch in gpu.launches:
            programs[launch.kernel] = max(programs[launch.kernel], launch.programs)
        compiled, looked_up = len(gpu.compiled), len(gpu.looked_up)
        # The same plan again: the same work, as its tables and lengths are the same.
        work = host_work(lambda: counted.runner.execute(plan))
        attention_calls = calls_in(attend)
        host_s = _median_s(lambda: counted.runner.execute(plan), rounds)
        attention_s = _median_s(attend, 20 * rounds if case.sequences[0][1] == 1 else rounds)
    return _Counts(
        kernels,
        ops.launched,
        ops.waited.total(),
        dict(programs),
        compiled,
        looked_up,
        work.calls,
        attention_calls,
        work.allocated_bytes,
        host_s,
        attention_s,
    )


def _median_s(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times) if times else 0.0


def measure(case: Case, kv_format: str, rounds: int = 0) -> tuple[Row, Times]:
    """rounds: of timed steps"""
    kv_format = case.kv_format or kv_format
    one, three = (_count(case, kv_format, layers, rounds) for layers in (1, 3))
    reads = [one.programs.get(f"{name}_kernel", 0) for name in ("decode", "prefill", "prefix")]
    return Row(
        case=case.name,
        tp=case.tp,
        kernels_a_layer=(three.kernels.total() - one.kernels.total()) // 2,
        torch_a_layer=(three.torch_ops.total() - one.torch_ops.total()) // 2,
        kernels_a_step=one.kernels.total(),
        torch_a_step=one.torch_ops.total(),
        waits_a_step=one.waits,
        fill=round(max(reads) / PROCESSORS, 2),
        compiled=one.compiled,
        looked_up_a_layer=(three.looked_up - one.looked_up) // 2,
        calls_a_layer=(three.calls - one.calls) // 2,
        calls_a_step=one.calls,
        calls_of_attention=one.attention_calls,
        host_bytes=one.host_bytes,
    ), Times(
        round((three.host_s - one.host_s) / 2 * 1e6),
        round(one.host_s * 1e6),
        round(one.attention_s * 1e6, 1),
    )


def compiled_in_workload(kv_format: str, steps: int) -> list[str]:
    """Names of the kernels that are compiled in a mixed workload, after warm-up."""
    random = np.random.default_rng(0)
    fmt = get_format(kv_format)
    shape = ModelShape("counted", 2, 32, 8, 128, 256, 512, VOCAB, 2**17)
    rows, pages = 24, 2**17 // PAGE_SIZE
    model = random_model(shape, torch.bfloat16, torch.device("cpu"), kv_format)
    windows = (fmt.sink_pages, fmt.recent_pages)
    with StandInGpu() as gpu, products_counted(), torch.inference_mode():
        runner = ModelRunner(
            model,
            fmt,
            Allocation(64, 64, rows, pages),
            Communicator.single(),
            page_size=PAGE_SIZE,
            sink_pages=windows[0],
            recent_pages=windows[1],
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            samples=True,
            cuda_graphs=False,
        )
        assert gpu.compiled, "warm-up compiled nothing"
        geometry = PageGeometry(PAGE_SIZE, *windows, 1, 1)
        lengths = np.zeros(rows, dtype=np.int64)
        gpu.clear()
        for step in range(1, steps + 1):
            present = np.sort(random.permutation(rows)[: random.integers(1, rows + 1)])
            starts, chunks, hot, sealed, seals = [], [], [], [], []
            for row in present.tolist():
                old = int(lengths[row])
                decodes = old > 0 and random.random() < 0.8
                new = 1 if decodes else int(random.choice([1, 5, 64, 200, 700]))
                if old + new >= 2**17 or random.random() < 0.05:
                    old = 0
                if not old:
                    greedy = random.random() < 0.5
                    starts.append(RowStart(row, GREEDY if greedy else NUCLEUS, new, b""))
                    if random.random() < 0.5:  # most of its prompt has been computed before
                        old = int(random.integers(1, 2**16))
                        sealed += [(row, page, page % 64) for page in geometry.sealed_range(old)]
                        hot += [(row, page, page % 64) for page in range(-(-old // PAGE_SIZE))]
                end = old + new
                hot += [
                    (row, page, page % 64) for page in range(old // PAGE_SIZE, end // PAGE_SIZE + 1)
                ]
                for page in range(geometry.sealed_range(old).stop, geometry.sealed_range(end).stop):
                    sealed.append((row, page, page % 64))
                    seals.append(page)
                tokens = np.full(new, 7, dtype=np.int32).tobytes()
                chunks.append(Chunk(row, old, tokens, True))
                lengths[row] = end
            ids = [page % 64 for page in seals]
            runner.execute(
                StepPlan(step, starts, chunks, _table(hot), _table(sealed), ids, ids, seals)
            )
        kinds = {launch.kernel for launch in gpu.launches}
        print(f"{steps} mixed steps: {len(gpu.launches)} launches of {', '.join(sorted(kinds))}")
        return gpu.compiled


def grown(rows: list[dict[str, Any]], committed: Path) -> list[str]:
    """What exceeds the committed table. Calls may vary with the version of torch or Python."""
    table = json.loads(committed.read_text())
    known = {(row["case"], row["tp"]): row for row in table["rows"]}
    found = []
    for row in rows:
        before = known[row["case"], row["tp"]]
        for name, count in row.items():
            if name in ("case", "tp", "fill"):
                continue
            slack = 1.1 if name.startswith(("calls", "host")) else 1.0
            limit = slack * before[name] + 8 * (slack > 1)
            if count > limit:
                found.append(
                    f"{row['case']}, tp {row['tp']}: {name} was {before[name]}, is {count}"
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="int8")
    parser.add_argument("--case", nargs="*", help="substrings of the cases' names")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--check", type=Path, help="fail if a count exceeds this committed table's")
    parser.add_argument("--workload", type=int, default=0, help="steps of a mixed workload")
    options = parser.parse_args()
    if options.workload:
        late = compiled_in_workload(options.format, options.workload)
        if late:
            raise SystemExit(f"compiled after warm-up: {', '.join(late)}")
    rows: list[dict[str, Any]] = []
    print(
        f"{'case':27} tp  a layer  torch  step  torch  waits   fill  compiled  looked up"
        "  calls/layer  attention  calls/step  host kB  µs/layer  attention  µs/step"
    )
    for case in CASES:
        if options.case and not any(part in case.name for part in options.case):
            continue
        row, times = measure(case, options.format, options.rounds)
        rows.append(asdict(row))
        print(
            f"{row.case:27} {row.tp:2} {row.kernels_a_layer:8} {row.torch_a_layer:6}"
            f" {row.kernels_a_step:5} {row.torch_a_step:6} {row.waits_a_step:6} {row.fill:6}"
            f" {row.compiled:9} {row.looked_up_a_layer:10} {row.calls_a_layer:12}"
            f" {row.calls_of_attention:10} {row.calls_a_step:11} {row.host_bytes / 1e3:8.0f}"
            f" {times.layer_us:9.0f} {times.attention_us:10.1f} {times.step_us:8.0f}",
            flush=True,
        )
    if options.output:
        options.output.write_text(
            json.dumps({"format": options.format, "rows": rows}, indent=1) + "\n"
        )
    if options.check:
        more = grown(rows, options.check)
        if more:
            raise SystemExit("\n".join(more))


if __name__ == "__main__":
    main()
