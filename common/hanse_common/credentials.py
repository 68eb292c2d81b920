"""Keys of Flower nodes, and the fingerprint of a server's certificate.

    create_node_key(path)                             # path and path.pub, as ssh-keygen writes them
    pem = node_public_pem(load_node_public(path.with_name("node.key.pub")))

A node key is ECDSA on P-384 in OpenSSH's file form: what `flwr supernode register` takes. It authenticates a
merchant's node to Flower and nothing else; what a merchant says is signed with its directory identity (`signing`).
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from hanse_common import signing
from hanse_common.errors import ConfigError
from hanse_common.files import PUBLIC, create_secret, read_bounded, write_atomically

MAX_KEY_FILE_BYTES = 4096


def create_node_key(path: Path, passphrase: bytes = b"") -> ec.EllipticCurvePrivateKey:
    """Make a node key, write it to `path` (mode 0600) and its public half to `path` with `.pub` added.

    With a passphrase the private half is encrypted, in PKCS #8, as OpenSSH's form would need another library.

    Raises `ConfigError` when `path` exists or can't be written.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    form = PrivateFormat.PKCS8 if passphrase else PrivateFormat.OpenSSH
    create_secret(path, key.private_bytes(Encoding.PEM, form, signing.encryption(passphrase)))
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write_atomically(path.with_name(path.name + ".pub"), line + b"\n", PUBLIC)
    return key


def load_node_key(
    path: Path, passphrase: Callable[[Path], bytes] | None = None
) -> ec.EllipticCurvePrivateKey:
    """Return the node key in the file `path`; `passphrase` is asked for an encrypted one's.

    Raises `ConfigError` as `signing.load_key` does.
    """
    data = read_bounded(path, MAX_KEY_FILE_BYTES, "a node key; make it with hanse-client init", ConfigError)
    key: object
    if data.startswith(b"-----BEGIN OPENSSH"):
        try:
            key = load_ssh_private_key(data, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ConfigError(
                f"{path}: found no OpenSSH private key without passphrase, expected one."
            ) from None
    else:
        key = signing.load_pem(path, data, passphrase)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{path}: found a key of another kind, expected ECDSA on P-384.")
    return key


def load_node_public(path: Path) -> ec.EllipticCurvePublicKey:
    """Return the public node key in the file `path`. Raises `ConfigError` when there is none."""
    data = read_bounded(path, MAX_KEY_FILE_BYTES, "a node's public key", ConfigError)
    try:
        key = load_ssh_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{path}: found no OpenSSH public key, expected one line of it.") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{path}: found a key of another kind, expected ECDSA on P-384.")
    return key


def node_public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return the public key as Flower knows it: SubjectPublicKeyInfo in PEM."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def node_point(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return the public key as directories have it: a compressed point, 49 bytes."""
    return key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)


def node_public_from_point(point: bytes) -> ec.EllipticCurvePublicKey:
    """Return the public key at the compressed `point`. Raises `ConfigError` when there is none."""
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), point)
    except ValueError:
        raise ConfigError(
            "Found a node key that is no point on P-384; its merchant must ask again."
        ) from None


def fingerprint(pem: bytes) -> bytes:
    """Return the SHA-256, 32 bytes, of the first certificate in `pem`. Raises `ConfigError` without one."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion):
        raise ConfigError("Found no PEM certificate, expected the server's, then its chain.") from None
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()
