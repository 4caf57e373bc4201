"""API keys of a local server: generated on first start, and stored where the SDK looks."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from kvmesh.client.credentials import key_path, read_key_file
from kvmesh.cluster.config import LOCAL_TENANT, AuthSection
from kvmesh.cluster.ingress.authenticate import Caller, KnownKey, hash_key
from kvmesh.workers.errors import ConfigError

LOCAL = Caller(LOCAL_TENANT, admin=True)
_KEY_BYTES = 32


def known_keys(auth: AuthSection, environ: Mapping[str, str]) -> list[KnownKey] | None:
    """Every accepted key, or None if no key is needed.

    Generates the local key if no keys are configured and it does not exist yet.
    Raises the errors of `ensure_key`.
    """
    if auth.mode == "none":
        return None
    if auth.keys:
        return [KnownKey(key.sha256, Caller(key.tenant, key.admin)) for key in auth.keys]
    key = ensure_key(auth.key_file or key_path(environ))
    return [KnownKey(hash_key(key), LOCAL)]


def local_key(auth: AuthSection, environ: Mapping[str, str]) -> str | None:
    """The generated key of this machine; None if keys are configured or none is needed."""
    if auth.mode == "none" or auth.keys:
        return None
    return read_key_file(auth.key_file or key_path(environ))


def ensure_key(path: Path) -> str:
    """The key in `path`, which is created with mode 0600 if it does not exist.

    Raises CredentialsError if it cannot be read or is readable by others, and ConfigError
    if it cannot be created.
    """
    try:
        found = read_key_file(path)
        if found is not None:
            return found
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _create_key(path)
    except FileExistsError:
        # Another server has created the key in the meantime.
        created = read_key_file(path)
        if created is None:
            raise ConfigError(
                "auth.key_file", f"{path} was removed while it was read; start again"
            ) from None
        return created
    except OSError as error:
        raise ConfigError("auth.key_file", f"cannot create {path}: {error.strerror}") from None


def protect_ray_token(environ: Mapping[str, str]) -> None:
    """Make Ray's token, which lets its holder run code, readable by this user alone.

    Ray itself creates it with the mode that the umask leaves. A token whose place the user has
    chosen is left as it is. Raises ConfigError if it cannot be created or protected.
    """
    if "RAY_AUTH_TOKEN" in environ or "RAY_AUTH_TOKEN_PATH" in environ:
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            with contextlib.suppress(FileExistsError):  # by another server in the meantime
                _create_key(path)
        elif path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            path.chmod(0o600)
    except OSError as error:
        raise ConfigError("ray", f"cannot protect {path}: {error.strerror}") from None


def _create_key(path: Path) -> str:
    """Create `path` atomically with a new key. Raises FileExistsError if it exists."""
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
