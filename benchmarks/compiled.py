"""Which kernels compile for which GPUs, and whether they use tensor cores; needs no GPU.

    python benchmarks/compiled.py [--output FILE] [--capability 70 75 ...] [--format NAME ...]
        [--shape 128x8] [--page-size 64]

Every kernel is compiled as the operators launch it, with everything that a layer or a batch may
need: a window, a softcap, shared prefixes. GPUs before sm_80 have no bf16; they use fp16. If a
compiler rejects a kernel, or the GPU has too little shared memory for it, the reason is recorded.
Nothing is run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's functions cannot be compiled

import torch
import triton

from benchmarks.kernel_formats import FORMATS, as_served
from benchmarks.sass import TYPES, compile_kernel
from kvmesh.kernels.attention.triton_launch import (
    Launch,
    decode_launch,
    integer_launch,
    one_warp_launch,
    prefill_launch,
    prefix_launch,
    shared_kib,
    takes_integer_path,
)
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.merge.triton_merge import BLOCK_P, merge_kernel
from kvmesh.kernels.moe import GatedUnit
from kvmesh.kernels.moe.triton_moe import down_kernel, gate_up_kernel, tiles, unit
from kvmesh.kernels.seal.triton_seal import NUM_WARPS, seal_constants, seal_kernel
from kvmesh.kernels.write.triton_write import write_kernel

CAPABILITIES = (70, 75, 80, 89, 90)
NUM_KV_HEADS = 8


def kernels_of(
    fmt: KVFormat, capability: int, head_dim: int, group: int, page_size: int
) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    """Name, kernel, constants and options of every kernel that this format runs on the GPU."""
    geometry = (fmt, head_dim, group, page_size)
    gpu = divmod(capability, 10)
    launches: dict[str, Launch | None] = {
        "decode": decode_launch(*geometry, capability=gpu),
        "decode, hot pages": decode_launch(*geometry, hot_only=True, capability=gpu),
        "decode, one warp": one_warp_launch(*geometry),
        "shared prefixes": prefix_launch(*geometry, capability=gpu),
        "prefill": prefill_launch(*geometry, capability=gpu),
    }
    if takes_integer_path(fmt, head_dim, page_size, dtype=torch.bfloat16, capability=gpu):
        launches["decode, integer"] = integer_launch(*geometry)
    for name, launch in launches.items():
        if launch is None:
            continue
        features = {"HAS_SOFTCAP": True, "HAS_WINDOW": True, "HAS_PREFIXES": name != "prefill"}
        taken = {key: value for key, value in features.items() if key in launch.kernel.arg_names}
        constants = {**launch.constants, **taken, "NUM_KV_HEADS": NUM_KV_HEADS}
        yield name, launch.kernel, constants, launch.options
    warps: dict[str, Any] = {"num_warps": NUM_WARPS}
    constants = {**seal_constants(fmt, page_size, head_dim, 2), "NUM_KV_HEADS": NUM_KV_HEADS}
    yield "seal", seal_kernel, constants, warps


def shared_kernels(
    head_dim: int, group: int, page_size: int
) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    """Kernels that all formats share."""
    block_d = triton.next_power_of_2(head_dim)
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": block_d}
    pages = {"NUM_KV_HEADS": NUM_KV_HEADS, "PAGE_SIZE": page_size}
    yield "write", write_kernel, {**sizes, **pages}, {}
    merge = {"NUM_HEADS": NUM_KV_HEADS * group, "BLOCK_P": BLOCK_P, "DECODE": True}
    yield "merge", merge_kernel, {**sizes, **merge}, {}
    inner = {"HIDDEN": 8 * head_dim, "WIDTH": 3 * head_dim}
    for rows in (16, 128):
        how = tiles(torch.bfloat16, rows)
        options = {name: how.pop(name) for name in ("num_warps", "num_stages")}
        gated = {**unit(GatedUnit(1.702, 7.0, 1.0)), **inner, "TOP_K": 8, "HAS_BIAS": True, **how}
        yield f"experts, gate and up, {rows} rows", gate_up_kernel, gated, options
        down = {**inner, "HAS_BIAS": True, **how}
        yield f"experts, down, {rows} rows", down_kernel, down, options


def attempt(kernel: Any, constants: dict[str, Any], options: dict[str, Any], cc: int) -> str:
    """The outcome: "tensor cores", "compiled" (without tensor cores), or the compiler's reason."""
    number = "*bf16" if cc >= 80 else "*fp16"
    numbers = dict.fromkeys(("q_ptr", "hot_ptr", "k_ptr", "v_ptr"), number)
    parts = dict.fromkeys(("outs_ptr", "lses_ptr"), "*fp32")
    types = {**TYPES, **numbers, **parts, "slots_ptr": "*i64"}
    if kernel in (gate_up_kernel, down_kernel):
        types |= dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), number)
        types |= {"order_ptr": "*i64", "shares_ptr": "*fp32"}
        if kernel is down_kernel:
            types["out_ptr"] = "*fp32"
    try:
        compiled = compile_kernel(kernel, constants, options, cc, types)
    except (triton.compiler.errors.CompilationError, RuntimeError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
    if compiled.metadata.shared > shared_kib(divmod(cc, 10)) * 1024:
        return f"takes {compiled.metadata.shared / 1024:.0f} KiB of shared memory"
    multiplies = any(opcode in compiled.asm["ptx"] for opcode in ("mma.sync", "wgmma"))
    return "tensor cores" if multiplies else "compiled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--capability", type=int, nargs="*", default=list(CAPABILITIES))
    parser.add_argument("--format", nargs="*", default=list(FORMATS))
    parser.add_argument("--shape", default="128x8")
    parser.add_argument("--page-size", type=int, default=64)
    options = parser.parse_args()
    head_dim, group = map(int, options.shape.split("x"))
    # For each GPU, kernel and outcome: the formats.
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    for capability in options.capability:
        outcomes = found.setdefault(f"sm_{capability}", {})
        geometry = (head_dim, group, options.page_size)
        work = [("all", *one) for one in shared_kernels(*geometry)]
        for name in options.format:
            fmt = as_served(name, head_dim)
            work += [(name, *one) for one in kernels_of(fmt, capability, *geometry)]
        for name, what, kernel, constants, how in work:
            outcome = attempt(kernel, constants, how, capability)
            outcomes.setdefault(what, {}).setdefault(outcome, []).append(name)
        for what, by_outcome in outcomes.items():
            for outcome, names in by_outcome.items():
                print(f"sm_{capability}  {what:32} {outcome}: {', '.join(names)}", flush=True)
    if options.output:
        report = {
            "triton": triton.__version__,
            "head_dim": head_dim,
            "group": group,
            "page_size": options.page_size,
            "kernels": found,
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")
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
