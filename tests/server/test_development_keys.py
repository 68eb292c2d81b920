"""Keys to try a league with: what is made, who can read it, and that TLS takes it."""

import socket
import ssl
import stat
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from hanse_common import signing, wire
from hanse_common.credentials import load_node_key, load_node_public, node_public_from_point
from hanse_common.directory import SignedDirectory
from hanse_common.errors import ConfigError
from hanse_server.development_keys import DevelopmentKeys, make_keys

SECRETS = {"server.key", "admin.token", "metrics.token", "identity.key", "node.key", "league.key"}


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_everything_is_made_and_secrets_are_for_the_user_alone(tmp_path: Path) -> None:
    made = make_keys(tmp_path / "keys", ("localhost",), ("alder", "birch"))
    named = {
        made.authority,
        made.certificate,
        made.key,
        made.token,
        made.token.with_name("metrics.token"),
        made.directory,
        made.league_key,
        made.charter,
    }
    named.add(made.league_key.with_name("league.key.pub"))
    for folder in made.merchants.values():
        signing.load_key(folder / "identity.key")
        assert load_node_public(folder / "node.key.pub") == load_node_key(folder / "node.key").public_key()
        named |= {folder / name for name in ("identity.key", "node.key")}
        named |= {folder / name for name in ("identity.key.pub", "node.key.pub")}
    assert files(tmp_path / "keys") == named
    for path in named:
        readable = stat.S_IMODE(path.stat().st_mode) & 0o077
        assert path.name not in SECRETS or not readable, path
    for folder in (tmp_path / "keys", *made.merchants.values()):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(made.token.read_bytes().strip()) >= 32


def test_the_authoritys_secret_key_is_nowhere(tmp_path: Path) -> None:
    made = make_keys(tmp_path / "keys", ("localhost",), ())
    secrets = [path for path in files(tmp_path / "keys") if b"PRIVATE KEY" in path.read_bytes()]
    assert secrets == [made.key]
    key = x509.load_pem_x509_certificate(made.authority.read_bytes()).public_key()
    leaf = x509.load_pem_x509_certificate(made.certificate.read_bytes()).public_key()
    assert key != leaf, "the server's key is not the authority's"


def test_the_directory_lists_the_merchants_under_their_own_identities(tmp_path: Path) -> None:
    made = make_keys(tmp_path / "keys", ("localhost",), ("birch", "alder"), "textiles")
    signed = wire.decode(SignedDirectory, made.directory.read_bytes())
    now = time.time()
    directory = signed.open(bytes.fromhex(made.pinned), now)
    assert directory.league == "textiles"
    assert directory.identities() == {
        name: signing.load_public(folder / "identity.key.pub") for name, folder in made.merchants.items()
    }
    assert len(directory.entities(now)) == 2
    for entry in directory.entries:
        entry.asked(bytes.fromhex(made.pinned)).require_sound()
        node = node_public_from_point(entry.node_key)
        assert node == load_node_public(made.merchants[entry.name] / "node.key.pub")


def test_without_merchants_there_is_no_directory(tmp_path: Path) -> None:
    made = make_keys(tmp_path / "keys", ("localhost",), ())
    assert not made.directory.exists()
    assert not made.league_key.exists()


def test_no_two_leagues_share_anything(tmp_path: Path) -> None:
    one, other = (make_keys(tmp_path / name, ("localhost",), ("alder",)) for name in "ab")
    contents = [path.read_bytes() for made in (one, other) for path in files(made.authority.parent)]
    assert len(set(contents)) == len(contents)


@pytest.mark.parametrize("there", ["file", "folder with something"])
def test_nothing_is_overwritten(tmp_path: Path, there: str) -> None:
    folder = tmp_path / "keys"
    if there == "file":
        folder.write_text("mine")
    else:
        folder.mkdir()
        (folder / "mine").write_text("mine")
    before = {path: path.read_bytes() for path in files(tmp_path)}
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        make_keys(folder, ("localhost",), ())
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="keys: cannot be made"):
        make_keys(tmp_path / "file" / "keys", ("localhost",), ())


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    make_keys(tmp_path, ("localhost",), ())


def test_validity(keys: DevelopmentKeys) -> None:
    now = datetime.now(UTC)
    for path, days in ((keys.authority, 365), (keys.certificate, 90)):
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        assert certificate.not_valid_before_utc < now - timedelta(minutes=30), "clocks may be late"
        assert timedelta(days=days - 1) < certificate.not_valid_after_utc - now <= timedelta(days=days)


def handshake(made: DevelopmentKeys, host: str, authority: Path) -> None:
    """Let a strict TLS client meet a server with these keys. Raises what the client raises."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made.certificate, made.key)
    client = ssl.create_default_context(cafile=str(authority))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    near, far = socket.socketpair()

    def serve() -> None:
        with far, suppress(OSError), server.wrap_socket(far, server_side=True):
            pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with near, client.wrap_socket(near, server_hostname=host):
            pass
    finally:
        thread.join()


@pytest.mark.parametrize("host", ["league.example", "192.0.2.7", "2001:db8::1", "localhost"])
def test_a_strict_client_takes_the_certificate_for_its_hosts(tmp_path: Path, host: str) -> None:
    made = make_keys(tmp_path / "keys", ("league.example", "192.0.2.7", "2001:db8::1", "localhost"), ())
    handshake(made, host, made.authority)


def test_and_for_no_other_host_or_authority(keys: DevelopmentKeys, tmp_path: Path) -> None:
    other = make_keys(tmp_path / "keys", ("localhost",), ())
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        handshake(keys, "elsewhere.example", keys.authority)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(keys, "localhost", other.authority)


def test_a_server_certificate_signs_no_other(keys: DevelopmentKeys) -> None:
    authority, leaf = (
        x509.load_pem_x509_certificate(path.read_bytes()).extensions
        for path in (keys.authority, keys.certificate)
    )
    assert authority.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert not leaf.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not leaf.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
