"""The directory: one entry an entity, in date, signed by the league's key alone, one encoding."""

from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from hanse_common import wire
from hanse_common.charter import MAX_ENDORSEMENTS, founded, with_signature
from hanse_common.credentials import node_point
from hanse_common.directory import (
    MAX_DIRECTORY_BYTES,
    MAX_FORMER,
    MAX_MEMBERS,
    Directory,
    Entry,
    SignedDirectory,
)
from hanse_common.errors import DirectoryRefused, SignatureInvalid, WireError
from hanse_common.membership import Endorsement

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
CHARTER = founded("test", KEY)
POINT = node_point(ec.derive_private_key(7, ec.SECP384R1()).public_key())
LEAGUE = CHARTER.read().digest


def entry(number: int, **changes: Any) -> Entry:
    fields = {
        "name": f"m{number:04}",
        "entity": f"Entity {number}",
        "identity": number.to_bytes(32, "big"),
        "expires": 100,
    }
    return Entry(**(fields | changes))


def directory(*entries: Entry, **changes: Any) -> Directory:
    fields: dict[str, Any] = {"league": "test", "charter": LEAGUE, "version": 1, "expires": 100}
    return Directory(**(fields | {"entries": entries or (entry(1), entry(2), entry(3))} | changes))


def sign(made: Directory) -> SignedDirectory:
    return SignedDirectory.of(made, (CHARTER,)).signed_by(KEY)


def test_it_opens_with_the_leagues_key_alone() -> None:
    signed = sign(directory())
    assert signed.open(LEAGUE, 99.9) == directory()
    with pytest.raises(DirectoryRefused, match="another league's"):
        signed.open(founded("test", Ed25519PrivateKey.generate()).read().digest, 0)
    forged = signed.model_copy(update={"directory": wire.encode(directory(version=2))})
    with pytest.raises(SignatureInvalid):
        forged.open(LEAGUE, 0)


def test_a_plans_signature_is_none_for_a_directory() -> None:
    data = wire.encode(directory())
    with pytest.raises(SignatureInvalid):
        sign(directory()).model_copy(update={"signatures": with_signature((), KEY, "plan", data)}).open(
            LEAGUE, 0
        )


def test_it_expires() -> None:
    for now in (100.0, 101.0, 1e9):
        with pytest.raises(DirectoryRefused, match="version 1, has expired"):
            sign(directory()).open(LEAGUE, now)


def test_entries_expire_one_by_one() -> None:
    made = directory(entry(1), entry(2, expires=50))
    assert set(made.entities(49)) == {entry(1).identity, entry(2).identity}
    assert made.entities(50) == {entry(1).identity: "Entity 1"}
    assert set(made.identities()) == {"m0001", "m0002"}


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"name": "m0001"}, "one name twice"),
        ({"entity": "entity 1"}, "one entity twice"),  # whatever its spelling
        ({"identity": entry(1).identity}, "one identity twice"),
        ({"node_key": POINT}, "one node key twice"),
        ({"name": "a"}, "sorted by name"),
    ],
)
def test_each_entity_has_one_entry(other: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        directory(entry(1, node_key=POINT), entry(2, **other))


def test_bounds() -> None:
    many = tuple(entry(number) for number in range(MAX_MEMBERS + 1))
    assert sign(directory(*many[:-1])).open(LEAGUE, 0).entries == many[:-1]
    for impossible in (
        lambda: directory(*many),
        lambda: directory(version=0),
        lambda: directory(expires=-1),
        lambda: entry(1, name="UPPER"),
        lambda: entry(1, entity=""),
        lambda: entry(1, identity=bytes(31)),
    ):
        with pytest.raises(ValidationError):
            impossible()


@pytest.mark.parametrize("letter", ["x", "ß", "林", "𐂃"])
def test_the_largest_list_of_members_can_be_signed_and_opened(letter: str) -> None:
    word = Endorsement(identity=bytes(32), signature=bytes(64))
    many = tuple(
        entry(
            n,
            name=f"m{n:062}",
            entity=f"{n:04}" + letter * 124,
            expires=(1 << 40) - 1,
            node_key=node_point(ec.derive_private_key(n + 1, ec.SECP384R1()).public_key()),
            replaces=bytes(32),
            proof=bytes(64),
            handover=bytes(64),
            endorsements=(word,) * MAX_ENDORSEMENTS,
        )
        for n in range(MAX_MEMBERS)
    )
    made = directory(*many, expires=(1 << 40) - 1, version=(1 << 31) - 1, former=many[:MAX_FORMER])
    signed = wire.decode(SignedDirectory, wire.encode(sign(made)))
    assert signed.open(LEAGUE, 0) == made
    assert len(wire.encode(signed)) < MAX_DIRECTORY_BYTES  # the bound of its file, too


def test_the_digest_tells_directories_apart() -> None:
    made = [
        directory(),
        directory(version=2),
        directory(expires=99),
        directory(league="other"),
        directory(charter=bytes(32)),
        directory(entry(1), entry(2)),
        directory(entry(1), entry(2), entry(3, expires=99)),
        directory(entry(1), entry(2), entry(3, entity="x")),
    ]
    assert len({one.digest for one in made}) == len(made)
    assert directory().digest == directory().digest


def test_an_entity_is_the_same_in_another_case() -> None:
    for one, other in (("Straße", "STRASSE"), ("ALDER", "alder")):
        with pytest.raises(ValidationError, match="one entity twice"):
            directory(entry(1, entity=one), entry(2, entity=other))


def test_signed_bytes_that_are_no_directory() -> None:
    plain = wire.encode(directory())
    reordered = msgpack.packb([1, 15, dict(reversed(directory().model_dump().items()))])
    assert plain.count(b"\xa7version\x01") == 1
    for data in (
        b"",
        b"\xc0",
        plain + b"\0",
        reordered,
        plain.replace(b"\xa7version\x01", b"\xa7version\xcc\x01"),  # a second encoding of the same number
    ):
        signatures = with_signature((), KEY, SignedDirectory.DOMAIN, data)
        with pytest.raises(WireError):
            SignedDirectory(charters=(CHARTER,), directory=data, signatures=signatures).open(LEAGUE, 0)
