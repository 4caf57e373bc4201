"""The kernels compile for GPUs that are not there, and the decode loop does not grow.

In a process of its own: here Triton may be in interpreter mode.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "sass.json"

COMPILE_THE_REST = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from kvmesh.kernels.attention.triton_attention import attention_kernel, prefill_launch
from kvmesh.kernels.formats.registry import get_format
from kvmesh.kernels.merge.triton_merge import merge_kernel
from kvmesh.kernels.seal.triton_seal import ROWS, seal_kernel
from kvmesh.kernels.write.triton_write import write_kernel

capability, name = int(sys.argv[1]), sys.argv[2]
fmt = get_format(name)
types = {"q_ptr": "*bf16", "hot_ptr": "*bf16", "out_ptr": "*bf16", "lse_ptr": "*fp32",
    "qk_scale": "fp32", "softcap": "fp32", "outs_ptr": "*fp32", "lses_ptr": "*fp32",
    "k_ptr": "*bf16", "v_ptr": "*bf16", "slots_ptr": "*i64",
    "data_ptr": "*bf16" if name == "exact" else "*u8",
    "meta_ptr": "*bf16" if name == "exact" else "*i16"}

def build(kernel, constants):
    names = list(kernel.arg_names)
    signature = {n: "constexpr" if n in constants
        else types.get(n, "*i32" if n.endswith("_ptr") else "i32") for n in names}
    source = ASTSource(fn=kernel, signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()})
    assert compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]

geometry = {"NUM_KV_HEADS": 2, "PAGE_SIZE": 48, "HEAD_DIM": 80, "HALF": 64}
prefill = prefill_launch(fmt, 80, 3, 48).constants
build(attention_kernel,
    {**prefill, "NUM_KV_HEADS": 2, "HAS_WINDOW": True, "HAS_SOFTCAP": True})
build(seal_kernel, {**geometry, "STORE": fmt.tile_kernels().store_tile, "ROWS": ROWS})
del geometry["HALF"]
build(write_kernel, {**geometry, "BLOCK_D": 128})
build(merge_kernel, {"NUM_HEADS": 6, "HEAD_DIM": 80, "BLOCK_D": 128, "DECODE": True})
"""


def run(*arguments: str) -> None:
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize(("capability", "name"), [(80, "int8"), (89, "int4"), (90, "exact")])
def test_prefill_sealing_writing_and_merging_compile(capability: int, name: str) -> None:
    run("-c", COMPILE_THE_REST, str(capability), name)


@pytest.mark.parametrize(
    ("capability", "shape"), [("80", "64x3"), ("89", "128x4"), ("90", "128x8")]
)
def test_the_decode_loop_compiles_and_has_not_grown(capability: str, shape: str) -> None:
    script = str(ROOT / "benchmarks" / "sass.py")
    run(script, "--check", str(TABLE), "--capability", capability, "--shape", shape)
