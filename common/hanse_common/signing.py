"""Ed25519 keys and domain-separated signatures (RFC 8032).

A signature is over `domain ‖ 0 ‖ bytes`, so that one made for a plan can never pass for one made for anything
else. Keys are files: the private one PKCS #8 PEM with mode 0600, the public one 64 hexadecimal digits, short
enough to read out over the telephone.
"""

from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from hanse_common.errors import ConfigError, SignatureInvalid
from hanse_common.files import create_secret, read_bounded

MAX_KEY_FILE_BYTES = 4096


def sign(key: Ed25519PrivateKey, domain: str, data: bytes) -> bytes:
    """Return the signature, 64 bytes, of `data` under `domain`."""
    return key.sign(_separated(domain, data))


def verify(public_key: bytes, domain: str, data: bytes, signature: bytes) -> None:
    """Raise `SignatureInvalid` unless `signature` is `public_key`'s over `data` under `domain`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _separated(domain, data))
    except (InvalidSignature, ValueError):
        raise SignatureInvalid(f"The signature of the {domain} does not verify.") from None


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """Return the public key that belongs to `key`, 32 bytes."""
    return key.public_key().public_bytes_raw()


def create_key(path: Path) -> Ed25519PrivateKey:
    """Make a key, write it to `path` (mode 0600) and its public half to `path` with `.pub` added.

    Raises `ConfigError` when `path` exists: a key that signed something is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    write_key(path, key)
    return key


def write_key(path: Path, key: Ed25519PrivateKey) -> None:
    """Write `key` as `create_key` does. Raises `ConfigError` when `path` exists."""
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    create_secret(path, pem)
    path.with_name(path.name + ".pub").write_text(public_bytes(key).hex() + "\n", encoding="ascii")


def load_key(path: Path) -> Ed25519PrivateKey:
    """Return the private key in the file `path`. Raises `ConfigError` when there is none."""
    data = read_bounded(path, MAX_KEY_FILE_BYTES, "a signing key", ConfigError)
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError):
        raise ConfigError(f"{path}: found no PEM private key without passphrase, expected one.") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: found a key of another kind, expected Ed25519.")
    return key


def load_public(path: Path) -> bytes:
    """Return the public key, 32 bytes, in the file `path` of 64 hexadecimal digits. Raises `ConfigError`."""
    data = read_bounded(path, MAX_KEY_FILE_BYTES, "a public key of 64 hexadecimal digits", ConfigError)
    try:
        key = bytes.fromhex(data.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(f"{path}: expected a public key of 64 hexadecimal digits; copy it again.")
    return key


def _separated(domain: str, data: bytes) -> bytes:
    return f"hanse {domain}".encode() + b"\0" + data
