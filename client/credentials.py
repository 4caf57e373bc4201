"""Where the API key comes from: argument, environment, or the local server's file.

The local server makes its key on first start and writes it to `key_path()` with
mode 0600, so a client on the same machine needs no configuration.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from kvmesh.client.errors import CredentialsError

KEY_VARIABLE = "KVMESH_API_KEY"
TARGET_VARIABLE = "KVMESH_TARGET"
DEFAULT_TARGET = "localhost:9000"
_MAX_KEY_BYTES = 4096


def key_path(environ: Mapping[str, str]) -> Path:
    """The local server's key file: $XDG_CONFIG_HOME/kvmesh/api_key, or under ~/.config."""
    config_home = environ.get("XDG_CONFIG_HOME", "")
    # The XDG specification says to ignore relative values.
    base = Path(config_home) if os.path.isabs(config_home) else Path.home() / ".config"
    return base / "kvmesh" / "api_key"


def resolve_target(target: str | None, environ: Mapping[str, str]) -> str:
    """The server's address: argument > $KVMESH_TARGET > localhost:9000."""
    return target or environ.get(TARGET_VARIABLE) or DEFAULT_TARGET


def resolve_api_key(api_key: str | None, target: str, environ: Mapping[str, str]) -> str | None:
    """The API key: argument > $KVMESH_API_KEY > the local server's file; None if there is none.

    An empty argument means no key. The file's key belongs to the server on this
    machine and is never sent to another.
    Raises CredentialsError if the key or its file cannot be used.
    """
    if api_key is not None:
        return checked_key(api_key, "api_key") if api_key else None
    if environ.get(KEY_VARIABLE):
        return checked_key(environ[KEY_VARIABLE], KEY_VARIABLE)
    return read_key_file(key_path(environ)) if is_local(target) else None


def read_key_file(path: Path) -> str | None:
    """The key in `path`, or None if there is no such file.

    Raises CredentialsError if anyone but its owner can read or write it.
    """
    try:
        # Checked on the open file, so it cannot be swapped in between.
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(_MAX_KEY_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CredentialsError(f"cannot read the API key file {path}: {error.strerror}") from error
    if os.name == "posix" and stat.S_IMODE(status.st_mode) & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise CredentialsError(
            f"the API key file {path} is open to others (mode {mode:04o}, "
            f"expected 0600); run `chmod 600 {path}`, and make a new key if it may have been read"
        )
    try:
        key = content.decode("ascii").strip()
    except UnicodeDecodeError:
        key = ""
    return checked_key(key, str(path))


def checked_key(key: str, source: str) -> str:
    """`key` if it is valid in a header; raises CredentialsError naming `source`."""
    if not isinstance(key, str) or not re.fullmatch(f"[!-~]{{1,{_MAX_KEY_BYTES}}}", key):
        raise CredentialsError(
            f"the API key from {source} must be 1 to {_MAX_KEY_BYTES} printable ASCII characters"
        )
    return key


def is_local(target: str) -> bool:
    """Whether a gRPC target is on this machine, judging by its text only."""
    if target.startswith("unix:"):
        return True
    address = target.rpartition("///")[2] if target.startswith("dns:") else target
    for scheme in ("dns:", "ipv4:", "ipv6:"):
        address = address.removeprefix(scheme)
    host = address.rpartition(":")[0] if address.count(":") == 1 or "]" in address else address
    host = host.strip("[]") or address
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
