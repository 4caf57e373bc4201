"""Authentication: the tenant of a call's API key."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence

from kvmesh.cluster.errors import UnauthenticatedError

ANONYMOUS = "anonymous"
_BEARER = "bearer "


def hash_key(key: str) -> str:
    """SHA-256 in hexadecimal. Keys are random and long, so they need no slow hash."""
    return hashlib.sha256(key.encode()).hexdigest()


class Authenticator:
    """Compares a call's key with the known keys, of which it has only the hashes.

    keys: (sha256 in hexadecimal, tenant) pairs; None accepts every call, as anonymous
    """

    def __init__(self, keys: Sequence[tuple[str, str]] | None) -> None:
        self._keys = None if keys is None else [(bytes.fromhex(h), t) for h, t in keys]

    def authenticate(self, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        """The tenant of a call's metadata; raises UnauthenticatedError."""
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
        tenant: str | None = None
        for known, owner in self._keys:
            if hmac.compare_digest(known, digest):
                tenant = owner
        if tenant is None:
            raise UnauthenticatedError(missing=False)
        return tenant
