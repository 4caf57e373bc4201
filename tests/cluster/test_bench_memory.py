"""`kvmesh bench memory`: predictions, and what is really allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from kvmesh.cluster.cli.exits import ExitCode
from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.evaluation.memory import predict
from kvmesh.workers.executor import Allocation
from kvmesh.workers.kv_pool import KVPool
from kvmesh.workers.page_geometry import KVShape
from tests.cluster.test_cli import run
from tests.model.small import make_small_model, make_small_tokenizer

MIB = 1 << 20
# MiB of a GPU, by batch: github.com/InternLM/lmdeploy, docs/en/kv_int8.md at 1ce8d4c. Weights in
# fp16, sequences of 2,048 tokens; its int8 has no scales per token, ours has (8.25 bits).
LMDEPLOY = {
    "exact": {8: 22337, 16: 30593, 32: 47073, 48: 63553},
    "int8": {8: 18241, 16: 22369, 32: 30625, 48: 38881},
}


def memory(*arguments: str) -> Any:
    result = run("bench", "memory", "--json", *arguments)
    assert result.exit_code == ExitCode.DONE, result.output
    return json.loads(result.stdout)


def test_lmdeploys_published_table_is_predicted() -> None:
    """Ours is above by a page a sequence, the tokens of a step, and the scales of int8."""
    found = memory("--model", "internlm-chat-7b", "--kv-format", "exact,int8")
    for figure in found["figures"]:
        published = LMDEPLOY[figure["kv_format"]][figure["sequences"]]
        within = 0.03 if figure["kv_format"] == "exact" else 0.06
        assert figure["total_bytes"] / MIB == pytest.approx(published, rel=within)
        assert figure["measured"] is None
    # "the fp16 version requires 1030MB of GPU memory for each concurrency"
    sequence = {x["kv_format"]: x["sequence_bytes"] / MIB for x in found["figures"]}
    assert sequence == {"exact": 1056.0, "int8": 560.0}


def test_ranks_share_the_heads() -> None:
    one = memory("--model", "llama-3-70b", "--kv-format", "k4v4", "--batch", "4")
    eight = memory("--model", "llama-3-70b", "--kv-format", "k4v4", "--batch", "4", "--tp", "8")
    (alone,), (shared,) = one["figures"], eight["figures"]
    assert alone["pool_bytes"] == shared["pool_bytes"]
    assert shared["kv_memory_bytes"] * 8 == alone["kv_memory_bytes"]


@pytest.mark.parametrize("kv_format", ["exact", "int8", "k4v4"])
def test_the_predicted_pool_is_what_a_process_grows_by(kv_format: str) -> None:
    shape = KVShape(4, 4, 64)
    (planned,) = predict(
        shape, 0, [get_format(kv_format)], [24], 2048, itemsize=4, page_size=64,
        max_num_batched_tokens=512,
    )  # fmt: skip
    before = psutil.Process().memory_info().rss
    pool = KVPool(
        Allocation(planned.plan.hot_total, planned.plan.sealed_pages, 24, 32),
        planned.fmt,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        page_size=64,
        head_dim=shape.head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    pool.commit()
    grown = psutil.Process().memory_info().rss - before
    arrays = (pool.all_hot, pool.all_sealed)
    assert sum(array.nbytes for array in arrays) == planned.figure.pool_bytes
    # Other memory of this process may be given back meanwhile.
    assert grown == pytest.approx(planned.figure.pool_bytes, rel=0.05, abs=2 * MIB)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("measured")
    vocab_size = make_small_tokenizer(folder)
    make_small_model("LlamaForCausalLM", folder, vocab_size=vocab_size)
    return str(folder)


@pytest.mark.slow
def test_a_local_model_is_measured(model: str) -> None:
    arguments = ("--model", model, "--batch", "1,300", "--tokens", "512")
    found = memory(*arguments, "--kv-format", "exact,nuq3")
    small, large, *calibrated = found["figures"]
    assert small["measured"]["process_bytes"] > found["weight_bytes"]
    assert large["measured"]["pool_bytes"] == pytest.approx(large["pool_bytes"], rel=0.1)
    assert [x["measured"] for x in calibrated] == [None, None], "without parameters"
    result = run("bench", "memory", *arguments)
    assert result.exit_code == ExitCode.DONE, result.output
    assert "measured" in result.stdout
    shown = memory(*arguments, "--predict")
    assert {x["measured"] for x in shown["figures"]} == {None}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--batch", "8,many"), "must be whole numbers from 1"),
        (("--batch", "0"), "must be whole numbers from 1"),
        (("--kv-format", "int9"), "did you mean int"),
        (("--kv-format", ","), "must name a format"),
        (("--model", "llama-3-8b", "--tp", "3"), "must divide the model's 8 KV heads"),
        (("--page-size", "7"), "must be one of 16, 32"),
        (("--dtype", "float16"), "float32"),
        (("--model", "none/config.json"), "none/config.json"),
        (("--model", "/nowhere"), "is not a model"),
    ],
)
def test_wrong_options_are_named(arguments: tuple[str, ...], part: str, tmp_path: Path) -> None:
    result = run("bench", "memory", *arguments)
    assert result.exit_code == ExitCode.USAGE, result.output
    assert part in " ".join(result.stderr.replace("│", " ").split())
