"""A set of keys for trying a league out on one machine or a few: an authority, a certificate, a token, merchants.

    made = make_keys(folder, hosts=("localhost", "127.0.0.1"), merchants=("alder", "birch"))

In production the certificate comes from an authority that merchants know already, and merchants make their own
keys with `hanse-client keygen`: whoever made a key can use it.
"""

import ipaddress
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hanse_common import signing, wire
from hanse_common.charter import CharterFile, SignedCharter, founded
from hanse_common.credentials import create_node_key, load_node_public, node_point
from hanse_common.directory import Directory, Entry, SignedDirectory
from hanse_common.errors import ConfigError
from hanse_common.files import PUBLIC, create_secret, write_atomically
from hanse_common.membership import Request, SignedRequest
from hanse_server.tokens import METRICS_TOKEN_FILE, metrics_token

AUTHORITY_DAYS = 365
CERTIFICATE_DAYS = 90
VERSIONS_SINCE = 1_700_000_000
"""Development directories are numbered by the seconds since then."""

BACKDATED = timedelta(hours=1)
"""Certificates are valid a little earlier than now, for machines whose clocks are late."""


@dataclass(frozen=True)
class DevelopmentKeys:
    """Where everything is. `merchants` has each merchant's folder, with its secret keys."""

    authority: Path
    certificate: Path
    key: Path
    token: Path
    league_key: Path
    charter: Path
    directory: Path
    merchants: dict[str, Path]

    @property
    def pinned(self) -> str:
        """The digest of the league's charter, 64 hexadecimal digits."""
        charters = wire.decode(CharterFile, self.charter.read_bytes()).charters
        return charters[0].read().digest.hex()


def make_keys(
    folder: Path, hosts: Sequence[str], merchants: Sequence[str], league: str = "demo"
) -> DevelopmentKeys:
    """Make the keys in `folder`; `hosts` are names and addresses by which merchants reach the server.

    With merchants, their directory is signed too, by a key that in production the operator never has.

    The authority's secret key is dropped, so that nobody can ever sign another certificate with it.

    Raises `ConfigError`, before anything is written, when `folder` exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: found something there, expected a new or empty folder; name another.")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error.strerror}).") from None
    made = DevelopmentKeys(
        authority=folder / "ca.crt",
        certificate=folder / "server.crt",
        key=folder / "server.key",
        token=folder / "admin.token",
        league_key=folder / "league.key",
        charter=folder / "charter.hanse",
        directory=folder / "directory.hanse",
        merchants={name: folder / name for name in merchants},
    )
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _authority(authority_key)
    server_key = ec.generate_private_key(ec.SECP256R1())
    certificate = _certificate(server_key, hosts, authority, authority_key)
    write_atomically(made.authority, authority.public_bytes(Encoding.PEM), PUBLIC)
    write_atomically(made.certificate, certificate.public_bytes(Encoding.PEM), PUBLIC)
    create_secret(made.key, server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    token = secrets.token_urlsafe(32).encode()
    create_secret(made.token, token + b"\n")
    create_secret(folder / METRICS_TOKEN_FILE, metrics_token(token) + b"\n")
    for own in made.merchants.values():
        own.mkdir(mode=0o700)
        signing.create_key(own / "identity.key")
        create_node_key(own / "node.key")
    if merchants:
        key = signing.create_key(made.league_key)
        charter = founded(league, key)
        write_atomically(made.charter, wire.encode(CharterFile(charters=(charter,))), PUBLIC)
        signed = sign_directory(charter, made.merchants, key, datetime.now(UTC))
        write_atomically(made.directory, wire.encode(signed), PUBLIC)
    return made


def sign_directory(
    charter: SignedCharter, shops: Mapping[str, Path], key: Ed25519PrivateKey, now: datetime
) -> SignedDirectory:
    """Return a directory for a year of the merchants whose keys are in these folders, each an entity of its name."""
    opened = charter.read()
    expires = int((now + timedelta(days=AUTHORITY_DAYS)).timestamp())
    entries = []
    for name, own in sorted(shops.items()):
        identity = signing.load_key(own / "identity.key")
        request = Request(
            charter=opened.digest,
            name=name,
            entity=name,
            identity=signing.public_bytes(identity),
            node_key=node_point(load_node_public(own / "node.key.pub")),
        )
        entries.append(Entry.of(SignedRequest.make(request, identity), expires))
    directory = Directory(
        league=opened.league,
        charter=opened.digest,
        # Later ones are of a later version, as merchants ask of a directory.
        version=int(now.timestamp()) - VERSIONS_SINCE,
        expires=expires,
        entries=tuple(entries),
    )
    return SignedDirectory.of(directory, (charter,)).signed_by(key)


def _authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = _name("Hanse development CA")
    usage = _usage(key_cert_sign=True, crl_sign=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        _builder(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )


def _certificate(
    key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        _builder(_name(hosts[0]), authority.subject, key.public_key(), CERTIFICATE_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=days))
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
