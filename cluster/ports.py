"""The TCP ports of a local cluster: a block of consecutive ones that no other cluster has.

Ray Serve gives every cluster the same default ports, and a port that is taken binds all the
same (SO_REUSEPORT), so that two clusters on one host would answer each other's calls.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from dataclasses import dataclass
from enum import IntEnum

from kvmesh.workers.errors import ConfigError

# Below 32768, where Linux takes the ports of outgoing connections from.
FIRST_PORT, END_PORT = 20_000, 32_000
BLOCK_SIZE = 400


class Port(IntEnum):
    """Places in a block; replicas have those after them."""

    PROXY_STATS = 0
    PROXY_METRICS = 1
    FALLBACK_HTTP = 2
    FALLBACK_GRPC = 3
    GRPC = 4
    HTTP = 5
    METRICS = 6
    GCS = 7


class PortLock:
    """Holds a name that no other process of this host can hold at the same time.

    A socket in Linux's abstract namespace: no file, and it is free again when its owner has
    ended, however it ended. The namespace belongs to the network namespace, as ports do.
    Of datagrams, so that others can see who has a name without taking it: see `_held`.
    """

    def __init__(self, name: str) -> None:
        """Raises BlockingIOError if another process holds it."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.bind(_address(name))
        except OSError as error:
            self._socket.close()
            if error.errno != errno.EADDRINUSE:
                raise
            raise BlockingIOError(f"{name} is held by another process") from None

    def release(self) -> None:
        self._socket.close()


@dataclass(frozen=True, slots=True)
class PortBlock:
    """Ports that belong to this process until `release`."""

    locks: tuple[PortLock, ...]
    first: int

    def __getitem__(self, port: Port) -> int:
        return self.first + port

    @property
    def http_replicas(self) -> range:
        """For the HTTP servers of replicas."""
        return range(self.first + len(Port), self.first + BLOCK_SIZE // 2)

    @property
    def grpc_replicas(self) -> range:
        """For the gRPC servers of replicas."""
        return range(self.first + BLOCK_SIZE // 2, self.first + BLOCK_SIZE)

    def release(self) -> None:
        for lock in self.locks:
            lock.release()


def take_ports(host: str, chosen: dict[str, int]) -> PortBlock:
    """A free block, and the ports that the user has chosen, which are in nobody's block.

    host: address that the chosen ports are for
    chosen: ports by the settings that they come from
    Raises ConfigError for a host that is not one of this machine's, for a chosen port that is in
    use or may not be bound, and if every block is taken.
    """
    _check_host(host)
    with contextlib.ExitStack() as stack:
        locks = []
        for setting, port in chosen.items():
            lock = _take(_name_of_port(port))
            if lock is not None:
                stack.callback(lock.release)
                locks.append(lock)
            try:
                # Also by a cluster in whose block it is: that one may bind it later.
                in_use = lock is None or _held(_name_of_block(port)) or _in_use(host, port)
            except OSError as error:  # such as a port below 1024, for other users than root
                raise ConfigError(
                    setting,
                    f"cannot listen on {port}: {error.strerror}; choose another, or 0 for any "
                    "free one",
                ) from None
            if in_use:
                raise ConfigError(
                    setting, f"{port} is in use; choose another, or 0 for any free one"
                )
        for first in range(FIRST_PORT, END_PORT, BLOCK_SIZE):
            if (lock := _take(_name_of_block(first))) is None:
                continue
            if any(map(_is_taken, range(first, first + BLOCK_SIZE))):
                lock.release()
                continue
            stack.pop_all()
            return PortBlock((*locks, lock), first)
    raise ConfigError(
        "ingress.port",
        f"no {BLOCK_SIZE} consecutive ports from {FIRST_PORT} to {END_PORT - 1} are free; "
        "stop other clusters on this host",
    )


def _is_taken(port: int) -> bool:
    """By a user's choice, by another program, or by what is left of a killed cluster."""
    return _held(_name_of_port(port)) or _in_use("", port)


def _name_of_port(port: int) -> str:
    return f"port/{port}"


def _name_of_block(port: int) -> str:
    """Of the block that a port is in."""
    return f"ports/{port - (port - FIRST_PORT) % BLOCK_SIZE}"


def _address(name: str) -> str:
    return f"\0kvmesh/{name}"


def _take(name: str) -> PortLock | None:
    try:
        return PortLock(name)
    except BlockingIOError:
        return None


def _held(name: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_address(name))
        except ConnectionRefusedError:
            return False
    return True


def _check_host(host: str) -> None:
    """Raises ConfigError if this machine cannot listen there on any port."""
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except (OSError, UnicodeError) as error:  # the latter of a name that cannot be one
            reason = error.strerror if isinstance(error, OSError) else "it is not a valid name"
            raise ConfigError(
                "ingress.host",
                f"cannot listen at {host}: {reason}; expected an address or a name of this "
                "machine, or 0.0.0.0 for all its interfaces",
            ) from None


def _in_use(host: str, port: int) -> bool:
    """Whether a server listens there, or a socket is bound to it.

    Raises OSError if it cannot be bound for another reason.
    """
    with socket.socket() as probe:
        # Connections of a former server that wait for their end do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return True
    return False
