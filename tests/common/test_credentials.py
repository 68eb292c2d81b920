"""Node keys as files, and fingerprints of certificates."""

import hashlib
import ssl
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
)

from hanse_common.credentials import (
    MAX_KEY_FILE_BYTES,
    create_node_key,
    fingerprint,
    load_node_key,
    load_node_public,
    node_public_pem,
)
from hanse_common.errors import ConfigError
from hanse_server.development_keys import DevelopmentKeys


def test_a_node_key_is_two_files_of_which_one_is_secret(tmp_path: Path) -> None:
    key = create_node_key(tmp_path / "node.key")
    assert load_node_key(tmp_path / "node.key").private_numbers() == key.private_numbers()
    assert load_node_public(tmp_path / "node.key.pub") == key.public_key()
    assert isinstance(key.curve, ec.SECP384R1)
    assert stat.S_IMODE((tmp_path / "node.key").stat().st_mode) == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"node.key", "node.key.pub"}
    public = (tmp_path / "node.key.pub").read_text()
    assert public.startswith("ecdsa-sha2-nistp384 ")
    assert public.count("\n") == 1


def test_a_node_key_is_never_overwritten(tmp_path: Path) -> None:
    create_node_key(tmp_path / "node.key")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="there is a key already"):
        create_node_key(tmp_path / "node.key")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_public_key_reads_as_flower_knows_it(tmp_path: Path) -> None:
    key = create_node_key(tmp_path / "node.key")
    assert load_pem_public_key(node_public_pem(key.public_key())) == key.public_key()


def private_file(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def public_file(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


RIGHT = ec.generate_private_key(ec.SECP384R1())
WRONG_CURVE = ec.generate_private_key(ec.SECP256R1())
WRONG_KIND = ed25519.Ed25519PrivateKey.generate()
ENCRYPTED = RIGHT.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no PEM private key"),
        (b"garbage", "no PEM private key"),
        (private_file(RIGHT)[:200], "no OpenSSH private key"),
        (ENCRYPTED, "with a passphrase, expected one without"),
        (public_file(RIGHT), "no PEM private key"),
        (private_file(WRONG_CURVE), "another kind, expected ECDSA on P-384"),
        (private_file(WRONG_KIND), "another kind, expected ECDSA on P-384"),
        (private_file(RIGHT) + bytes(MAX_KEY_FILE_BYTES), f"more than {MAX_KEY_FILE_BYTES} bytes"),
    ],
    ids=["empty", "garbage", "half", "passphrase", "public", "curve", "kind", "large"],
)
def test_what_is_no_node_key(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=why) as caught:
        load_node_key(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no OpenSSH public key"),
        (b"garbage", "no OpenSSH public key"),
        (private_file(RIGHT), "no OpenSSH public key"),
        (node_public_pem(RIGHT.public_key()), "no OpenSSH public key"),
        (public_file(WRONG_CURVE), "another kind, expected ECDSA on P-384"),
        (public_file(WRONG_KIND), "another kind, expected ECDSA on P-384"),
        (public_file(RIGHT) + bytes(MAX_KEY_FILE_BYTES), f"more than {MAX_KEY_FILE_BYTES} bytes"),
    ],
    ids=["empty", "garbage", "private", "pem", "curve", "kind", "large"],
)
def test_what_is_no_public_node_key(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "node.key.pub"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=why) as caught:
        load_node_public(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("load", [load_node_key, load_node_public])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, load: Callable[[Path], object]) -> None:
    with pytest.raises(ConfigError, match=r"nothing-here: cannot be read"):
        load(tmp_path / "nothing-here")


def test_a_fingerprint_is_that_of_the_first_certificate(keys: DevelopmentKeys) -> None:
    leaf, authority = keys.certificate.read_bytes(), keys.authority.read_bytes()
    expected = hashlib.sha256(ssl.PEM_cert_to_DER_cert(leaf.decode())).digest()
    assert fingerprint(leaf) == expected
    assert fingerprint(leaf + authority) == expected
    assert fingerprint(authority) != expected


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff\xfe", private_file(RIGHT)])
def test_what_has_no_certificate_has_no_fingerprint(content: bytes) -> None:
    with pytest.raises(ConfigError, match="no PEM certificate"):
        fingerprint(content)


def test_ssh_keygen_reads_what_is_written(tmp_path: Path) -> None:
    create_node_key(tmp_path / "node.key")
    try:
        found = subprocess.run(
            ["ssh-keygen", "-y", "-f", tmp_path / "node.key"], capture_output=True, check=True, timeout=30
        )
    except FileNotFoundError:
        pytest.skip("no ssh-keygen here")
    assert found.stdout.split()[:2] == (tmp_path / "node.key.pub").read_bytes().split()[:2]
