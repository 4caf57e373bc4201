"""Authentication: who makes a call, by its API key."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvmesh.cluster.errors import UnauthenticatedError

_BEARER = "bearer "


@dataclass(frozen=True, slots=True)
class Caller:
    """admin: may use the calls for operators"""

    tenant: str
    admin: bool = False


@dataclass(frozen=True, slots=True)
class KnownKey:
    """An accepted key. sha256: in hexadecimal"""

    sha256: str
    caller: Caller


ANONYMOUS = Caller("anonymous", admin=True)


def hash_key(key: str) -> str:
    """SHA-256 in hexadecimal. Keys are random and long, so they need no slow hash."""
    return hashlib.sha256(key.encode()).hexdigest()


class Authenticator:
    """Compares a call's key with the known keys, of which it has only the hashes.

    keys: None accepts every call, as anonymous
    """

    def __init__(self, keys: Sequence[KnownKey] | None) -> None:
        self.accept(keys)

    def accept(self, keys: Sequence[KnownKey] | None) -> None:
        """From now on accept these keys and no others; see the constructor."""
        self._keys = None if keys is None else [(bytes.fromhex(k.sha256), k.caller) for k in keys]

    @property
    def several_tenants(self) -> bool:
        return len({caller.tenant for _, caller in self._keys or ()}) > 1

    def authenticate(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Who made a call, by its metadata; raises UnauthenticatedError."""
        if self._keys is None:
            return ANONYMOUS
        header = next((v for k, v in metadata if k.lower() == "authorization"), None)
        if header is None:
            raise UnauthenticatedError(missing=True)
        text = header.decode("latin-1") if isinstance(header, bytes) else header
        if not text.lower().startswith(_BEARER):
            raise UnauthenticatedError(missing=True)
        digest = hashlib.sha256(text[len(_BEARER) :].strip().encode()).digest()
        # Compare all keys even after a match: timing must not reveal whether or which one matched.
        caller: Caller | None = None
        for known, owner in self._keys:
            if hmac.compare_digest(known, digest):
                caller = owner
        if caller is None:
            raise UnauthenticatedError(missing=False)
        return caller
