"""Split models against whole ones: real processes, real gloo.

All architectures run in one pair of processes, since starting them costs most.
"""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.load import load_model
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.parallel.shards import check_tp
from tests.model.attend import generate_greedily, prompt_logits
from tests.model.cases import CASES, PROMPTS
from tests.model.small import make_small_model

CPU = torch.device("cpu")
TOKENS = 12


def _rank_main(rank: int, size: int, rendezvous: str, root: Path, results: Any) -> None:
    torch.set_num_threads(1)
    comm = Communicator.connect(rank, size, rendezvous, device=CPU, timeout_s=60)
    try:
        results.put((rank, "sums", _sums(comm)))
        for case in sorted(path.name for path in root.iterdir()):
            expected = torch.load(root / case / "expected.pt")
            model = load_model(root / case, dtype=torch.float32, device=CPU, comm=comm)
            logits = prompt_logits(model, PROMPTS[0])
            outputs = generate_greedily(model, PROMPTS, TOKENS, expected["outputs"])
            if logits is not None:
                error = (logits - expected["logits"]).abs().max().item()
                results.put((rank, case, (error, outputs == expected["outputs"])))
        comm.barrier()
    finally:
        comm.close()


def _sums(comm: Communicator) -> list[tuple[bytes, bytes]]:
    """Of tensors of many sizes: the all-reduced bits and the all-gathered ones."""
    generator = torch.Generator().manual_seed(comm.rank)
    found = []
    for count in (1, 2, 3, 7, 576, 577, 4096, 9216, 100_003):
        part = torch.randn(count, generator=generator)
        gathered = comm.all_gather(part[None])
        found.append((comm.all_reduce(part).numpy().tobytes(), gathered.numpy().tobytes()))
    return found


def _run_ranks(size: int, root: Path) -> list[tuple[int, str, Any]]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        rendezvous = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=_rank_main, args=(rank, size, rendezvous, root, results))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    expected = size + len(list(root.iterdir()))
    try:
        found = [results.get(timeout=240) for _ in range(expected)]
    finally:
        for process in ranks:
            process.join(timeout=30)
            process.kill()
    assert [process.exitcode for process in ranks] == [0] * size
    return found


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    for case, (architecture, overrides) in CASES.items():
        path = make_small_model(architecture, tmp_path / case, **overrides)
        model = load_model(path, dtype=torch.float32, device=CPU, comm=Communicator.single())
        expected = {
            "logits": prompt_logits(model, PROMPTS[0]),
            "outputs": generate_greedily(model, PROMPTS, TOKENS),
        }
        torch.save(expected, path / "expected.pt")
    found = _run_ranks(2, tmp_path)
    sums = {rank: value for rank, name, value in found if name == "sums"}
    assert sums[0] == sums[1], "ranks must see the same sums, to the bit"
    results = {name: value for _, name, value in found if name != "sums"}
    assert results.keys() == CASES.keys()
    wrong = {case: result for case, result in results.items() if result[0] > 1e-4 or not result[1]}
    assert not wrong


def test_sums_of_four_ranks_are_alike(tmp_path: Path) -> None:
    sums = [value for _, _, value in _run_ranks(4, tmp_path)]
    assert sums[1:] == sums[:-1]


def test_tp_must_divide_the_kv_heads(tmp_path: Path) -> None:
    facts = read_facts(make_small_model("LlamaForCausalLM", tmp_path))
    for tp in (1, 2, 4):
        check_tp(facts, tp)
    for tp in (0, 3, 8):
        with pytest.raises(ConfigError, match="1, 2, 4") as caught:
            check_tp(facts, tp)
        assert caught.value.field == "tp"


def test_a_rank_alone_gives_up() -> None:
    with pytest.raises(ConfigError, match="rank"):
        Communicator.connect(2, 2, "tcp://127.0.0.1:1", device=CPU)
    assert Communicator.connect(0, 1, "unused", device=CPU).size == 1
