"""Which kernels compile for which GPUs, and whether they use tensor cores; needs no GPU.

    python benchmarks/compiled.py [--output FILE] [--capability 70 75 ...] [--format NAME ...]
        [--kernel NAME ...] [--kind NAME ...] [--shape 128x8] [--page-size 64] [--stride 1]
        [--latent HEADS] [--code FILE] [--check FILE] [--update]

Every kernel is compiled as the operators launch it, with everything that a layer or a batch may
need: a window, a softcap, shared prefixes. GPUs before sm_80 have no bf16; they use fp16. If a
compiler rejects a kernel, or the GPU has too little shared memory for it, the reason is recorded.
Nothing is run.

`--code` also writes what each kernel became in machine code, and `--check` fails if one has more
instructions (by 5%) or spills more than in that table: those of the longest loop with tensor cores,
which a thread goes through for each tile, or of the whole kernel if there is no such loop. The
loops over sealed pages are counted for each element of KV by `sass.py`. With `--update`, FILEs
keep what this run did not compile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's functions cannot be compiled

import torch
import triton

from benchmarks.kernel_formats import FORMATS
from benchmarks.random_model import KINDS, random_grouped
from benchmarks.sass import (
    TOLERANCE,
    Resources,
    compile_kernel,
    compile_launch,
    disassemble,
    instructions_in,
    product_loops,
)
from kvmesh.kernels.attention.latent_form import OPTIONS as LATENT_OPTIONS
from kvmesh.kernels.attention.latent_form import form_of
from kvmesh.kernels.attention.triton_decode import decode_merge_kernel
from kvmesh.kernels.attention.triton_form import Geometry
from kvmesh.kernels.attention.triton_latent import latent_kernel
from kvmesh.kernels.attention.triton_launch import (
    Launch,
    decode_launch,
    prefill_launch,
    prefix_launch,
    shared_kib,
    takes_integer_path,
)
from kvmesh.kernels.attention.triton_pages import NUM_WARPS as PAGES_WARPS
from kvmesh.kernels.attention.triton_pages import decode_pages_kernel
from kvmesh.kernels.attention.triton_parts import BatchPointers
from kvmesh.kernels.attention.triton_prefill import prefill_merge_kernel
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.registry import format_of_model, get_format
from kvmesh.kernels.linear import GroupedWeight, Kind
from kvmesh.kernels.linear.triton_linear import (
    FIXED_TILE,
    add_parts_kernel,
    decode_kernel,
    form_for,
    linear_kernel,
)
from kvmesh.kernels.linear.triton_tiles import WeightForm, pointers, weight_form
from kvmesh.kernels.linear.triton_tiles import options as linear_options
from kvmesh.kernels.merge.triton_merge import merge_kernel
from kvmesh.kernels.moe.triton_moe import BLOCK_N, Groups, down_kernel, gate_up_kernel
from kvmesh.kernels.moe.triton_moe import options as expert_options
from kvmesh.kernels.seal.triton_seal import NUM_WARPS, seal_form, seal_kernel
from kvmesh.kernels.write.triton_write import write_kernel

CAPABILITIES = (70, 75, 80, 89, 90)
NUM_KV_HEADS = 8
LATENT_DIM, LATENT_VALUES = 576, 512
Compile = Callable[[], Any]


def kernels_of(
    fmt: KVFormat, capability: int, head_dim: int, group: int, page_size: int, stride: int
) -> Iterator[tuple[str, Compile]]:
    """Every kernel that this format runs on the GPU."""
    gpu = divmod(capability, 10)
    geometry = Geometry(NUM_KV_HEADS, group, head_dim, page_size, stride=stride)
    some = {"softcap": True, "window": True}
    launches = {
        "decode": decode_launch(fmt, geometry, gpu, integer=False, prefixes=True, **some),
        "shared prefixes": prefix_launch(fmt, geometry, gpu, softcap=True),
        "prefill": prefill_launch(fmt, geometry, gpu, **some),
    }
    yield "decoded pages", partial(compile_pages, prefill_launch(fmt, geometry, gpu), capability)
    if takes_integer_path(fmt, geometry, gpu):
        launches["decode, integer"] = decode_launch(
            fmt, geometry, gpu, integer=True, prefixes=True, softcap=True
        )
    for name, launch in launches.items():
        yield name, partial(compile_launch, launch, capability)
    yield "seal", partial(compile_seal, fmt, capability, geometry)


def latent_kernels(
    fmt: KVFormat, capability: int, num_heads: int, page_size: int, stride: int
) -> Iterator[tuple[str, Compile]]:
    """Of pages whose values are in keys, with DeepSeek's channels. GPUs before sm_80 have too
    little shared memory for products without tensor cores, which take 68 KiB here."""
    stored = format_of_model(fmt, LATENT_VALUES)
    number = torch.empty(16, dtype=torch.bfloat16)
    sums, ints = torch.empty(16), torch.empty(16, dtype=torch.int32)
    pages = (number, number, torch.empty(16, dtype=torch.int8), sums, sums)
    batch = BatchPointers(*[ints] * len(BatchPointers._fields))
    arguments = (*pages, ints, ints, batch, 64, LATENT_DIM * num_heads, LATENT_DIM, 16, 1.0)
    geometry = Geometry(1, num_heads, LATENT_DIM, page_size, stride=stride)
    form = form_of(stored, geometry, (1, 2), divmod(capability, 10))
    how = (latent_kernel, arguments, {"FORM": form}, LATENT_OPTIONS)
    yield f"latents, {num_heads} heads", partial(compile_kernel, *how, capability)


def shared_kernels(
    capability: int,
    head_dim: int,
    group: int,
    page_size: int,
    stride: int,
    kinds: Sequence[Kind] = KINDS,
) -> Iterator[tuple[str, Compile]]:
    """Kernels that all formats share. kinds: of weights in few bits, from sm_80 on"""
    number = torch.empty(16, dtype=torch.bfloat16 if capability >= 80 else torch.float16)
    ids = torch.empty(16, dtype=torch.int64)
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}
    pages = {**sizes, "SIDES": 2, "NUM_KV_HEADS": NUM_KV_HEADS, "PAGE_SIZE": page_size}
    write = (write_kernel, (number, number, number, ids, 128, 16, 128, 16), pages, {"num_warps": 1})
    yield "write", partial(compile_kernel, *write, capability)
    sums = torch.empty(16)
    blocks = {"HEAD_DIM": head_dim}
    merge = (merge_kernel, (sums, sums, number, sums, 8, 8), blocks, {"num_warps": 4})
    yield "merge", partial(compile_kernel, *merge, capability)
    geometry = Geometry(NUM_KV_HEADS, group, head_dim, page_size, stride=stride)
    ints = torch.empty(16, dtype=torch.int32)
    batch = BatchPointers(*[ints] * len(BatchPointers._fields))
    fmt, gpu = get_format("exact"), divmod(capability, 10)
    for name, kernel, launch, where in (
        (
            "merge, decode",
            decode_merge_kernel,
            decode_launch(fmt, geometry, gpu, integer=False),
            (0, 0, 2, 2, 2),
        ),
        (
            "merge, prefill",
            prefill_merge_kernel,
            prefill_launch(fmt, geometry, gpu),
            (0, 0, 2, (2, 2)),
        ),
    ):
        arguments = (number, sums, sums, sums, batch, *where, launch.form)
        how: dict[str, Any] = {"num_warps": 4}
        yield name, partial(compile_kernel, kernel, arguments, {}, how, capability)
    weight = torch.zeros(3 * head_dim, 8 * head_dim, dtype=number.dtype)
    fixed = weight_form(weight, *FIXED_TILE)
    yield "fixed linear", partial(compile_linear, weight, fixed, number, capability, has_bias=False)
    if capability >= 80:
        yield from grouped_kernels(head_dim, capability, kinds)
    yield from expert_kernels(head_dim, capability, kinds if capability >= 80 else ())


def grouped_kernels(
    head_dim: int, capability: int, kinds: Sequence[Kind]
) -> Iterator[tuple[str, Compile]]:
    """Products with weights in few bits, for few, many and any rows, and decoding them."""
    number = torch.empty(16, dtype=torch.bfloat16 if capability >= 80 else torch.float16)
    sums = torch.empty(16)
    for kind in kinds:
        weight = random_grouped(kind, 3 * head_dim, 8 * head_dim)
        for rows, form in (
            ("few rows", form_for(weight, 1)),
            ("many rows", form_for(weight, 1000)),
            ("fixed", weight_form(weight, *FIXED_TILE)),
        ):
            yield (
                f"grouped linear, {kind}, {rows}",
                partial(compile_linear, weight, form, number, capability),
            )
        form = weight_form(weight, 16, 64)
        decoding = (decode_kernel, (pointers(weight), number, 0, 64), {"FORM": form})
        yield (
            f"decoded weights, {kind}",
            partial(compile_kernel, *decoding, {"num_warps": 4}, capability),
        )
    constants = {"OUTPUTS": 3 * head_dim, "PARTS": 4, "HAS_BIAS": True, "BLOCK": 1024}
    add = (add_parts_kernel, (sums, number, number, 8), constants, {"num_warps": 4})
    yield "add parts", partial(compile_kernel, *add, capability)


def expert_kernels(
    head_dim: int, capability: int, kinds: Sequence[Kind]
) -> Iterator[tuple[str, Compile]]:
    """Both products of a mixture's experts, with few and many rows for each."""
    dtype = torch.bfloat16 if capability >= 80 else torch.float16
    number, sums = torch.empty(16, dtype=dtype), torch.empty(16)
    ints, order = (torch.empty(16, dtype=kind) for kind in (torch.int32, torch.int64))
    groups = Groups(order, ints, ints, ints)
    hidden, width = 8 * head_dim, 3 * head_dim
    shapes = ((2 * width, hidden), (hidden, width))
    plain = [torch.zeros(2, *shape, dtype=dtype) for shape in shapes]
    cases: list[tuple[str, int, Sequence[torch.Tensor | GroupedWeight]]] = [
        ("16 rows", 16, plain),
        ("128 rows", 128, plain),
    ]
    for kind in kinds:
        cases.append((kind, 16, [random_grouped(kind, *shape, experts=2) for shape in shapes]))
    for what, rows, weights in cases:
        inward, outward = (weight_form(weight, rows, BLOCK_N) for weight in weights)
        how = expert_options(inward, torch.bfloat16)
        constants = {"HAS_BIAS": True, "PRECISION": how.pop("PRECISION")}
        unit = {"ALPHA": 1.702, "LIMIT": 7.0, "SHIFT": 1.0}
        gated = {**unit, **constants, "TOP_K": 8, "FORM": inward}
        arguments = (number, groups, pointers(weights[0]), number, number, 8)
        gate_up = (gate_up_kernel, arguments, gated, how)
        yield f"experts, gate and up, {what}", partial(compile_kernel, *gate_up, capability)
        last = (number, groups, pointers(weights[1]), number, sums, sums, 8)
        down = (down_kernel, last, {**constants, "FORM": outward}, how)
        yield f"experts, down, {what}", partial(compile_kernel, *down, capability)


def compile_linear(
    weight: torch.Tensor | GroupedWeight,
    form: WeightForm,
    number: torch.Tensor,
    capability: int,
    *,
    has_bias: bool = True,
) -> Any:
    """number: of the inputs' dtype"""
    arguments = (number, pointers(weight), number, number, 8, 16, 4)
    how = linear_options(form, number.dtype)
    constants = {"HAS_BIAS": has_bias, "FORM": form, "PRECISION": how.pop("PRECISION")}
    return compile_kernel(linear_kernel, arguments, constants, how, capability)


def compile_pages(launch: Launch, capability: int) -> Any:
    number = torch.empty(16, dtype=torch.bfloat16 if capability >= 80 else torch.float16)
    ids, sealed = (torch.empty(16, dtype=kind) for kind in (torch.int32, torch.int8))
    arguments = (sealed, number, number, ids, ids, 16, 2, 2, 64, launch.form)
    how = {"num_warps": PAGES_WARPS}
    return compile_kernel(decode_pages_kernel, arguments, {}, how, capability)


def compile_seal(fmt: KVFormat, capability: int, geometry: Geometry) -> Any:
    number = torch.empty(16, dtype=torch.bfloat16 if capability >= 80 else torch.float16)
    ids = torch.empty(16, dtype=torch.int32)
    form = seal_form(fmt, geometry.num_kv_heads, geometry.page_size, geometry.head_dim, 2)
    arguments = (number, torch.empty(16, dtype=torch.int8), ids, ids, 8, 8, form)
    return compile_kernel(seal_kernel, arguments, {}, {"num_warps": NUM_WARPS}, capability)


def attempt(compile_it: Compile, cc: int) -> tuple[str, Any]:
    """The outcome, "tensor cores", "compiled" (without tensor cores), or the compiler's reason; and
    the kernel if there is one."""
    try:
        compiled = compile_it()
    except (triton.compiler.errors.CompilationError, RuntimeError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200], None
    if compiled.metadata.shared > shared_kib(divmod(cc, 10)) * 1024:
        return f"takes {compiled.metadata.shared / 1024:.0f} KiB of shared memory", None
    multiplies = any(opcode in compiled.asm["ptx"] for opcode in ("mma.sync", "wgmma"))
    return "tensor cores" if multiplies else "compiled", compiled


def code_of(compiled: Any) -> dict[str, int]:
    """Of a thread; shared memory in bytes of a program."""
    lines, usage = disassemble(compiled.asm["cubin"])
    resources = Resources.of(usage)
    return {
        "instructions": max(product_loops(lines), default=instructions_in(lines)),
        "registers": resources.registers,
        "shared_bytes": compiled.metadata.shared,
        "spill_bytes": resources.spill_bytes,
    }


def worse(rows: dict[str, dict[str, int]], committed: Path) -> list[str]:
    """Kernels with more instructions, by more than 5%, or spills than in the committed table."""
    table = json.loads(committed.read_text())
    if table["triton"] != triton.__version__:  # another compiler: not comparable
        return []
    found = []
    for name, row in rows.items():
        before = table["kernels"].get(name)
        if before and row["instructions"] > TOLERANCE * before["instructions"]:
            found.append(f"{name}: {row['instructions']} instructions, {before['instructions']}")
        if before and row["spill_bytes"] > before["spill_bytes"]:
            found.append(f"{name}: {row['spill_bytes']} bytes spilled, {before['spill_bytes']}")
    return found


def write_table(
    file: Path, conditions: dict[str, Any], kernels: dict[str, Any], update: bool
) -> None:
    """update: keep kernels of the file that are not among these"""
    if update:
        known = json.loads(file.read_text())
        assert {name: known[name] for name in conditions} == conditions, (
            "made with another compiler"
        )
        kernels = {
            name: {**before, **kernels.get(name, {})} for name, before in known["kernels"].items()
        } | {name: new for name, new in kernels.items() if name not in known["kernels"]}
    file.write_text(json.dumps({**conditions, "kernels": kernels}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--capability", type=int, nargs="*", default=list(CAPABILITIES))
    parser.add_argument("--format", nargs="*", default=list(FORMATS))
    parser.add_argument("--kernel", nargs="*", help="only those of these names")
    parser.add_argument("--kind", nargs="*", choices=KINDS, default=KINDS, help="of weights")
    parser.add_argument("--shape", default="128x8")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--stride", type=int, default=1, help="engine.kvp")
    parser.add_argument("--latent", type=int, help="only attention over latents, of so many heads")
    parser.add_argument("--code", type=Path)
    parser.add_argument("--check", type=Path, help="fail if this committed table is better")
    parser.add_argument("--update", action="store_true")
    options = parser.parse_args()
    head_dim, group = map(int, options.shape.split("x"))
    # For each GPU, kernel and outcome: the formats.
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    code: dict[str, dict[str, int]] = {}
    shape = f"{options.shape}, pages of {options.page_size}"
    for capability in options.capability:
        outcomes = found.setdefault(f"sm_{capability}", {})
        geometry = (head_dim, group, options.page_size, options.stride)
        work: list[tuple[str, str, Compile]] = []
        if options.latent:
            if capability < 80:
                continue
            where = (capability, options.latent, *geometry[2:])
            for name in options.format:
                work += [(name, *one) for one in latent_kernels(get_format(name), *where)]
        else:
            work += [("all", *one) for one in shared_kernels(capability, *geometry, options.kind)]
            for name in options.format:
                fmt = get_format(name)
                work += [(name, *one) for one in kernels_of(fmt, capability, *geometry)]
        for name, what, compile_it in work:
            if options.kernel is not None and what not in options.kernel:
                continue
            outcome, compiled = attempt(compile_it, capability)
            # The disassembler knows no sm_70.
            if compiled is not None and capability > 70 and (options.code or options.check):
                sizes = "" if options.latent else f", {shape}, stride {options.stride}"
                code[f"sm_{capability}, {what}, {name}{sizes}"] = code_of(compiled)
            outcomes.setdefault(what, {}).setdefault(outcome, []).append(name)
        for what, by_outcome in outcomes.items():
            for outcome, names in by_outcome.items():
                print(f"sm_{capability}  {what:32} {outcome}: {', '.join(names)}", flush=True)
    if options.output:
        conditions = {
            "triton": triton.__version__,
            "head_dim": head_dim,
            "group": group,
            "page_size": options.page_size,
        }
        write_table(options.output, conditions, found, options.update)
    if options.code:
        write_table(options.code, {"triton": triton.__version__}, code, options.update)
    more = worse(code, options.check) if options.check else []
    if more:
        raise SystemExit("\n".join(more))
    failures = [
        f"sm_{capability} {what}: {outcome}"
        for capability in options.capability
        for what, by_outcome in found[f"sm_{capability}"].items()
        for outcome in by_outcome
        if outcome not in ("tensor cores", "compiled")
    ]
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
