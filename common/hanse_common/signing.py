"""Ed25519 keys and domain-separated signatures (RFC 8032).

A signature is over `domain ‖ 0 ‖ bytes`, so that one made for a plan can never pass for one made for anything
else. Keys are files: the private one PKCS #8 PEM with mode 0600, the public one 64 hexadecimal digits, short
enough to read out over the telephone.
"""

from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from hanse_common.errors import ConfigError, SignatureInvalid
from hanse_common.files import PUBLIC, create_secret, read_bounded, write_atomically

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


def create_key(path: Path, passphrase: bytes = b"") -> Ed25519PrivateKey:
    """Make a key, write it to `path` (mode 0600) and its public half to `path` with `.pub` added.

    The private half is encrypted when there is a passphrase.

    Raises `ConfigError` when `path` exists: a key that signed something is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    write_key(path, key, passphrase)
    return key


def write_key(path: Path, key: Ed25519PrivateKey, passphrase: bytes = b"") -> None:
    """Write `key` as `create_key` does. Raises `ConfigError` when `path` exists."""
    create_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption(passphrase)))
    line = public_bytes(key).hex() + "\n"
    write_atomically(path.with_name(path.name + ".pub"), line.encode("ascii"), PUBLIC)


def load_key(path: Path, passphrase: Callable[[Path], bytes] | None = None) -> Ed25519PrivateKey:
    """Return the private key in the file `path`; `passphrase` is asked for an encrypted one's.

    Raises `ConfigError` when there is no key, or it is encrypted with another passphrase or nobody to ask for it.
    """
    data = read_bounded(path, MAX_KEY_FILE_BYTES, "a signing key", ConfigError)
    key = load_pem(path, data, passphrase)
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: found a key of another kind, expected Ed25519.")
    return key


def load_pem(path: Path, data: bytes, passphrase: Callable[[Path], bytes] | None) -> object:
    """Return the private key in `data`, PEM, of the file `path`. Raises `ConfigError` as `load_key` does."""
    encrypted = data.startswith(b"-----BEGIN ENCRYPTED")
    if encrypted and passphrase is None:
        raise ConfigError(f"{path}: found a key with a passphrase, expected one without.")
    try:
        return load_pem_private_key(data, passphrase(path) if encrypted and passphrase else None)
    except (ValueError, TypeError):
        if encrypted:
            raise ConfigError(f"{path}: this is not the key's passphrase, or the file is damaged.") from None
        raise ConfigError(
            f"{path}: found no PEM private key, expected one; restore it from a backup."
        ) from None


def encryption(passphrase: bytes) -> KeySerializationEncryption:
    """Return how a private key is written: encrypted when there is a passphrase."""
    return BestAvailableEncryption(passphrase) if passphrase else NoEncryption()


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
