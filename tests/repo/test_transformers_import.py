"""transformers can be imported next to our top-level folder `kernels`.

transformers uses a PyPI package named `kernels` if there is one, and both
`python -c` and Ray put the current folder on sys.path.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile

import pytest

from tests.repo.imports import ROOT

IN_DRIVER = """
import sys
assert sys.path[0] == "", sys.path[0]
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3ForCausalLM, Gemma2ForCausalLM
config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1,
)
LlamaForCausalLM(config)
print("imported")
"""
IN_WORKER = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray

@ray.remote
def load():
    import os, sys
    assert os.getcwd() in sys.path, sys.path
    from transformers import LlamaForCausalLM
    import kvmesh.kernels
    return LlamaForCausalLM.__name__

ray.init(
    num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20,
    _temp_dir=sys.argv[1], log_to_driver=False,
)
try:
    assert ray.get(load.remote()) == "LlamaForCausalLM"
finally:
    ray.shutdown()
print("imported")
"""


def run_in_root(script: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_models_import_from_the_repository_root() -> None:
    assert "imported" in run_in_root(IN_DRIVER)


@pytest.mark.ray
def test_models_import_in_a_ray_worker() -> None:
    # Unix socket paths must be short, and pytest's own folders can be too long.
    folder = tempfile.mkdtemp(prefix="kvm-", dir="/tmp")
    try:
        assert "imported" in run_in_root(IN_WORKER, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
