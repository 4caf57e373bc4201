"""Sums over the GPUs of a host: whether one-shot sums are NCCL's, and the time of both.

python -m benchmarks.sums [--gpus N]
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.device import seconds
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.parallel.one_shot import MAX_BYTES, OneShotSums

# Numbers of a row of hidden states, and rows of a decode step.
SIZE, ROWS = 4096, (1, 4, 16, 32)
TIMEOUT_S = 120.0


def measure(gpus: int) -> list[dict[str, Any]]:
    """A row for each number of rows: the largest difference and both times, as rank 0 sees them."""
    folder = Path(tempfile.mkdtemp())
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, gpus, folder / "ranks", queue))
        for rank in range(gpus)
    ]
    for process in ranks:
        process.start()
    try:
        return list(queue.get(timeout=TIMEOUT_S))
    finally:
        for process in ranks:
            process.join(timeout=30)
            process.kill()
        shutil.rmtree(folder)


def _rank(rank: int, gpus: int, rendezvous: Path, queue: Any) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    comm = Communicator.connect(rank, gpus, rendezvous, device=device)
    one_shot = OneShotSums.try_to_meet(device)
    found = []
    for rows in ROWS:
        row: dict[str, Any] = {"gpus": gpus, "rows": rows, "sums_with": comm.sums_with}
        part = torch.randn(rows, SIZE, device=device).bfloat16()
        want = part.clone()
        dist.all_reduce(want)
        row["nccl_us"] = 1e6 * seconds(partial(_sum_copy, part, dist.all_reduce))
        if one_shot is not None:
            assert rows * SIZE * 2 <= MAX_BYTES and one_shot.takes(part)
            got = part.clone()
            one_shot.all_reduce(got)
            # bf16 has 8 bits, and each of the sums is rounded.
            row["error"] = float((got - want).abs().max() / want.abs().max())
            row["one_shot_us"] = 1e6 * seconds(partial(_sum_copy, part, one_shot.all_reduce))
        found.append(row)
    if rank == 0:
        queue.put(found)
    comm.close()


def _sum_copy(part: torch.Tensor, all_reduce: Callable[[torch.Tensor], object]) -> None:
    all_reduce(part.clone())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    options = parser.parse_args()
    if options.gpus < 2:
        raise SystemExit("this benchmark needs two GPUs")
    for row in measure(options.gpus):
        print(row)


if __name__ == "__main__":
    main()
