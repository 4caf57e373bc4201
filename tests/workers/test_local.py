"""Executors of this process and of its children."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.local import InProcessExecutor
from tests.model.small import make_small_model


def test_a_closed_executor_lets_weights_and_pages_go(tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(make_small_model("LlamaForCausalLM", tmp_path, num_hidden_layers=1)),
        device="cpu",
        page_size=16,
        kv_memory_bytes=1 << 20,
        max_num_seqs=2,
        threads_per_rank=1,
    )
    executor = InProcessExecutor(config)
    Engine(config, executor)
    rank, runner = weakref.ref(executor.rank), weakref.ref(executor.rank.runner)
    executor.close()
    gc.collect()
    assert (rank(), runner()) == (None, None)
