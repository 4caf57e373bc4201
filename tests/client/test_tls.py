"""Encryption, with certificates made on the spot."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kvmesh import TLS, AsyncClient, Client, InvalidRequestError, RetryPolicy, UnavailableError
from kvmesh.protos import pb
from tests.client.servicer import ScriptedServicer, answering, serving

ONCE = RetryPolicy(max_attempts=1)


@dataclass(frozen=True)
class Identity:
    cert: bytes
    key: bytes


def self_signed(name: str) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Identity(
        cert.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


@pytest.fixture(scope="module")
def server() -> Identity:
    return self_signed("localhost")


@pytest.fixture(scope="module")
def caller() -> Identity:
    return self_signed("caller")


def serve(identity: Identity, callers: bytes | None = None) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(identity.key, identity.cert)],
        root_certificates=callers,
        require_client_auth=callers is not None,
    )


def loads() -> ScriptedServicer:
    return ScriptedServicer(answering(pb.GetLoadsResponse()))


def test_a_private_root(server: Identity, tmp_path: Path) -> None:
    file = tmp_path / "root.pem"
    file.write_bytes(server.cert)
    for root_ca in (server.cert, file, str(file)):
        with (
            serving(loads(), credentials=serve(server)) as target,
            Client(target, tls=TLS(root_ca=root_ca), retry=ONCE) as client,
        ):
            assert client.loads().groups == ()


async def test_a_private_root_for_the_async_client(server: Identity) -> None:
    with serving(loads(), credentials=serve(server)) as target:
        async with AsyncClient(target, tls=TLS(root_ca=server.cert), retry=ONCE) as client:
            assert (await client.loads()).groups == ()


def test_mutual_authentication(server: Identity, caller: Identity) -> None:
    with serving(loads(), credentials=serve(server, caller.cert)) as target:
        known = TLS(root_ca=server.cert, client_cert=caller.cert, client_key=caller.key)
        with Client(target, tls=known, retry=ONCE) as client:
            assert client.loads().groups == ()
        with (
            Client(target, tls=TLS(root_ca=server.cert), retry=ONCE) as client,
            pytest.raises(UnavailableError),
        ):
            client.loads(timeout_s=10)


@pytest.mark.parametrize(
    "tls",
    [
        lambda server: True,
        lambda server: False,
        lambda server: TLS(root_ca=self_signed("localhost").cert),
        lambda server: TLS(root_ca=server.cert, server_name="elsewhere"),
    ],
    ids=["system-roots", "plaintext", "another-root", "another-name"],
)
def test_what_must_not_connect(server: Identity, tls: Callable[[Identity], TLS | bool]) -> None:
    servicer = loads()
    with (
        serving(servicer, credentials=serve(server)) as target,
        Client(target, api_key="secret", tls=tls(server), retry=ONCE) as client,
        pytest.raises(UnavailableError),
    ):
        client.loads(timeout_s=10)
    assert not servicer.requests


def test_another_name_in_the_certificate() -> None:
    server = self_signed("kvmesh.internal")
    tls = TLS(root_ca=server.cert, server_name="kvmesh.internal")
    with (
        serving(loads(), credentials=serve(server)) as target,
        Client(target, tls=tls, retry=ONCE) as client,
    ):
        assert client.loads().groups == ()


def test_half_an_identity_is_refused(caller: Identity) -> None:
    with pytest.raises(InvalidRequestError, match="together"):
        TLS(client_cert=caller.cert)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"tls\.root_ca"):
        Client("localhost:1", tls=TLS(root_ca=tmp_path / "missing.pem"))
