"""Sums and gathers between CPU ranks of one host, through shared memory.

gloo takes half a millisecond for a sum between two ranks and several between
four on two cores; a decode step needs two sums per layer. Here a rank writes its part
into a buffer that all ranks map, signals the others by a byte on a socket, waits for
their bytes, and reads their parts itself, in rank order, so that a sum has the same
bits on every rank.

    segment   [2 buffers, size ranks, _BUFFER_BYTES]

No rank spins: they wait in the kernel, so ranks may outnumber cores, and the sockets
of a rank that dies are closed, which wakes the others. Two buffers are enough: a rank
writes buffer b again two rounds later, after it has heard from all ranks in the round
between, which they start only after reading b.
"""

from __future__ import annotations

import mmap
import os
import shutil
import socket
import struct
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from kvmesh.workers.errors import WorkerDiedError

_BUFFER_BYTES = 1 << 20
_SIGNAL = b"\x01"
_RANK = struct.Struct("<H")


def make_meeting_place(size: int) -> Path:
    """A directory that only this user can enter, with the segment in it; made by rank 0.

    Raises OSError if there is no room for the segment.
    """
    shm = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(prefix="kvmesh-", dir=shm if shm.is_dir() else None))
    try:
        with (place / "segment").open("wb") as segment:
            # Reserved now: if a page could not be allocated later, SIGBUS would end the process.
            os.posix_fallocate(segment.fileno(), 0, _segment_bytes(size))
    except OSError:
        shutil.rmtree(place)
        raise
    return place


def _segment_bytes(size: int) -> int:
    return 2 * size * _BUFFER_BYTES


class SameHost:
    """One rank's end of the exchange.

    After construction call `listen` on every rank, then `meet` on every rank; then the
    meeting place can be removed. These raise OSError. Later calls raise
    WorkerDiedError if another rank is gone or silent for `timeout_s`.
    """

    def __init__(self, rank: int, size: int, place: Path, timeout_s: float) -> None:
        self._rank = rank
        self._size = size
        self._place = place
        self._timeout_s = timeout_s
        with (place / "segment").open("r+b") as segment:
            self._map = mmap.mmap(segment.fileno(), _segment_bytes(size))
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        self._buffers = whole.view(2, size, _BUFFER_BYTES)
        self._turn = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._peers: dict[int, socket.socket] = {}

    def listen(self) -> None:
        self._listener.settimeout(self._timeout_s)
        self._listener.bind(str(self._place / str(self._rank)))
        self._listener.listen(self._size)

    def meet(self) -> None:
        """Connect to the lower ranks and accept connections from the higher ones."""
        for rank in range(self._rank):
            peer = socket.socket(socket.AF_UNIX)
            peer.settimeout(self._timeout_s)
            peer.connect(str(self._place / str(rank)))
            peer.sendall(_RANK.pack(self._rank))
            self._peers[rank] = peer
        for _ in range(self._rank + 1, self._size):
            peer, _ = self._listener.accept()
            peer.settimeout(self._timeout_s)
            (rank,) = _RANK.unpack(peer.recv(_RANK.size, socket.MSG_WAITALL))
            self._peers[rank] = peer
        self._listener.close()
        # The kernel's timeout needs no extra call, unlike Python's, which polls first.
        wait = struct.pack("@ll", int(self._timeout_s), int(self._timeout_s % 1 * 1e6))
        for peer in self._peers.values():
            peer.setblocking(True)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over the ranks, in place, in fp32 for any dtype; contiguous, any shape."""
        flat = tensor.view(-1)
        step = _BUFFER_BYTES // flat.element_size()
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            parts = self._exchange(part)
            total = parts[0].float() + parts[1]
            for other in parts[2:]:
                total += other
            part.copy_(total)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[size, ...], each rank's tensor in rank order; contiguous and of equal shapes."""
        gathered = tensor.new_empty((self._size, *tensor.shape))
        flat, flat_gathered = tensor.reshape(-1), gathered.view(self._size, -1)
        step = _BUFFER_BYTES // flat.element_size()
        for start in range(0, flat.numel(), step):
            parts = self._exchange(flat[start : start + step])
            flat_gathered[:, start : start + step] = parts
        return gathered

    def exchange(self, parts: Tensor, among: range) -> Tensor:
        """Of ranks `among`, to which this one belongs: what each had for this one, in order.

        parts: [len(among), ...], what this one has for each of them; contiguous. All ranks of the
        group take part at the same time, with equal shapes, also those of other ranges.
        """
        received = torch.empty_like(parts)
        count, own = len(among), among.index(self._rank)
        flat, flat_received = parts.view(count, -1), received.view(count, -1)
        step = _BUFFER_BYTES // (count * parts.element_size())
        for start in range(0, flat.shape[1], step):
            some = flat[:, start : start + step]
            theirs = self._exchange(some.reshape(-1))[among.start : among.stop]
            flat_received[:, start : start + step] = theirs.view(count, *some.shape)[:, own]
        return received

    def _exchange(self, part: Tensor) -> Tensor:
        """[size, n]: every rank's `part` [n]; valid until the call after the next."""
        buffer = self._buffers[self._turn][:, : part.numel() * part.element_size()]
        parts = buffer.view(part.dtype)
        self._turn ^= 1
        parts[self._rank] = part
        try:
            for peer in self._peers.values():
                peer.send(_SIGNAL)
            for rank, peer in self._peers.items():
                if not peer.recv(1):
                    raise WorkerDiedError(f"rank {rank} of the group is gone")
        except BlockingIOError as error:
            raise WorkerDiedError(f"a rank sent nothing for {self._timeout_s:g} s") from error
        except OSError as error:
            raise WorkerDiedError(f"a rank of the group is gone: {error}") from error
        return parts

    def close(self) -> None:
        for peer in (self._listener, *self._peers.values()):
            peer.close()
