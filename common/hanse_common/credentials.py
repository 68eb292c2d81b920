"""Keys of Flower nodes, and the fingerprint of a server's certificate.

    create_node_key(path)                             # path and path.pub, as ssh-keygen writes them
    pem = node_public_pem(load_node_public(path.with_name("node.key.pub")))

A node key is ECDSA on P-384 in OpenSSH's file form: what `flwr supernode register` takes. It authenticates a
merchant's node to Flower and nothing else; what a merchant says is signed with its directory identity (`signing`).
"""

import hashlib
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from hanse_common.errors import ConfigError
from hanse_common.files import PUBLIC, create_secret, read_bounded, write_atomically

MAX_KEY_FILE_BYTES = 4096


def create_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Make a node key, write it to `path` (mode 0600) and its public half to `path` with `.pub` added.

    Raises `ConfigError` when `path` exists or can't be written.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    create_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write_atomically(path.with_name(path.name + ".pub"), line + b"\n", PUBLIC)
    return key


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the node key in the file `path`. Raises `ConfigError` when there is none."""
    data = read_bounded(path, MAX_KEY_FILE_BYTES, "a node key; make it with hanse-client keygen", ConfigError)
    try:
        key = load_ssh_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path}: found no OpenSSH private key without passphrase, expected one.") from None
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


def fingerprint(pem: bytes) -> bytes:
    """Return the SHA-256, 32 bytes, of the first certificate in `pem`. Raises `ConfigError` without one."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ConfigError("Found no PEM certificate, expected the server's, then its chain.") from None
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()
