"""What an engine on a CPU compiles, it compiles before it is ready."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo.imports import ROOT
from tests.workers.structured.tiny import model_path

PROGRAM = """
import os, sys
from kvmesh import LLM

def loops():
    return set(os.listdir(os.environ["NUMBA_CACHE_DIR"] + "/kvmesh-loops"))

with LLM(sys.argv[1], kv_format=sys.argv[2], kv_memory_bytes="64MiB", page_size=16,
         max_num_batched_tokens=128, kv_probe="off") as llm:
    ready = loops()
    prompts = ["x " * 200, "x " * 200 + "y", "x " * 200 + "z", "hello"]
    for sampling in ({"temperature": 0.0}, {"top_k": 20, "presence_penalty": 0.5, "logprobs": 2}):
        llm.generate(prompts, max_tokens=40, ignore_eos=True, **sampling)
    assert ready and loops() == ready, (len(ready), len(loops() - ready))
"""


@pytest.mark.slow
def test_no_request_waits_for_a_loop_to_be_compiled(tmp_path: Path) -> None:
    """With a format that has loops of its own for keys, for values and to fit its scales."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model_path()), "k4v2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
