"""The kernels compile for GPUs that this machine may lack, and the decode loop does not grow.

Compilation runs in a separate process: here Triton may be in interpreter mode.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmesh.kernels.formats.registry import format_names

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "sass.json"
KINDS = ("uint4", "uint8", "e4m3", "e2m1")
WITHOUT_PRODUCTS = (
    *("seal", "write", "merge", "merge, decode", "merge, prefill", "decoded pages", "add parts"),
    *(f"decoded weights, {kind}" for kind in KINDS),
)
CODE = ROOT / "benchmarks" / "results" / "compiled_code.json"
COMPILED = ROOT / "benchmarks" / "results" / "compiled.json"


# Each call is a script and its arguments; one process, because its imports take seconds.
PROGRAM = """
import json, runpy, sys
for call in json.loads(sys.argv[1]):
    sys.argv = call
    runpy.run_path(call[0], run_name="__main__")
"""


def run(*calls: tuple[str, ...]) -> None:
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(calls)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


# Every format once. stride: 1 for all pages of a sequence, 3 for those that one rank of three has
ODD_SHAPES = {
    "70": (["int8"], "1"),
    "75": (["fp8"], "3"),
    "80": (["k4v2"], "1"),
    "89": (["k2v2"], "1"),
    "90": (["k3v2", "exact"], "3"),
}
# Of weights in few bits: those with PTX of their own. The record has all.
WEIGHTS = {"80": ("uint4",)}
WIDE_HEADS = {"80": ["int8"], "89": ["k4v4"]}
DECODE = {
    "80": ("64x3", ["int8", "k8v4", "k2v2"]),
    "89": ("128x4", ["int4", "k4v2", "fp8"]),
    "90": ("128x8", ["exact", "k4v4", "k3v2"]),
}
PREFILL = {"90": ("128x8", ["int4", "k3v2"])}


@pytest.mark.parametrize("capability", ODD_SHAPES)
def test_kernels_compile_fit_into_shared_memory_and_have_not_grown(capability: str) -> None:
    """For odd shapes all kernels but the integer loop, which supports no such shapes; for wide
    heads all. Of decode's and prefill's loops the instructions for an element are counted, of all
    kernels those of their longest loop."""
    compiled = (str(ROOT / "benchmarks/compiled.py"), "--capability", capability)
    sass = (str(ROOT / "benchmarks/sass.py"), "--capability", capability)
    names, stride = ODD_SHAPES[capability]
    shape = ("--shape", "80x3", "--page-size", "48", "--stride", stride, "--check", str(CODE))
    kinds = WEIGHTS.get(capability, ())
    calls: list[tuple[str, ...]] = [(*compiled, *shape, "--format", *names, "--kind", *kinds)]
    if capability in WIDE_HEADS:
        wide = ("--shape", "256x4", "--check", str(CODE), "--format", *WIDE_HEADS[capability])
        calls.append((*compiled, *wide, "--kind"))
    for wanted, table, loops in (
        ((), TABLE, DECODE),
        (("--prefill",), TABLE.with_name("sass_prefill.json"), PREFILL),
    ):
        if capability in loops:
            size, names = loops[capability]
            what = ("--check", str(table), "--shape", size, "--format", *names)
            calls.append((*sass, *wanted, *what))
    run(*calls)


def test_attention_over_latents_fits_into_shared_memory() -> None:
    script = str(ROOT / "benchmarks" / "compiled.py")
    what = ("--capability", "89", "--latent", "128", "--format", "fp8")
    run((script, *what, "--check", str(CODE)))


def test_tiles_of_whole_blocks_compile_without_bf16() -> None:
    script = str(ROOT / "benchmarks" / "compiled.py")
    where = ("--capability", "75", "--kernel", "prefill", "decoded pages")
    run((script, *where, "--format", "k3v2", "--check", str(CODE)))


def test_every_kernel_has_a_row() -> None:
    """Of machine code: for what `sass.json` does not count for each element of KV."""
    names = json.loads(CODE.read_text())["kernels"]
    pages = "128x8, pages of 64, stride 1"
    for gpu in ("sm_80", "sm_89", "sm_90"):
        for fmt in format_names(comparison=False):
            assert f"{gpu}, decoded pages, {fmt}, {pages}" in names
        for fmt in ("exact", "int8", "fp8", "int4"):
            row = names[f"{gpu}, latents, 128 heads, {fmt}"]
            assert row["spill_bytes"] == 0
            assert row["instructions"] <= 2400
        assert f"{gpu}, fixed linear, all, {pages}" in names


def test_the_record_of_what_compiles_has_no_failure() -> None:
    """It also names the GPUs for which the compiler uses tensor cores."""
    kernels = json.loads(COMPILED.read_text())["kernels"]
    assert set(kernels) == {"sm_70", "sm_75", "sm_80", "sm_89", "sm_90"}
    for name, outcomes in kernels.items():
        for what, by_outcome in outcomes.items():
            multiplies = name not in ("sm_70", "sm_75") and what not in WITHOUT_PRODUCTS
            assert set(by_outcome) == {"tensor cores" if multiplies else "compiled"}


def test_the_recorded_instruction_counts_reach_their_targets() -> None:
    """On sm_90 at head_dim 128 and 8 query heads per KV head, without any register spills."""
    rows = [
        row
        for row in json.loads(TABLE.read_text())["rows"]
        if (row["capability"], row["head_dim"], row["group"]) == (90, 128, 8)
    ]
    found = {row["kv_format"]: row for row in rows}
    limits = {"exact": 2.2, "int8": 2.0, "fp8": 4.0}
    limits |= dict.fromkeys(("k8v4", "int4", "k4v4", "k4v2"), 3.0)
    limits |= dict.fromkeys(("k3v2", "k2v2"), 2.5)
    for name, limit in limits.items():
        assert found[name]["path"] == ("plain" if name in ("exact", "fp8") else "integer")
        assert found[name]["instructions"] <= limit
        assert found[name]["spill_bytes"] == 0
    for style, ours in (("where_chain", "k4v2"), ("index_mod", "int4"), ("fp32_dots", "int4")):
        assert found[style]["instructions"] > 4 * found[ours]["instructions"]
