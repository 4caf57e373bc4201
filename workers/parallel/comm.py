"""Communication between the ranks of a group during computation."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from kvmesh.workers.errors import ConfigError, WorkerDiedError
from kvmesh.workers.parallel.one_shot import MAX_BYTES, OneShotSums
from kvmesh.workers.parallel.same_host import SameHost, make_meeting_place

logger = logging.getLogger(__name__)

_TIMEOUT_S = 120.0
_LOADED_PERIOD_S = 0.1


class Communicator:
    """The ranks of one group. With one rank, every call is a no-op without torch.distributed.

    A group's size is tp · kvp. Rank t · kvp + k has share t of the heads, and of their pages those
    that are dealt to k:

        tp 2, kvp 3     share 0: ranks 0 1 2     share 1: ranks 3 4 5

    A sum has the same bits on every rank: each part of it is summed on one rank, in a
    fixed order, and sent to the others.
    """

    rank = 0
    size = 1
    kvp = 1

    @property
    def tp(self) -> int:
        """Shares of the heads."""
        return self.size // self.kvp

    @property
    def tp_rank(self) -> int:
        """This rank's share of the heads."""
        return self.rank // self.kvp

    @property
    def kvp_rank(self) -> int:
        """Which pages of its heads this rank has."""
        return self.rank % self.kvp

    @staticmethod
    def single() -> Communicator:
        """A group of one rank."""
        return Communicator()

    @staticmethod
    def connect(
        rank: int,
        size: int,
        rendezvous: Path,
        *,
        device: torch.device,
        kvp: int = 1,
        deterministic: bool = False,
        timeout_s: float = _TIMEOUT_S,
    ) -> Communicator:
        """Meet the other ranks through the file `rendezvous`, which must not exist before.

        Any process that can write to its directory can join: it must be this user's alone.

        device: where tensors are; NCCL between GPUs, shared memory between the CPUs
            of one host, gloo between those of several
        deterministic: a number's sum has the same bits wherever it is in a tensor of any size
        timeout_s: for meeting and, if the backend supports it, for each call
        Raises ConfigError if rank and size are inconsistent, WorkerDiedError if
        the other ranks do not connect in time.
        """
        if not 0 <= rank < size:
            raise ConfigError("rank", f"must be from 0 to {size - 1}, got {rank}")
        if kvp < 1 or size % kvp:
            raise ConfigError("kvp", f"must divide the {size} ranks of the group; got {kvp}")
        if size == 1:
            return Communicator.single()
        return _ProcessGroup(
            rank, size, kvp, rendezvous, device, timeout_s, deterministic=deterministic
        )

    @property
    def sums_with(self) -> str:
        """What sums over the ranks, as users read it; "" for one rank."""
        return ""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the ranks in place and return it; contiguous, of any shape."""
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Give every rank rank 0's tensor, in place; contiguous, of any shape."""

    def gather_logits(self, part: torch.Tensor) -> torch.Tensor | None:
        """The parts [n, v], concatenated along the last dimension, on rank 0; otherwise None."""
        return part

    def all_gather(self, part: torch.Tensor) -> torch.Tensor:
        """The ranks' parts [..., v], concatenated along the last dimension, on every rank."""
        return part

    def exchange(self, parts: torch.Tensor) -> torch.Tensor:
        """Between the kvp ranks of a share of the heads: parts[k] goes to the k-th of them.

        parts: [kvp, ...], contiguous and of the same shape on every rank of the group
        Returns like parts: [k] is what the k-th of them had for this one.
        """
        return parts

    def barrier(self) -> None:
        """Wait until every rank has called this."""

    def wait_for_all(self) -> None:
        """Like `barrier`, but for as long as the leader lives: other ranks may still load, for
        longer than any call may take. Raises WorkerDiedError if the leader is gone."""

    def close(self) -> None:
        """Leave the group; the communicator cannot be used afterwards."""


class _ProcessGroup(Communicator):
    """Ranks in separate processes, over torch.distributed and, on one host, shared memory."""

    def __init__(
        self,
        rank: int,
        size: int,
        kvp: int,
        rendezvous: Path,
        device: torch.device,
        timeout_s: float,
        *,
        deterministic: bool,
    ) -> None:
        self.rank = rank
        self.size = size
        self.kvp = kvp
        self._deterministic = deterministic
        self._on_gpu = device.type == "cuda"
        timeout = timedelta(seconds=timeout_s)
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            # Their sockets know no authentication, and the ranks are on one host.
            os.environ.setdefault(name, "lo")
        store = self._store = FileStore(str(rendezvous), size)
        store.set_timeout(timeout)
        try:
            dist.init_process_group(
                "nccl" if self._on_gpu else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timeout,
                device_id=device if self._on_gpu else None,
            )
        except dist.DistError as error:
            raise WorkerDiedError(
                f"rank {rank} of {size} could not connect to the others at {rendezvous}: {error}"
            ) from error
        self._same_host = None if self._on_gpu else _meet_on_host(rank, size, store, timeout_s)
        self._one_shot: OneShotSums | None = None
        if self._on_gpu and not deterministic:
            with torch.cuda.device(device):
                self._one_shot = OneShotSums.try_to_meet(device)
        self._share: dist.ProcessGroup | None = None  # the ranks with the same heads
        if self._same_host is None and 1 < kvp < size:
            # Every rank has to take part in making every group.
            groups = [dist.new_group(list(range(i, i + kvp))) for i in range(0, size, kvp)]
            self._share = groups[self.tp_rank]

    @property
    def sums_with(self) -> str:
        if self._same_host is not None:
            return "shared memory"
        if self._one_shot is not None:
            return f"one-shot to {MAX_BYTES >> 10} KiB, NCCL"
        return "NCCL" if self._on_gpu else "gloo"

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._same_host is not None:
            self._same_host.all_reduce(tensor)
        elif self._one_shot is not None and self._one_shot.takes(tensor):
            self._one_shot.all_reduce(tensor)
        elif self._deterministic:
            # NCCL and gloo sum the parts of a tensor in an order that depends on its size.
            parts = [torch.empty_like(tensor) for _ in range(self.size)]
            dist.all_gather(parts, tensor)
            total = parts[0].float()
            for part in parts[1:]:
                total += part
            tensor.copy_(total)
        else:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> None:
        if self._same_host is not None:
            tensor.copy_(self._same_host.all_gather(tensor)[0])
        else:
            dist.broadcast(tensor, src=0)

    def gather_logits(self, part: torch.Tensor) -> torch.Tensor | None:
        # NCCL has no gather, but its all-gather is a single kernel.
        if self._on_gpu or self._same_host is not None:
            joined = self.all_gather(part)
            return joined if self.rank == 0 else None
        if self.rank != 0:
            dist.gather(part.contiguous(), dst=0)
            return None
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.gather(part.contiguous(), parts, dst=0)
        return torch.cat(parts, dim=-1)

    def all_gather(self, part: torch.Tensor) -> torch.Tensor:
        if self._same_host is not None:
            return torch.cat(tuple(self._same_host.all_gather(part)), dim=-1)
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, dim=-1)

    def exchange(self, parts: torch.Tensor) -> torch.Tensor:
        if self._same_host is not None:
            first = self.tp_rank * self.kvp
            return self._same_host.exchange(parts, range(first, first + self.kvp))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self._share)
        return received

    def barrier(self) -> None:
        dist.barrier()

    def wait_for_all(self) -> None:
        parent = os.getppid()
        self._store.set(f"loaded {self.rank}", "yes")
        keys = [f"loaded {rank}" for rank in range(self.size)]
        while not self._store.check(keys):
            if os.getppid() != parent:
                raise WorkerDiedError("the leader is gone")
            time.sleep(_LOADED_PERIOD_S)

    def close(self) -> None:
        if self._same_host is not None:
            self._same_host.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet_on_host(rank: int, size: int, store: FileStore, timeout_s: float) -> SameHost | None:
    """The exchange through shared memory; None unless all ranks are on one host and can map it."""
    place = None
    if rank == 0:
        try:
            place = make_meeting_place(size)
        except OSError as error:
            logger.warning("no shared memory between ranks: %s", error)
        store.set("host", platform.node())
        store.set("meeting place", str(place or ""))
    host, path = store.get("host").decode(), store.get("meeting place").decode()
    if not path:
        return None
    try:
        same_host = _try_to_join(rank, size, host, Path(path), timeout_s)
        if _all_agree(same_host is not None, size):
            assert same_host is not None
            same_host.meet()
            dist.barrier()
            return same_host
        if same_host is not None:
            same_host.close()
        return None
    finally:
        if place is not None:  # all ranks have opened its files by now
            shutil.rmtree(place, ignore_errors=True)


def _try_to_join(rank: int, size: int, host: str, place: Path, timeout_s: float) -> SameHost | None:
    if platform.node() != host:
        return None
    try:
        same_host = SameHost(rank, size, place, timeout_s)
        same_host.listen()
    except OSError as error:
        logger.warning("rank %d cannot share memory with the others: %s", rank, error)
        return None
    return same_host


def _all_agree(own: bool, size: int) -> bool:
    answers: list[bool | None] = [None] * size
    dist.all_gather_object(answers, own)
    return all(answers)
