"""Signatures and key files, against RFC 8032."""

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hanse_common import signing
from hanse_common.errors import ConfigError, SignatureInvalid

# RFC 8032, section 7.1, TEST 3.
SECRET = bytes.fromhex("c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7")
PUBLIC = bytes.fromhex("fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025")
SIGNATURE = bytes.fromhex(
    "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
    "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
)


def test_the_keys_are_those_of_rfc_8032() -> None:
    key = Ed25519PrivateKey.from_private_bytes(SECRET)
    assert signing.public_bytes(key) == PUBLIC
    assert key.sign(bytes.fromhex("af82")) == SIGNATURE


def test_a_signature_holds_for_its_domain_bytes_and_key_only() -> None:
    key = Ed25519PrivateKey.from_private_bytes(SECRET)
    signature = signing.sign(key, "plan", b"data")
    signing.verify(PUBLIC, "plan", b"data", signature)
    stranger = signing.public_bytes(Ed25519PrivateKey.generate())
    for public, domain, data, sig in [
        (PUBLIC, "model", b"data", signature),
        (PUBLIC, "plan", b"datA", signature),
        (stranger, "plan", b"data", signature),
        (PUBLIC, "plan", b"data", bytes(64)),
        (PUBLIC, "plan", b"data", b""),
        (b"short", "plan", b"data", signature),
        (PUBLIC, "pla", b"n\0data", signature),
    ]:
        with pytest.raises(SignatureInvalid):
            signing.verify(public, domain, data, sig)


def test_a_key_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "operator.key"
    key = signing.create_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert signing.public_bytes(signing.load_key(path)) == signing.public_bytes(key)
    assert path.with_name("operator.key.pub").read_text().strip() == signing.public_bytes(key).hex()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="already"):
        signing.create_key(path)
    assert path.read_bytes() == before


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    with pytest.raises(ConfigError, match=r"other\.pem"):
        signing.load_key(other)
    other.write_text("hello")
    with pytest.raises(ConfigError, match="PEM"):
        signing.load_key(other)
    elliptic = ec.generate_private_key(ec.SECP256R1())
    other.write_bytes(elliptic.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(ConfigError, match="Ed25519"):
        signing.load_key(other)


def test_what_is_signed_is_the_domain_a_nul_and_the_bytes() -> None:
    key = Ed25519PrivateKey.from_private_bytes(SECRET)
    key.public_key().verify(signing.sign(key, "plan", b"data"), b"hanse plan\0data")


def test_a_key_is_on_disk_before_it_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    path, fsync = tmp_path / "operator.key", os.fsync

    def spy(handle: int) -> None:
        fsync(handle)
        synced.append(path.read_bytes() if path.exists() else b"")

    monkeypatch.setattr(os, "fsync", spy)
    signing.create_key(path)
    assert path.read_bytes() in synced
