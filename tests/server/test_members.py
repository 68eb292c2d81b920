"""Who is a member, as the directory's file says from block to block."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_common import signing, wire
from hanse_common.charter import founded
from hanse_common.credentials import load_node_public, node_public_pem
from hanse_common.directory import SignedDirectory
from hanse_common.errors import ConfigError, DirectoryRefused, SignatureInvalid, WireError
from hanse_server.config import Service
from hanse_server.development_keys import DevelopmentKeys
from hanse_server.members import Members


@pytest.fixture
def service(make_service: Callable[..., Service], keys: DevelopmentKeys, tmp_path: Path) -> Service:
    path = tmp_path / "directory.hanse"
    path.write_bytes(keys.directory.read_bytes())
    return make_service(directory=path)


def rewrite(
    service: Service, keys: DevelopmentKeys, key: Ed25519PrivateKey | None = None, **changes: Any
) -> None:
    signed = wire.decode(SignedDirectory, service.directory.read_bytes())
    directory = signed.read().model_copy(update=changes)
    made = SignedDirectory.of(directory, signed.charters).signed_by(key or signing.load_key(keys.league_key))
    service.directory.write_bytes(wire.encode(made))


def test_the_members_are_the_directorys(service: Service, keys: DevelopmentKeys) -> None:
    members = Members(service, "demo")
    assert members.names == set(keys.merchants)
    for name, own in keys.merchants.items():
        assert members.nodes[node_public_pem(load_node_public(own / "node.key.pub"))] == name
        assert members.identities[signing.load_public(own / "identity.key.pub")] == name


def test_another_version_is_taken_at_the_next_look(service: Service, keys: DevelopmentKeys) -> None:
    members, told = Members(service, "demo"), []
    before = members.current.opened
    members.refresh(told.append)
    assert not told
    rewrite(service, keys, version=before.version + 1, entries=before.entries[:-1])
    members.refresh(told.append)
    assert members.names == {entry.name for entry in before.entries[:-1]}
    assert told == [f"The league's directory is now version {before.version + 1}, with 2 members."]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 1}, "merchants refuse it"),
        ({"expires": 1, "version": 1 << 30}, "has expired"),
        ({"league": "other", "version": 1 << 30}, "under another charter"),
    ],
)
def test_a_file_that_is_no_use_changes_nothing_and_is_told_once(
    service: Service, keys: DevelopmentKeys, changes: dict[str, Any], why: str
) -> None:
    members, told = Members(service, "demo"), []
    before = members.current
    rewrite(service, keys, **changes)
    for _ in range(3):
        members.refresh(told.append)
    assert members.current is before
    assert len(told) == 1 and why in told[0] and "the one before stays" in told[0]
    service.directory.unlink()
    members.refresh(told.append)
    assert members.current is before and len(told) == 2


def test_without_a_directory_of_this_league_there_is_nothing_to_begin_with(
    service: Service, keys: DevelopmentKeys
) -> None:
    with pytest.raises(ConfigError, match="the plan is shoes's"):
        Members(service, "shoes")
    rewrite(service, keys, Ed25519PrivateKey.generate())
    with pytest.raises(SignatureInvalid, match="Ask those who hold"):
        Members(service, "demo")
    other = founded("demo", Ed25519PrivateKey.generate()).read().digest.hex()
    with pytest.raises(DirectoryRefused, match="another league's"):
        Members(service.model_copy(update={"charter": other}), "demo")
    service.directory.write_bytes(b"nothing")
    with pytest.raises(WireError, match="not a directory"):
        Members(service, "demo")
