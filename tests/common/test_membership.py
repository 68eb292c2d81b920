"""Requests, endorsements and who is admitted by them: what a directory may hold that its members did not want."""

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse_common import signing, wire
from hanse_common.charter import Charter, founded
from hanse_common.credentials import node_point
from hanse_common.directory import Directory, Entry, require_admitted
from hanse_common.errors import DirectoryRefused, SignatureInvalid, WireError
from hanse_common.fingerprint import words
from hanse_common.membership import MAX_REQUEST_BYTES, Request, SignedRequest

HOLDER = Ed25519PrivateKey.from_private_bytes(bytes([99]) * 32)


def charter_of(endorsements: int) -> Charter:
    return founded("test", HOLDER, endorsements=endorsements).read()


FOUNDING = charter_of(2).digest
POINT = node_point(ec.derive_private_key(7, ec.SECP384R1()).public_key())
KEYS = {
    name: Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)
    for n, name in enumerate(("alder", "birch", "cedar", "damson", "elder", "fir", "gorse"), start=1)
}


def asks(name: str, *endorsers: str, key: str | None = None, **changes: Any) -> SignedRequest:
    own = KEYS[key or name]
    fields: dict[str, Any] = {
        "charter": FOUNDING,
        "name": name,
        "entity": f"{name.title()} Ltd",
        "identity": signing.public_bytes(own),
    }
    asked = SignedRequest.make(Request(**(fields | changes)), own)
    for endorser in endorsers:
        asked = asked.endorsed_by(KEYS[endorser])
    return asked


def entry(name: str, *endorsers: str, **changes: Any) -> Entry:
    return Entry.of(asks(name, *endorsers, **changes), 100)


def directory(
    *entries: Entry, version: int = 1, endorsements: int = 2, former: tuple[Entry, ...] = ()
) -> Directory:
    return Directory(
        league="test",
        charter=charter_of(endorsements).digest,
        former=former,
        version=version,
        expires=100,
        entries=tuple(sorted(entries, key=lambda one: one.name)),
    )


FOUNDERS = (entry("alder"), entry("birch"), entry("cedar"))
BEFORE = directory(*FOUNDERS)


def admitted(
    *entries: Entry,
    before: Directory | None = BEFORE,
    former: tuple[Entry, ...] = (),
    gone: tuple[bytes, ...] = (),
) -> None:
    require_admitted(directory(*entries, version=2, former=former), (charter_of(2),), before, gone)


def test_two_members_admit_a_third_party_and_one_does_not() -> None:
    admitted(*FOUNDERS, entry("damson", "alder", "birch"))
    for fewer in (entry("damson", "alder"), entry("damson"), entry("damson", "alder", "elder")):
        with pytest.raises(DirectoryRefused, match="damson without the word of 2 members"):
            admitted(*FOUNDERS, fewer)


def test_nobody_vouches_for_itself_nor_twice() -> None:
    twice = asks("damson", "alder")
    doubled = twice.model_copy(update={"endorsements": twice.endorsements * 2})
    with pytest.raises(DirectoryRefused):
        admitted(*FOUNDERS, Entry.of(doubled, 100))
    with pytest.raises(DirectoryRefused):
        admitted(*FOUNDERS, entry("damson", "damson", "alder"))


def test_invented_members_do_not_admit_each_other() -> None:
    ring = (entry("damson", "elder", "fir"), entry("elder", "damson", "fir"), entry("fir", "damson", "elder"))
    with pytest.raises(DirectoryRefused, match="damson, elder, fir"):
        admitted(*FOUNDERS, *ring)


def test_new_members_vouch_for_newer_ones() -> None:
    """A merchant that was away while both came."""
    admitted(*FOUNDERS, entry("damson", "alder", "birch"), entry("elder", "damson", "cedar"))


def test_a_member_that_has_left_since_counts_as_it_was_there_before() -> None:
    admitted(*FOUNDERS[1:], entry("damson", "alder", "birch"))


def test_the_first_directory_is_believed_but_not_its_forged_signatures() -> None:
    admitted(entry("damson"), *FOUNDERS, before=None)
    forged = entry("damson", "alder").model_copy(update={"proof": bytes(64)})
    with pytest.raises(SignatureInvalid):
        admitted(*FOUNDERS, forged, before=None)


def test_a_league_may_leave_it_to_the_holders() -> None:
    founding = charter_of(0)
    require_admitted(
        directory(*FOUNDERS, entry("damson"), endorsements=0),
        (founding,),
        directory(*FOUNDERS, endorsements=0),
    )


def test_an_entry_nobody_asked_for() -> None:
    silent = Entry(name="damson", entity="Damson Ltd", identity=b"d" * 32, expires=100)
    with pytest.raises(DirectoryRefused, match="without its own request"):
        admitted(*FOUNDERS, silent)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "dates"},
        {"entity": "Another Ltd"},
        {"node_key": POINT},
        {"proof": bytes(64)},
        {"handover": bytes(64)},
    ],
)
def test_what_was_signed_cannot_be_changed(change: dict[str, Any]) -> None:
    with pytest.raises(SignatureInvalid):
        admitted(*FOUNDERS, entry("damson", "alder", "birch").model_copy(update=change))


def test_a_request_for_another_league_is_none_for_this() -> None:
    with pytest.raises(SignatureInvalid):
        admitted(*FOUNDERS, entry("damson", "alder", "birch", charter=b"g" * 32))


def test_who_was_away_while_members_came_and_went() -> None:
    """Elder came by alder and birch, vouched for fir together with cedar, and left; or alder changed twice."""
    elder, fir = entry("elder", "alder", "birch"), entry("fir", "elder", "cedar")
    with pytest.raises(DirectoryRefused, match="fir without the word"):
        admitted(*FOUNDERS, fir)
    admitted(*FOUNDERS, fir, former=(elder,))
    once, twice = (
        Entry.of(hands_over("alder", "damson"), 100),
        Entry.of(hands_over("alder", "gorse", "damson"), 100),
    )
    admitted(*FOUNDERS[1:], twice, former=(once,))
    with pytest.raises(DirectoryRefused):
        admitted(*FOUNDERS[1:], twice)


def test_a_former_member_is_a_step_and_no_way_in() -> None:
    """Nobody admitted elder; that it is called former changes nothing."""
    with pytest.raises(DirectoryRefused):
        admitted(*FOUNDERS, entry("fir", "elder", "cedar"), former=(entry("elder", "fir", "cedar"),))


def test_who_left_does_not_come_back_by_old_words() -> None:
    damson = entry("damson", "alder", "birch")
    admitted(*FOUNDERS, damson)
    with pytest.raises(DirectoryRefused, match="damson with an identity that had left"):
        admitted(*FOUNDERS, damson, gone=(damson.identity,))


def test_a_present_members_entry_is_changed_by_itself_alone() -> None:
    for change in ({"name": "ab"}, {"node_key": POINT}):
        with pytest.raises(SignatureInvalid):
            admitted(FOUNDERS[0].model_copy(update=change), *FOUNDERS[1:])
    admitted(entry("alder", node_key=POINT), *FOUNDERS[1:])


def test_a_rule_that_grew_holds_from_the_directory_on_that_was_made_under_it() -> None:
    """Damson came while one word was enough; a merchant that was away then takes it, and asks for two afterwards."""
    first = charter_of(1)
    second = first.succeeded_by(first.holders, 1, 2)
    before = directory(*FOUNDERS, endorsements=1)

    def made(*entries: Entry, charter: Charter) -> Directory:
        return directory(*entries).model_copy(update={"charter": charter.digest, "version": 3})

    def of(name: str, *endorsers: str) -> Entry:
        return entry(name, *endorsers, charter=first.digest)

    now = made(*FOUNDERS, of("damson", "alder"), charter=second)
    require_admitted(now, (first, second), before)
    with pytest.raises(DirectoryRefused):
        require_admitted(
            made(*FOUNDERS, of("damson", "alder"), of("elder", "alder"), charter=second), (first, second), now
        )


def test_a_fork_of_the_charters_is_noticed() -> None:
    """A replaced holder signs another second charter beside the one that was seen."""
    first = charter_of(2)
    other = Ed25519PrivateKey.generate()
    seen = first.succeeded_by([signing.public_bytes(other)], 1, 2)
    fork = first.succeeded_by(first.holders, 1, 2)
    before = directory(*FOUNDERS).model_copy(update={"charter": seen.digest})
    after = directory(*FOUNDERS).model_copy(update={"charter": fork.digest, "version": 9})
    with pytest.raises(DirectoryRefused, match="somebody signed a fork"):
        require_admitted(after, (first, fork), before)
    require_admitted(after.model_copy(update={"charter": seen.digest}), (first, seen), before)


@pytest.mark.parametrize("entity", ["ALDER LTD", "  Alder   Ltd ", "Ａｌｄｅｒ Ltd"])
def test_one_business_is_one_however_it_is_spelled(entity: str) -> None:
    with pytest.raises(ValueError, match="one entity twice"):
        directory(*FOUNDERS, entry("damson", entity=entity))


@pytest.mark.parametrize("key", [b"n" * 49, b"\x02" * 48, b"\x04" + bytes(48)])
def test_a_node_key_is_a_point_or_nothing(key: bytes) -> None:
    with pytest.raises(ValueError, match="point on P-384"):
        asks("damson", node_key=key)


def test_a_request_has_room_for_so_many_words() -> None:
    full = asks("damson", "alder", "birch", "cedar", "elder")
    assert full.endorsed_by(KEYS["alder"]).endorsements[-1].identity == signing.public_bytes(KEYS["alder"])
    with pytest.raises(WireError, match="all that it has room for"):
        full.endorsed_by(KEYS["fir"])


def hands_over(old: str, new: str, by: str | None = None, **changes: Any) -> SignedRequest:
    fields: dict[str, Any] = {
        "charter": FOUNDING,
        "name": old,
        "entity": f"{old.title()} Ltd",
        "identity": signing.public_bytes(KEYS[new]),
        "replaces": signing.public_bytes(KEYS[by or old]),
    }
    return SignedRequest.make(Request(**(fields | changes)), KEYS[new], KEYS[by or old])


def test_a_member_changes_its_identity_with_the_old_one() -> None:
    admitted(*FOUNDERS[1:], Entry.of(hands_over("alder", "damson"), 100))


def test_an_identity_is_handed_over_by_its_owner_to_the_same_entity() -> None:
    stolen = SignedRequest.make(
        Request(
            charter=FOUNDING,
            name="alder",
            entity="Alder Ltd",
            identity=signing.public_bytes(KEYS["damson"]),
            replaces=signing.public_bytes(KEYS["alder"]),
        ),
        KEYS["damson"],
        KEYS["elder"],
    )
    with pytest.raises(SignatureInvalid):
        admitted(*FOUNDERS[1:], Entry.of(stolen, 100))
    sold = hands_over("alder", "damson", name="damson", entity="Damson Ltd")
    with pytest.raises(DirectoryRefused):
        admitted(*FOUNDERS[1:], Entry.of(sold, 100))
    stranger = hands_over("elder", "damson")
    with pytest.raises(DirectoryRefused):
        admitted(*FOUNDERS, Entry.of(stranger, 100))


def test_a_member_that_becomes_another_business_is_a_new_one() -> None:
    with pytest.raises(DirectoryRefused, match="alder"):
        admitted(entry("alder", entity="Somebody Else Ltd"), *FOUNDERS[1:])


def test_an_endorsement_is_of_one_request() -> None:
    vouched = asks("damson", "alder", "birch")
    other = asks("elder").model_copy(update={"endorsements": vouched.endorsements})
    with pytest.raises(SignatureInvalid):
        other.require_sound()


def test_text_goes_there_and_back_through_a_mail() -> None:
    asked = asks("damson", "alder", "birch", "cedar", "elder")
    text = "Hello!\r\n\r\n" + asked.to_text().replace("\n", "\r\n> ").replace("> -----", "-----") + "\r\nBest"
    assert SignedRequest.from_text(asked.to_text()) == asked
    assert SignedRequest.from_text(text.replace("> ", "")) == asked
    assert max(map(len, asked.to_text().splitlines())) <= 72
    assert len(wire.encode(asked)) < MAX_REQUEST_BYTES


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        "-----BEGIN HANSE REQUEST-----",
        "-----BEGIN HANSE REQUEST-----\n!!!\n-----END HANSE REQUEST-----",
        "-----BEGIN HANSE REQUEST-----\nAAAA\n-----END HANSE REQUEST-----",
        "-----BEGIN HANSE REQUEST-----" + "A" * 100_000 + "-----END HANSE REQUEST-----",
    ],
)
def test_text_that_is_no_request(text: str) -> None:
    with pytest.raises(WireError):
        SignedRequest.from_text(text)


def test_words_are_those_of_bip_39() -> None:
    """Trezor's published vectors for 128 bits."""
    assert words(bytes(16)).split() == ["abandon"] * 11 + ["about"]
    assert (
        words(b"\x7f" * 16) == "legal winner thank year wave sausage worth useful legal winner thank yellow"
    )
    assert words(b"\xff" * 32).split() == ["zoo"] * 11 + ["wrong"]
    assert words(bytes(16), "zh").split() == ["的"] * 11 + ["在"]


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=16, max_size=32), st.integers(0, 127))
def test_one_bit_changes_the_words(digest: bytes, bit: int) -> None:
    other = bytearray(digest)
    other[bit // 8] ^= 1 << bit % 8
    assert words(bytes(other)) != words(digest)
