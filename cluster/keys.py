"""API keys of a local server: made on first start, kept where the SDK looks for them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from kvmesh.client.credentials import key_path, read_key_file
from kvmesh.cluster.config import AuthSection
from kvmesh.cluster.ingress.authenticate import hash_key
from kvmesh.workers.errors import ConfigError

LOCAL_TENANT = "local"
_KEY_BYTES = 32


def known_keys(auth: AuthSection, environ: Mapping[str, str]) -> list[tuple[str, str]] | None:
    """(sha256, tenant) of every key let in, or None where everybody is.

    Makes the local key if none is configured and there is none yet. Raises as
    `ensure_key`.
    """
    if auth.mode == "none":
        return None
    if auth.keys:
        return [(key.sha256, key.tenant) for key in auth.keys]
    key = ensure_key(auth.key_file or key_path(environ))
    return [(hash_key(key), LOCAL_TENANT)]


def local_key(auth: AuthSection, environ: Mapping[str, str]) -> str | None:
    """The key that `known_keys` lets in, where it is kept on this machine."""
    if auth.mode == "none" or auth.keys:
        return None
    return read_key_file(auth.key_file or key_path(environ))


def ensure_key(path: Path) -> str:
    """The key in `path`, made with mode 0600 if it is not there.

    Raises CredentialsError if it cannot be read or others can read it, ConfigError if it
    cannot be made.
    """
    try:
        found = read_key_file(path)
        if found is not None:
            return found
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _make_key(path)
    except FileExistsError:
        # Another server has made it in between.
        made = read_key_file(path)
        if made is None:
            raise ConfigError("auth.key_file", f"{path} vanished while it was read") from None
        return made
    except OSError as error:
        raise ConfigError("auth.key_file", f"cannot make {path}: {error.strerror}") from None


def _make_key(path: Path) -> str:
    """Write a new key beside `path` and link it there whole; FileExistsError if it is there."""
    key = secrets.token_urlsafe(_KEY_BYTES)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(draft, flags, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(key + "\n")
        os.link(draft, path)
    finally:
        draft.unlink()
    return key
