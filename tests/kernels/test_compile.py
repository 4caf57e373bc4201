"""The kernels compile for GPUs that are not there, and the decode loop does not grow.

In a process of its own: here Triton may be in interpreter mode.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "sass.json"

COMPILE_THE_REST = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from kvmesh.kernels.attention.triton_attention import decode_launch, prefill_launch
from kvmesh.kernels.formats.registry import get_format
from kvmesh.kernels.merge.triton_merge import BLOCK_P, merge_kernel
from kvmesh.kernels.seal.triton_seal import NUM_WARPS, seal_constants, seal_kernel
from kvmesh.kernels.write.triton_write import write_kernel

capability, name = int(sys.argv[1]), sys.argv[2]
fmt = get_format(name)
number = "*bf16" if capability >= 80 else "*fp16"
types = {**dict.fromkeys(("q_ptr", "hot_ptr", "k_ptr", "v_ptr"), number), "sealed_ptr": "*i8",
    **dict.fromkeys(("out_ptr", "lse_ptr", "outs_ptr", "lses_ptr"), "*fp32"),
    "qk_scale": "fp32", "softcap": "fp32", "slots_ptr": "*i64"}

def build(kernel, constants, **options):
    names = list(kernel.arg_names)
    signature = {n: "constexpr" if n in constants
        else types.get(n, "*i32" if n.endswith("_ptr") else "i32") for n in names}
    source = ASTSource(fn=kernel, signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()})
    target = GPUTarget("cuda", capability, 32)
    assert compile(source, target=target, options=options).asm["cubin"]

geometry = {"NUM_KV_HEADS": 2, "PAGE_SIZE": 48, "HEAD_DIM": 80}
every = {"NUM_KV_HEADS": 2, "HAS_WINDOW": True, "HAS_SOFTCAP": True}
for launch in (prefill_launch(fmt, 80, 3, 48), decode_launch(fmt, 80, 3, 48)):
    build(launch.kernel, {**launch.constants, **every}, **launch.options)
build(seal_kernel, {**seal_constants(fmt, 48, 80, 2), "NUM_KV_HEADS": 2}, num_warps=NUM_WARPS)
build(write_kernel, {**geometry, "BLOCK_D": 128})
build(merge_kernel, {"NUM_HEADS": 6, "HEAD_DIM": 80, "BLOCK_D": 128, "BLOCK_P": BLOCK_P,
    "DECODE": True})
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


@pytest.mark.parametrize(
    ("capability", "name"),
    [(75, "k4v2"), (80, "fp8"), (89, "kivi2"), (90, "k3v3"), (90, "exact"), (90, "g64-hqq4")],
)
def test_everything_but_the_integer_loop_compiles(capability: int, name: str) -> None:
    run("-c", COMPILE_THE_REST, str(capability), name)


@pytest.mark.parametrize(
    ("capability", "shape", "formats"),
    [
        ("80", "64x3", ["int8", "k8v4", "k2v2"]),
        ("89", "128x4", ["int4", "k4v2", "fp8"]),
        ("90", "128x8", ["exact", "k4v4", "k3v3", "k3v2"]),
    ],
)
def test_decode_loops_compile_and_have_not_grown(
    capability: str, shape: str, formats: list[str]
) -> None:
    script = str(ROOT / "benchmarks" / "sass.py")
    where = ("--capability", capability, "--shape", shape, "--format", *formats)
    run(script, "--check", str(TABLE), *where)


def test_the_table_reaches_what_was_set_out_for() -> None:
    """On sm_90 at head_dim 128 and 8 query heads a KV head, and nowhere a register in memory."""
    rows = [
        row
        for row in json.loads(TABLE.read_text())["rows"]
        if (row["capability"], row["head_dim"], row["group"]) == (90, 128, 8)
    ]
    found = {row["kv_format"]: row for row in rows}
    limits = {"int8": 2.0, "k8v4": 3.0, "int4": 3.0, "k4v4": 3.0, "k4v2": 3.0}
    limits |= dict.fromkeys(("k3v3", "k3v2", "k2v2"), 2.5)
    for name, limit in limits.items():
        assert found[name]["path"] == "integer"
        assert found[name]["instructions"] <= limit
        assert found[name]["spill_bytes"] == 0
    for style, ours in (("where_chain", "k4v2"), ("index_mod", "int4"), ("fp32_dots", "int4")):
        assert found[style]["instructions"] > 4 * found[ours]["instructions"]
