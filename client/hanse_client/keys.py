"""The merchant's two secret keys, and where the passphrase comes from when they have one.

    make_keys(config, passphrase=b"")
    identity = load_identity(config)

The identity (Ed25519) is what the league's directory names and all that the merchant says is signed with. The node's
key (P-384) only lets the node into Flower, so the process that talks to the operator's server needs nothing else.
"""

import getpass
import os
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_client.config import ClientConfig
from hanse_common import signing
from hanse_common.credentials import create_node_key, load_node_key
from hanse_common.errors import ConfigError
from hanse_common.files import read_bounded

PASSPHRASE_FILE = "HANSE_PASSPHRASE_FILE"  # noqa: S105 - a name
"""Environment variable that names a file with the passphrase, such as a credential of systemd's."""

MAX_PASSPHRASE_BYTES = 1024


def make_keys(config: ClientConfig, passphrase: bytes = b"") -> Ed25519PrivateKey:
    """Make both keys (mode 0600), encrypted when there is a passphrase, and return the identity's.

    Raises `ConfigError`, before anything is written, when there is one already.
    """
    config.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (config.identity_path, config.node_key_path):
        if path.exists():
            raise ConfigError(f"{path}: there is a key already; move it away to make another.")
    identity = signing.create_key(config.identity_path, passphrase)
    create_node_key(config.node_key_path, passphrase)
    return identity


def load_identity(config: ClientConfig) -> Ed25519PrivateKey:
    """Return the identity's key. Raises `ConfigError`."""
    return signing.load_key(_there(config.identity_path), ask)


def load_node(config: ClientConfig) -> ec.EllipticCurvePrivateKey:
    """Return the node's key. Raises `ConfigError`."""
    return load_node_key(_there(config.node_key_path), ask)


def ask(path: Path) -> bytes:
    """Return the passphrase of the key in `path`: from the file in the environment, or typed in.

    Raises `ConfigError` when there is neither a file nor a person.
    """
    file = os.environ.get(PASSPHRASE_FILE)
    if file:
        return read_bounded(Path(file), MAX_PASSPHRASE_BYTES, "a passphrase", ConfigError).strip()
    if not sys.stdin.isatty():
        raise ConfigError(
            f"{path}: this key has a passphrase, and nobody is there to type it. Put it into a file that only your "
            f"user can read, and name that file in the environment variable {PASSPHRASE_FILE}."
        )
    return getpass.getpass(f"Passphrase of {path}: ").encode()


def _there(path: Path) -> Path:
    if not path.exists():
        raise ConfigError(f"{path}: no such key; make your keys with hanse-client init.")
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigError(
            f"{path}: other users of this machine can read this key (mode {mode:o}, expected 600). Run chmod 600 "
            f"{path}; if one of them may have read it, make another key."
        )
    return path
