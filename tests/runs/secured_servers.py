"""A Kafka and a Postgres that let nobody in without TLS and a password, and the certificates they show."""

import os
import platform
import tarfile
import zipfile
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialAlteration,
    UserScramCredentialUpsertion,
)
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from psycopg2 import sql

from batch.postgres import open_connection
from jobs.local.jars import postgres_with_tls
from jobs.local.kafka import KafkaBroker
from jobs.local.ports import LOOPBACK
from jobs.local.postgres import OWNER, SUPERUSER, PostgresServer
from jobs.local.private_files import private_directory, write_private

BROKER_USER, BROKER_PASSWORD = "broker", "of-the-broker"
_LOGIN = "org.apache.kafka.common.security"


class Authority:
    """A certificate authority of a test's own; `certificate` is the PEM file that clients are to trust."""

    def __init__(self, folder: Path, name: str) -> None:
        self.certificate = folder / f"{name}.pem"
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        own = _valid_now(self._name, self._name, self._key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self.certificate.write_bytes(own.sign(self._key, SHA256()).public_bytes(Encoding.PEM))

    def certify(self, host: str = LOOPBACK) -> tuple[str, str]:
        """A new key, and its certificate for a server at an IP address, as PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        certificate = _valid_now(subject, self._name, key.public_key()).add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address(host))]), critical=False
        )
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return pem.decode(), certificate.sign(self._key, SHA256()).public_bytes(Encoding.PEM).decode()


def _valid_now(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))


class SecuredBroker(KafkaBroker):
    """A broker that speaks SASL_SSL only, and checks ACLs: BROKER_USER, by PLAIN, may do all; others come by SCRAM-SHA-512."""

    def __init__(self, home: Path, authority: Authority) -> None:
        super().__init__(home)
        self._authority = authority
        self._keystore = private_directory(home / "kafka") / "server.pem"
        write_private(self._keystore, "".join(authority.certify()))

    def create_user(self, name: str, password: str, *, reads: Sequence[str], writes: Sequence[str]) -> None:
        """Let one more user log in, who may read and write these topics."""
        client = AdminClient(self._client())
        kind = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, iterations=4096)
        login: list[UserScramCredentialAlteration] = [UserScramCredentialUpsertion(name, kind, password.encode())]
        rights = [_allowed(name, topic, AclOperation.READ) for topic in reads]
        rights += [_allowed(name, topic, AclOperation.WRITE) for topic in writes]
        for done in [*client.alter_user_scram_credentials(login).values(), *client.create_acls(rights).values()]:
            done.result(timeout=20)

    def _listeners(self, broker: str, controller: str) -> list[str]:
        login = f'username="{BROKER_USER}" password="{BROKER_PASSWORD}" user_{BROKER_USER}="{BROKER_PASSWORD}"'
        listener = "listener.name.sasl_ssl"
        return [
            f"listeners=SASL_SSL://{broker},CONTROLLER://{controller}",
            f"advertised.listeners=SASL_SSL://{broker}",
            "listener.security.protocol.map=SASL_SSL:SASL_SSL,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name=SASL_SSL",
            "sasl.mechanism.inter.broker.protocol=PLAIN",
            "sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512",
            f"{listener}.plain.sasl.jaas.config={_LOGIN}.plain.PlainLoginModule required {login};",
            f"{listener}.scram-sha-512.sasl.jaas.config={_LOGIN}.scram.ScramLoginModule required;",
            "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            f"super.users=User:{BROKER_USER};User:ANONYMOUS",  # the latter is the controller, to itself
            "ssl.keystore.type=PEM",
            f"ssl.keystore.location={self._keystore}",
            "ssl.truststore.type=PEM",
            f"ssl.truststore.location={self._authority.certificate}",
        ]

    def _client(self) -> dict[str, Any]:
        return {
            "bootstrap.servers": self.address,
            "security.protocol": "SASL_SSL",
            "ssl.ca.location": str(self._authority.certificate),
            "sasl.mechanism": "PLAIN",
            "sasl.username": BROKER_USER,
            "sasl.password": BROKER_PASSWORD,
        }


def _allowed(user: str, topic: str, operation: AclOperation) -> AclBinding:
    who = (f"User:{user}", "*", operation, AclPermissionType.ALLOW)
    return AclBinding(ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, *who)


class SecuredPostgres(PostgresServer):
    """A server that lets nobody in without TLS."""

    def __init__(self, home: Path, authority: Authority) -> None:
        super().__init__(home, _binaries_with_tls(home))
        self._authority = authority

    def demand_tls(self) -> None:
        """From now on, for every new connection."""
        key, certificate = self._authority.certify()
        files = {"server.key": key, "server.crt": certificate, "pg_hba.conf": "hostssl all all all scram-sha-256\n"}
        owner = self._data.stat().st_uid
        for name, text in files.items():
            write_private(self._data / name, text)
            os.chown(self._data / name, owner, -1)
        with closing(open_connection(self.dsn(SUPERUSER, SUPERUSER))) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute("alter system set ssl = on")
            cursor.execute("select pg_reload_conf()")

    def create_user(self, name: str, password: str, role: str) -> None:
        """A login that has the privileges of one group role."""
        with closing(open_connection(self.dsn(SUPERUSER, SUPERUSER))) as connection, connection, connection.cursor() as cursor:
            user = sql.Identifier(name)
            cursor.execute(sql.SQL("create role {} login password {}").format(user, sql.Literal(password)))
            cursor.execute(sql.SQL("grant {} to {}").format(sql.Identifier(role), user))

    def secured_dsn(self, user: str, password: str) -> str:
        """The connection string of `user` that checks the server's certificate."""
        login = f"{user}:{quote(password, safe='')}"
        return f"postgresql://{login}@{self.address}/{OWNER}?sslmode=verify-full&sslrootcert={self._authority.certificate}"

    def owner_dsn(self) -> str:
        """The same for the owner of finpro's tables."""
        return f"{self.dsn(OWNER, OWNER)}?sslmode=verify-full&sslrootcert={self._authority.certificate}"


def _binaries_with_tls(home: Path) -> Path:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("a Postgres with TLS is at hand for Linux on x86-64 only")
    folder = home / "postgres-with-tls"
    with (
        zipfile.ZipFile(postgres_with_tls()) as jar,
        jar.open("postgres-linux-x86_64.txz") as packed,
        tarfile.open(fileobj=packed, mode="r:xz") as archive,
    ):
        # (Debian 12's Python 3.11 knows no filters yet.)
        checked: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder, **checked)  # noqa: S202  what the jar holds is known by its hash
    return folder / "bin"
