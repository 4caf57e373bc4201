"""API keys: those that ingresses accept, and the one that a local server generates.

The local key is generated on first start, and stored where the SDK looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import stat
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path

from kvmesh.client.credentials import checked_key, key_path, read_key_file
from kvmesh.client.errors import CredentialsError
from kvmesh.cluster.config import LOCAL_TENANT, AuthSection, TenantKey
from kvmesh.cluster.ingress.authenticate import (
    ANONYMOUS,
    Authenticator,
    Caller,
    KnownKey,
    hash_key,
)
from kvmesh.workers.errors import ConfigError

logger = logging.getLogger(__name__)

LOCAL = Caller(LOCAL_TENANT, admin=True)
ADMIN = ".admin"
FOLLOW_PERIOD_S = 5.0
MAX_FILE_BYTES = 1 << 20
_KEY_BYTES = 32


def known_keys(auth: AuthSection) -> list[KnownKey] | None:
    """Every configured key, or None if no key is needed.

    Raises ConfigError(auth.key_directory) if there are none, or a file cannot be used.
    """
    if auth.mode == "none":
        return None
    found = [KnownKey(key.sha256, Caller(key.tenant, key.admin)) for key in auth.keys]
    if auth.key_directory is not None:
        found += _keys_in(auth.key_directory)
    if not found:
        raise ConfigError("auth.key_directory", f"there are no keys in {auth.key_directory}")
    return found


def metered_tenants(auth: AuthSection, count: int) -> tuple[str, ...]:
    """The tenants that metrics name: the first `count` that have keys now.

    Where no key is needed, all calls are of one tenant.
    Raises the errors of `known_keys`, unless `count` is 0.
    """
    if count == 0:
        return ()
    keys = known_keys(auth)
    names = [ANONYMOUS.tenant] if keys is None else [key.caller.tenant for key in keys]
    return tuple(dict.fromkeys(names))[:count]


def _keys_in(directory: Path) -> list[KnownKey]:
    """The keys in a directory; names that begin with a dot are Kubernetes' own."""
    try:
        paths = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ConfigError(
            "auth.key_directory", f"cannot read {directory}: {error.strerror}"
        ) from None
    return [
        KnownKey(hash_key(key), Caller(path.name.removesuffix(ADMIN), path.name.endswith(ADMIN)))
        for path in paths
        for key in _lines_of(path)
    ]


def _lines_of(path: Path) -> list[str]:
    """The keys in a file."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(MAX_FILE_BYTES + 1)
        # A Secret that is mounted for a group is readable by that group.
        if mode & stat.S_IRWXO:
            raise ConfigError(
                "auth.key_directory",
                f"{path} is open to everyone (mode {mode:04o}), expected at most 0660",
            )
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError("auth.key_directory", f"{path} is larger than 1 MiB")
        lines = [line.strip() for line in content.decode("ascii").splitlines()]
        return [checked_key(line, str(path)) for line in lines if line]
    except OSError as error:
        raise ConfigError("auth.key_directory", f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError("auth.key_directory", f"{path} is not ASCII text") from None
    except CredentialsError as error:
        raise ConfigError("auth.key_directory", str(error)) from None


async def follow_keys(
    auth: AuthSection,
    authenticator: Authenticator,
    note: Callable[[bool], None] = lambda _: None,
    period_s: float = FOLLOW_PERIOD_S,
) -> None:
    """Accept the keys that are in the directory now, until cancelled.

    While one of its files cannot be used, the former keys stay.

    note: called whenever they were read, with whether all of them can be used
    """
    problem = ""
    while auth.key_directory is not None:
        await asyncio.sleep(period_s)
        try:
            authenticator.accept(known_keys(auth))
            problem = ""
            note(True)
        except ConfigError as error:
            note(False)
            if str(error) != problem:
                problem = str(error)
                logger.error(
                    "the API keys could not be read again, the former ones stay: %s", error
                )


def with_local_key(auth: AuthSection, environ: Mapping[str, str]) -> AuthSection:
    """The settings with this machine's key by its hash, if a key is needed and none configured.

    The key is generated if it does not exist yet. Raises the errors of `ensure_key`.
    """
    if auth.mode == "none" or auth.keys or auth.key_directory is not None:
        return auth
    key = ensure_key(local_key_file(auth, environ))
    local = TenantKey(tenant=LOCAL.tenant, sha256=hash_key(key), admin=LOCAL.admin)
    return auth.model_copy(update={"keys": (local,)})


def local_key(auth: AuthSection, environ: Mapping[str, str]) -> str | None:
    """The generated key of this machine; None if keys are configured or none is needed."""
    if auth.mode == "none" or auth.keys or auth.key_directory is not None:
        return None
    return read_key_file(local_key_file(auth, environ))


def local_key_file(auth: AuthSection, environ: Mapping[str, str]) -> Path:
    """Where the generated key of this machine is."""
    return auth.key_file or key_path(environ)


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


def use_ray_token(environ: MutableMapping[str, str]) -> None:
    """Have Ray send this user's token, if there is one, to clusters that it joins.

    Ray starts a cluster with authentication where it finds a token, but joins one without. A
    cluster that asks for none accepts any. Call it before Ray is imported.
    """
    named = "RAY_AUTH_TOKEN" in environ or "RAY_AUTH_TOKEN_PATH" in environ
    if named or (Path.home() / ".ray" / "auth_token").exists():
        environ.setdefault("RAY_AUTH_MODE", "token")


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
