"""Mutual authentication inside a cluster: one certificate for all processes of a deployment.

It is created when the application is deployed and passed to its processes with their
configuration. Both ends of every connection present it and accept no other, so anyone else who
reaches a port can neither read nor send anything.
"""

from __future__ import annotations

import datetime
import os
import ssl
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

NAME = "kvmesh"
LIFETIME = datetime.timedelta(days=3650)  # every deployment creates a new certificate


@dataclass(frozen=True, slots=True)
class Identity:
    """A self-signed certificate and its key, as PEM."""

    certificate: str
    key: str = field(repr=False)

    @staticmethod
    def make() -> Identity:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))  # nodes' clocks differ
            .not_valid_after(now + LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        return Identity(
            certificate.public_bytes(serialization.Encoding.PEM).decode(),
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ).decode(),
        )

    def server_context(self) -> ssl.SSLContext:
        return self._context(ssl.PROTOCOL_TLS_SERVER)

    def client_context(self) -> ssl.SSLContext:
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the certificate names a deployment, not a host
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self.certificate)
        # The ssl module reads keys from files only; mkstemp's are readable by this user alone.
        handle, path = tempfile.mkstemp(prefix="kvmesh-")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(self.certificate + self.key)
            context.load_cert_chain(path)
        finally:
            Path(path).unlink()
        return context
