"""Instructions per KV element of the attention kernels, counted in machine code; needs no GPU.

    python benchmarks/sass.py [--prefill] [--output FILE] [--check FILE] [--capability 90]
        [--dump DIR]

Triton compiles for a GPU that need not be present and ships a disassembler. The loop over
sealed pages is a backward branch whose body contains tensor-core instructions;
every thread of the program runs it once per tile:

    instructions per element = instructions * threads / (tile's tokens * head_dim * 2)

A streaming multiprocessor issues instructions of 4 warps per clock, i.e. 128 thread
instructions. With b stored bits per element, clock f and n multiprocessors, a loop of i
instructions per element can request at most 128 f n b / (8 i) bytes per second. `bound`
gives that as a share of the GPU's memory bandwidth. It is an upper bound, not a forecast:
stalls are not included.

With `--prefill` it is the loop of prefill, whose tiles are shared by many query rows: the unit
is instructions per element and row. There the tensor core is the bound, and no share is given.

The last rows are loops in the styles of other projects (`styles.py`), compiled in the same
way, with the format of ours that stores the same number of bits and the ratio to it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's functions cannot be compiled

import torch
import triton

from benchmarks.kernel_formats import FORMATS
from benchmarks.stand_in_gpu import StandInGpu
from benchmarks.styles import STYLES, style_kernel
from kvmesh.kernels.attention.triton_form import Geometry
from kvmesh.kernels.attention.triton_launch import (
    Launch,
    decode_launch,
    prefill_launch,
    takes_integer_path,
)
from kvmesh.kernels.attention.triton_parts import BatchPointers
from kvmesh.kernels.formats.registry import get_format

# name: capability, multiprocessors, boost clock Hz, memory bytes per second
GPUS = {
    "A100": (80, 108, 1.41e9, 2.04e12),
    "L40S": (89, 142, 2.52e9, 0.864e12),
    "H100": (90, 132, 1.755e9, 3.35e12),
    "H200": (90, 132, 1.755e9, 4.8e12),
}
TOLERANCE = 1.05
NUM_KV_HEADS = 8


@dataclass(frozen=True)
class Row:
    """One kernel: `instructions` of the sealed loop per element, of prefill per element and query
    row; registers per thread; shared memory and spills in bytes; `bound` as a share of each
    GPU's bandwidth.

    path: "integer", "plain" or "prefill", or "style" for a loop in another project's style
    """

    kv_format: str
    path: str
    capability: int
    head_dim: int
    group: int
    page_size: int
    instructions: float
    registers: int
    shared_bytes: int
    spill_bytes: int
    bound: dict[str, float]


def compile_launch(launch: Launch, capability: int) -> Any:
    """The kernel compiled for that GPU, as the operator launches it."""
    number = torch.bfloat16 if capability >= 80 else torch.float16
    some, ints = torch.empty(16, dtype=number), torch.empty(16, dtype=torch.int32)
    sums = torch.empty(16)
    pages = (some, some, torch.empty(16, dtype=torch.int8), sums, sums)
    batch = BatchPointers(*[ints] * len(BatchPointers._fields))
    ends: tuple[Any, ...] = (0, 2, 2)
    if launch.kernel.fn.__name__ == "prefill_kernel":
        ends = (0, 2)
    more = (False,) if len(ends) == 2 else ()
    arguments = (*pages, batch, 64, *ends, (1.0, 0.0, 2), (2, 2), *more, launch.form)
    return compile_kernel(launch.kernel, arguments, {}, launch.options, capability)


def compile_kernel(
    kernel: Any,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
    capability: int,
) -> Any:
    """arguments, constants: of a launch, by position and by name"""
    with StandInGpu(compiles=True, capability=capability) as gpu:
        kernel[(1, 1, 1)](*arguments, **constants, **options)
        return gpu.kernels[-1]


def launch_of(
    name: str, capability: int, head_dim: int, group: int, page_size: int
) -> tuple[str, Launch]:
    fmt = get_format(name)
    gpu = divmod(capability, 10)
    geometry = Geometry(NUM_KV_HEADS, group, head_dim, page_size)
    integer = takes_integer_path(fmt, geometry, gpu)
    launch = decode_launch(fmt, geometry, gpu, integer=integer)
    return "integer" if integer else "plain", launch


def prefill_of(
    name: str, capability: int, head_dim: int, group: int, page_size: int
) -> tuple[str, Launch]:
    fmt = get_format(name)
    geometry = Geometry(NUM_KV_HEADS, group, head_dim, page_size)
    return "prefill", prefill_launch(fmt, geometry, divmod(capability, 10))


@dataclass(frozen=True)
class StyleForm:
    """What `measure` asks a `Form`."""

    block_n: int
    constants: dict[str, Any]


def style_launch(style: str, head_dim: int, group: int, page_size: int) -> Launch:
    constants = {
        "STYLE": style,
        "K_WIDTH": 4,
        "V_WIDTH": 2 if style == "where_chain" else 4,
        "GROUP": group,
        "TOKENS": page_size,
        "HEAD_DIM": head_dim,
    }
    form: Any = StyleForm(page_size, constants)
    return Launch(style_kernel, form, {"num_warps": 4, "num_stages": 3})


def compile_style(launch: Launch, capability: int) -> Any:
    some, table = torch.empty(16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.int32)
    arguments = (some, torch.empty(16, dtype=torch.int8), torch.empty(16), table, 8, 1.0)
    form: Any = launch.form
    return compile_kernel(launch.kernel, arguments, form.constants, launch.options, capability)


def disassemble(cubin: bytes) -> tuple[list[str], str]:
    """Lines of machine code, and cuobjdump's report of resources."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = subprocess.run(
            [tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        )
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    return code.stdout.splitlines(), usage.stdout + usage.stderr


IS_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s")


def instructions_in(lines: list[str]) -> int:
    return sum(bool(IS_INSTRUCTION.match(line)) for line in lines)


def product_loops(lines: list[str]) -> list[int]:
    """Instructions of the innermost loops with tensor-core instructions, in order."""
    found: list[tuple[int, int]] = []
    labels: dict[str, int] = {}
    for index, line in enumerate(lines):
        label = re.match(r"^(\.L_\w+):", line)
        if label:
            labels[label[1]] = index
        branch = re.search(r"\bBRA(?:\.\w+)*\s.*`\((\.L_\w+)\)", line)
        if branch and branch[1] in labels:
            body = lines[labels[branch[1]] : index + 1]
            multiplies = any(re.search(r"\b[HIQ]G?MMA\b", text) for text in body)
            if multiplies and not any(labels[branch[1]] < first for first, _ in found):
                found.append((labels[branch[1]], instructions_in(body)))
    return [count for _, count in found]


@dataclass(frozen=True)
class Resources:
    """Registers per thread; spills and arrays in bytes of local memory per thread."""

    registers: int
    spill_bytes: int

    @classmethod
    def of(cls, usage: str) -> Resources:
        """usage: cuobjdump's report"""
        found = {name: int(count) for name, count in re.findall(r"\b([A-Z]+):(\d+)", usage)}
        return cls(found["REG"], found["LOCAL"] + found["STACK"])


def measure(
    name: str,
    path: str,
    launch: Launch,
    bits: float,
    capability: int,
    head_dim: int,
    group: int,
    page_size: int,
    dump: Path | None,
) -> Row:
    """bits: stored per element, including metadata"""
    if path == "style":
        compiled = compile_style(launch, capability)
    else:
        compiled = compile_launch(launch, capability)
    lines, usage = disassemble(compiled.asm["cubin"])
    if dump:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / f"{name}-sm{capability}-d{head_dim}-g{group}.sass").write_text("\n".join(lines))
    threads = launch.options["num_warps"] * 32
    # In decode the loop over hot pages comes first, in prefill the one over sealed pages.
    loops = product_loops(lines)
    if not loops:
        raise SystemExit(f"{name}: no loop with tensor-core instructions found")
    loop = loops[0 if path == "prefill" else -1]
    instructions = loop * threads / (launch.form.block_n * head_dim * 2)
    if path in ("integer", "plain"):
        instructions *= launch.form.head_parts
    digits = 2
    if path == "prefill":
        instructions, digits = instructions / launch.form.block_m, 4
    bound = {
        gpu: round(128 * clock * processors * bits / 8 / instructions / bandwidth, 2)
        for gpu, (cc, processors, clock, bandwidth) in GPUS.items()
        if cc == capability and path != "prefill"
    }
    resources = Resources.of(usage)
    return Row(
        name,
        path,
        capability,
        head_dim,
        group,
        page_size,
        round(instructions, digits),
        resources.registers,
        compiled.metadata.shared,
        resources.spill_bytes,
        bound,
    )


def rows_of(
    formats: list[str],
    capability: int,
    head_dim: int,
    group: int,
    page_size: int,
    dump: Path | None,
    prefill: bool,
) -> list[Row]:
    rows = []
    shape = (capability, head_dim, group, page_size)
    for name in formats:
        path, launch = (prefill_of if prefill else launch_of)(name, *shape)
        bits = get_format(name).bits_per_element(page_size, head_dim)
        rows.append(measure(name, path, launch, bits, *shape, dump))
        show(rows[-1])
    for style, (ours, bits) in STYLES.items():
        if ours not in formats or prefill:
            continue
        launch = style_launch(style, head_dim, group, page_size)
        row = measure(style, "style", launch, bits + 32 / head_dim / 2, *shape, dump)
        rows.append(row)
        ours_count = next(row.instructions for row in rows if row.kv_format == ours)
        show(row, f"{row.instructions / ours_count:.1f} times {ours}")
    return rows


def show(row: Row, note: str = "") -> None:
    print(
        f"{row.kv_format:11} {row.path:8} {row.capability} {row.head_dim:4} {row.group:5}"
        f" {row.instructions:11.4g} {row.registers:5} {row.shared_bytes:7} {row.spill_bytes:6}"
        f"  {row.bound} {note}",
        flush=True,
    )


def regressions(rows: list[Row], committed: Path) -> list[str]:
    """Rows that are worse than the committed table by more than 5%."""
    keys = ("kv_format", "path", "capability", "head_dim", "group", "page_size")
    table = json.loads(committed.read_text())
    if table["triton"] != triton.__version__:  # another compiler: not comparable
        return []
    known = {tuple(row[key] for key in keys): row for row in table["rows"]}
    found = []
    for row in rows:
        before = known.get(tuple(getattr(row, key) for key in keys))
        if before and row.instructions > TOLERANCE * before["instructions"]:
            found.append(f"{row}: {before['instructions']} instructions per element before")
        if before and row.spill_bytes > before["spill_bytes"]:
            found.append(f"{row}: {before['spill_bytes']} bytes spilled before")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--check", type=Path, help="fail if this committed table is better")
    parser.add_argument("--capability", type=int, nargs="*", default=[80, 89, 90])
    parser.add_argument("--format", nargs="*", default=list(FORMATS))
    parser.add_argument("--shape", nargs="*", default=["128x8", "128x4", "64x3"])
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--dump", type=Path)
    parser.add_argument("--prefill", action="store_true")
    options = parser.parse_args()
    rows: list[Row] = []
    print("format      path     sm  dim group  instr/elem  regs  shared  spill  bound")
    for capability in options.capability:
        for shape in options.shape:
            head_dim, group = map(int, shape.split("x"))
            geometry = (capability, head_dim, group, options.page_size)
            rows += rows_of(options.format, *geometry, options.dump, options.prefill)
    if options.output:
        report = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    if options.check:
        worse = regressions(rows, options.check)
        if worse:
            raise SystemExit("\n".join(worse))


if __name__ == "__main__":
    main()
