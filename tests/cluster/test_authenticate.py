"""API keys: which tenant a key gives, and how the local key is stored."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from hmac import compare_digest
from pathlib import Path

import pytest

from kvmesh.client.credentials import key_path, read_key_file
from kvmesh.client.errors import CredentialsError
from kvmesh.cluster import keys
from kvmesh.cluster.config import AuthSection, TenantKey
from kvmesh.cluster.errors import UnauthenticatedError
from kvmesh.cluster.ingress.authenticate import ANONYMOUS, Authenticator, Caller, KnownKey, hash_key
from kvmesh.cluster.keys import (
    LOCAL,
    ensure_key,
    follow_keys,
    known_keys,
    local_key,
    with_local_key,
)
from kvmesh.workers.errors import ConfigError

PATIENCE_S = 120.0
KEYS = {"alpha-key": Caller("alpha"), "beta-key": Caller("beta", admin=True)}


def known(key: str, caller: Caller) -> KnownKey:
    return KnownKey(hash_key(key), caller)


@pytest.fixture
def authenticator() -> Authenticator:
    return Authenticator([known(key, caller) for key, caller in KEYS.items()])


def bearer(key: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "x"), ("authorization", f"Bearer {key}")]


@pytest.mark.parametrize(("key", "caller"), KEYS.items())
def test_a_key_gives_its_caller(authenticator: Authenticator, key: str, caller: Caller) -> None:
    assert authenticator.authenticate(bearer(key)) == caller
    assert authenticator.authenticate([("Authorization", f"bEaReR  {key} ")]) == caller
    assert authenticator.authenticate([("authorization", f"Bearer {key}".encode())]) == caller


@pytest.mark.parametrize("key", ["", "alpha", "alpha-key2", "ALPHA-KEY", "\xe9", "x" * 9000])
def test_a_wrong_key_is_refused(authenticator: Authenticator, key: str) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        authenticator.authenticate(bearer(key))
    assert not caught.value.missing
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", "alpha-key")],
        [("authorization", "Basic alpha-key")],
        [("authorization", b"\xff\xfe")],
        [("x-api-key", "alpha-key")],
    ],
)
def test_a_missing_key_is_refused(
    authenticator: Authenticator, metadata: list[tuple[str, str | bytes]]
) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        authenticator.authenticate(metadata)
    assert caught.value.missing
    assert "authorization: Bearer" in str(caught.value)


def test_a_tenant_may_have_two_keys() -> None:
    authenticator = Authenticator([known("old", Caller("a")), known("new", Caller("a"))])
    assert (
        authenticator.authenticate(bearer("old"))
        == authenticator.authenticate(bearer("new"))
        == Caller("a")
    )


def test_without_keys_all_calls_are_refused_and_without_authentication_accepted() -> None:
    with pytest.raises(UnauthenticatedError):
        Authenticator([]).authenticate(bearer("alpha-key"))
    assert Authenticator(None).authenticate([]) == ANONYMOUS
    assert Authenticator(None).authenticate(bearer("any-key")) == ANONYMOUS


def test_hashes_are_compared_in_constant_time_and_all_of_them(
    authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def record(known: bytes, given: bytes) -> bool:
        compared.append((known, given))
        return compare_digest(known, given)

    monkeypatch.setattr("hmac.compare_digest", record)
    for key in ("alpha-key", "beta-key"):
        compared.clear()
        authenticator.authenticate(bearer(key))
        given = hashlib.sha256(key.encode()).digest()
        assert compared == [(hashlib.sha256(known.encode()).digest(), given) for known in KEYS]


def test_only_hashes_of_keys_are_stored(authenticator: Authenticator) -> None:
    assert "alpha-key" not in repr(vars(authenticator))


# Keys of a local server


def environ_of(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(tmp_path / "config")}


def test_the_first_start_creates_a_key_that_only_its_owner_can_read(tmp_path: Path) -> None:
    environ = environ_of(tmp_path)
    path = key_path(environ)
    before = os.umask(0)
    try:
        found = known_keys(with_local_key(AuthSection(), environ))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    key = path.read_text().strip()
    assert len(key) >= 32
    assert found == [known(key, LOCAL)]
    assert local_key(AuthSection(), environ) == key
    assert Authenticator(found).authenticate(bearer(key)) == LOCAL


def test_later_starts_keep_the_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert ensure_key(path) == ensure_key(path) == path.read_text().strip()
    assert ensure_key(tmp_path / "other") != ensure_key(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    ensure_key(path)
    path.chmod(mode)
    with pytest.raises(CredentialsError, match="open to others"):
        with_local_key(AuthSection(key_file=path), {})


def test_a_key_created_by_another_server_in_between_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "key"
    path.write_text("theirs\n")
    path.chmod(0o600)
    reads: list[Path] = []

    def absent_at_first(where: Path) -> str | None:
        reads.append(where)
        return read_key_file(where) if len(reads) > 1 else None

    monkeypatch.setattr(keys, "read_key_file", absent_at_first)
    assert ensure_key(path) == "theirs"
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_a_key_that_cannot_be_created_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((ConfigError, CredentialsError)) as caught:
        ensure_key(tmp_path / "file" / "key")
    assert str(tmp_path) in str(caught.value)


def test_configured_keys_replace_the_local_key(tmp_path: Path) -> None:
    environ = environ_of(tmp_path)
    auth = AuthSection(keys=(TenantKey(tenant="a", sha256=hash_key("k")),))
    assert known_keys(with_local_key(auth, environ)) == [known("k", Caller("a"))]
    auth = AuthSection(keys=(TenantKey(tenant="a", sha256=hash_key("k"), admin=True),))
    assert known_keys(with_local_key(auth, environ)) == [known("k", Caller("a", admin=True))]
    assert local_key(auth, environ) is None
    assert not key_path(environ).exists()


def test_a_local_key_is_used_only_where_no_other_is_configured(tmp_path: Path) -> None:
    environ = environ_of(tmp_path)
    key = ensure_key(key_path(environ))
    assert local_key(AuthSection(), environ) == key
    assert with_local_key(AuthSection(), environ).keys[0].sha256 == hash_key(key)
    configured = TenantKey(tenant="a", sha256=hash_key("k"))
    for auth in (
        AuthSection(mode="none"),
        AuthSection(keys=(configured,)),
        AuthSection(key_directory=tmp_path),
    ):
        assert local_key(auth, environ) is None
        assert with_local_key(auth, environ) == auth


def test_authentication_is_on_unless_it_is_turned_off(tmp_path: Path) -> None:
    environ = environ_of(tmp_path)
    assert known_keys(with_local_key(AuthSection(mode="none"), environ)) is None
    assert local_key(AuthSection(mode="none"), environ) is None
    assert AuthSection().mode == "api_key"
    assert not key_path(environ).exists()


# Keys in a directory


def write_keys(directory: Path, **files: str) -> None:
    """files: by name, in which __ stands for a dot"""
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        draft = directory / ".draft"
        draft.write_text(content)
        draft.chmod(0o440)
        draft.replace(path)


def test_a_directory_has_a_file_for_each_tenant(tmp_path: Path) -> None:
    write_keys(tmp_path, a="old\n\n  new  \n", ops__admin="root\n", __draft="no")
    auth = AuthSection(
        key_directory=tmp_path, keys=(TenantKey(tenant="b", sha256=hash_key("hashed")),)
    )
    assert with_local_key(auth, {}) == auth
    assert local_key(auth, {}) is None
    assert known_keys(auth) == [
        known("hashed", Caller("b")),
        known("old", Caller("a")),
        known("new", Caller("a")),
        known("root", Caller("ops", admin=True)),
    ]


@pytest.mark.parametrize(
    ("content", "mode", "problem"),
    [
        (None, 0o600, "there are no keys in"),
        (b"\n", 0o600, "there are no keys in"),
        (b"k\n", 0o604, "open to everyone"),
        (b"k\n", 0o602, "open to everyone"),
        (b"k k\n", 0o600, "printable ASCII"),
        ("k\xe9".encode(), 0o600, "not ASCII"),
        (b"k\n" * (1 << 20), 0o600, "larger than 1 MiB"),
    ],
)
def test_a_directory_without_usable_keys_is_refused(
    tmp_path: Path, content: bytes | None, mode: int, problem: str
) -> None:
    if content is not None:
        (tmp_path / "a").write_bytes(content)
        (tmp_path / "a").chmod(mode)
    with pytest.raises(ConfigError, match=problem) as caught:
        known_keys(AuthSection(key_directory=tmp_path))
    assert caught.value.field == "auth.key_directory"
    assert str(tmp_path) in str(caught.value)


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*/none") as caught:
        known_keys(AuthSection(key_directory=tmp_path / "none"))
    assert caught.value.field == "auth.key_directory"


async def test_keys_are_read_again_and_a_broken_file_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_keys(tmp_path, a="old\n")
    auth = AuthSection(key_directory=tmp_path)
    authenticator = Authenticator(known_keys(auth))
    current: list[bool] = []
    following = asyncio.create_task(
        follow_keys(auth, authenticator, current.append, period_s=0.001)
    )

    def accepts(key: str) -> bool:
        try:
            return authenticator.authenticate(bearer(key)) == Caller("a")
        except UnauthenticatedError:
            return False

    async def until_accepted(key: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not accepts(key):
                await asyncio.sleep(0.001)

    write_keys(tmp_path, a="old\nnew\n")
    await until_accepted("new")
    assert accepts("old")
    write_keys(tmp_path, b="two words\n")
    write_keys(tmp_path, a="last\n")
    async with asyncio.timeout(PATIENCE_S):
        while not caplog.records:
            await asyncio.sleep(0.001)
    assert accepts("new") and not accepts("last")
    assert str(tmp_path / "b") in caplog.text and "two" not in caplog.text
    assert current[-1:] == [False]
    (tmp_path / "b").unlink()
    await until_accepted("last")
    assert not accepts("new") and not accepts("old")
    assert current[-1:] == [True]
    assert len(caplog.records) == 1, "a problem is logged once, however long it lasts"
    write_keys(tmp_path, b="two words\n")
    async with asyncio.timeout(PATIENCE_S):
        while len(caplog.records) < 2:
            await asyncio.sleep(0.001)
    assert accepts("last")
    following.cancel()


async def test_without_a_directory_nothing_is_followed() -> None:
    auth = AuthSection(keys=(TenantKey(tenant="a", sha256=hash_key("k")),))
    async with asyncio.timeout(PATIENCE_S):
        await follow_keys(auth, Authenticator(known_keys(auth)))
