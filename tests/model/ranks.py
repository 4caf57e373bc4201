"""Functions that the processes of the tp tests run; imports little, as each process imports it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kvmesh.workers.errors import WorkerDiedError
from kvmesh.workers.parallel.comm import Communicator

CPU = torch.device("cpu")
TOKENS = 4


def run_ranks(target: Callable[..., None], size: int, num_results: int, *args: Any) -> list[Any]:
    """What `size` processes of target(rank, size, rendezvous, results, *args) put into results."""
    rendezvous = Path(tempfile.mkdtemp()) / "ranks"
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=target, args=(rank, size, rendezvous, results, *args))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        return [results.get(timeout=500) for _ in range(num_results)]
    finally:
        for process in ranks:
            process.join(timeout=30)
            process.kill()
        shutil.rmtree(rendezvous.parent)


def sum_then_lose_a_rank(rank: int, size: int, rendezvous: Path, results: Any) -> None:
    """Puts (rank, [sums, gathered parts], whether exchanges were right); then the last rank dies,
    and the others put their rank when they notice."""
    torch.set_num_threads(1)
    comm = Communicator.connect(rank, size, rendezvous, device=CPU, kvp=2, timeout_s=300)
    comm.wait_for_all()
    tokens = torch.arange(1 << 24, (1 << 24) + 9, dtype=torch.int32) + rank
    comm.broadcast(tokens)
    assert tokens.tolist() == [*range(1 << 24, (1 << 24) + 9)]
    generator = torch.Generator().manual_seed(rank)
    found = []
    for count in (1, 3, 576, 4097, 600_001):
        part = torch.randn(2, count, generator=generator)
        gathered = comm.all_gather(part)
        found.append((comm.all_reduce(part).numpy(), gathered.numpy()))
    exchanged = [exchange(comm, count) for count in (1, 3, 200_001)]
    results.put((rank, found, exchanged))
    comm.barrier()
    if rank == size - 1:
        results.close()
        results.join_thread()
        os._exit(1)
    try:
        comm.all_reduce(torch.ones(3))
    except WorkerDiedError:
        results.put(rank)


def exchange(comm: Communicator, count: int) -> bool:
    """Whether each rank with the same heads has sent this one its part of what it had."""

    def parts_of(rank: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 + rank)
        return torch.randn(comm.kvp, count, 3, generator=generator)

    received = comm.exchange(parts_of(comm.rank))
    first = comm.tp_rank * comm.kvp
    wanted = [parts_of(first + other)[comm.kvp_rank] for other in range(comm.kvp)]
    return torch.equal(received, torch.stack(wanted))


def save_expectation(file: Path, path: Path, prompts: list[list[int]]) -> Path:
    """Save what one rank computes, for compare_models; returns `file`."""
    from kvmesh.workers.model.load import load_model
    from tests.model.attend import generate_greedily, prompt_logits

    model = load_model(path, dtype=torch.float32, device=CPU, comm=Communicator.single())
    expectation = {
        "path": str(path),
        "prompts": prompts,
        "logits": prompt_logits(model, prompts[0]),
        "outputs": generate_greedily(model, prompts, TOKENS),
    }
    torch.save(expectation, file)
    return file


def compare_models(
    rank: int,
    size: int,
    rendezvous: Path,
    results: Any,
    expectations: Sequence[Path],
    kvps: Sequence[int] = (1,),
) -> None:
    """For each file of expected results and each kvp of the ranks, rank 0 puts (stem, kvp, largest
    logit error, same tokens).

    Such a file contains a model's path, prompts, the logits of the first prompt and outputs. With
    kvp > 1 ranks have whole experts, if there are any.
    """
    from kvmesh.workers.model.facts import read_facts
    from kvmesh.workers.model.load import load_model
    from tests.model.attend import generate_greedily, prompt_logits

    torch.set_num_threads(1)
    comm = Communicator.connect(rank, size, rendezvous, device=CPU, timeout_s=300)
    try:
        for file in expectations:
            expected = torch.load(file)
            path, prompts = Path(expected["path"]), expected["prompts"]
            has_experts = read_facts(path).num_experts > 0
            for kvp in kvps:
                comm.kvp = kvp
                by_expert = has_experts and kvp > 1
                model = load_model(
                    path, dtype=torch.float32, device=CPU, comm=comm, expert_parallel=by_expert
                )
                logits = prompt_logits(model, prompts[0], comm)
                outputs = generate_greedily(model, prompts, TOKENS, expected["outputs"], comm)
                if logits is not None:
                    error = (logits - expected["logits"]).abs().max().item()
                    results.put((file.stem, kvp, error, outputs == expected["outputs"]))
        comm.barrier()
    finally:
        comm.close()
